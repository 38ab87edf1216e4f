"""Malicious files of models and adapters: each is refused with a message that names it, and nothing in them runs."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from scfm_core import load
from scfm_core.errors import UserError
from scfm_core.models.encoders import TextEncoders, load_tokenizer
from scfm_core.models.families import open_family
from scfm_core.models.fused_base import FusedAdapter
from scfm_core.models.tensor_files import TensorFiles
from scfm_core.train.pipelines import read_header

DEEP = "[" * 100_000
LAYER = "transformer_blocks.0.attn.to_q"
WEIGHTS = "diffusion_pytorch_model.safetensors"


def safetensors(header: Any, data: bytes = bytes(64), length: int | None = None) -> bytes:
    text = header.encode() if isinstance(header, str) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(begin: Any, stop: Any, shape: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, stop]}


HEADERS = {
    "longer than the file": safetensors({"a": tensor(0, 64, [16])}, length=10**9),
    "longer than any": safetensors({"a": tensor(0, 64, [16])}, length=2**64 - 1),
    "nested": safetensors(DEEP),
    "a list": safetensors([1]),
    "a number": safetensors("7"),
    "an entry that is a list": safetensors({"a": [1, 2]}),
    "a number of 5000 digits": safetensors('{"a": ' + "9" * 5000 + "}"),
    "not UTF-8": safetensors("{}").replace(b"{}", b"\xff\xfe"),
    "overlapping": safetensors({"a": tensor(0, 64, [16]), "b": tensor(32, 64, [8])}),
    "twice the same bytes": safetensors({"a": tensor(0, 64, [16]), "b": tensor(0, 64, [16])}),
    "negative shape": safetensors({"a": tensor(0, 64, [-4, -4])}),
    "negative offset": safetensors({"a": tensor(-64, 0, [16])}),
    "offsets in reverse": safetensors({"a": tensor(64, 0, [16])}),
    "a tensor after the end": safetensors({"a": tensor(0, 4 << 40, [1 << 40])}),
    "a product that overflows": safetensors({"a": tensor(0, 64, [2**62, 4])}),
    "shape of text": safetensors({"a": tensor(0, 64, ["16"])}),
    "shape of fractions": safetensors({"a": tensor(0, 64, [16.0])}),
    "an unknown dtype": safetensors({"a": tensor(0, 64, [16], "O")}),
    "a dtype that is a list": safetensors({"a": tensor(0, 64, [16], [])}),
    "empty": b"",
    "a pickle": b"\x80\x04cos\nsystem\n(S'touch canary'\ntR.",
}


@pytest.mark.parametrize("content", HEADERS.values(), ids=HEADERS)
def test_a_header_of_safetensors(tmp_path: Path, content: bytes) -> None:
    """As weights of a model, as a LoRA, and as an adapter of `scfm export`."""
    (tmp_path / WEIGHTS).write_bytes(content)
    with pytest.raises(UserError, match=str(tmp_path)):
        TensorFiles(tmp_path).close()
    with pytest.raises(UserError, match=WEIGHTS):
        read_header(tmp_path / WEIGHTS)


def test_an_index_that_leads_out_of_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": torch.zeros(1)}, tmp_path / "secret.safetensors")
    for name in ("../secret.safetensors", str(tmp_path / "secret.safetensors"), 7):
        (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(UserError, match=r"the weights in .*model cannot be read"):
            TensorFiles(folder)
    (folder / f"{WEIGHTS}.index.json").write_text(DEEP)
    with pytest.raises(UserError, match=r"the weights in .*model cannot be read"):
        TensorFiles(folder)


def lora(settings: Any = None, **changes: torch.Tensor) -> Callable[[Path], None]:
    tensors = {f"{LAYER}.lora_A.weight": torch.ones(2, 64), f"{LAYER}.lora_B.weight": torch.ones(64, 2)}
    tensors |= {f"{LAYER}.{name.replace('_weight', '.weight')}": changed for name, changed in changes.items()}
    text = settings if isinstance(settings, str) else json.dumps(settings)
    return lambda path: save_file(tensors, path, None if settings is None else {"lora_adapter_metadata": text})


LORAS = {
    "nested settings": lora(DEEP),
    "settings that are a list": lora([1]),
    "alpha that is text": lora({"lora_alpha": "1e9999"}),
    "patterns that are a list": lora({"alpha_pattern": ["a"]}),
    "a pattern that would run for years": lora({"alpha_pattern": {"(.*)*(.*)*(.*)*(.*)*(.*)*x": 1}}),
    "a pattern that is none": lora({"alpha_pattern": {"(": 1}}),
    "alpha of two numbers": lora(alpha=torch.ones(2)),
    "rank 0": lora(lora_A_weight=torch.ones(0, 64), lora_B_weight=torch.ones(64, 0)),
    "factors of other ranks": lora(lora_A_weight=torch.ones(3, 64)),
}


@pytest.mark.parametrize("write", LORAS.values(), ids=LORAS)
def test_a_lora(tiny: Path, tmp_path: Path, write: Callable[[Path], None]) -> None:
    path = tmp_path / "style.safetensors"
    write(path)
    with pytest.raises(UserError, match=r"style\.safetensors"):
        open_family(str(tiny / "flux"), adapters=[FusedAdapter(path=str(path))])


def test_names_of_layers_are_no_regular_expressions(tiny: Path, tmp_path: Path) -> None:
    """PEFT's forms of a name: its end, the whole with `^`, and with escaped dots."""
    path, network = tmp_path / "style.safetensors", open_family(str(tiny / "flux"))
    for pattern, scale in (
        ("to_q", 3.0),
        (f"^{LAYER}", 3.0),
        (LAYER.replace(".", r"\."), 3.0),
        ("^to_q", 1.0),
        ("o_q", 1.0),
    ):
        lora({"lora_alpha": 2, "alpha_pattern": {pattern: 6}})(path)
        network.adapters = (FusedAdapter(path=str(path)),)
        [(_, up)] = network.changes(network.meta_network())[f"{LAYER}.weight"].factors
        assert up.max() == scale, pattern


