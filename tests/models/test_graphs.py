"""Graphed passes: on a GPU the real thing; elsewhere with a graph that repeats the call that was captured."""

import contextlib

import pytest
import torch

from scfm_core.models.graphs import GraphedVelocity
from scfm_core.models.protocol import Conditioning

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Model:
    """A velocity over a weight that changes in place, and how often Python entered it."""

    def __init__(self):
        self.weight = torch.ones(1, device=DEVICE)
        self.calls = 0

    def __call__(self, x, sigma, cond, strength):
        self.calls += 1
        guidance = 0.0 if cond.guidance is None else cond.guidance[:, None]
        return x * self.weight + (sigma * strength)[:, None] + cond.text.sum((1, 2))[:, None] + guidance + cond.pooled


@pytest.fixture
def model(monkeypatch):
    model = Model()
    if DEVICE.type == "cuda":
        return model

    class Graph:
        """Runs the captured call again, on the tensors that it was captured with, into the same output."""

        def replay(self):
            self.output.copy_(self.call())

    @contextlib.contextmanager
    def capture(graph):
        before = Model.__call__

        def recording(self, *arguments):
            output = before(self, *arguments)
            graph.output, graph.call = output, lambda: before(self, *arguments)
            return output

        monkeypatch.setattr(Model, "__call__", recording)
        yield
        monkeypatch.setattr(Model, "__call__", before)

    class Stream:
        def wait_stream(self, other):
            pass

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    return model


def draw(batch, guidance=True):
    cond = Conditioning(
        text=torch.randn(batch, 2, 3, device=DEVICE),
        pooled=torch.randn(batch, 4, device=DEVICE),
        guidance=torch.rand(batch, device=DEVICE) if guidance else None,
    )
    return (
        torch.randn(batch, 4, device=DEVICE),
        torch.rand(batch, device=DEVICE),
        cond,
        torch.rand(batch, device=DEVICE),
    )


@torch.no_grad()
def test_every_call_sees_its_own_inputs_and_the_weights_of_the_moment(model):
    graphed = GraphedVelocity(model)
    inputs = [draw(3) for _ in range(3)]
    results = [graphed(*one) for one in inputs]  # kept: a later replay must not write into them
    for one, result in zip(inputs, results, strict=True):
        torch.testing.assert_close(result, model(*one))
    model.weight.mul_(2)
    torch.testing.assert_close(graphed(*inputs[0]), model(*inputs[0]))


@torch.no_grad()
def test_one_capture_for_each_shape(model):
    graphed = GraphedVelocity(model)
    for batch, guidance in ((3, True), (2, True), (3, False), (3, True), (2, True)):
        one = draw(batch, guidance)
        torch.testing.assert_close(graphed(*one), model(*one))
    assert len(graphed._captured) == 3
