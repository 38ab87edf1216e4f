"""Graphed passes: with CUDA graphs on a GPU, else with `RecordedGraph`, which follows the same rules in PyTorch.

Only a GPU shows that a capture succeeds, that the warm-up keeps compilation and autotuning out of it, and that side
streams are ordered correctly.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from scfm_core.models.adapters import ADAPTERS, LoRAConfig
from scfm_core.models.conditioning import Conditioning
from scfm_core.models.families import open_family
from scfm_core.models.graphs import WARM_UP, GraphedVelocity
from scfm_core.models.student import LoRAModel

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class RecordedGraph(TorchDispatchMode):
    """The operations that ran within the capture, with the tensors that they ran on.

    As a CUDA graph: `replay` enters no Python of the model, reads what those tensors hold now and writes into the
    tensors that the capture made; the capture itself computes nothing; within it no value may be read on the host. Graphs of one
    pool share memory: a replay may overwrite what others have made.
    """

    def __init__(self):
        super().__init__()
        self.operations = []
        self.pool = [self]

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        result = function(*arguments, **(keywords or {}))
        self.operations.append((function, arguments, keywords or {}, result))
        return result

    def replay(self):
        for other in self.pool:
            other.forget_results()
        for function, arguments, keywords, result in self.operations:
            again = function(*arguments, **keywords)
            for old, new in zip(tensors(result), tensors(again), strict=True):
                if address(old) != address(new):  # else a view, or an operation in place
                    old.copy_(new)

    def forget_results(self):
        for _, arguments, keywords, result in self.operations:
            given = {address(tensor) for tensor in tensors((arguments, keywords))}
            for tensor in tensors(result):
                if address(tensor) not in given and tensor.is_floating_point():
                    tensor.fill_(torch.nan)


@pytest.fixture(autouse=True)
def graphs_without_a_gpu(monkeypatch):
    if DEVICE.type == "cuda":
        return

    @contextlib.contextmanager
    def capture(graph: RecordedGraph, pool: list[RecordedGraph]) -> Iterator[None]:
        with graph:
            yield
        pool.append(graph)
        graph.pool = pool
        graph.forget_results()

    class Stream:
        def wait_stream(self, other):
            pass

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", list)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", RecordedGraph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())


class Model:
    """A velocity that every input changes, over a weight that changes in place; counts how often Python enters it."""

    def __init__(self):
        self.weight = torch.ones(1, device=DEVICE)
        self.calls = 0

    def __call__(self, x, sigma, cond, strength):
        self.calls += 1
        guidance = 0.0 if cond.guidance is None else cond.guidance[:, None]
        return (
            x * self.weight
            + (sigma * strength)[:, None]
            + cond.fields["text"].sum((1, 2))[:, None]
            + guidance
            + cond.fields["pooled"]
        )


def draw(batch, *, guidance=True, dtype=torch.float32):
    cond = Conditioning(
        fields={
            "text": torch.randn(batch, 2, 3, device=DEVICE, dtype=dtype),
            "pooled": torch.randn(batch, 4, device=DEVICE),
        },
        guidance=torch.rand(batch, device=DEVICE) if guidance else None,
    )
    return (
        torch.randn(batch, 4, device=DEVICE),
        torch.rand(batch, device=DEVICE),
        cond,
        torch.rand(batch, device=DEVICE),
    )


@torch.no_grad()
def test_every_call_sees_its_own_inputs_and_the_weights_of_the_moment():
    model = Model()
    graphed = GraphedVelocity(model)
    inputs = [draw(3) for _ in range(3)]
    results = [graphed(*one) for one in inputs]  # kept: a later replay must not write into them
    assert model.calls == WARM_UP + 1
    for one, result in zip(inputs, results, strict=True):
        torch.testing.assert_close(result, model(*one))
    model.weight.mul_(2)
    torch.testing.assert_close(graphed(*inputs[0]), model(*inputs[0]))


@torch.no_grad()
def test_a_call_does_not_change_the_inputs_of_an_earlier_one():
    graphed = GraphedVelocity(Model())
    x, sigma, cond, strength = first = draw(3)
    given = [tensor.clone() for tensor in (x, sigma, strength, *cond.fields.values(), cond.guidance)]
    graphed(*first)
    graphed(*draw(3))
    for tensor, before in zip((x, sigma, strength, *cond.fields.values(), cond.guidance), given, strict=True):
        assert torch.equal(tensor, before)


@torch.no_grad()
def test_one_capture_for_each_set_of_shapes_and_dtypes():
    model = Model()
    graphed = GraphedVelocity(model)
    kinds = [{"batch": 3}, {"batch": 2}, {"batch": 3, "guidance": False}, {"batch": 3, "dtype": torch.bfloat16}]
    for number, kind in enumerate(kinds + kinds):
        before, one = model.calls, draw(**kind)
        result = graphed(*one)
        assert model.calls - before == (WARM_UP + 1 if number < len(kinds) else 0), kind
        torch.testing.assert_close(result, model(*one))


@torch.no_grad()
def test_the_passes_of_an_adapted_flux_can_be_replayed(tiny):
    """Which adapter runs is fixed by the capture; strength, sigma and guidance are read at each replay."""
    family = open_family(str(tiny / "flux"))
    model = LoRAModel(family, family.load_network(torch.float32, DEVICE), LoRAConfig(rank=2, alpha=2.0))
    for role in ADAPTERS:
        for factor in model.parameters(role).values():
            factor.normal_(std=0.1)
    near = GraphedVelocity(model.near_velocity)
    far = GraphedVelocity(model.far_velocity, shared=near)

    def inputs():
        cond = Conditioning(
            fields={name: torch.randn(2, *shape, device=DEVICE) for name, shape in family.shapes(5).items()},
            guidance=1 + 7 * torch.rand(2, device=DEVICE),
        )
        x = torch.randn(2, *family.latent_shape(16, 16), device=DEVICE)
        return x, torch.rand(2, device=DEVICE), cond, torch.rand(2, device=DEVICE)

    for _ in range(3):  # the two alternate, as in a step
        one = inputs()
        near_result, far_result = near(*one), far(*one)
        torch.testing.assert_close(near_result, model.near_velocity(*one))
        torch.testing.assert_close(far_result, model.far_velocity(*one))
        assert not torch.allclose(near_result, far_result)
