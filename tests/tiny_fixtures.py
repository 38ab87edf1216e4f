"""One tiny pipeline for the whole session, and the smallest complete run on it."""

import fcntl
import json
import os
import shutil
import subprocess

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors: threads cost more than they bring
os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported: no test needs the network

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is imported

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import garbage
import pytest
from runs import FEW_TARGETS

from data_tools.encode import EncodeConfig, encode
from recipes.tiny import write_classifier, write_digits, write_pipeline
from scfm_core.data.corpus import Corpus
from scfm_core.data.recipe import DataConfig
from scfm_core.models.families import open_family
from scfm_core.models.weights import adapter_files
from scfm_core.train.config import RunConfig
from scfm_core.train.parse import parse_config

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `flux` (a pipeline whose transformer is random but not zero), `digits`, `cache`, `classifier`."""
    with garbage.left_alone():  # diffusers, transformers and scikit-learn
        return write_tiny(tmp_path_factory.mktemp("tiny"))


def write_tiny(root: Path) -> Path:
    """What `tiny` holds, in `root`."""
    write_pipeline(root / "flux", vae_steps=30)
    randomise_transformer(root / "flux")
    write_digits(root / "digits", count=48)
    write_classifier(root / "classifier", steps=50)
    encode(
        Corpus(DataConfig(path=str(root / "digits"), format="folder", resolution=(16, 16))),
        root / "cache",
        open_family(str(root / "flux")),
        EncodeConfig(text_length=8, dtype=torch.float32, samples_per_shard=20),
    )
    return root


@pytest.fixture(scope="session")
def tiny_short(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny`'s flux with one block of each kind, not 1 and 3: Triton's interpreter takes a second for a block's pass."""
    folder = tmp_path_factory.mktemp("tiny_short")
    for part in (tiny / "flux").iterdir():
        if part.name != "transformer":
            (folder / part.name).symlink_to(part)
    network: Any = open_family(str(tiny / "flux")).load_network(torch.float32, "cpu")
    network.single_transformer_blocks = network.single_transformer_blocks[:1]
    network.register_to_config(num_single_layers=1)
    network.save_pretrained(folder / "transformer")
    return folder


@pytest.fixture(scope="session")
def tiny_sd3(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `sd3`, as `tiny`'s flux with the same VAE, and `cache`."""
    from tiny_sd3 import write

    root = tmp_path_factory.mktemp("tiny_sd3")
    write(root / "sd3", vae=tiny / "flux" / "vae")
    randomise_transformer(root / "sd3")
    images = Corpus(DataConfig(path=str(tiny / "digits"), format="folder", resolution=(16, 16)))
    encode(images, root / "cache", open_family(str(root / "sd3")), EncodeConfig(text_length=8, dtype=torch.float32))
    return root


def randomise_transformer(folder: Path) -> None:
    """adaLN-zero starts the network at zero output: no signal for a test."""
    network: Any = open_family(str(folder)).load_network(torch.float32, "cpu")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.6 / parameter.shape[1] ** 0.5, generator=generator)
    network.save_pretrained(folder / "transformer")


def write_clip(folder: Path, tokenizer: Path) -> Path:
    """A CLIPModel of the real class with few and random weights, and its processor; images of 32 pixels."""
    from transformers import (
        CLIPConfig,
        CLIPImageProcessor,
        CLIPModel,
        CLIPProcessor,
        CLIPTextConfig,
        CLIPTokenizer,
        CLIPVisionConfig,
    )

    torch.manual_seed(0)
    words = CLIPTokenizer.from_pretrained(tokenizer)
    few = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = CLIPTextConfig(
        vocab_size=len(words),
        eos_token_id=words.eos_token_id,
        bos_token_id=words.bos_token_id,
        max_position_embeddings=16,
        **few,
    )
    vision = CLIPVisionConfig(image_size=32, patch_size=8, **few)
    CLIPModel(CLIPConfig(text.to_dict(), vision.to_dict(), projection_dim=8)).save_pretrained(folder)
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(processor, words).save_pretrained(folder)
    return folder


ConfigMaker = Callable[..., RunConfig]


@pytest.fixture
def tree(tiny: Path, tmp_path: Path) -> dict[str, Any]:
    """The smallest complete configuration, as plain values."""
    return smallest_tree(tiny, tmp_path / "run")


def smallest_tree(tiny: Path, run_dir: Path, targets: str = FEW_TARGETS) -> dict[str, Any]:
    """What `tree` is, for a run in another folder, with adapters of these linears: `ALL_TARGETS` where each of them matters."""
    return {
        "run": {"dir": str(run_dir), "device": "cpu"},
        "model": {"path": str(tiny / "flux"), "text_length": 8},
        "data": {"path": str(tiny / "cache"), "resolution": [16, 16], "num_workers": 0},
        "method": {"self_grids": [16, 8, 4, 2]},
        "lora": {"rank": 4, "alpha": 4.0, "targets": targets},
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


def adapter_file(folder: Path) -> Path:
    """The only adapter in a folder."""
    [path] = adapter_files(folder)
    return path


def load_adapter(pipe: Any, folder: Path) -> None:
    """Load the only adapter in a folder into a pipeline of diffusers, as `scfm`; offline it needs the file's name."""
    pipe.load_lora_weights(folder, weight_name=adapter_file(folder).name, adapter_name="scfm")


def adapter_metadata(path: Path) -> dict[str, Any]:
    """What an exported adapter says of itself, read from the safetensors header: 8 bytes of length, then JSON."""
    raw = path.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    metadata: dict[str, Any] = json.loads(header["__metadata__"]["scfm"])
    return metadata


@contextmanager
def streaming_alone() -> Iterator[None]:
    """Keep other tests of this machine from mosaicml-streaming's datasets.

    A dataset takes the first number that no shared memory has: two that look at the same time take the same one and fail.
    """
    with (Path(tempfile.gettempdir()) / "scfm_tests_streaming.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def mounted(disk: Path, options: str) -> Iterator[Path]:
    """A file system in memory."""
    disk.mkdir()
    result = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)], capture_output=True, check=False
    )
    if not result or result.returncode:
        pytest.skip("a file system can only be mounted by root, on Linux")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    yield from mounted(tmp_path / "disk", "size=1m")
