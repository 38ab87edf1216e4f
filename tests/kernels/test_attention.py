"""The choice of an attention backend: which are available, measured times, and the file with earlier measurements."""

import json
import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import scfm_core.kernels.attention as module
from scfm_core.kernels.attention import BACKENDS, TIE, AttentionShape, attention, choose_attention, why_unavailable
from scfm_core.kernels.reference import flash_attention_reference
from scfm_core.train.network import _SAVED

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32  # flash on a GPU does not support fp32
TOLERANCE = {"rtol": 2e-2, "atol": 2e-2} if DEVICE.type == "cuda" else {"rtol": 1e-4, "atol": 1e-5}
SHAPE = AttentionShape(2, 40, 3, 16, DTYPE, DEVICE)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "scfm" / "attention.json"


def available():
    return [backend for backend in BACKENDS if why_unavailable(backend, SHAPE) is None]


def times(**milliseconds):
    measured = []

    def time(backend, shape):
        measured.append(backend)
        return milliseconds.get(backend, 100.0)

    return time, measured


def test_grouped_queries_and_masks_are_tried_as_they_are():
    grouped = replace(SHAPE, heads=6, kv_heads=2, masked=True)
    assert why_unavailable("math", grouped) is None
    assert "takes no mask" in why_unavailable("xformers" if DEVICE.type == "cuda" else "triton", grouped)
    assert len({SHAPE.key, grouped.key, replace(grouped, masked=False).key}) == 3
    query, key, value = (tensor.detach() for tensor in grouped.draw())
    wide = [tensor.repeat_interleave(3, dim=2) for tensor in (key, value)]
    kept = grouped.tokens // 2
    expected = attention(query, *(tensor[:, :kept] for tensor in wide), "math")
    torch.testing.assert_close(attention(query, key, value, "math", grouped.mask()), expected, **TOLERANCE)


def test_the_backends_of_a_cpu():
    if DEVICE.type == "cpu":
        assert available() == ["flash", "triton", "math"]
    else:
        assert {"flash", "triton", "math"} <= set(available())


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_available_backends_agree(backend):
    if (reason := why_unavailable(backend, SHAPE)) is not None:
        pytest.skip(reason)
    query, key, value = SHAPE.draw()
    expected = flash_attention_reference(query.double(), key.double(), value.double())
    torch.testing.assert_close(attention(query, key, value, backend).double(), expected, **TOLERANCE)


def test_the_fastest_is_chosen_and_saved(cache):
    time, asked = times(triton=1.0, flash=2.0)
    first = choose_attention("auto", SHAPE, time=time)
    assert (first.backend, first.milliseconds["flash"]) == ("triton", 2.0)
    measured = [backend for backend in available() if backend != "math"]  # it allocates whole matrices of scores
    assert asked == measured
    again = choose_attention("auto", SHAPE, time=time)
    assert asked == measured, "measured twice"
    assert (again.backend, again.milliseconds) == (first.backend, first.milliseconds)
    assert str(cache) in again.why
    other = AttentionShape(2, 48, 3, 16, DTYPE, DEVICE)
    choose_attention("auto", other, time=time)
    assert asked == 2 * measured
    assert set(json.loads(cache.read_text())) == {SHAPE.key, other.key}


def test_a_difference_within_the_tie_keeps_the_order_of_preference():
    time, _ = times(flash=1.0, triton=1.0 - TIE / 2)
    assert choose_attention("auto", SHAPE, time=time).backend == "flash"


@pytest.mark.parametrize("content", ["", "[]", "{", '{"x": 1}', '{"x": {"backend": "gone", "milliseconds": {}}}'])
def test_a_damaged_file_is_measured_again(cache, content):
    cache.parent.mkdir()
    cache.write_text(content)
    time, _ = times(triton=1.0)
    assert choose_attention("auto", SHAPE, time=time).backend == "triton"
    assert list(json.loads(cache.read_text())) == [SHAPE.key]


def test_a_saved_backend_that_is_no_longer_available_is_not_used(cache, monkeypatch):
    cache.parent.mkdir()
    cache.write_text(json.dumps({SHAPE.key: {"backend": "flash", "milliseconds": {"flash": 0.1}}}))
    time, asked = times(triton=1.0)
    assert choose_attention("auto", SHAPE, time=time).backend == "flash" and not asked
    reason = module.why_unavailable
    monkeypatch.setattr(module, "why_unavailable", lambda name, at: "removed" if name == "flash" else reason(name, at))
    assert choose_attention("auto", SHAPE, time=time).backend == "triton" and "flash" not in asked
    assert json.loads(cache.read_text())[SHAPE.key]["backend"] == "triton"


