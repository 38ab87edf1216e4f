"""Blocks whose weights come from host memory: the same losses and gradients, whatever the order in which they run."""

import pytest
import torch

from scfm_core.errors import UserError
from scfm_core.models.offload import Offload, offloaded_bytes, spread
from scfm_core.train.trainer import Trainer

CPU = torch.device("cpu")


def rows(config):
    clock = ("seconds", "samples_per_second", "data_seconds")
    return [{k: v for k, v in row.items() if k not in clock} for row in Trainer(config).train_steps()]


@pytest.mark.parametrize(
    ("base", "checkpointing", "number", "blocks"),
    [("bfloat16", "none", 2, "none"), ("nf4", "none", 3, "reference"), ("nf4", "full", 4, "none")],
)
def test_a_run_is_the_same(make_config, base, checkpointing, number, blocks):
    """Without checkpointing, the backward pass reads what the forward pass saved: views of slots with other weights since."""
    changes = {"model.base": base, "train.activation_checkpointing": checkpointing, "train.steps": 2}
    changes |= {"train.micro_batch_size": 4, "method.step_gain": {"gamma": 0.5}, "kernels.fused": blocks}
    expected = rows(make_config(changes))
    assert rows(make_config({"model.offload_blocks": number})) == expected


def test_compiled_blocks_with_packed_weights(make_config, monkeypatch):
    """Compiled to one graph each; the copies are outside of it."""
    changes = {"model.base": "nf4", "train.activation_checkpointing": "selective", "train.steps": 1}
    changes |= {"lora.targets": r".*\.(attn\.to_q|proj_out)"}
    expected = rows(make_config(changes))
    torch._dynamo.reset()
    compile_block = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda block: compile_block(block, backend="aot_eager", fullgraph=True)
    )
    [row] = rows(make_config({"train.compile": True, "model.offload_blocks": 4}))
    for key in ("loss", "grad_norm"):
        assert row[key] == pytest.approx(expected[0][key], rel=1e-5)


class TestBlocks:
    @pytest.fixture()
    def blocks(self):
        torch.manual_seed(0)
        return [torch.nn.Linear(5, 5, dtype=torch.bfloat16).requires_grad_(False) for _ in range(4)]

    def test_two_slots_hold_all_weights_and_copies_run_ahead(self, blocks, monkeypatch):
        expected = [block.weight.clone() for block in blocks]
        offload = Offload(blocks, CPU)
        storages = {tensor.untyped_storage().data_ptr() for block in blocks for tensor in block.parameters()}
        assert len(storages) == 2 and all(
            tensor.data_ptr() % 16 == 0 for block in blocks for tensor in block.parameters()
        )
        copies, copy = [], offload._copy

        def recorded(number):
            if offload._holds[number % 2] != number:
                copies.append(number)
            copy(number)

        monkeypatch.setattr(offload, "_copy", recorded)
        x = torch.randn(2, 5, dtype=torch.bfloat16, requires_grad=True)
        with torch.no_grad():
            for block, weight in zip(blocks, expected, strict=True):
                block(x)
                assert torch.equal(block.weight, weight)
        assert copies == [0, 1, 2, 3, 0]  # the last is for the next pass
        copies.clear()
        y = x
        for block in blocks:
            y = block(y)
        assert copies == [1, 2, 3]
        copies.clear()
        y.sum().backward()
        assert copies == [1, 0]  # 3 and 2 are there; the next pass finds 0 and 1
        gradient = torch.ones(2, 5, dtype=torch.bfloat16)
        for weight in reversed(expected):
            gradient = gradient @ weight
        assert torch.equal(x.grad, gradient)

    def test_on_the_meta_device_nothing_is_in_host_memory(self, blocks):
        meta = [block.to("meta") for block in blocks]
        offload = Offload(meta, torch.device("meta"))
        assert offload._host == [None] * 4
        assert meta[0](torch.empty(2, 5, device="meta", dtype=torch.bfloat16)).is_meta

    def test_the_estimate_counts_their_bytes(self, blocks):
        network = torch.nn.Sequential(*blocks)
        assert offloaded_bytes(network, blocks, 0, "bfloat16", 2) == (0, 0)
        assert offloaded_bytes(network, blocks, 3, "bfloat16", 2) == (3 * 60, 2 * 60)  # 5 x 5 weights and 5 of the bias

    def test_offloaded_blocks_are_evenly_spaced(self, blocks):
        assert spread(blocks, 2) == [blocks[0], blocks[2]] and spread(blocks, 4) == blocks


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.offload_blocks": 1}, "model.offload_blocks must be 0 or at least 2"),
        ({"train.weights": "full"}, "train.weights=full trains the base"),
        ({"kernels.fp8": True}, "kernels.fp8 keeps copies"),
        ({"kernels.cuda_graphs": True}, "a CUDA graph cannot wait"),
        ({"engine": {"name": "deepspeed"}}, "DeepSpeed sends the weights"),
        ({"model.offload_blocks": 9}, "has 4 blocks"),
    ],
)
def test_impossible_combinations_are_errors(make_config, changes, message):
    with pytest.raises(UserError, match=message):
        Trainer(make_config({"model.offload_blocks": 2, **changes}))
