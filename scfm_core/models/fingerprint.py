"""Fingerprints of a pipeline's parts: whether two folders hold the same model, and if not, which file differs.

A fingerprint is a sha256, followed by `FILE=HASH` for each file that counts. Files count if they decide what the model
computes: weights, and of the other files only what matters. Notes, variants such as fp16 beside the weights, and the
versions that libraries write into configurations do not count.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from scfm_core.errors import UserError
from scfm_core.models.tensor_files import adapter_settings, read_header

ENCODERS = (
    "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "text_encoder_3", "tokenizer_3",
    "text_encoder_4", "tokenizer_4", "processor", "text_processor", "image_processor",
)  # fmt: skip
NETWORK = ("transformer",)

_ADAPTER = "model.adapters."
"""What the mark of an adapter begins with."""

_BLOCK = 4096
"""Bytes of a tensor that are hashed, from its middle."""
# What `from_pretrained` loads without a variant: not `model.fp16.safetensors`.
_WEIGHTS = re.compile(r"(diffusion_pytorch_model|model)(-\d{5}-of-\d{5})?\.safetensors")
# Libraries write these into config.json. The weights are cast to the dtype of the run.
_UNIMPORTANT = ("transformers_version", "torch_dtype", "dtype", "architectures")
# Of tokenizer_config.json, which libraries rewrite too, what changes the tokens of a caption.
_OF_TOKENIZER = ("model_max_length", "legacy", "add_prefix_space", "do_lower_case")
# The vocabulary: the first of these that a tokenizer has. The others are derived from it.
_VOCABULARIES = (("vocab.json", "merges.txt"), ("spiece.model",), ("tokenizer.json",), ("tokenizer.model",))
# Of tokenizers and processors that are not CLIP's or T5's, what else changes the tokens of a caption.
_PROCESSORS = ("processor_config.json", "preprocessor_config.json")
_CHAT_TEMPLATE = "chat_template"


def encoder_fingerprint(folder: Path) -> str:
    """A fingerprint of VAE and text encoders. Two caches are compatible only if theirs are equal."""
    return _fingerprint(folder, ENCODERS)


def network_fingerprint(folder: Path, adapters: Sequence[tuple[Path, float]] = ()) -> str:
    """A fingerprint of the pre-trained network. An adapter is valid only for the network that it was trained on.

    Args:
        folder: of the pipeline.
        adapters: files and weights of the adapters that are fused into the network.
    """
    return _fingerprint(folder, NETWORK, _adapter_marks(adapters))


def different_encoders(recorded: str | None, folder: Path) -> str | None:
    """In which files the encoders of `folder` differ from a recorded fingerprint; None if they are the same."""
    return _difference(recorded, folder, ENCODERS)


def different_network(
    recorded: str | None, folder: Path, adapters: Sequence[tuple[Path, float]] | None = ()
) -> str | None:
    """In which files the network of `folder` differs from a recorded fingerprint; None if it is the same.

    Args:
        recorded: a fingerprint.
        folder: of the pipeline.
        adapters: files and weights of the adapters that are fused into the network; None: compare the network without adapters.
    """
    if adapters is None and recorded is not None:
        marks = [mark for mark in recorded.split()[1:] if not mark.startswith(_ADAPTER)]
        recorded = _joined(marks) if marks else recorded
    return _difference(recorded, folder, NETWORK, _adapter_marks(adapters or ()))


def _adapter_marks(adapters: Sequence[tuple[Path, float]]) -> list[str]:
    """Number, weight and hash of each adapter; its name and place do not count."""
    return [
        f"{_ADAPTER}{number}(weight={weight:g})={_short(_weights_content(path) + adapter_settings(path).encode())}"
        for number, (path, weight) in enumerate(adapters)
    ]


def _difference(
    recorded: str | None, folder: Path, components: Sequence[str], more_marks: Sequence[str] = ()
) -> str | None:
    current = _fingerprint(folder, components, more_marks)
    is_of_0_1 = recorded is not None and not more_marks and recorded == _fingerprint_of_0_1(folder, components)
    return None if recorded == current or is_of_0_1 else differing_files(recorded, current)


def differing_files(recorded: str | None, current: str | None) -> str:
    """The files in which two fingerprints differ, and how."""
    before, now = _files(recorded or ""), _files(current or "")
    if not before:
        return "the record is of version 0.1, which counted every file of the folder and did not name them"
    differing = [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
    words = {True: "missing now", False: "other content"}
    return ", ".join(f"{name} ({words[name not in now] if name in before else 'new'})" for name in differing)


def _files(fingerprint: str) -> dict[str, str]:
    """The files of a fingerprint and their hashes."""
    return dict(word.rsplit("=", 1) for word in fingerprint.split()[1:])


def _fingerprint(folder: Path, components: Sequence[str], more_marks: Sequence[str] = ()) -> str:
    marks = [f"{component}/{name}={mark}" for component in components for name, mark in _marks(folder / component)]
    return _joined([*marks, *more_marks])


def _joined(marks: Sequence[str]) -> str:
    return " ".join([hashlib.sha256("\n".join(marks).encode()).hexdigest(), *marks])


def weight_files(component: Path) -> list[Path]:
    """The files of a component that are loaded without a variant, by name; if there are none, all safetensors files."""
    files = sorted(component.glob("*.safetensors"))
    return [path for path in files if _WEIGHTS.fullmatch(path.name)] or files


def _marks(component: Path) -> Iterator[tuple[str, str]]:
    """Name and hash of each file of a component that counts."""
    for path in weight_files(component):
        yield path.name, _short(_weights_content(path))
    if (component / "config.json").is_file():
        config = _read_json(component / "config.json")
        kept = {key: value for key, value in config.items() if key not in _UNIMPORTANT and not key.startswith("_")}
        yield "config.json", _short(json.dumps(kept, sort_keys=True).encode())
    vocabulary = next((names for names in _VOCABULARIES if all((component / name).is_file() for name in names)), ())
    for name in vocabulary:
        content = (component / name).read_bytes()
        if name == "tokenizer.json":  # it also has the truncation and padding of the last call
            content = json.dumps(_read_json(component / name).get("model"), sort_keys=True).encode()
        yield name, _short(content)
    if (component / "tokenizer_config.json").is_file():
        config = _read_json(component / "tokenizer_config.json")
        kept = {key: config.get(key) for key in _OF_TOKENIZER}
        if config.get("padding_side") == "left":  # the default is right, which is most often not written
            kept["padding_side"] = "left"
        yield "tokenizer_config.json", _short(json.dumps(kept, sort_keys=True).encode())
    for name in _PROCESSORS:
        if (component / name).is_file():
            config = _read_json(component / name)
            kept = {key: value for key, value in config.items() if key not in _UNIMPORTANT and not key.startswith("_")}
            yield name, _short(json.dumps(kept, sort_keys=True).encode())
    if (template := _chat_template(component)) is not None:
        yield _CHAT_TEMPLATE, _short(json.dumps(template).encode())
    for path in sorted(component.glob("additional_chat_templates/*.jinja")):
        yield f"{path.parent.name}/{path.name}", _short(path.read_bytes())


def _chat_template(component: Path) -> Any:
    """The template that makes a prompt of a caption; None if there is none. Libraries have moved it from file to file."""
    if (path := component / f"{_CHAT_TEMPLATE}.jinja").is_file():
        return path.read_text(encoding="utf-8")
    for name in (f"{_CHAT_TEMPLATE}.json", "tokenizer_config.json"):
        if (component / name).is_file() and (found := _read_json(component / name).get(_CHAT_TEMPLATE)) is not None:
            return found
    return None


def _weights_content(path: Path) -> bytes:
    """Names, shapes and dtypes of the tensors, and a block of each tensor.

    A training changes all of its tensors, and so does merging a LoRA. Hashing all of T5-XXL would take a minute at every
    start. The header's metadata do not count, since libraries rewrite them
    (https://github.com/huggingface/safetensors#format).
    """
    try:
        header, first = read_header(path)
        parts = [json.dumps(header, sort_keys=True).encode()]
        with path.open("rb", buffering=0) as file:
            for _, tensor in sorted(header.items()):
                begin, end = tensor["data_offsets"]
                middle = max(begin, (begin + end - _BLOCK) // 2)
                parts.append(os.pread(file.fileno(), min(_BLOCK, end - begin), first + middle))
        return b"".join(parts)
    except (ValueError, KeyError, TypeError):  # damaged: loading it raises
        return f"damaged, {path.stat().st_size} bytes".encode()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict):
            raise ValueError("it is not an object")
    except ValueError as error:
        raise UserError(f"model.path: {path} is not valid JSON ({error}); download it again") from error
    return content


def _short(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _fingerprint_of_0_1(folder: Path, components: Sequence[str]) -> str:
    """What version 0.1 recorded: every file counted in full, so it is the same only in an untouched folder."""
    digest, edge = hashlib.sha256(), 1 << 20
    for component in components:
        for path in sorted((folder / component).glob("*")):
            if path.suffix in (".safetensors", ".json", ".txt", ".model"):
                size = path.stat().st_size
                digest.update(f"{component}/{path.name}:{size}:".encode())
                with path.open("rb") as file:
                    digest.update(file.read(edge))
                    file.seek(max(0, size - edge))
                    digest.update(file.read())
    return digest.hexdigest()
