"""A chosen backend of attention in diffusers' own blocks, where keys are masked."""

from collections import Counter

import pytest
import tiny_qwen_image
import torch
from parity import Pair

from scfm_core.kernels.attention import SDPA
from scfm_core.train.network import set_activation_checkpointing


@pytest.fixture
def seen(monkeypatch):
    """Counts calls of attention, by the first backend in the order and by whether there is a mask."""
    counts: Counter[tuple[int, bool]] = Counter()
    attention = torch.nn.functional.scaled_dot_product_attention

    def counted(*arguments, attn_mask=None, **keywords):
        counts[torch._C._get_sdp_priority_order()[0], attn_mask is not None] += 1
        return attention(*arguments, attn_mask=attn_mask, **keywords)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    return counts


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "qwen_image"
    tiny_qwen_image.write(folder)
    return Pair(folder, torch.float32, 16)


def gradient(pair, network, seen=None):
    """Velocity and gradient of one weight, for captions of two lengths."""
    cond, x = pair.encoders.encode(["a handwritten digit three", "a fox"]), torch.linspace(-1, 1, 512).view(2, 4, 8, 8)
    if seen is not None:
        seen.clear()  # the text encoder's calls
    velocity = pair.family.predict(network, x, torch.tensor([0.9, 0.4]), cond)
    velocity.square().sum().backward()
    return velocity.detach(), network.transformer_blocks[0].attn.to_q.weight.grad


@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize("backend", ["math", "flash"])
def test_masked_blocks_use_the_backend_also_in_recomputation(pair, seen, backend, checkpointing):
    plain = pair.family.load_network(torch.float32, "cpu")
    expected = gradient(pair, plain)
    network = pair.family.load_network(torch.float32, "cpu")
    pair.family.fuse(network, None, backend, blocks=False)
    blocks = pair.family.blocks(network)
    set_activation_checkpointing(blocks, checkpointing)
    found = gradient(pair, network, seen)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-3, atol=1e-5)
    calls = len(blocks) * (2 if checkpointing == "full" else 1)
    assert seen == {(int(SDPA[backend].value), True): calls}


def test_compiled_blocks_keep_the_backend(pair):
    network = pair.family.load_network(torch.float32, "cpu")
    expected = gradient(pair, network)
    pair.family.fuse(network, None, "math", blocks=False)
    network.zero_grad(set_to_none=True)
    blocks = pair.family.blocks(network)
    set_activation_checkpointing(blocks, "selective")
    torch._dynamo.reset()
    for block in blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    found = gradient(pair, network)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-3, atol=1e-5)
