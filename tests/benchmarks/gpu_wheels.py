"""Collect the wheels that a machine with a GPU and without network lacks for `make gpu`. `make gpu-wheels` runs it here, with network.

    python tests/benchmarks/gpu_wheels.py [--have FILE] [--python 3.12] [--to FOLDER] [--most MIB] [PACKAGE ...]

That machine has torch with CUDA, Triton and pytest. The wheels have the versions of requirements.lock, so that they work together;
`--have` names the output of `pip list --format=freeze` there, and what it has in the same version is left out. `PACKAGE` adds others of
the lock (xformers, torchao, ...). Copy the folder beside the repository there, and start `gpu_day.py --wheels FOLDER`.
"""

import argparse
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = (
    "diffusers", "importlib_metadata", "zipp", "transformers", "tokenizers", "huggingface_hub", "peft", "accelerate", "safetensors",
    "webdataset", "braceexpand", "pytest-timeout", "pytest-xdist", "execnet",
)  # fmt: skip
"""What scfm and its tests import there, beside torch, numpy, Pillow, PyYAML and scikit-learn."""
GLIBC = range(39, 16, -1)
"""Minor versions of glibc whose wheels run there: pip matches each exactly."""


def versions(text: str) -> dict[str, str]:
    """`name==version` lines by name, as pip compares names."""
    found = re.findall(r"(?m)^([\w.-]+)==([^\s;]+)", text)
    return {normalised(name): version for name, version in found}


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", nargs="*", metavar="PACKAGE")
    parser.add_argument("--have", type=Path)
    parser.add_argument("--python", default="3.12", help="version of Python there")
    parser.add_argument("--to", type=Path, default=ROOT / "runs" / "gpu_wheels")
    parser.add_argument("--most", type=float, default=64, help="MiB that can be carried")
    options = parser.parse_args(argv)
    locked = versions((ROOT / "requirements.lock").read_text(encoding="utf-8"))
    there = versions(options.have.read_text(encoding="utf-8")) if options.have else {}
    wanted = [normalised(name) for name in (*PACKAGES, *options.packages)]
    if unknown := [name for name in wanted if name not in locked]:
        parser.error(f"not in requirements.lock: {', '.join(unknown)}")
    missing = [f"{name}=={locked[name]}" for name in wanted if there.get(name) != locked[name]]
    options.to.mkdir(parents=True, exist_ok=True)
    for wheel in options.to.glob("*.whl"):  # two versions of a package would stop the installation
        wheel.unlink()
    platforms = [f"--platform=manylinux_2_{minor}_x86_64" for minor in GLIBC] + ["--platform=manylinux2014_x86_64"]
    pip = (
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
        "--implementation=cp",
    )
    subprocess.run([*pip, f"--python-version={options.python}", *platforms, "-d", options.to, *missing], check=True)
    sizes = {wheel.name: wheel.stat().st_size / 2**20 for wheel in sorted(options.to.glob("*.whl"))}
    for name, size in sizes.items():
        print(f"{size:6.1f} MiB  {name}")
    print(f"{sum(sizes.values()):6.1f} MiB in {options.to}")
    if sum(sizes.values()) > options.most:
        sys.exit(f"more than {options.most:.0f} MiB: name what that machine has with --have, or fewer packages")


if __name__ == "__main__":
    main()