@pytest.fixture
def model(tiny: Path, tmp_path: Path) -> Path:
    """A pipeline whose files a test may change."""
    return shutil.copytree(tiny / "flux", tmp_path / "flux")


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("content", [DEEP, "[]", "7", "\xff"], ids=["nested", "a list", "a number", "not UTF-8"])
@pytest.mark.parametrize("name", ["model_index.json", "transformer/config.json", "vae/config.json"])
def test_json_of_a_model(model: Path, name: str, content: str) -> None:
    (model / name).write_text(content, encoding="latin-1")
    with pytest.raises(UserError, match=name):
        open_family(str(model))


@pytest.fixture
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that exists if the code of a model was run; nobody answers a question on the terminal."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks whether to run code"))
    return tmp_path / "canary"


def test_code_in_a_model_is_not_run(model: Path, canary: Path) -> None:
    """The forms in which diffusers and transformers look for code in a folder. The model works without it, or is refused."""
    code = f"open({str(canary)!r}, 'w')\nclass Evil:\n    @classmethod\n    def from_pretrained(cls, *_, **__):\n        return cls()\n"
    for place in ("", "tokenizer_2", "text_encoder", "transformer"):
        (model / place / "evil.py").write_text(code)
    edit(model / "tokenizer_2" / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]})
    edit(model / "text_encoder" / "config.json", auto_map={"AutoModel": "evil.Evil"})
    edit(model / "transformer" / "config.json", auto_map={"AutoModel": "evil.Evil"})
    family = open_family(str(model))
    TextEncoders(family, 8, torch.float32, "cpu")
    load_tokenizer(family)
    edit(model / "model_index.json", text_encoder=["evil", "Evil"])
    with pytest.raises(UserError, match="text encoders in"):
        TextEncoders(open_family(str(model)), 8, torch.float32, "cpu")
    edit(model / "model_index.json", _class_name=["evil", "Evil"])
    with pytest.raises(UserError, match="scfm supports"):
        open_family(str(model))
    assert not canary.exists()


def write_adapter(path: Path, base: Path) -> None:
    """A file with the header of an exported adapter."""
    values = {
        "base_model": str(base),
        "step_gain_gamma": None,
        "shift": 3.0,
        "guidance": 1.0,
        "text_length": 8,
        "resolution": [16, 16],
    }
    save_file({"a": torch.zeros(1)}, path, {"scfm": json.dumps(values)})


@pytest.mark.parametrize("size", [0, 4, 5000])
def test_damaged_weights_of_an_encoder(model: Path, tmp_path: Path, size: int) -> None:
    """Cut off while they were downloaded."""
    path = model / "text_encoder" / "model.safetensors"
    content = path.read_bytes()[:size]
    path.unlink()  # it may be a link
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"text encoders in .* cannot be used: .* download the model again"):
        TextEncoders(open_family(str(model)), 8, torch.float32, "cpu")
    write_adapter(tmp_path / "adapter.safetensors", model)
    with pytest.raises(UserError, match=r"the base model in .* cannot be loaded .* download it again"):
        load(tmp_path / "adapter.safetensors")


def test_an_adapter_does_not_name_a_model_that_runs_code(model: Path, canary: Path, tmp_path: Path) -> None:
    write_adapter(tmp_path / "adapter.safetensors", model)
    (model / "evil.py").write_text(f"open({str(canary)!r}, 'w')\nclass Evil: ...\n")
    edit(model / "model_index.json", _class_name=["evil", "Evil"])
    with pytest.raises(UserError, match="the base model in"):
        load(tmp_path / "adapter.safetensors")
    assert not canary.exists()
