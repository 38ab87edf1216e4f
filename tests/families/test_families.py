"""Every family from its folder to images in diffusers: the same steps for all, and no name of one in the code that runs them."""

import importlib
import inspect
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from runs import ENGINES, run_distributed, train_all
from tiny_fixtures import randomise_transformer

from data_tools.encode import EncodeConfig, encode
from data_tools.generate import SamplerConfig, generate
from recipes.card import UNNAMED_BASE
from recipes.cli import main
from recipes.tiny import write_digits
from scfm_core import load, with_steps
from scfm_core.data.corpus import Corpus
from scfm_core.data.recipe import DataConfig
from scfm_core.data.schema import collate
from scfm_core.errors import UserError
from scfm_core.models.families import FAMILIES, open_family
from scfm_core.scfm.meter import LossMeter
from scfm_core.train.checkpoint import find_checkpoint
from scfm_core.train.fit import fit
from scfm_core.train.parse import dump_config, parse_config
from scfm_core.train.trainer import Trainer

TEXT_LENGTH = 24
PROMPT = "a handwritten digit three"


@dataclass(frozen=True)
class Case:
    """A tiny pipeline of a family."""

    guidance: float
    variant: str | None = None
    """Argument of the module's `write`."""
    module: str | None = None
    sides: tuple[int, int, int] | None = None
    """See `Tiny`; by default small multiples of what the family needs."""


CASES = {
    "flux": Case(3.5),
    "sd3": Case(4.0),
    "flux2_klein": Case(4.0, "klein", "tiny_flux2"),
    "flux2_dev": Case(4.0, "dev", "tiny_flux2"),
    "qwen_image": Case(4.0, module="tiny_qwen_image"),
    "z_image": Case(5.0, module="tiny_z_image"),
    "krea2": Case(4.5, module="tiny_krea2"),
    # Its pipeline makes only multiples of 32 pixels.
    "sana": Case(4.5, module="tiny_sana", sides=(32, 64, 96)),
    "chroma": Case(3.0, module="tiny_chroma"),
}


@dataclass(frozen=True)
class Tiny:
    """A family's tiny pipeline with its data."""

    name: str
    root: Path
    guidance: float
    sides: tuple[int, int, int]
    """Sides of the images of three sizes, in pixels; the first is the resolution."""

    def tree(self, run_dir: Path, changes: dict[str, Any] | None = None) -> dict[str, Any]:
        """A configuration on the cache as plain values; `changes` as "section.key"."""
        tree: dict[str, Any] = {
            "run": {"dir": str(run_dir), "device": "cpu"},
            "model": {"path": str(self.root / "model"), "text_length": TEXT_LENGTH},
            "data": {"path": str(self.root / "cache"), "resolution": [self.sides[0]] * 2, "num_workers": 0},
            "method": {"self_grids": [8, 4, 2], "guidance": [self.guidance] * 2, "step_gain": {"gamma": 0.5}},
            "lora": {"rank": 2, "alpha": 2.0},
            "train": {
                "steps": 3,
                "global_batch_size": 4,
                "micro_batch_size": 4,
                "lr": 1e-2,
                "compute_dtype": "float32",
            },
            "checkpoint": {"every": 2},
            "sample": {"every": 0, "shift": 3.0, "guidance": self.guidance},
            "evaluate": {"samples": 4, "batch_size": 4, "steps": [2], "teacher_steps": 3, "features": "classifier"},
            "wandb": {"mode": "disabled"},
        }
        for key, value in (changes or {}).items():
            section, _, name = key.partition(".")
            tree[section][name] = value
        return tree


@pytest.fixture(scope="module", params=CASES)
def model(request, tiny, tiny_sd3, tmp_path_factory) -> Tiny:
    """One family: `model`, `digits` (three sizes), `cache` and the classifier."""
    case, root = CASES[request.param], tmp_path_factory.mktemp(request.param)
    if case.module is None:
        (root / "model").symlink_to({"flux": tiny / "flux", "sd3": tiny_sd3 / "sd3"}[request.param])
    else:
        write = importlib.import_module(case.module).write
        write(root / "model", **({} if case.variant is None else {"variant": case.variant}))
        randomise_transformer(root / "model")
    (root / "classifier").symlink_to(tiny / "classifier")
    multiple = open_family(str(root / "model")).pixel_multiple
    sides = case.sides or (4 * multiple, 3 * multiple, 2 * multiple)
    write_digits(root / "digits", count=12, size=sides[0])
    for number, size in enumerate([(sides[0], sides[1])] * 4 + [(sides[2], sides[0])] * 4):  # width, height
        path = root / "digits" / f"{number:04d}.png"
        Image.open(path).resize(size).save(path)
    encode(
        Corpus(DataConfig(path=str(root / "digits"), format="folder", resolution=(sides[0], sides[0]))),
        root / "cache",
        open_family(str(root / "model")),
        EncodeConfig(text_length=TEXT_LENGTH, dtype=torch.float32),
    )
    return Tiny(request.param, root, case.guidance, sides)


