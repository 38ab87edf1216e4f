"""One tiny pipeline for the whole session, and the smallest complete run on it."""

import json
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors: threads cost more than they bring

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is imported

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_tools.encode import EncodeConfig, encode
from recipes.tiny import write_classifier, write_digits, write_pipeline, write_sd3_pipeline
from scfm_core.data.corpus import Corpus
from scfm_core.data.recipe import DataConfig
from scfm_core.models.families import open_family
from scfm_core.train.config import RunConfig
from scfm_core.train.parse import parse_config

torch.set_num_threads(1)


# Of these, each on its own takes two cores, and waits for what must happen within a time: never two of them at once.
TIMED = tuple(
    f"tests/{name}"
    for name in ("slurm/", "distributed/test_faults", "distributed/test_processes", "distributed/test_streaming")
)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """For `pytest -n 2`: one worker begins with all tests of `TIMED`, the other with the rest, which both then share."""
    from xdist.scheduler import LoadScopeScheduling

    class OneLaneForTimed(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "timed" if nodeid.startswith(TIMED) else nodeid

    return OneLaneForTimed(config, log)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `flux` (a pipeline whose transformer is random but not zero), `digits`, `cache`, `classifier`."""
    return write_tiny(tmp_path_factory.mktemp("tiny"))


def write_tiny(root: Path) -> Path:
    """What `tiny` holds, in `root`."""
    write_pipeline(root / "flux", vae_steps=30)
    _randomise_transformer(root / "flux")
    write_digits(root / "digits", count=48)
    write_classifier(root / "classifier", steps=50)
    encode(
        Corpus(DataConfig(path=str(root / "digits"), format="folder", resolution=(16, 16))),
        root / "cache",
        open_family(str(root / "flux")),
        EncodeConfig(text_length=8, keep_padding=True, dtype=torch.float32, samples_per_shard=20),
    )
    return root


@pytest.fixture(scope="session")
def tiny_sd3(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `sd3`, as `tiny`'s flux with the same VAE, and `cache`."""
    root = tmp_path_factory.mktemp("tiny_sd3")
    write_sd3_pipeline(root / "sd3", vae=tiny / "flux" / "vae")
    _randomise_transformer(root / "sd3")
    images = Corpus(DataConfig(path=str(tiny / "digits"), format="folder", resolution=(16, 16)))
    encode(images, root / "cache", open_family(str(root / "sd3")), EncodeConfig(text_length=8, dtype=torch.float32))
    return root


def _randomise_transformer(folder: Path) -> None:
    """adaLN-zero starts the network at zero output: no signal for a test."""
    network: Any = open_family(str(folder)).load_network(torch.float32, "cpu")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.6 / parameter.shape[1] ** 0.5, generator=generator)
    network.save_pretrained(folder / "transformer")


ConfigMaker = Callable[..., RunConfig]


@pytest.fixture
def tree(tiny: Path, tmp_path: Path) -> dict[str, Any]:
    """The smallest complete configuration, as plain values."""
    return {
        "run": {"dir": str(tmp_path / "run"), "device": "cpu"},
        "model": {"path": str(tiny / "flux"), "text_length": 8},
        "data": {"path": str(tiny / "cache"), "resolution": [16, 16], "num_workers": 0},
        "method": {"self_grids": [16, 8, 4, 2]},
        "lora": {"rank": 4, "alpha": 4.0},
        "train": {
            "steps": 4,
            "global_batch_size": 8,
            "micro_batch_size": 8,
            "lr": 1e-3,
            "compute_dtype": "float32",
        },
        "checkpoint": {"every": 2},
        "sample": {"every": 0, "shift": 3.0},
        "evaluate": {
            "samples": 16,
            "batch_size": 16,
            "steps": [1, 3],
            "teacher_steps": 4,
            "features": "classifier",
            "features_path": str(tiny / "classifier"),
        },
        "wandb": {"mode": "disabled"},
    }


@pytest.fixture
def make_config(tree: dict[str, Any]) -> ConfigMaker:
    """`make_config({"train.steps": 3})`: the smallest configuration with changes."""

    def make(changes: dict[str, Any] | None = None) -> RunConfig:
        for key, value in (changes or {}).items():
            section, _, name = key.partition(".")
            if name:
                tree.setdefault(section, {})[name] = value
            else:
                tree[section] = value
        return parse_config(tree, source="test")

    return make


def adapter_metadata(path: Path) -> dict[str, Any]:
    """What an exported adapter says of itself, read from the safetensors header: 8 bytes of length, then JSON."""
    raw = path.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    metadata: dict[str, Any] = json.loads(header["__metadata__"]["scfm"])
    return metadata
