"""Every kernel against its plain PyTorch reference in fp64: compiled on a GPU, else in Triton's interpreter."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from scfm_core.kernels import concat, flash, lora, lora_products, modulate, norm_rope, reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HEADS, DIM = 3, 16
# A result is rounded once, when it is stored; sums of rounded values (gradients through a stored row) add a little. In
# bf16 Triton's interpreter truncates, and a GPU rounds to nearest.
BOUND = {torch.bfloat16: (2 if DEVICE.type == "cuda" else 4) * 2**-8, torch.float32: 16 * 2**-24, torch.float64: 1e-12}


def rotation(tokens: int) -> tuple[Tensor, Tensor]:
    angles = torch.rand(tokens, DIM // 2, device=DEVICE).repeat_interleave(2, dim=1) * 6
    return angles.cos(), angles.sin()


def two(function: Callable[..., list[Tensor]]) -> Callable[..., tuple[Tensor, ...]]:
    """Two linears of one x, from a function of lists."""
    return lambda x, w, v, b, c, a, d, e, u, scale: tuple(function(x, [w, v], [b, c], [a, d], [e, u], scale))


def linears_reference(x: Tensor, *groups: list[Tensor]) -> list[Tensor]:
    *each, scale = groups
    return [reference.lora_linear_reference(x, *one, scale) for one in zip(*each, strict=True)]


@dataclass
class Case:
    """A kernel, its reference, and the shapes of its inputs; `fixed` are further arguments without gradient."""

    kernel: Callable[..., Tensor | tuple[Tensor, ...]]
    reference: Callable[..., Tensor | tuple[Tensor, ...]]
    shapes: tuple[tuple[int, ...] | None, ...]
    fixed: Callable[[], tuple] = tuple


CASES = {
    "norm_rope": Case(
        norm_rope.norm_rope, reference.norm_rope_reference,
        ((2, 19, HEADS * DIM), (2, 5, HEADS * DIM), (DIM,), (DIM,)), lambda: (*rotation(24), HEADS),
    ),
    "norm_rope of joined streams": Case(
        norm_rope.norm_rope, reference.norm_rope_reference,
        ((2, 17, HEADS * DIM), None, (DIM,), None), lambda: (*rotation(17), HEADS),
    ),
    "modulate": Case(modulate.modulate, reference.modulate_reference, ((2, 21, 20), (2, 20), (2, 20))),
    "gate_residual": Case(modulate.gate_residual, reference.gate_residual_reference, ((2, 21, 20), (2, 21, 20), (2, 20))),
    "gated_modulate": Case(
        modulate.gated_modulate, reference.gated_modulate_reference,
        ((2, 21, 20), (2, 21, 20), (2, 20), (2, 20), (2, 20)),
    ),
    "gelu_concat": Case(concat.gelu_concat, reference.gelu_concat_reference, ((2, 5, 20), (2, 5, 1100))),
    "swiglu_concat": Case(concat.swiglu_concat, reference.swiglu_concat_reference, ((2, 5, 20), (2, 5, 2200))),
    "swiglu_concat of nothing": Case(concat.swiglu_concat, reference.swiglu_concat_reference, (None, (2, 5, 40))),
    "flash_attention": Case(
        flash.flash_attention, reference.flash_attention_reference, ((2, 37, 2, DIM), (2, 45, 2, DIM), (2, 45, 2, DIM))
    ),
    "flash_attention, whole tiles": Case(
        flash.flash_attention, reference.flash_attention_reference, ((1, 64, 2, 64), (1, 64, 2, 64), (1, 64, 2, 64))
    ),
    "flash_attention, heads of 128": Case(
        flash.flash_attention, reference.flash_attention_reference, ((1, 33, 1, 128), (1, 33, 1, 128), (1, 33, 1, 128))
    ),
    "lora_linear": Case(
        lora.lora_linear, reference.lora_linear_reference,
        ((2, 7, 12), (10, 12), (10,), (4, 12), (10, 4)), lambda: (torch.tensor([0.0, 0.7], device=DEVICE),),
    ),
    "lora_linear of a vector": Case(
        lora.lora_linear, reference.lora_linear_reference,
        ((3, 12), (10, 12), None, (4, 12), (10, 4)), lambda: (torch.tensor([1.0, 0.0, 0.3], device=DEVICE),),
    ),
    "lora_linears": Case(
        two(lora.lora_linears), two(linears_reference),
        ((2, 7, 12), (10, 12), (6, 12), (10,), (6,), (4, 12), (4, 12), (10, 4), (6, 4)),
        lambda: (torch.tensor([0.2, 0.7], device=DEVICE),),
    ),
    "lora_add": Case(
        lora.lora_add, reference.lora_add_reference,
        ((2, 7, 10), (2, 7, 12), (4, 12), (10, 4)), lambda: (torch.tensor([0.0, 0.7], device=DEVICE),),
    ),
}  # fmt: skip


def draw(case: Case, dtype: torch.dtype, *, dense: bool = True) -> list[Tensor | None]:
    """Inputs that require gradients; if not `dense`, each is a slice of a wider tensor."""
    torch.manual_seed(0)
    inputs: list[Tensor | None] = []
    for shape in case.shapes:
        if shape is None:
            inputs.append(None)
            continue
        values = torch.randn(*shape[:-1], shape[-1] if dense else 3 * shape[-1], device=DEVICE).to(dtype)
        inputs.append((values if dense else values[..., shape[-1] : 2 * shape[-1]]).requires_grad_())
        assert values.numel() == 0 or inputs[-1].is_contiguous() == (dense or values.ndim == 1)
    return inputs


def as_tuple(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def run(function: Callable, inputs: list[Tensor | None], fixed: tuple) -> tuple[list[Tensor], list[Tensor]]:
    """Results, and gradients of the inputs for fixed random gradients of the results."""
    leaves = [None if tensor is None else tensor.detach().requires_grad_() for tensor in inputs]
    results = as_tuple(function(*leaves, *fixed))
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(result.shape, generator=generator).to(result) for result in results]
    # Rounded to bf16 first, so that kernel and reference get the same gradients.
    grads = [grad.bfloat16().to(result) for grad, result in zip(grads, results, strict=True)]
    torch.autograd.backward(results, grads)
    return list(results), [leaf.grad for leaf in leaves if leaf is not None]


def wide(value: object) -> object:
    return value.detach().double() if isinstance(value, Tensor) and value.is_floating_point() else value


def assert_close(found: list[Tensor], expected: list[Tensor], bound: float) -> None:
    assert len(found) == len(expected)
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert one.shape == other.shape
        error = (one.double() - other).abs().max() / other.abs().max()
        assert error <= bound, f"result {number}: {error:.2e} of the largest value, more than {bound:.2e}"


# In fp64 the gradients agree to 12 digits. Strides do not depend on the dtype, so slices are tested in one.
@pytest.mark.parametrize(
    ("dtype", "dense"),
    [(torch.bfloat16, True), (torch.float32, True), (torch.float32, False), (torch.float64, True)],
    ids=["bf16", "fp32", "fp32 slices", "fp64"],
)
@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_reference_in_fp64(name, dtype, dense):
    case = CASES[name]
    inputs = draw(case, dtype, dense=dense)
    fixed = case.fixed()
    if dtype == torch.float64:
        fixed = tuple(wide(value) for value in fixed)
    results, gradients = run(case.kernel, inputs, fixed)
    assert all(result.dtype == dtype for result in results)
    expected = run(case.reference, [wide(tensor) for tensor in inputs], tuple(wide(value) for value in fixed))
    # A compiled kernel of Triton takes numbers in fp32: the scale of the scores.
    is_rounded = DEVICE.type == "cuda" and dtype == torch.float64 and name.startswith("flash_attention")
    bound = 1e-6 if is_rounded else BOUND[dtype]
    assert_close(results, expected[0], bound)
    assert_close(gradients, expected[1], bound)


@pytest.mark.parametrize("name", CASES)
def test_a_compiled_call_is_one_graph_with_the_same_results(name):
    case = CASES[name]
    inputs, fixed = draw(case, torch.float32), case.fixed()
    eager, again = (run(case.kernel, inputs, fixed) for _ in range(2))
    for one, other in zip(eager[0] + eager[1], again[0] + again[1], strict=True):
        assert torch.equal(one, other)  # no atomics
    compiled = run(torch.compile(case.kernel, fullgraph=True, dynamic=False), inputs, fixed)
    for one, other in zip(eager[0] + eager[1], compiled[0] + compiled[1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def lora_factors(x: Tensor) -> tuple:
    """Frozen base of bf16, fp32 A and B with their copies, and a strength for each of two samples."""
    inputs = x.shape[-1]
    weight, down, up = (torch.randn(*shape, device=x.device) for shape in ((20, inputs), (4, inputs), (20, 4)))
    strengths = torch.tensor([0.3, 1.0], device=x.device)
    masters, copies = (down.requires_grad_(), up.requires_grad_()), (down.detach().bfloat16(), up.detach().bfloat16())
    return weight.bfloat16(), None, *masters, strengths, *copies


def in_lists(x: Tensor, factors: tuple) -> tuple:
    """Two linears with the same base: arguments of the op on lists."""
    weight, _, down, up, scale, *copies = factors
    return x, [weight, 2 * weight], [], [down, down], [up, up], scale, [*copies, *copies], []


OPS = {
    "norm_rope": lambda x, row, head: (
        torch.ops.scfm.norm_rope.default, (x, x, head, head, *rotation(14), HEADS, 1e-6),
    ),
    "modulate": lambda x, row, head: (torch.ops.scfm.modulate.default, (x, row, row, 1e-6)),
    "gated_modulate": lambda x, row, head: (torch.ops.scfm.gated_modulate.default, (x, x, row, row, row, 1e-6)),
    "gate_residual": lambda x, row, head: (torch.ops.scfm.gate_residual.default, (x, x, row)),
    "gelu_concat": lambda x, row, head: (torch.ops.scfm.activation_concat.default, (x, x, False)),
    "swiglu_concat": lambda x, row, head: (torch.ops.scfm.activation_concat.default, (x, x, True)),
    "flash_attention": lambda x, row, head: (
        torch.ops.scfm.flash_attention.default, tuple(x.detach().unflatten(-1, (HEADS, DIM)) for _ in range(3)),
    ),
    "lora_linear": lambda x, row, head: (
        torch.ops.scfm.lora_linear.default, (x.detach().bfloat16().requires_grad_(), *lora_factors(x), None),
    ),
    "lora_linears": lambda x, row, head: (
        torch.ops.scfm.lora_linears.default, in_lists(x.detach().bfloat16().requires_grad_(), lora_factors(x)),
    ),
    "lora_add": lambda x, row, head: (torch.ops.scfm.lora_add.default, (torch.ones(2, 7, 20, device=x.device), x, *lora_factors(x)[2:5], None, None)),
}  # fmt: skip


@pytest.mark.parametrize("name", OPS)
def test_registered_as_torch_expects(name):
    """Schema, fake tensors, autograd and AOT dispatch, by torch's own checker."""
    x, row, head = (torch.randn(*shape, device=DEVICE, requires_grad=True) for shape in ((2, 7, 48), (2, 48), (DIM,)))
    op, arguments = OPS[name](x, row, head)
    torch.library.opcheck(op, arguments)


