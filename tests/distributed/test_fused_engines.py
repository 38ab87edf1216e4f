"""Fused blocks over weights that an engine shards: the kernels read what is gathered, forward and backward."""

import pytest
import torch
from runs import ENGINES, make_tree, run_distributed, train_all

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(),
    reason="ranks on the CPU need Triton's interpreter, which is off where there is a GPU",
)

FUSED = {"kernels": {"fused": "triton", "attention": "triton"}}


@pytest.fixture(scope="module")
def plain(tiny, tiny_short, tmp_path_factory):
    """weights -> the rows of one process with diffusers' own blocks."""
    known = {}

    def get(weights):
        if weights not in known:
            run_dir = tmp_path_factory.mktemp("plain") / "run"
            tree = make_tree(tiny, run_dir, **changes(weights, tiny_short), train__micro_batch_size=2)
            [known[weights]] = run_distributed(train_all, 1, tree)
        return known[weights]

    return get


def changes(weights, folder):
    """One step of one block of each kind: Triton's interpreter takes seconds a forward."""
    return {
        "model__path": str(folder),
        "train__steps": 1,
        "train__weights": weights,
        "train__global_batch_size": 2,
    }


@pytest.mark.parametrize(("engine", "weights"), [("fsdp2", "full"), ("zero3", "lora")])
def test_losses_and_gradients_are_those_of_plain_blocks(engine, weights, plain, tiny, tiny_short, tmp_path):
    small = changes(weights, tiny_short)
    tree = make_tree(tiny, tmp_path / "run", **small, train__micro_batch_size=1, engine=ENGINES[engine])
    rows = run_distributed(train_all, 2, tree | FUSED)[0]
    expected = plain(weights)
    for key in ("loss", "grad_norm"):
        assert [row[key] for row in rows] == pytest.approx([row[key] for row in expected], rel=2e-5)
