"""Gradients of replicas: summed in buckets within the last backward pass of a step, in one order on all ranks."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from launch import run_distributed
from torch import nn
from torch.utils.checkpoint import checkpoint

from scfm_core.distributed import replicas
from scfm_core.distributed.replicas import ReplicatedGradients
from scfm_core.distributed.world import join_world

WIDTH, LAYERS = 6, 5


def network() -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS))


def loss(layers: nn.ModuleList, seed: int, *, unused: int | None = None, checkpointed: bool = False) -> torch.Tensor:
    """The first layer is used twice; without `unused`."""
    x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(seed))
    for layer in [*(each for number, each in enumerate(layers) if number != unused), layers[0]]:
        x = torch.tanh(checkpoint(layer, x, use_reentrant=False) if checkpointed else layer(x))
    return x.square().sum()


def gradients(layers: nn.ModuleList, losses: list[torch.Tensor]) -> torch.Tensor:
    for each in losses:
        each.backward()
    return torch.cat([
        torch.zeros_like(layer.weight).flatten() if layer.weight.grad is None else layer.weight.grad.flatten()
        for layer in layers
    ])  # fmt: skip


class Sum:
    """In place of `dist.all_reduce`: records which part is summed, and doubles it once it is waited for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.started: list[int] = []
        monkeypatch.setattr(dist, "all_reduce", self.start)

    def start(self, part: torch.Tensor, *, async_op: bool) -> Any:
        self.started.append(part.storage_offset() // WIDTH**2)
        work = type("Work", (), {"wait": lambda _: part.mul_(2)})
        return work()


@pytest.mark.parametrize("checkpointed", [False, True])
def test_only_the_last_backward_sums(checkpointed, monkeypatch):
    monkeypatch.setattr(replicas, "BUCKET", 2 * 4 * WIDTH**2)  # two layers
    plain = network()
    expected = gradients(plain, [loss(plain, 1), loss(plain, 2)])
    layers, sums = network(), Sum(monkeypatch)
    together = ReplicatedGradients(list(layers.parameters()), overlapped=True)
    for step in range(2):
        loss(layers, 1, checkpointed=checkpointed).backward()
        assert sums.started == []
        together.expect_last_backward()
        loss(layers, 2, checkpointed=checkpointed).backward()
        assert sums.started == [3, 1, 0], "of layers 3 and 4, of 1 and 2, of 0: all within the backward"
        together.sum_()
        assert torch.equal(together.flat, 2 * expected), step
        assert torch.equal(torch.cat([layer.weight.grad.flatten() for layer in layers]), together.flat)
        together.flat.zero_()
        sums.started.clear()


@pytest.mark.parametrize(("unused", "within"), [(4, []), (2, [3]), (None, [3, 1, 0])])
def test_a_missing_gradient_does_not_change_the_order(unused, within, monkeypatch):
    monkeypatch.setattr(replicas, "BUCKET", 2 * 4 * WIDTH**2)
    layers, sums = network(), Sum(monkeypatch)
    together = ReplicatedGradients(list(layers.parameters()), overlapped=True)
    together.expect_last_backward()
    loss(layers, 1, unused=unused).backward()
    assert sums.started == within
    together.sum_()
    assert sums.started == [3, 1, 0]
    plain = network()
    assert torch.equal(together.flat, 2 * gradients(plain, [loss(plain, 1, unused=unused)]))


def test_without_overlap_nothing_is_sent_within_the_backward(monkeypatch):
    layers, sums = network(), Sum(monkeypatch)
    together = ReplicatedGradients(list(layers.parameters()), overlapped=False)
    together.expect_last_backward()
    loss(layers, 1).backward()
    assert sums.started == []
    together.sum_()
    assert sums.started == [0], "all layers are one bucket of 100 MiB"


def sums_of_a_rank(failing: int | None) -> torch.Tensor:
    """In a rank: two steps; rank 1 has no gradient of layer 2 in the first. `failing` raises within the second's last backward."""
    replicas.BUCKET = 4 * WIDTH**2
    with join_world(torch.device("cpu"), 60.0) as world:
        layers, found = network(), []
        together = ReplicatedGradients(list(layers.parameters()), overlapped=True)
        for step in range(2):
            loss(layers, 10 * step + world.rank).backward()
            together.expect_last_backward()
            last = loss(layers, 100 + 10 * step + world.rank, unused=2 if world.rank == 1 and not step else None)
            if step and world.rank == failing:
                layers[1].weight.register_hook(lambda _: 1 / 0)  # after the sums of layers 4 to 2 have started
            last.backward()
            together.sum_()
            found.append(together.flat.clone())
            together.flat.zero_()
        return torch.cat(found)


def test_all_ranks_have_the_same_bits():
    found = run_distributed(sums_of_a_rank, 3, None)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    expected = []
    for step in range(2):
        layers, losses = network(), []
        for rank in range(3):
            unused = 2 if rank == 1 and not step else None
            losses += [loss(layers, 10 * step + rank), loss(layers, 100 + 10 * step + rank, unused=unused)]
        expected.append(gradients(layers, losses))
    torch.testing.assert_close(found[0], torch.cat(expected))


def test_a_rank_that_fails_within_the_backward_ends_the_others():
    outcomes = run_distributed(sums_of_a_rank, 3, 1, timeout=60, expect_failure=True)
    assert "ZeroDivisionError" in outcomes[1].traceback
    for rank in (0, 2):
        assert "PeerLost: rank 1 is gone" in outcomes[rank].traceback