def far(x: Tensor) -> Tensor:
    """[1, 3, ...] with rows 2^30 elements apart; memory that is not touched takes no room."""
    storage = torch.empty(2**31 + x[0, 0].numel(), dtype=x.dtype, device=x.device)
    return storage.as_strided(x.shape, (0, 2**30, *x.stride()[2:])).copy_(x)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="a GPU's memory takes room that is not touched")
@pytest.mark.parametrize(
    ("kernel", "shapes"),
    [
        (
            lambda x: norm_rope.norm_rope(x, None, torch.ones(DIM).to(x), None, *rotation(3), HEADS),
            [(1, 3, HEADS * DIM)],
        ),
        (lambda x, branch: modulate.gate_residual(x, branch, torch.ones(1, 20).to(x)), [(1, 3, 20)] * 2),
        (
            lambda x, branch: modulate.gated_modulate(x, branch, *torch.ones(3, 1, 20).to(x))[1],
            [(1, 3, 20)] * 2,
        ),
        (concat.swiglu_concat, [(1, 3, 20), (1, 3, 40)]),
        (flash.flash_attention, [(1, 3, 1, DIM)] * 3),
    ],
    ids=["norm_rope", "gate_residual", "gated_modulate", "swiglu_concat", "flash_attention"],
)
def test_rows_whose_offsets_need_64_bits(kernel, shapes):
    """Queries, keys and values of FLUX.2-dev's single blocks are views with rows of 55,296: 2^31 from token 38,836 on."""
    torch.manual_seed(0)
    near = [torch.randn(shape, dtype=torch.bfloat16) for shape in shapes]
    results = []
    for place in (Tensor.clone, far):
        inputs = [place(x).requires_grad_() for x in near]
        torch.manual_seed(1)  # of the rotation
        output = kernel(*inputs)
        results.append([output, *torch.autograd.grad(output, inputs, torch.ones_like(output))])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_a_frozen_norm_gets_no_gradient():
    x = torch.randn(1, 4, HEADS * DIM, device=DEVICE, requires_grad=True)
    weight = torch.ones(DIM, device=DEVICE)
    norm_rope.norm_rope(x, None, weight, None, *rotation(4), HEADS).sum().backward()
    assert x.grad is not None and weight.grad is None


