"""Tiny networks with fused blocks have the outputs, gradients and names of those with diffusers' own blocks."""

import copy

import pytest
import tiny_flux2
import torch
from torch import nn

from scfm_core.kernels.ops import REFERENCE, triton_ops
from scfm_core.models.adapters import ADAPTERS, LoRABank, LoRAConfig
from scfm_core.models.conditioning import Conditioning
from scfm_core.models.families import open_family
from scfm_core.models.fused import FusedBlock, fuse

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
OPS = {"triton": triton_ops, "reference": lambda: REFERENCE}
BOUND = 5e-6  # relative, in fp32


@pytest.fixture(scope="module", params=["flux", "flux2"])
def family(request, tmp_path_factory):
    if request.param == "flux":
        return open_family(str(request.getfixturevalue("tiny") / "flux"))
    folder = tmp_path_factory.mktemp("flux2")
    tiny_flux2.write(folder)
    return open_family(str(folder))


def inputs(family, dtype):
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, *family.latent_shape(8, 8), generator=generator).to(DEVICE)
    cond = Conditioning(
        fields={
            name: torch.randn(2, *shape, generator=generator).to(DEVICE, dtype)
            for name, shape in family.shapes(2).items()
        },
        guidance=torch.tensor([1.0, 8.0], device=DEVICE),
    )
    return latents, torch.tensor([0.9, 0.2], device=DEVICE), cond


def outputs_and_gradients(family, network, dtype):
    x, sigma, cond = inputs(family, dtype)
    velocity = family.predict(network, x, sigma, cond)
    target = torch.randn(velocity.shape, generator=torch.Generator().manual_seed(1)).to(velocity)
    (velocity * target).sum().backward()
    gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    return velocity.detach(), gradients


def assert_same(found, expected, bound):
    assert found[0].shape == expected[0].shape and found[1].keys() == expected[1].keys()
    pairs = [("velocity", found[0], expected[0])] + [(n, found[1][n], g) for n, g in expected[1].items()]
    for name, one, other in pairs:
        error = (one.double() - other.double()).norm() / other.double().norm().clamp(min=1e-30)
        assert error <= bound, f"{name}: {error:.2e}"


def adapted(network):
    bank = LoRABank(network, LoRAConfig(rank=4, alpha=4.0))
    generator = torch.Generator().manual_seed(3)
    for role in ADAPTERS:
        for factor in bank.parameters(role).values():
            factor.data.copy_(0.1 * torch.randn(factor.shape, generator=generator))
    bank.select("student", torch.tensor([0.0, 0.7], device=DEVICE))
    return network


@pytest.mark.parametrize(
    ("ops", "weights", "dtype"),
    [
        (ops, weights, dtype)
        for ops in OPS
        for weights in ("lora", "full")
        for dtype in (torch.float32, torch.bfloat16)
        if ops == "reference" or DEVICE.type == "cuda"  # else below, in one test: Triton's interpreter is slow
    ],
)
def test_agrees_with_diffusers(family, ops, weights, dtype):
    plain = family.load_network(torch.float32, DEVICE)
    if weights == "lora":
        adapted(plain)
    fused = copy.deepcopy(plain)
    backend = "triton" if ops == "triton" else "math"
    fuse(fused, OPS[ops](), backend)
    assert all(isinstance(block, FusedBlock) for block in family.blocks(fused))
    assert [name for name, _ in fused.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert fused.state_dict().keys() == plain.state_dict().keys()
    expected = outputs_and_gradients(family, plain, torch.float32)
    if dtype == torch.bfloat16:
        # Both differ from fp32 by their bf16 roundings; the error of the fused blocks may not be larger.
        for network in (plain, fused):
            network.zero_grad()
            nn.Module.to(network, dtype)
        plain_error = error_of(outputs_and_gradients(family, plain, dtype), expected)
        fused_error = error_of(outputs_and_gradients(family, fused, dtype), expected)
        assert 1e-4 < fused_error <= 1.2 * plain_error
        return
    assert_same(outputs_and_gradients(family, fused, dtype), expected, BOUND)


def error_of(found, expected):
    """Relative error of the velocity and of all gradients together."""
    one = torch.cat([found[0].double().flatten()] + [g.double().flatten() for g in found[1].values()])
    other = torch.cat([expected[0].double().flatten()] + [g.double().flatten() for g in expected[1].values()])
    return ((one - other).norm() / other.norm()).item()


def test_the_processors_alone(family):
    plain = family.load_network(torch.float32, DEVICE)
    other = copy.deepcopy(plain)
    fuse(other, REFERENCE, "math", blocks=False)
    assert not any(isinstance(module, FusedBlock) for module in other.modules())
    expected = outputs_and_gradients(family, plain, torch.float32)
    assert_same(outputs_and_gradients(family, other, torch.float32), expected, BOUND)


def test_triton_blocks_train_eagerly_and_compiled(family):
    """The first block of each kind is compiled to one graph, the others are eager; adapters and all base weights train."""
    from scfm_core.train.network import set_activation_checkpointing

    network = family.load_network(torch.float32, DEVICE)
    network.single_transformer_blocks = network.single_transformer_blocks[:2]  # the interpreter is slow
    plain = adapted(network)
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_("lora_" not in name or ".student." in name)
    expected = outputs_and_gradients(family, plain, torch.float32)
    assert any("norm_added_k" in name for name in expected[1]) and any("lora_A" in name for name in expected[1])
    plain.zero_grad()
    fuse(plain, triton_ops(), "triton")
    set_activation_checkpointing(family.blocks(plain), "selective")
    assert len(plain.transformer_blocks) > 1 or len(plain.single_transformer_blocks) > 1
    for blocks in (plain.transformer_blocks, plain.single_transformer_blocks):
        blocks[0].compile(backend="aot_eager", fullgraph=True)
    assert_same(outputs_and_gradients(family, plain, torch.float32), expected, BOUND)


def test_number_of_compiled_graphs(family, monkeypatch):
    """Per kind of block one graph for the student, and one for both EMAs, whose passes have no gradient."""
    from torch._dynamo.testing import CompileCounter

    from scfm_core.train.network import compile_blocks

    network = family.load_network(torch.bfloat16, DEVICE)
    for blocks in (network.transformer_blocks, network.single_transformer_blocks):
        blocks.append(copy.deepcopy(blocks[0]))  # so that a later block differs from the first, if it can
    bank = LoRABank(network, LoRAConfig(rank=4, alpha=4.0))
    fuse(network, REFERENCE, "math")
    bank.keep_copies()
    counter, compile_block = CompileCounter(), nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda block: compile_block(block, backend=counter, fullgraph=True))
    torch._dynamo.reset()
    compile_blocks(family.blocks(network))
    assert torch.compiler.config.cache_key_tag  # else an update of our operations would find graphs of before
    x, sigma, cond = inputs(family, torch.bfloat16)
    for _ in range(2):
        for role in ADAPTERS[::-1]:
            bank.select(role, torch.tensor([0.5, 1.0], device=DEVICE))
            with torch.inference_mode(role != "student"):
                velocity = family.predict(network, x, sigma, cond)
        velocity.sum().backward()
    assert counter.frame_count == 4


def test_a_mask_is_refused(family):
    network = family.load_network(torch.float32, DEVICE)
    fuse(network, REFERENCE, "math")
    attn = network.single_transformer_blocks[0].attn
    with pytest.raises(ValueError, match="takes a rotary embedding and no mask"):
        attn(torch.zeros(1, 4, family.width, device=DEVICE), attention_mask=torch.ones(1, 4, device=DEVICE))
