"""Building the parts of a run: what each process loads, and what is kept of the files that were read."""

import contextlib
import shutil
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from scfm_core.data.corpus import Corpus
from scfm_core.distributed.world import World
from scfm_core.models.adapters import ADAPTERS
from scfm_core.models.families import open_family
from scfm_core.models.fingerprint import network_fingerprint
from scfm_core.train import grid, inputs
from scfm_core.train.assemble import build_layout, build_model
from scfm_core.train.checkpoint import load_checkpoint
from scfm_core.train.grid import Validation
from scfm_core.train.inputs import BatchEncoder
from scfm_core.train.kernels import Kernels
from scfm_core.train.trainer import Trainer

PROMPTS = ["a handwritten digit one", "a handwritten digit two"]


class Rank:
    """A world of two, seen from one rank; `sent` is what rank 0 sends."""

    def __init__(self, rank: int, sent: list[Any]) -> None:
        self.is_main, self.sent = rank == 0, sent

    def together(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def from_main(self, value: Any) -> Any:
        if self.is_main:
            self.sent.append(value)
        return self.sent[0]


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_one_rank_encodes_the_prompts(make_config, tiny, monkeypatch, dropout):
    config = make_config({"method.caption_dropout": dropout, "sample.guidance": 2.5})
    corpus, sent, device = Corpus(config.data), [], torch.device("cpu")
    family = open_family(str(tiny / "flux"))
    first = BatchEncoder(config, family, corpus, device, PROMPTS, Rank(0, sent))
    expected, empty = first.prompt_cond, family.unconditional
    assert expected is not None and expected.guidance is not None and expected.guidance.tolist() == [2.5, 2.5]
    monkeypatch.setattr(inputs, "TextEncoders", None)  # calling it raises
    family = open_family(str(tiny / "flux"))
    encoder = BatchEncoder(config, family, corpus, device, PROMPTS, Rank(1, sent))
    other = encoder.prompt_cond
    for left, right in ((expected, other), (empty, family.unconditional)):
        assert all(torch.equal(tensor, right.fields[name]) for name, tensor in left.fields.items())
    assert torch.equal(expected.guidance, other.guidance)
    assert len(sent) == 1
    monkeypatch.setattr(grid, "Autoencoder", None)  # nor does it decode
    Validation(config, SimpleNamespace(family=family), None, encoder, Rank(1, sent))


def test_every_rank_encodes_images(make_config, tiny):
    config = make_config({"data.path": str(tiny / "digits"), "data.format": "folder"})
    encoder = BatchEncoder(
        config, open_family(str(tiny / "flux")), Corpus(config.data), torch.device("cpu"), PROMPTS, Rank(1, [])
    )
    assert encoder.text is not None and encoder.vae is not None and encoder.prompt_cond is not None


def test_a_checkpoint_names_the_model_that_was_loaded(make_config, tiny, tmp_path):
    """The model's folder is gone when the checkpoint is written, and back when the run resumes."""
    (tmp_path / "model").symlink_to(tiny / "flux")
    config = make_config({"model.path": str(tmp_path / "model")})
    trainer = Trainer(config)
    next(steps := trainer.train_steps())
    (tmp_path / "model").unlink()
    path = trainer.state.save()
    steps.close()
    (tmp_path / "model").symlink_to(tiny / "flux")
    assert load_checkpoint(path).state["base_fingerprint"] == network_fingerprint(tiny / "flux")
    assert Trainer(config, path).progress.step == 1


def test_buffers_of_all_networks_are_those_of_the_files(make_config, tiny_sd3, tmp_path):
    """SD3 stores its table of positions. The averages have it too, although their weights are not read."""
    folder = shutil.copytree(tiny_sd3 / "sd3", tmp_path / "sd3")
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    stored = tensors["pos_embed.pos_embed"] = 2 * tensors["pos_embed.pos_embed"]
    save_file(tensors, path)
    changes = {"train.weights": "full", "model.path": str(folder)}
    config = make_config(changes)
    layout = build_layout(config, World(), torch.device("cpu"))
    model = build_model(
        config, open_family(str(folder)), torch.device("cpu"), kernels=Kernels("none", "", None), layout=layout
    )
    assert set(model.networks) == {*ADAPTERS, "teacher"}
    for network in model.networks.values():
        assert torch.equal(network.get_buffer("pos_embed.pos_embed"), stored)
