"""The products of adapted linears: Triton's kernel, and the choice between it and the library."""

import json

import pytest
import torch

from scfm_core.kernels import lora, lora_choice, lora_products, reference
from scfm_core.kernels.lora_gemm import TILES, lora_gemm

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def library():
    yield
    lora_products.use_tiles({})


# Of the last tile of a GPU (128 x 128 x 32), and of the interpreter's (32 x 32 x 32): sizes that fill tiles, and that do not.
@pytest.mark.parametrize(("rows", "inputs", "outputs", "rank"), [(64, 64, 128, 32), (70, 40, 36, 24)])
@pytest.mark.parametrize("is_backward", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_kernel_agrees_with_fp64(rows, inputs, outputs, rank, is_backward, dtype):
    torch.manual_seed(0)
    weight = torch.randn(*(inputs, outputs) if is_backward else (outputs, inputs), device=DEVICE).to(dtype)
    factor = torch.randn(*(rank, outputs) if is_backward else (outputs, rank), device=DEVICE).to(dtype)
    weight, factor = (weight, factor) if is_backward else (weight.T, factor.T)
    x, bias = torch.randn(rows, inputs, device=DEVICE).to(dtype), torch.randn(outputs, device=DEVICE).to(dtype)
    low = torch.randn(rows, 3 * rank, device=DEVICE).to(dtype)[:, rank : 2 * rank]  # of one of three joined linears
    for given in (bias, None):
        found = lora_gemm(x, weight, low, factor, given, TILES[-1])
        expected = x.double() @ weight.double() + low.double() @ factor.double()
        expected += 0 if given is None else given.double()
        bound = {torch.bfloat16: 4 * 2**-8, torch.float64: 1e-12}[dtype]
        assert found.dtype == dtype
        assert (found.double() - expected).abs().max() <= bound * expected.abs().max()


def test_adapted_linears_use_the_chosen_tiles(monkeypatch):
    monkeypatch.setattr(lora_products, "MIN_ROWS", 14)
    torch.manual_seed(0)
    x = torch.randn(2, 7, 12, device=DEVICE, requires_grad=True)
    shapes = ((10, 12), (6, 12), (10,), (6,), (4, 12), (4, 12), (10, 4), (6, 4))
    weight, other, *factors = (torch.randn(shape, device=DEVICE, requires_grad=len(shape) > 1) for shape in shapes)
    strengths = torch.tensor([0.2, 0.7], device=DEVICE)
    weights, biases, downs, ups = [weight.detach(), other.detach()], factors[:2], factors[2:4], factors[4:]
    used = [weights[0].T, weights[0], weights[1].T]
    lora_products.use_tiles({lora_products.shape_of(weight): TILES[0] for weight in used})
    calls, gemm = [], lora_gemm
    monkeypatch.setattr(
        "scfm_core.kernels.lora_gemm.lora_gemm", lambda *inputs: calls.append(inputs[1].shape) or gemm(*inputs)
    )
    found = lora.lora_linears(x, weights, biases, downs, ups, strengths)
    torch.cat(found, dim=-1).square().sum().backward()
    assert calls == [
        (12, 10),
        (12, 6),
        (10, 12),
    ]  # in the backward the first product, with all A; the second adds to it
    gradients = [leaf.grad.clone() for leaf in (x, *downs, *ups)]
    for leaf in (x, *downs, *ups):
        leaf.grad = None
    groups = zip(weights, biases, downs, ups, strict=True)
    expected = [reference.lora_linear_reference(x, *one, strengths) for one in groups]
    torch.cat(expected, dim=-1).square().sum().backward()
    for one, wanted in zip([*found, *gradients], [*expected, *(leaf.grad for leaf in (x, *downs, *ups))], strict=True):
        torch.testing.assert_close(one, wanted, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        lora.lora_linears(x[:, :6], weights, biases, downs, ups, strengths)
    assert len(calls) == 3  # too few rows


class TestChoice:
    """Times are given: no test measures any."""

    @pytest.fixture(autouse=True)
    def cache(self, tmp_path, monkeypatch):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        return tmp_path / "scfm" / "products.json"

    def choose(self, milliseconds, shapes=((600, 8, 16),)):
        """`milliseconds` of a shape's name and a tile, or None for the library."""
        asked = []

        def time(x, weight, low, factor, tile):
            assert low.shape == (x.shape[0], 4) and factor.shape == (4, weight.shape[1])
            asked.append((x.shape[0], tile))
            return milliseconds(lora_products.shape_of(weight), tile)

        return lora_choice.choose_products(shapes, 4, torch.float32, torch.device("cpu"), time=time), asked

    def test_triton_is_chosen_where_it_is_faster_and_measured_once(self, cache):
        def milliseconds(shape, tile):
            faster = 0.9 if shape.endswith("columns, float32") else 0.98  # within 3 % the library remains
            return 1.0 if tile is None else faster if tile == TILES[1] else 1.1

        choice, asked = self.choose(milliseconds)
        assert choice.tiles == {"8 x 16, columns, float32": TILES[1]}
        assert len(asked) == 2 * (len(TILES) + 1)
        again, asked = self.choose(milliseconds)
        assert again.tiles == choice.tiles and not asked
        assert "by Triton for 8 x 16, columns, float32 (measured here" in str(again)
        cache.write_text("{}")
        assert len(self.choose(milliseconds)[1]) == 2 * (len(TILES) + 1)

    def test_the_most_rows_of_a_shape_count(self):
        _, asked = self.choose(lambda *_: 1.0, ((600, 8, 16), (900, 8, 16), (700, 8, 16)))
        assert {rows for rows, _ in asked} == {900}

    @pytest.mark.parametrize("content", ["", "[]", json.dumps({"x": "fast"})])
    def test_a_damaged_cache_is_measured_again(self, cache, content):
        cache.parent.mkdir()
        cache.write_text(content)
        assert self.choose(lambda *_: 1.0)[1]

    def test_a_cpu_measures_nothing(self):
        choice = lora_choice.choose_products([(600, 8, 16)], 4, torch.float32, torch.device("cpu"))
        assert not choice.tiles and "on GPUs only" in str(choice)
        assert not str(lora_choice.ProductChoice())
