"""Loading by ranges into a network on the meta device: the weights of diffusers' own loading, and errors that say what to do."""

import errno
import json
import os
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from scfm_core.errors import UserError
from scfm_core.filling import allocate, materialise, zeros
from scfm_core.models import tensor_files
from scfm_core.models.adapters import LoRAConfig
from scfm_core.models.families import open_family
from scfm_core.models.initial import zero_modulation
from scfm_core.models.protocol import ModelFamily
from scfm_core.models.student import LoRAModel
from scfm_core.models.tensor_files import TensorFiles

DTYPES = [torch.float32, torch.bfloat16]
ONE = "diffusion_pytorch_model.safetensors"


@pytest.fixture(params=["flux", "sd3"])
def family(request, tiny, tiny_sd3) -> ModelFamily:
    return open_family(str({"flux": tiny, "sd3": tiny_sd3}[request.param] / request.param))


@pytest.fixture
def folder(tiny, tmp_path) -> Path:
    """A pipeline whose files a test may change."""
    return shutil.copytree(tiny / "flux", tmp_path / "flux")


def assert_same(network: torch.nn.Module, expected: dict[str, torch.Tensor]) -> None:
    state = network.state_dict()
    assert list(state) == list(expected)
    for name, tensor in expected.items():
        assert state[name].dtype == tensor.dtype, name
        assert torch.equal(state[name], tensor), name


def of_diffusers(family: ModelFamily, folder: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    network = family.network_class.from_pretrained(folder, subfolder="transformer", torch_dtype=dtype)
    return network.state_dict()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_the_weights_are_those_of_diffusers(family, tmp_path, dtype, stored, monkeypatch):
    folder = shutil.copytree(family.folder, tmp_path / "copy")
    shutil.rmtree(folder / "transformer")
    network = family.load_network(stored, "cpu")
    network.save_pretrained(folder / "transformer", max_shard_size="60KB" if stored is torch.float32 else "10GB")
    assert len(list((folder / "transformer").glob("*.safetensors"))) > (3 if stored is torch.float32 else 0)
    monkeypatch.setattr(tensor_files, "CHUNK", 1000)  # bytes: many chunks a tensor
    loaded = open_family(str(folder)).load_network(dtype, "cpu")
    assert_same(loaded, of_diffusers(family, folder, dtype))
    assert not loaded.training


@pytest.mark.parametrize("dtype", DTYPES)
def test_random_weights_are_those_of_the_constructor(family, dtype):
    torch.manual_seed(7)
    whole = family.network_class.from_config(dict(family.network_config))
    zero_modulation(whole)
    network = family.empty_network(dtype)
    before = torch.get_rng_state()
    materialise(network, "cpu", family.random_weights(7).fill)
    assert torch.equal(torch.get_rng_state(), before)
    assert_same(network, torch.nn.Module.to(whole, dtype).state_dict())


@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
def test_adapters_on_the_meta_device_get_the_same_initial_weights(family, init):
    config = LoRAConfig(rank=4, alpha=4.0, init=init)
    whole = LoRAModel(family, family.load_network(torch.bfloat16, "cpu"), config, seed=5)
    network = family.empty_network(torch.bfloat16)
    with family.open_weights(network) as files:
        model = LoRAModel(family, network, config, seed=5)
        assert all(parameter.is_meta for parameter in network.parameters())
        materialise(network, "cpu", model.bank.filling(files.fill))
    assert_same(network, whole.bank.network.state_dict())
    trained = [name for name, parameter in network.named_parameters() if parameter.requires_grad]
    assert trained == [name for name, parameter in whole.bank.network.named_parameters() if parameter.requires_grad]


def test_any_range_of_a_tensor(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_files, "CHUNK", 12)
    tensors = {"a": torch.arange(24.0).view(4, 6), "b": torch.arange(7.0).bfloat16(), "empty": torch.empty(0, 3)}
    save_file(tensors, tmp_path / ONE)
    with TensorFiles(tmp_path) as files:
        files.check(tensors)
        for name, tensor in tensors.items():
            flat = tensor.flatten()
            for start in range(len(flat) + 1):
                for stop in range(start, len(flat) + 1):
                    part = torch.full((stop - start,), -1.0)
                    files.fill(name, part, start)
                    assert torch.equal(part, flat[start:stop].float())


@pytest.mark.parametrize("stray", ["old.safetensors", "diffusion_pytorch_model.bf16.safetensors"])
def test_a_merged_model_is_made_from_the_weights_that_were_trained_on(folder, stray):
    """Many a folder has other files beside them, with the same names of tensors or with more."""
    path = folder / "transformer" / stray
    save_file(
        {name: weight + 1 for name, weight in load_file(path.with_name(ONE)).items()} | {"more": torch.ones(2)}, path
    )
    (folder / "text_encoder" / "model.fp16.safetensors").write_bytes(bytes(10**6))
    family = open_family(str(folder))
    read = dict(family.read_weights())
    network = family.load_network(torch.float32, "cpu")
    assert read.keys() == network.state_dict().keys()
    assert_same(network, {name: read[name] for name in network.state_dict()})
    assert family.encoder_bytes < 10**6


def test_a_network_of_zeros(tiny):
    network = open_family(str(tiny / "flux")).empty_network(torch.float32)
    materialise(network, "cpu", zeros)
    assert not any(parameter.any() for parameter in network.parameters())


def test_buffers_are_where_the_network_computes(tiny_sd3):
    """Also if its weights are offloaded."""
    network = open_family(str(tiny_sd3 / "sd3")).empty_network(torch.float32)
    assert {buffer.device.type for buffer in network.buffers()} == {"cpu"}
    allocate(network, "cpu", others_on="meta")
    assert {parameter.device.type for parameter in network.parameters()} == {"cpu"}
    assert {buffer.device.type for buffer in network.buffers()} == {"meta"}


def change(folder: Path, edit: Any) -> None:
    path = folder / "transformer" / ONE
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


def without_a_tensor(folder: Path) -> str:
    change(folder, lambda tensors: tensors.pop("proj_out.weight"))
    return r"do not fit its config.json. 1 of \d+ tensors: proj_out.weight is missing"


def with_another_shape(folder: Path) -> str:
    change(folder, lambda tensors: tensors.update({"proj_out.bias": torch.zeros(9)}))
    return r"proj_out.bias has shape \[9\], not \[4\]. Download weights and config.json again"


def cut_off(folder: Path) -> str:
    path = folder / "transformer" / ONE
    os.truncate(path, path.stat().st_size - 1)
    return "ends before the end of .*damaged or incomplete: download them again"


def without_a_header(folder: Path) -> str:
    (folder / "transformer" / ONE).write_bytes(struct.pack("<Q", 5) + b"[1, 2")
    return "cannot be read .*damaged or incomplete: download them again"


def empty_file(folder: Path) -> str:
    (folder / "transformer" / ONE).write_bytes(b"")
    return "damaged or incomplete: download them again"


def unknown_dtype(folder: Path) -> str:
    change(folder, lambda tensors: tensors.update({"proj_out.bias": torch.zeros(4, dtype=torch.int32)}))
    return r"are quantised \(proj_out.bias in .* has dtype I32\), which scfm does not read. Give the model in bf16"


def scaled_fp8(folder: Path) -> str:
    scale = {"x_embedder.weight_scale": torch.ones(1)}
    change(
        folder, lambda tensors: tensors.update({name: t.to(torch.float8_e4m3fn) for name, t in tensors.items()} | scale)
    )
    return r"are quantised \(x_embedder.weight_scale is a scale of fp8 weights\)"


def only_a_variant(folder: Path) -> str:
    path = folder / "transformer" / ONE
    path.rename(path.with_name("diffusion_pytorch_model.fp16.safetensors"))
    return f"has no {ONE}, only diffusion_pytorch_model.fp16.safetensors. Rename"


def no_file(folder: Path) -> str:
    (folder / "transformer" / ONE).unlink()
    return "has no .safetensors weights; is the download complete?"


def a_shard_is_missing(folder: Path) -> str:
    names = dict.fromkeys(load_file(folder / "transformer" / ONE), "missing.safetensors")
    (folder / "transformer" / f"{ONE}.index.json").write_text(json.dumps({"weight_map": names}))
    return "missing.safetensors.*damaged or incomplete"


def damaged_index(folder: Path) -> str:
    (folder / "transformer" / f"{ONE}.index.json").write_text('{"weight_map": 3}')
    return "damaged or incomplete"


@pytest.mark.parametrize(
    "damage",
    [
        without_a_tensor, with_another_shape, cut_off, without_a_header, empty_file, unknown_dtype, scaled_fp8,
        only_a_variant, no_file, a_shard_is_missing, damaged_index,
    ],
)  # fmt: skip
def test_unusable_weights_are_found_before_any_is_read(folder, damage, monkeypatch):
    message = damage(folder)
    monkeypatch.setattr(os, "preadv", None)
    family = open_family(str(folder))
    with pytest.raises(UserError, match=message):
        family.load_network(torch.float32, "cpu")


def test_a_network_that_bitsandbytes_has_quantised_is_refused(folder):
    path = folder / "transformer" / "config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_method": "bitsandbytes"}})
    )
    with pytest.raises(
        UserError, match=r"are quantised \(quantization_config in config.json: bitsandbytes\).*model.base=nf4"
    ):
        open_family(str(folder))