def trained(tree: dict[str, Any], *, resume: bool = False) -> Trainer:
    config = parse_config(tree, "test")
    trainer = Trainer(config, find_checkpoint(Path(config.run.dir)) if resume else None)
    fit(trainer)
    (trainer.run_dir / "config.yaml").write_text(dump_config(config))
    return trainer


def test_a_family_is_one_file_of_at_most_150_lines():
    long = {
        family.__module__: lines
        for family in FAMILIES
        if (lines := Path(inspect.getfile(family)).read_text().count("\n")) > 150
    }
    assert long == {}


def test_every_family_is_here():
    assert {type(open_family(path, offline=True)) for family in FAMILIES for path in family.known} == set(FAMILIES)
    modules = {family.__module__.rpartition(".")[2] for family in FAMILIES}
    assert modules == {re.sub("_(klein|dev)$", "", name) for name in CASES}


def test_distilled_resumed_sampled_evaluated_exported(model, tmp_path, monkeypatch):
    """The code on the card of the adapter makes in diffusers the image that `scfm sample` makes."""
    whole = trained(model.tree(tmp_path / "whole"))
    tree = model.tree(tmp_path / "cut")
    first = Trainer(parse_config(tree, "test"))
    next(first.train_steps())
    first.state.save()
    first.state.wait()
    again = trained(tree, resume=True)
    expected = whole.model.parameters("student")
    for name, parameter in again.model.parameters("student").items():
        assert torch.equal(parameter, expected[name]), name
    if again.family.passes == 1:
        assert all(bool(p.ne(0).any()) for name, p in expected.items() if ".lora_B." in name), "a linear is not trained"

    run_dir, images = again.run_dir, tmp_path / "images"
    words = ["--prompt", PROMPT, "--seed", "0", "--steps", "3", "--output", str(images)]
    assert main(["sample", str(run_dir), *words]) == 0
    [path] = images.glob("*.png")
    ours = np.asarray(Image.open(path), dtype=int)
    assert main(["export", str(run_dir)]) == 0
    code = re.search(r"```python\n(.*?)```", (run_dir / "adapter" / "README.md").read_text(), re.S)
    assert code is not None
    monkeypatch.chdir(run_dir)
    found: dict[str, Any] = {}
    exec(code[1].replace("your prompt", PROMPT).replace(UNNAMED_BASE, str(model.root / "model")), found)
    assert np.abs(ours - np.asarray(found["image"], dtype=int)).max() <= 2
    assert ours.std() > 3, "the images are flat"
    from_python(run_dir, found["pipe"], ours)

    evaluate = ["evaluate", str(run_dir), f"evaluate.features_path={model.root / 'classifier'}"]
    assert main(evaluate) == 0


def test_the_noise_has_the_dtype_of_the_pipelines(model, monkeypatch):
    """A seed gives other noise in another dtype, which networks in fp32 cannot show."""
    pipe = DiffusionPipeline.from_pretrained(model.root / "model", torch_dtype=torch.bfloat16)
    family, side = open_family(str(model.root / "model")), model.sides[0]

    class Drawn(Exception): ...

    def draw(*_: Any, dtype: torch.dtype, **__: Any) -> None:
        raise Drawn(dtype)

    monkeypatch.setattr(sys.modules[type(pipe).__module__], "randn_tensor", draw)
    with pytest.raises(Drawn) as drawn:
        pipe(
            prompt=PROMPT,
            height=side,
            width=side,
            num_inference_steps=1,
            **family.call_arguments(model.guidance, TEXT_LENGTH),
        )
    assert drawn.value.args == (family.noise_dtype or torch.bfloat16,)


def from_python(run_dir: Path, pipe: Any, ours: np.ndarray) -> None:
    """The API makes the image of `scfm sample`, from the run and with the pipeline of diffusers; also without the adapter."""
    student = load(run_dir)
    [image] = student.sample(PROMPT, steps=3)
    assert np.abs(ours - np.asarray(image, dtype=int)).max() == 0
    pipe = with_steps(pipe, run_dir / "adapter")

    def make(steps: int, **arguments: Any) -> np.ndarray:
        generator = torch.Generator().manual_seed(0)
        result = pipe(prompt=PROMPT, num_inference_steps=steps, generator=generator, **arguments)
        return np.asarray(result.images[0], dtype=int)

    assert np.abs(make(3) - ours).max() <= 2
    [expected] = student.sample(PROMPT, steps=2, undistilled=True)
    guidance = pipe_guidance(student)
    assert np.abs(make(2, adapter_weight=0.0, **guidance) - np.asarray(expected, dtype=int)).max() <= 2
    assert np.abs(make(2) - np.asarray(student.sample(PROMPT, steps=2)[0], dtype=int)).max() <= 2


def pipe_guidance(student: Any) -> dict[str, Any]:
    """The teacher's guidance, in the words of its pipeline."""
    return {
        name: value
        for name, value in student.family.call_arguments(student.settings()["guidance"], TEXT_LENGTH).items()
        if name != "max_sequence_length"
    }