def test_without_a_writable_cache_the_choice_still_works(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    time, _ = times(triton=1.0)
    assert choose_attention("auto", SHAPE, time=time).backend == "triton"


def test_backends_without_enough_memory_are_skipped():
    def time(backend, shape):
        if backend != "flash":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 1.0

    assert choose_attention("auto", SHAPE, time=time).backend == "flash"

    def never(backend, shape):
        raise torch.OutOfMemoryError("CUDA out of memory")

    other = AttentionShape(4, 40, 3, 16, DTYPE, DEVICE)
    with pytest.raises(ValueError, match=r"lower train\.micro_batch_size"):
        choose_attention("auto", other, time=never)


def test_a_backend_that_refuses_the_true_shape_is_skipped():
    """Though it took the few tokens of the probe."""

    def time(backend, shape):
        if backend != "triton":
            raise RuntimeError("No valid execution plans built.\nMore.")
        return 1.0

    other = AttentionShape(3, 40, 3, 16, DTYPE, DEVICE)
    assert choose_attention("auto", other, time=time).backend == "triton"
    with pytest.raises(ValueError, match=r"no attention backend runs .*: flash: No valid execution plans built\.$"):
        choose_attention("auto", replace(other, batch=5), backends=("flash",), time=time)


def test_math_is_chosen_if_nothing_else_is_available(monkeypatch):
    reason = "not here"
    monkeypatch.setattr(module, "why_unavailable", lambda backend, shape: None if backend == "math" else reason)
    time, asked = times(math=5.0)
    assert choose_attention("auto", SHAPE, time=time).backend == "math" and asked == ["math"]


@pytest.mark.parametrize(
    ("backend", "reason"),
    [
        ("flash3", "FlashAttention-3 cannot be imported"),
        (
            "flash4",
            "FlashAttention-4 has no kernel for a CPU|compute capability 9.0|FlashAttention-4 cannot be imported",
        ),
    ],
)
def test_an_unavailable_backend_is_refused_with_the_reason_and_the_available_ones(backend, reason):
    if backend in available():
        pytest.skip(f"{backend} is installed")
    with pytest.raises(ValueError, match=reason) as raised:
        choose_attention(backend, SHAPE)
    assert "Choose among" in str(raised.value) and "triton" in str(raised.value)


def test_a_named_backend_is_not_measured():
    time, asked = times()
    assert choose_attention("triton", SHAPE, time=time).backend == "triton" and not asked


@pytest.fixture
def flash4(monkeypatch):
    """A stand-in with the two functions of FlashAttention-4 that are called: their arguments and results as of 4.0.0b36."""

    def heads_first(*tensors):
        return (tensor.transpose(1, 2) for tensor in tensors)

    def forward(q, k, v, *, return_lse):
        assert return_lse
        scores = torch.einsum("bshd,bthd->bhst", q, k) * q.shape[-1] ** -0.5
        output = torch.einsum("bhst,bthd->bshd", scores.softmax(-1), v).contiguous()
        return output, scores.logsumexp(-1).float(), None, None, None

    def backward(q, k, v, out, dout, lse):
        scale = q.shape[-1] ** -0.5
        probabilities = (torch.einsum("bshd,bthd->bhst", q, k) * scale - lse[..., None]).exp()
        delta = (out * dout).sum(-1).transpose(1, 2)[..., None]
        scores = probabilities * (torch.einsum("bshd,bthd->bhst", dout, v) - delta) * scale
        found = (
            torch.einsum("bhst,bthd->bshd", scores, k),
            torch.einsum("bhst,bshd->bthd", scores, q),
            torch.einsum("bhst,bshd->bthd", probabilities, dout),
        )
        return tuple(torch.empty_like(x).copy_(grad) for x, grad in zip((q, k, v), found, strict=True))

    package, interface = ModuleType("flash_attn.cute"), ModuleType("flash_attn.cute.interface")
    interface._flash_attn_fwd, interface._flash_attn_bwd = forward, backward
    for part in (ModuleType("flash_attn"), package, interface):
        monkeypatch.setitem(sys.modules, part.__name__, part)


def test_flash4_is_one_node_with_gradients(flash4):
    """Under `torch.compile` without a graph break, and under selective checkpointing."""
    query, key, value = AttentionShape(2, 40, 3, 16, torch.float32, torch.device("cpu")).draw()
    value = value.transpose(1, 2).contiguous().transpose(1, 2).detach().requires_grad_()  # strides as of a split linear
    weights = torch.randn(2, 40, 3, 16)

    def gradients(function):
        output = function(query, key, value)
        return [output, *torch.autograd.grad((output * weights).sum(), (query, key, value))]

    expected = gradients(flash_attention_reference)
    for function in (attention, torch.compile(attention, fullgraph=True, backend="aot_eager")):
        found = gradients(lambda *inputs, function=function: function(*inputs, "flash4"))
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    torch.library.opcheck(torch.ops.scfm.flash4_attention.default, (query, key, value))
    assert torch.ops.scfm.flash4_attention.default.name() in _SAVED


@pytest.mark.parametrize(("backend", "products"), [("triton", 2 + 7), ("flash4", 2 + 5)])
def test_products_of_forward_and_backward_are_counted_without_a_gpu(backend, products):
    """The Triton kernel computes the scores and the gradient of the probabilities twice in its backward."""
    inputs = AttentionShape(2, 40, 3, 16, torch.bfloat16, torch.device("meta")).draw()
    attention(*inputs, backend)  # the first call imports the operator; a counter knows those that were there before it
    with FlopCounterMode(display=False) as counter:
        attention(*inputs, backend).sum().backward()
    assert counter.get_total_flops() == products * 2 * 2 * 3 * 40 * 40 * 16


def test_flash4_needs_a_gpu_with_its_backward(monkeypatch):
    shape = AttentionShape(1, 8, 1, 16, torch.bfloat16, torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert "needs compute capability 9.0" in why_unavailable("flash4", shape)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    assert "pip install flash-attn-4" in why_unavailable("flash4", shape)
