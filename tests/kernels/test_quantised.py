"""Linears with packed weights against the same products with the dequantised weight, and the errors of the formats."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from scfm_core.kernels import nf4
from scfm_core.kernels.lora import lora_linear
from scfm_core.kernels.quantised import dequantise, quantise, quantised_linear

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PACKINGS = ("int8", "float8", "nf4")


def inputs(packing, dtype):
    """x of two samples, packed weight [48, 64] and bias, A, B and strengths."""
    torch.manual_seed(0)
    x, bias = torch.randn(2, 3, 64, device=DEVICE), torch.randn(48, device=DEVICE)
    down, up = torch.randn(4, 64, device=DEVICE), torch.randn(48, 4, device=DEVICE)
    values, scale = quantise(torch.randn(48, 64, device=DEVICE).to(dtype), packing)
    trained = [tensor.to(dtype).requires_grad_() for tensor in (x, down, up)]
    return *trained, values, scale, bias.to(dtype), torch.tensor([0.0, 0.7], device=DEVICE)


def adapted(x, values, scale, bias, down, up, strength, copies=None):
    return lora_linear(x, values, bias, down, up, strength, copies, scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("packing", PACKINGS)
def test_products_and_gradients_are_those_of_the_dequantised_weight(packing, dtype):
    x, down, up, values, scale, bias, strength = inputs(packing, dtype)
    weight = dequantise(values, scale, dtype)
    assert weight.shape == (48, 64) and weight.dtype == dtype
    copies = (down.detach(), up.detach())
    masters = [torch.zeros_like(factor, dtype=torch.float32).requires_grad_() for factor in copies]
    pairs = [
        (quantised_linear(x, values, scale, bias), F.linear(x, weight, bias), (x,)),
        (
            adapted(x, values, scale, bias, down, up, strength),
            lora_linear(x, weight, bias, down, up, strength),
            (x, down, up),
        ),
        (  # fp32 masters that get the gradients, and copies that are read
            adapted(x, values, scale, bias, *masters, strength, copies),
            lora_linear(x, weight, bias, *masters, strength, copies),
            (x, *masters),
        ),
    ]
    for found, expected, trained in pairs:
        upstream = torch.randn_like(expected)
        assert torch.equal(found, expected)
        for a, b in zip(*(torch.autograd.grad(y, trained, upstream) for y in (found, expected)), strict=True):
            assert torch.equal(a, b) and a.dtype == b.dtype


@pytest.mark.parametrize("packing", PACKINGS)
def test_only_packed_weights_are_kept_for_the_backward_pass(packing):
    x, down, up, values, scale, bias, strength = inputs(packing, torch.float32)
    kept = []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        quantised_linear(x, values, scale, bias)
        assert {tensor.data_ptr() for tensor in kept} == {values.data_ptr(), scale.data_ptr()}
        kept.clear()
        adapted(x, values, scale, bias, down, up, strength)
    shapes = {tuple(tensor.shape) for tensor in kept if tensor.is_floating_point() and tensor.dtype != values.dtype}
    assert shapes == {(2, 3, 64), (4, 64), (48, 4), (2,), (6, 4), tuple(scale.shape)}


@pytest.mark.parametrize("packing", PACKINGS)
def test_one_graph_without_breaks(packing):
    x, down, up, values, scale, bias, strength = inputs(packing, torch.float32)
    arguments = (x, values, scale, bias, down, up, strength)
    compiled = torch.compile(adapted, fullgraph=True, backend="aot_eager")
    for a, b in zip(*(torch.autograd.grad(f(*arguments).sum(), (x, down, up)) for f in (compiled, adapted)), strict=True):  # fmt: skip
        assert torch.equal(a, b)
    if packing == "nf4":  # opcheck compares inputs by operations that float8 does not have
        checks = ("test_schema", "test_autograd_registration", "test_faketensor")
        factors = (bias, down, up, strength, None, None, scale)
        torch.library.opcheck(torch.ops.scfm.lora_linear, (x, values, *factors), test_utils=checks)
        torch.library.opcheck(torch.ops.scfm.quantised_linear, arguments[:4], test_utils=checks)


@pytest.mark.parametrize("packing", PACKINGS)
def test_bytes_and_flops_are_counted_on_the_meta_device(packing):
    weight = torch.empty(256, 128, dtype=torch.bfloat16, device="meta")
    values, scale = quantise(weight, packing)
    scales = 256 * 128 // 64 if packing == "nf4" else 256
    assert values.nbytes == 256 * 128 // (2 if packing == "nf4" else 1) and scale.nbytes == 4 * scales
    x, down, up = (torch.empty(*s, device="meta", dtype=torch.bfloat16, requires_grad=True) for s in ((2, 5, 128), (8, 128), (256, 8)))  # fmt: skip
    product, factors = 2 * 10 * 256 * 128, 2 * 10 * 8 * (256 + 128)
    with FlopCounterMode(display=False) as counter:
        y = adapted(x, values, scale, None, down, up, torch.empty(2, device="meta"))
        assert counter.get_total_flops() == product + factors
        y.sum().backward()
        assert counter.get_total_flops() == 2 * product + 3 * factors
        quantised_linear(x, values, scale, None).sum().backward()
    assert counter.get_total_flops() == 4 * product + 3 * factors and x.grad.shape == x.shape


def test_int8_is_off_by_half_a_unit_at_most():
    """A unit is the row's largest value / 127, whatever the size of the row; a row of zeros stays zero."""
    torch.manual_seed(0)
    rows = torch.randn(5, 64, device=DEVICE) * torch.tensor([1e-6, 1e-2, 1.0, 1e3, 0.0], device=DEVICE)[:, None]
    back = dequantise(*quantise(rows, "int8"), torch.float32)
    unit = rows.abs().amax(dim=1, keepdim=True) / 127
    assert ((back - rows).abs() <= 0.501 * unit).all() and ((back - rows).abs() > 0.4 * unit)[:4].any(1).all()