def test_pretrained_on_images_of_three_sizes(model, tmp_path):
    """From random weights, captions encoded on the fly, some dropped; the exported pipeline is a model that can be distilled."""
    first, second, third = model.sides
    sizes = [[first, first], [second, first], [first, third]]
    images = {"data.path": str(model.root / "digits"), "data.format": "folder", "data.buckets": sizes}
    method = {
        "method.flow_fraction": 0.75,
        "method.teacher_fraction": 0.0,
        "method.step_gain": None,
        "method.caption_dropout": 0.5,
    }
    full = {"model.init": "random", "train.weights": "full", "train.micro_batch_size": 2}
    trainer = trained(model.tree(tmp_path / "run", {**images, **method, **full}))
    assert len(trainer.corpus.sizes) == 3
    assert main(["export", str(trainer.run_dir), "--merged", str(tmp_path / "merged")]) == 0
    again = trained(model.tree(tmp_path / "next", {"model.path": str(tmp_path / "merged"), "train.steps": 1}))
    student = trainer.model.parameters("student")
    name, weight = next((name, weight) for name, weight in student.items() if weight.ndim == 2)
    base = again.model.bank.network.state_dict()
    assert torch.equal(base[name if name in base else name.replace(".weight", ".base_layer.weight")], weight)


def test_cached_text_gives_the_loss_of_text_encoded_on_the_fly(model, tmp_path):
    losses = []
    for number, (path, form) in enumerate((("cache", "auto"), ("digits", "folder"))):
        data = {"data.path": str(model.root / path), "data.format": form}
        trainer = Trainer(parse_config(model.tree(tmp_path / str(number), data), "test"))
        items = [3, 4, 5]
        batch = collate(items, [trainer.corpus.record(item, item) for item in items])
        losses.append(float(trainer.objective.micro_step(batch, LossMeter(torch.device("cpu")))))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_an_untouched_student_has_no_loss_on_stored_paths(model, tmp_path):
    """The teacher was sampled with the text and the guidance that the student gets. Captions of several lengths."""
    generate(
        [PROMPT, "digit", "", "a handwritten digit"],
        tmp_path / "paths",
        open_family(str(model.root / "model")),
        EncodeConfig(text_length=TEXT_LENGTH, dtype=torch.float32),
        SamplerConfig(
            sizes=((model.sides[0], model.sides[0]),),
            per_prompt=1,
            num_steps=2,
            shift=3.0,
            guidance=model.guidance,
            seed=5,
            intervals=2,
        ),
    )
    changes = {
        "data.path": str(tmp_path / "paths"),
        "method.trajectory_fraction": 1.0,
        "method.teacher_fraction": 0.0,
        "method.trajectory_grids": [2],
        "train.steps": 1,
    }
    [row] = Trainer(parse_config(model.tree(tmp_path / "run", changes), "test")).train_steps()
    assert row["loss"] < 1e-10


@pytest.mark.processes
@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_two_processes_train_as_one(model, tmp_path, engine):
    one = [row["loss"] for row in Trainer(parse_config(model.tree(tmp_path / "one"), "test")).train_steps()]
    changes = {"train.micro_batch_size": 2}
    tree = model.tree(tmp_path / "two", changes) | {"engine": {"timeout": 60.0, **ENGINES[engine]}}
    both = run_distributed(train_all, 2, tree)
    assert [[row["loss"] for row in rows] for rows in both] == [pytest.approx(one, rel=1e-4)] * 2


EXPLAINED = {
    "scfm_core/scfm/method.py": 3,  # the paper's guidance and the release's share of dynamic shifts, by model
    "scfm_core/train/config.py": 1,  # the paper's clip norms, by model
}
"""Lines of documentation that name a family."""


@pytest.mark.parametrize("family", FAMILIES)
def test_a_network_without_blocks_is_an_error(family, monkeypatch):
    """Checkpointing and compilation would otherwise do nothing."""
    path = next(iter(family.known))
    opened = open_family(path, offline=True)
    network = opened.meta_network()
    assert len(opened.blocks(network)) > 10
    monkeypatch.setattr(family, "block_lists", ("renamed_blocks",))
    with pytest.raises(UserError, match=f"the {type(network).__name__} of {path} has no blocks in renamed_blocks"):
        opened.blocks(network)


def test_only_models_and_kernels_name_families():
    modules = {re.sub(r"(?<=\w{3})\d+$", "", family.__module__.rpartition(".")[2]) for family in FAMILIES}
    words = rf"(?<![a-z])({'|'.join(modules).replace('_', '.?')}|stable.diffusion)"
    root = Path(__file__).parents[2]
    files = [path for package in ("scfm_core", "data_tools") for path in (root / package).rglob("*.py")]
    models = (root / "scfm_core/models", root / "scfm_core/kernels")
    found = Counter(
        str(path.relative_to(root))
        for path in files
        if not any(path.is_relative_to(folder) for folder in models)
        for line in path.read_text().splitlines()
        if re.search(words, line, re.IGNORECASE)
    )
    assert found == EXPLAINED
