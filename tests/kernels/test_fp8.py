"""Linears in fp8: their error is that of the format's roundings, computed here from the format alone."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from scfm_core.kernels.fp8 import Fp8Weight, fits, fp8_linear, quantise

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HAS_FP8 = DEVICE.type == "cpu" or torch.cuda.get_device_capability() >= (8, 9)
pytestmark = pytest.mark.skipif(not HAS_FP8, reason="this GPU has no fp8")


def test_rows_keep_their_own_scale():
    """Three mantissa bits: half a unit in the last place is 1/16 of a value, whatever the size of its row."""
    torch.manual_seed(0)
    rows = torch.randn(5, 64, device=DEVICE) * torch.tensor([1e-6, 1e-2, 1.0, 1e3, 0.0], device=DEVICE)[:, None]
    values, scale = quantise(rows)
    back = values.float() * scale
    assert values.dtype == torch.float8_e4m3fn and scale.shape == (5, 1)
    large = rows.abs() > rows.abs().amax(dim=1, keepdim=True) / 64  # smaller ones are subnormal
    assert large[:4].any(1).all() and ((back - rows).abs() <= rows.abs() / 16 + 1e-30)[large].all()
    assert torch.equal(back[4], torch.zeros(64, device=DEVICE))


def rounding(tensor: Tensor) -> Tensor:
    """Standard deviation of each element's rounding to e4m3, with the row's maximum at 448: one unit / sqrt(12).

    A normal number in [2^e, 2^(e+1)) has units of 2^(e-3); subnormal ones, below 2^-6, have units of 2^-9.
    """
    scale = tensor.double().abs().amax(dim=1, keepdim=True) / 448
    exponent = (tensor.double() / scale).abs().clamp(min=2**-6).log2().floor()
    return 2 ** (exponent - 3) * scale / 12**0.5


def assert_off_by_the_roundings(found: Tensor, x: Tensor, weight: Tensor) -> None:
    """The error has the predicted size, and is no multiple of the result.

    Both factors are rounded independently: a result's variance is the sum of x_k^2 var(w_k) + w_k^2 var(x_k).
    """
    x, weight = x.double(), weight.double()
    exact = x @ weight.T
    variance = x.square() @ rounding(weight).square().T + rounding(x).square() @ weight.square().T
    size = (found.double() - exact).norm() / variance.sum().sqrt()
    assert 0.9 < size < 1.05, f"{size:.3f} of the predicted error"
    # To first order the roundings average out over 10^4 results. The second order is some 10^-3 for each factor: within
    # a unit the smaller values are more frequent.
    slope = (found.double() * exact).sum() / exact.square().sum()
    assert abs(slope - 1) < 0.005, f"results are scaled by {slope:.4f}"


def factors(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    x, weight = torch.randn(120, 128, device=DEVICE), torch.randn(96, 128, device=DEVICE)
    # Rows of different sizes: a scale for the whole tensor would lose the small ones.
    x[:40] *= 1e-5
    weight[:32] *= 1e2
    return x.to(dtype), weight.to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_product_is_off_by_the_roundings(dtype):
    x, weight = factors(dtype)
    bias = torch.randn(96, device=DEVICE).to(dtype)
    quantised = Fp8Weight(*quantise(weight))
    found = fp8_linear(x, quantised, None)
    assert found.dtype == dtype
    for rows in (slice(0, 40), slice(40, 120)):
        for columns in (slice(0, 32), slice(32, 96)):
            assert_off_by_the_roundings(found[rows, columns], x[rows], weight[columns])
    batched = fp8_linear(x.view(3, 40, 128), quantised, bias)
    assert batched.shape == (3, 40, 96) and batched.dtype == dtype
    # A GPU computes the product in bf16.
    tolerance = {"rtol": 2**-6, "atol": 2**-6} if dtype == torch.bfloat16 or DEVICE.type == "cuda" else {}
    torch.testing.assert_close(batched.view(120, 96), found + bias, **tolerance)


def cut_off(x: Tensor) -> tuple[Tensor, Tensor]:
    """Towards zero instead of to the nearest: one representation down where the rounding went up."""
    values, scale = quantise(x)
    went_up = (values.float() * scale).abs() > x.abs()
    return (values.view(torch.uint8) - went_up.to(torch.uint8)).view(torch.float8_e4m3fn), scale


def one_scale(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = x.abs().max() / 448
    return (x / scale).to(torch.float8_e4m3fn), scale


WRONG: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "a scale off by 1 %": lambda x: (quantise(x)[0], 1.01 * quantise(x)[1]),
    "two mantissa bits": lambda x: (quantise(x)[0].float().to(torch.float8_e5m2), quantise(x)[1]),
    "cut off, not rounded": cut_off,
    "one scale for all rows": one_scale,
}


@pytest.mark.parametrize("name", WRONG)
def test_the_bound_catches_a_wrong_quantisation(name):
    x, weight = factors(torch.float32)

    def product(quantise_input: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Tensor:
        (values, scale), (weights, weight_scale) = quantise_input(x), quantise(weight)
        return ((values.float() * scale) @ (weights.float() * weight_scale).T)[:40]

    assert_off_by_the_roundings(product(quantise), x[:40], weight)
    with pytest.raises(AssertionError, match=r"of the predicted error|results are scaled by"):
        assert_off_by_the_roundings(product(WRONG[name]), x[:40], weight)


def test_shapes_that_the_hardware_takes():
    assert fits(torch.empty(32, 48)) and not fits(torch.empty(32, 40)) and not fits(torch.empty(24, 48))