class TestNf4:
    def test_each_weight_becomes_the_nearest_level_of_its_block(self, monkeypatch):
        """Also if a weight is packed in several parts, and for blocks of zeros."""
        monkeypatch.setattr(nf4, "_PART", 192)
        torch.manual_seed(0)
        weight = torch.randn(10, 64, device=DEVICE) * 10.0 ** torch.arange(-5, 5, device=DEVICE)[:, None]
        weight[3] = 0
        values, scale = quantise(weight, "nf4")
        levels = nf4.levels(DEVICE)[:, None, None] * weight.abs().amax(dim=1, keepdim=True)
        nearest = (levels - weight).abs().amin(dim=0)
        torch.testing.assert_close((dequantise(values, scale, torch.float32) - weight).abs(), nearest)

    def test_levels_are_means_of_normal_quantiles(self):
        """Appendix E of the paper: 8 positive and 7 negative quantiles between the same outermost one, and 0, scaled to 1."""
        normal = torch.distributions.Normal(0.0, 1.0)
        outermost = (1 - 1 / 30 + 1 - 1 / 32) / 2
        positive = normal.icdf(torch.linspace(outermost, 0.5, 9)[:-1])
        negative = -normal.icdf(torch.linspace(outermost, 0.5, 8)[:-1])
        expected = torch.cat([positive, torch.zeros(1), negative]).sort().values / positive.max()
        torch.testing.assert_close(nf4.levels(torch.device("cpu")), expected, atol=2e-5, rtol=0)

    @pytest.mark.parametrize("shape", [(8, 16), (96, 40), (130, 64)])
    def test_any_whole_number_of_blocks(self, shape):
        """Rows need not be whole blocks."""
        torch.manual_seed(0)
        weight = torch.randn(shape, device=DEVICE)
        back = dequantise(*quantise(weight, "nf4"), torch.float32)
        assert 0.08 < (back - weight).norm() / weight.norm() < 0.1

    def test_what_does_not_fit(self):
        assert nf4.fits_nf4(96, 40) and not nf4.fits_nf4(64, 3) and not nf4.fits_nf4(9, 10)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_the_kernel_is_the_reference(self, dtype):
        from scfm_core.kernels.nf4_unpack import unpack

        torch.manual_seed(0)
        values, scale = quantise(torch.randn(33, 128, device=DEVICE), "nf4")  # more than one program, and a rest
        found = unpack(values, scale, nf4.levels(DEVICE), dtype)
        expected = nf4.dequantise_nf4_reference(values, scale, dtype)
        if dtype == torch.float32 or DEVICE.type == "cuda":
            assert torch.equal(found, expected)
        else:  # Triton's interpreter truncates to bf16
            torch.testing.assert_close(found, expected, rtol=2**-7, atol=0)