def test_heads_of_another_size_are_refused():
    x = torch.randn(1, 4, 1, 24, device=DEVICE)
    with pytest.raises(ValueError, match="not 24: choose another backend"):
        flash.flash_attention(x, x, x)


def test_attention_of_large_scores_does_not_overflow():
    x = 60 * torch.randn(1, 40, 1, DIM, device=DEVICE)
    expected = reference.flash_attention_reference(x.double(), x.double(), x.double())
    assert_close([flash.flash_attention(x, x, x)], [expected], 1e-4)


def test_attention_with_very_negative_scores_has_the_right_gradient():
    """45 keys do not fill tiles of 32. Keys in the rest of the tile would have score 0, far above all true scores."""
    key = torch.randn(1, 45, 1, DIM, device=DEVICE)
    key[..., 0] = 20.0
    query = torch.zeros(1, 40, 1, DIM, device=DEVICE)
    query[..., 0] = -30.0
    expected = run(reference.flash_attention_reference, [query.double(), key.double(), key.double()], ())
    found = run(flash.flash_attention, [query, key, key], ())
    assert_close(found[1], expected[1], 1e-4)


@pytest.mark.parametrize("unused", [0, 1])
def test_one_result_of_two_is_enough_for_a_gradient(unused):
    inputs = draw(CASES["gated_modulate"], torch.float32)
    function = lambda *values: modulate.gated_modulate(*values)[1 - unused]  # noqa: E731
    expected = lambda *values: reference.gated_modulate_reference(*values)[1 - unused]  # noqa: E731
    found = torch.autograd.grad(function(*inputs).sum(), inputs, allow_unused=True, materialize_grads=True)
    wanted = torch.autograd.grad(expected(*inputs).sum(), inputs, allow_unused=True, materialize_grads=True)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("has_copies", [False, True])
