"""When two folders hold the same model: what libraries, people and downloads change beside the weights does not count."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from recipes.tiny import write_pipeline
from scfm_core.models.fingerprint import (
    different_encoders,
    different_network,
    encoder_fingerprint,
    network_fingerprint,
)

Change = Callable[[Path], object]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tests must not change it."""
    folder = tmp_path_factory.mktemp("pipeline")
    write_pipeline(folder, vae_steps=0)
    return folder


@pytest.fixture
def model(original: Path, tmp_path: Path) -> Path:
    shutil.copytree(original, tmp_path / "model", copy_function=shutil.copyfile)  # with other times
    return tmp_path / "model"


def in_json(file: str, **values: Any) -> Change:
    def change(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(content | values))

    return change


def without(file: str, key: str) -> Change:
    def change(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        del content[key]
        (folder / file).write_text(json.dumps(content, indent=8))

    return change


def saved_again(file: str, **metadata: str) -> Change:
    return lambda folder: save_file(load_file(folder / file), folder / file, metadata or None)


def nudged(file: str) -> Change:
    """One tensor in the middle of the file changes, as when a LoRA is merged."""

    def change(folder: Path) -> None:
        tensors = load_file(folder / file)
        name = sorted(tensors)[len(tensors) // 2]
        tensors[name] = tensors[name] + 1
        save_file(tensors, folder / file, {"format": "pt"})

    return change


def linked(folder: Path) -> None:
    """As the hub's cache: each file is a link to a blob."""
    shutil.move(folder, folder.with_name("blobs"))
    for path in folder.with_name("blobs").rglob("*.*"):
        target = folder / path.relative_to(folder.with_name("blobs"))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(path)


VAE = "vae/diffusion_pytorch_model.safetensors"
TEMPLATE = "{{ messages[0].content }}"


def moved_template(folder: Path) -> None:
    """A newer library writes the template of tokenizer_config.json into a file of its own."""
    without("tokenizer_3/tokenizer_config.json", "chat_template")(folder)
    (folder / "tokenizer_3" / "chat_template.jinja").write_text(TEMPLATE)


def with_chat(folder: Path) -> None:
    """A third text encoder, which takes its captions by a chat template."""
    shutil.copytree(folder / "tokenizer_2", folder / "tokenizer_3")
    in_json("tokenizer_3/tokenizer_config.json", chat_template=TEMPLATE)(folder)
    (folder / "processor").mkdir()
    (folder / "processor" / "preprocessor_config.json").write_text('{"size": 2}')


SAME: dict[str, Change] = {
    "diffusers' version": in_json("vae/config.json", _diffusers_version="0.99.0", _name_or_path="elsewhere"),
    "transformers' version": in_json("text_encoder/config.json", transformers_version="9.9", dtype="float16"),
    "network's version": in_json("transformer/config.json", _diffusers_version="0.99.0"),
    "a note": lambda folder: (folder / "transformer" / "notes.txt").write_text("from the hub"),
    "a card": lambda folder: (folder / "text_encoder" / "README.json").write_text("{}"),
    "fp16 beside": lambda folder: shutil.copy(
        folder / VAE, folder / "vae" / "diffusion_pytorch_model.fp16.safetensors"
    ),
    "metadata of weights": saved_again(VAE, format="pt", made="by another version"),
    "tokenizer's last call": in_json("tokenizer_2/tokenizer.json", truncation={"max_length": 9}, padding=None),
    "tokenizer's class": in_json("tokenizer/tokenizer_config.json", tokenizer_class="CLIPTokenizerFast", extra=1),
    "tokenizer.json beside a vocabulary": lambda folder: (folder / "tokenizer" / "tokenizer.json").write_text("{}"),
    "special tokens": lambda folder: (folder / "tokenizer" / "special_tokens_map.json").unlink(),
    "links": linked,
    "nothing": lambda folder: None,
}
OTHER: dict[str, tuple[Change, str]] = {
    "VAE": (nudged(VAE), f"{VAE} (other content)"),
    "CLIP": (nudged("text_encoder/model.safetensors"), "text_encoder/model.safetensors (other content)"),
    "scale": (in_json("vae/config.json", scaling_factor=0.9), "vae/config.json (other content)"),
    "no shift": (without("vae/config.json", "shift_factor"), "vae/config.json (other content)"),
    "words": (in_json("tokenizer/vocab.json", new=999), "tokenizer/vocab.json (other content)"),
    "T5's words": (in_json("tokenizer_2/tokenizer.json", model={}), "tokenizer_2/tokenizer.json (other content)"),
    "damaged": (lambda folder: (folder / VAE).write_bytes(bytes(99)), f"{VAE} (other content)"),
    "missing": (lambda folder: (folder / VAE).unlink(), f"{VAE} (missing now)"),
    "third encoder": (
        lambda folder: shutil.copytree(folder / "vae", folder / "text_encoder_3"),
        "text_encoder_3/config.json (new)",
    ),
}


@pytest.mark.parametrize("name", SAME)
def test_the_same_model(original, model, name):
    SAME[name](model)
    assert encoder_fingerprint(model) == encoder_fingerprint(original)
    assert network_fingerprint(model) == network_fingerprint(original)
    assert different_encoders(encoder_fingerprint(original), model) is None


@pytest.mark.parametrize("name", OTHER)
def test_another_model_and_the_file_that_differs(original, model, name):
    change, said = OTHER[name]
    change(model)
    assert said in str(different_encoders(encoder_fingerprint(original), model))
    assert different_network(network_fingerprint(original), model) is None


def test_another_network(original, model):
    file = "transformer/diffusion_pytorch_model.safetensors"
    nudged(file)(model)
    assert different_network(network_fingerprint(original), model) == f"{file} (other content)"
    assert different_encoders(encoder_fingerprint(original), model) is None


def of_0_1(folder: Path) -> str:
    """The rule of version 0.1, written down once more: every file of the network, in full up to 1 MiB at each end."""
    digest = hashlib.sha256()
    for path in sorted((folder / "transformer").glob("*")):
        content = path.read_bytes()
        digest.update(f"transformer/{path.name}:{len(content)}:".encode() + content[: 1 << 20] + content[-(1 << 20) :])
    return digest.hexdigest()


def test_what_version_0_1_recorded_is_accepted(original, model):
    assert different_network(of_0_1(original), model) is None
    nudged("transformer/diffusion_pytorch_model.safetensors")(model)
    old = "the record is of version 0.1, which counted every file of the folder and did not name them"
    assert different_network(of_0_1(original), model) == old
    assert different_network(None, model) == old


def test_a_tensor_smaller_and_larger_than_a_block(tmp_path):
    """A change at the middle of a large tensor is seen, and any change of a small one."""
    (tmp_path / "transformer").mkdir()
    file = tmp_path / "transformer" / "model.safetensors"
    found = set()
    for place, value in ((0, 0.0), (0, 1.0), (100_000, 1.0)):
        tensors = {"large": torch.zeros(200_000), "small": torch.zeros(8)}
        tensors["large" if place else "small"].view(-1)[place] = value
        save_file(tensors, file)
        found.add(network_fingerprint(tmp_path))
    assert len(found) == 3


WITH_CHAT: dict[str, tuple[Change, str | None]] = {
    "template in a file of its own": (moved_template, None),
    "processor's version": (in_json("processor/preprocessor_config.json", transformers_version="9.9"), None),
    "padding on the right": (in_json("tokenizer_3/tokenizer_config.json", padding_side="right"), None),
    "template": (
        in_json("tokenizer_3/tokenizer_config.json", chat_template="other"),
        "tokenizer_3/chat_template (other content)",
    ),
    "no template": (
        without("tokenizer_3/tokenizer_config.json", "chat_template"),
        "tokenizer_3/chat_template (missing now)",
    ),
    "processor": (
        in_json("processor/preprocessor_config.json", size=3),
        "processor/preprocessor_config.json (other content)",
    ),
    "padding on the left": (
        in_json("tokenizer_3/tokenizer_config.json", padding_side="left"),
        "tokenizer_3/tokenizer_config.json (other content)",
    ),
}


@pytest.mark.parametrize("name", WITH_CHAT)
def test_chat_templates_and_processors_count(model, name):
    with_chat(model)
    before = encoder_fingerprint(model)
    change, said = WITH_CHAT[name]
    change(model)
    assert different_encoders(before, model) == said


@pytest.mark.parametrize(
    ("file", "named"),
    [
        ("tokenizer/chat_template.jinja", "tokenizer/chat_template"),
        ("tokenizer/additional_chat_templates/edit.jinja", "tokenizer/additional_chat_templates/edit.jinja"),
    ],
)
def test_a_new_template_is_named(original, model, file, named):
    (model / file).parent.mkdir(exist_ok=True)
    (model / file).write_text(TEMPLATE)
    assert different_encoders(encoder_fingerprint(original), model) == f"{named} (new)"


def test_the_marks_of_clip_and_t5_are_those_of_earlier_releases(original):
    """Otherwise caches and adapters of Flux.1 and SD3.5 would have to be made again."""
    files = [word.partition("=")[0] for word in encoder_fingerprint(original).split()[1:]]
    assert files == [
        "vae/diffusion_pytorch_model.safetensors", "vae/config.json",
        "text_encoder/model.safetensors", "text_encoder/config.json",
        "text_encoder_2/model.safetensors", "text_encoder_2/config.json",
        "tokenizer/vocab.json", "tokenizer/merges.txt", "tokenizer/tokenizer_config.json",
        "tokenizer_2/tokenizer.json", "tokenizer_2/tokenizer_config.json",
    ]  # fmt: skip