def test_tensors_that_the_network_does_not_have_are_named(folder, tiny, capsys):
    change(folder, lambda tensors: tensors.update(extra=torch.zeros(3)))
    network = open_family(str(folder)).load_network(torch.float32, "cpu")
    assert_same(network, open_family(str(tiny / "flux")).load_network(torch.float32, "cpu").state_dict())
    assert "1 tensor of the weights in" in (said := capsys.readouterr().out) and "not used: extra" in said


@pytest.mark.parametrize(
    ("fault", "message"), [("error", "cannot be read .Input/output error."), ("cut", "has become shorter")]
)
def test_a_file_that_fails_while_it_is_read(folder, fault, message, monkeypatch):
    family = open_family(str(folder))
    network = family.empty_network(torch.float32)

    def fail(*arguments: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with family.open_weights(network) as files:
        if fault == "error":
            monkeypatch.setattr(os, "preadv", fail)
        else:
            os.truncate(folder / "transformer" / ONE, 4096)
        with pytest.raises(UserError, match=message):
            materialise(network, "cpu", files.fill)


@pytest.mark.parametrize(
    ("path", "command"),
    [("runs/demo/teacher", "python -m recipes.demo --only teacher"), ("runs/demo/short_teacher", "make demo")],
)
def test_a_missing_model_of_the_demo_names_the_command_that_makes_it(path, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=rf"there is no folder '{path}'.*`{command}` makes it"):
        open_family(path)
