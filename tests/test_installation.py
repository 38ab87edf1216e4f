"""pyproject.toml, requirements.lock, the sdist and its wheel: what an installation contains, and that the slim one works."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from tiny_fixtures import adapter_file

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCK = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "requirements.lock").read_text(), re.MULTILINE))
UNTRIED = {"azure", "gcs"}  # not in the lock
EXTRAS = {name: [Requirement(text) for text in texts] for name, texts in PROJECT["optional-dependencies"].items()}


def test_the_lock_has_a_version_of_every_range():
    locked = {canonicalize_name(name): version for name, version in LOCK.items()}
    groups = {"": [Requirement(text) for text in PROJECT["dependencies"]], **EXTRAS}
    ranges = [each for name, group in groups.items() if name not in UNTRIED for each in group if each.name != "scfm"]
    assert len(ranges) > 30
    assert [
        str(each) for each in ranges if locked.get(canonicalize_name(each.name), "none") not in each.specifier
    ] == []


def test_the_extra_all_has_all_that_were_tried():
    [everything] = EXTRAS["all"]
    assert everything.extras == set(EXTRAS) - UNTRIED - {"all", "dev"}


def test_messages_name_extras_that_exist():
    sources = [
        path.read_text() for folder in ("scfm_core", "recipes", "data_tools") for path in (ROOT / folder).rglob("*.py")
    ]
    named = {name for text in sources for name in re.findall(r"scfm\[(\w+)\]", text)}
    named |= {name for text in sources for name in re.findall(r'missing_extra\([^,]+, "(\w+)"', text)}
    assert {"deepspeed", "mds", "wandb", "xformers", "demo", "evaluate"} <= named <= set(EXTRAS)


def requirements_of(name: str, extras: set[str], seen: set[str]) -> Iterator[importlib.metadata.Distribution]:
    """The distributions that pip would install for a requirement, from those that are installed here."""
    if (key := canonicalize_name(name)) in seen:
        return
    seen.add(key)
    found = importlib.metadata.distribution(name)
    yield found
    for text in found.requires or ():
        requirement = Requirement(text)
        if any(not requirement.marker or requirement.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            yield from requirements_of(requirement.name, requirement.extras, seen)


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """The unpacked sdist of a copy, since setuptools writes into the sources."""
    folder = tmp_path_factory.mktemp("sdist")
    not_sources = shutil.ignore_patterns(
        ".git", ".venv", ".*_cache", "__pycache__", "*.egg-info", "runs", "build", "dist"
    )
    shutil.copytree(ROOT, folder / "copy", symlinks=True, ignore=not_sources)
    code = "from setuptools.build_meta import build_sdist; build_sdist('..')"
    subprocess.run([sys.executable, "-c", code], cwd=folder / "copy", check=True, capture_output=True)
    [packed] = folder.glob("*.tar.gz")
    shutil.unpack_archive(packed, folder)
    return folder / packed.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def wheel(sdist) -> Path:
    words = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--quiet", "."]
    subprocess.run(words, cwd=sdist, check=True)
    [built] = sdist.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def slim(wheel, tmp_path_factory) -> Path:
    """An environment with the wheel and what it requires without extras, linked from the environment of the tests."""
    folder = tmp_path_factory.mktemp("slim")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    [site] = folder.glob("lib/python*/site-packages")
    words = [
        "--python",
        folder / "bin" / "python",
        "install",
        "--no-deps",
        "--no-index",
        "--no-compile",
        "--quiet",
        wheel,
    ]
    subprocess.run([sys.executable, "-m", "pip", *words], check=True)
    seen = {"scfm"}
    for text in PROJECT["dependencies"]:
        requirement = Requirement(text)
        for distribution in requirements_of(requirement.name, requirement.extras, seen):
            for top in {
                line.partition(",")[0].partition("/")[0]
                for line in (distribution.read_text("RECORD") or "").split("\n")
            }:
                source = Path(str(distribution.locate_file(top)))
                if top not in ("", "..", "__pycache__") and not (site / top).exists():
                    (site / top).symlink_to(source.resolve())
    return folder


def alone() -> dict[str, str]:
    """The environment without PYTHONPATH, by which the sources would be imported in place of the wheel."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