def test_adapters_in_fp32_beside_products_in_bf16(has_copies):
    """The masters get fp32 gradients. With copies their own values do not matter: NaN here."""
    torch.manual_seed(0)
    x = torch.randn(2, 7, 48, device=DEVICE).bfloat16().requires_grad_()
    weight, _, down, up, strengths, *copies = lora_factors(x)
    inputs = [x, weight, down, up]
    expected = run(
        lambda x, weight, down, up: reference.lora_linear_reference(x, weight, None, down, up, strengths.double()),
        [wide(tensor.bfloat16()) for tensor in inputs], (),
    )  # fmt: skip
    if has_copies:
        inputs[2:] = [torch.full_like(factor, torch.nan).requires_grad_() for factor in (down, up)]
    given = tuple(copies) if has_copies else None
    function = lambda x, weight, down, up: lora.lora_linear(x, weight, None, down, up, strengths, given)  # noqa: E731
    found = run(function, inputs, ())
    assert [gradient.dtype for gradient in found[1]] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]
    assert_close(found[0], expected[0], BOUND[torch.bfloat16])
    assert_close(found[1], expected[1], BOUND[torch.bfloat16])


def test_the_copies_of_linears_of_one_input_are_not_joined_again_if_they_are_adjacent():
    parts = torch.randn(3, 4, 12, device=DEVICE)
    assert lora_products.joined(list(parts)).data_ptr() == parts.data_ptr()
    for others in (
        [parts[1], parts[0]],
        [parts[0], parts[2]],
        [part[:, :6] for part in parts],
        [parts[0], parts[1].clone()],
    ):
        assert torch.equal(lora_products.joined(others), torch.cat(others))


def test_one_of_several_adapted_linears_is_enough_for_a_gradient():
    inputs, (strengths,) = draw(CASES["lora_linears"], torch.float32), CASES["lora_linears"].fixed()
    kernel, plain = CASES["lora_linears"].kernel, CASES["lora_linears"].reference
    found, expected = (
        torch.autograd.grad(f(*inputs, strengths)[1].sum(), inputs, allow_unused=True, materialize_grads=True)
        for f in (kernel, plain)
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("trains_base", [False, True])
def test_flops_of_an_adapted_linear(trains_base):
    """Products alone: two FLOPs for each pair of elements."""
    rows, inputs, outputs, rank = 14, 48, 20, 4
    x = torch.randn(2, 7, inputs, requires_grad=True)
    weight, bias, down, up, strengths, *_ = lora_factors(x)
    weight = weight.float().requires_grad_(trains_base)
    low = rank * (inputs + outputs)
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        lora.lora_linear(x, weight, bias, down, up, strengths).sum().backward()
    expected = 2 * rows * ((2 + trains_base) * inputs * outputs + 3 * low)
    assert counter.get_total_flops() == expected
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        both = lora.lora_linears(x, [weight] * 2, [], [down] * 2, [up] * 2, strengths)
        torch.cat(both).sum().backward()
    assert counter.get_total_flops() == 2 * expected
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        lora.lora_add(torch.ones(2, 7, outputs), x.detach(), down, up, strengths).sum().backward()
    assert counter.get_total_flops() == 2 * rows * (2 * low + rank * outputs)
