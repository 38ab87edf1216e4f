import pytest
import torch

from scfm_core.kernels.fp8 import Fp8Weight, fits, fp8_linear, quantise

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HAS_FP8 = DEVICE.type == "cpu" or torch.cuda.get_device_capability() >= (8, 9)
pytestmark = pytest.mark.skipif(not HAS_FP8, reason="this GPU has no fp8")


def test_rows_keep_their_own_scale():
    """Three mantissa bits: half a unit in the last place is 1/16 of a value, whatever the size of its row."""
    rows = torch.randn(5, 64, device=DEVICE) * torch.tensor([1e-6, 1e-2, 1.0, 1e3, 0.0], device=DEVICE)[:, None]
    values, scale = quantise(rows)
    back = values.float() * scale
    assert values.dtype == torch.float8_e4m3fn and scale.shape == (5, 1)
    large = rows.abs() > rows.abs().amax(dim=1, keepdim=True) / 64  # smaller ones are subnormal
    assert ((back - rows).abs() <= rows.abs() / 16 + 1e-30)[large].all()
    assert torch.equal(back[4], torch.zeros(64, device=DEVICE))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_product_is_off_by_the_roundings(dtype):
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(*shape, device=DEVICE).to(dtype) for shape in ((3, 40, 128), (96, 128), (96,)))
    x[0, 0, 0] = 300.0  # one large value spoils its own row alone
    found = fp8_linear(x, Fp8Weight(*quantise(weight)), bias)
    expected = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    assert found.shape == (3, 40, 96) and found.dtype == dtype
    error = (found.double() - expected)[1:].norm() / expected[1:].norm()
    assert 0.01 < error < 0.045


def test_shapes_that_the_hardware_takes():
    assert fits(torch.empty(32, 48)) and not fits(torch.empty(32, 40)) and not fits(torch.empty(24, 48))