@pytest.mark.processes
class TestWheel:
    def test_the_sdist_has_the_repository(self, sdist):
        kept = {
            name: sdist / name for name in ("Makefile", "requirements.lock", "CITATION.cff", ".ci/run", "docs/demo.png")
        }
        kept |= {
            path.relative_to(ROOT).as_posix(): sdist / path.relative_to(ROOT) for path in ROOT.glob("tests/**/*.py")
        }
        assert len(kept) > 150
        assert [name for name, path in kept.items() if path.read_bytes() != (ROOT / name).read_bytes()] == []

    def test_it_has_the_packages_byte_for_byte(self, wheel):
        """Built from the sdist: code, recipes, and the job scripts, which lie in slurm/."""
        sources = {
            name: path
            for package in ("scfm_core", "recipes", "data_tools")
            for path in (ROOT / package).rglob("*")
            if path.is_file() and "__pycache__" not in (name := path.relative_to(ROOT).as_posix())
        }
        sources |= {f"recipes/slurm/{path.name}": path for path in (ROOT / "slurm").glob("*.sh")}
        sources |= {f"recipes/slurm/clusters/{path.name}": path for path in (ROOT / "slurm" / "clusters").glob("*.env")}
        assert sum(name.endswith(".yaml") for name in sources) >= 40 and "recipes/slurm/lib.sh" in sources
        with zipfile.ZipFile(wheel) as archive:
            installed = {name: archive.read(name) for name in archive.namelist() if ".dist-info/" not in name}
        assert set(installed) == set(sources)
        assert [name for name, path in sources.items() if path.read_bytes() != installed[name]] == []

    def test_it_has_no_extra(self, slim):
        optional = (
            "deepspeed",
            "streaming",
            "sklearn",
            "wandb",
            "xformers",
            "s3fs",
            "torchmetrics",
            "torchvision",
            "gradio",
            "pytest",
        )
        [site] = slim.glob("lib/python*/site-packages")
        assert [name for name in optional if (site / name).exists()] == []
        assert (site / "torch").exists() and (site / "peft").exists()

    def test_the_command(self, slim, tmp_path):
        done = subprocess.run(
            [slim / "bin" / "scfm", "--help"], cwd=tmp_path, env=alone(), capture_output=True, text=True, check=True
        )
        assert done.stdout.startswith("usage: scfm ")

    def test_dry_run_train_and_sample_without_extras(self, slim, tiny, tree, tmp_path):
        """In one process, since importing torch takes longer than all of it."""
        tree["wandb"] = {"mode": "auto"}
        tree["train"]["steps"] = 1
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
        code = (
            "from recipes.cli import main\n"
            "import recipes\n"
            "assert main(['recipes', '--copy', 'mine']) == 0\n"
            "assert main(['train', 'flux_dev_lora', '--dry-run']) == 0\n"
            "assert main(['train', 'recipe.yaml']) == 0\n"
            "assert main(['sample', 'run', '--steps', '1', '--prompt', 'a cat']) == 0\n"
            "assert main(['train', 'recipe.yaml', 'run.dir=other', 'engine.name=deepspeed']) == 2\n"
            "print(recipes.__file__)\n"
        )
        words = [slim / "bin" / "python", "-c", code]
        done = subprocess.run(words, cwd=tmp_path, env=alone(), capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.splitlines()[-1].startswith(str(slim))
        assert "nothing is logged to W&B: wandb.mode=auto needs a package that cannot be imported" in done.stdout
        assert adapter_file(tmp_path / "run" / "adapter").is_file()
        assert (tmp_path / "mine" / "slurm" / "lib.sh").is_file()
        assert (tmp_path / "mine" / "recipes" / "configs" / "flux_dev_lora.yaml").is_file()
        assert (
            "engine.name=deepspeed needs a package that cannot be imported (No module named 'deepspeed'): "
            in done.stderr
        )
        assert done.stderr.splitlines()[-1].endswith("pip install 'scfm[deepspeed]', or set engine.name=fsdp2")
