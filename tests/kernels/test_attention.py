"""Which attention is taken, and why: what is there, what was measured, what is remembered."""

import json

import pytest
import torch

import scfm_core.kernels.attention as module
from scfm_core.kernels.attention import BACKENDS, TIE, AttentionShape, attention, choose_attention, why_unavailable
from scfm_core.kernels.reference import flash_attention_reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32  # a GPU's flash takes no fp32
TOLERANCE = {"rtol": 2e-2, "atol": 2e-2} if DEVICE.type == "cuda" else {"rtol": 1e-4, "atol": 1e-5}
SHAPE = AttentionShape(2, 40, 3, 16, DTYPE, DEVICE)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "scfm" / "attention.json"


def there():
    return [backend for backend in BACKENDS if why_unavailable(backend, SHAPE) is None]


def times(**milliseconds):
    asked = []

    def time(backend, shape):
        asked.append(backend)
        return milliseconds.get(backend, 100.0)

    return time, asked


def test_on_a_cpu_these_are_there():
    if DEVICE.type == "cpu":
        assert there() == ["flash", "triton", "math"]
    else:
        assert {"flash", "triton", "math"} <= set(there())


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_that_are_there_agree(backend):
    if (reason := why_unavailable(backend, SHAPE)) is not None:
        pytest.skip(reason)
    query, key, value = SHAPE.draw()
    expected = flash_attention_reference(query.double(), key.double(), value.double())
    torch.testing.assert_close(attention(query, key, value, backend).double(), expected, **TOLERANCE)


def test_the_fastest_is_taken_and_remembered(cache):
    time, asked = times(triton=1.0, flash=2.0)
    first = choose_attention("auto", SHAPE, time=time)
    assert (first.backend, first.milliseconds["flash"]) == ("triton", 2.0)
    measured = [backend for backend in there() if backend != "math"]  # which holds whole matrices of scores
    assert asked == measured
    again = choose_attention("auto", SHAPE, time=time)
    assert asked == measured, "measured twice"
    assert (again.backend, again.milliseconds) == (first.backend, first.milliseconds)
    assert str(cache) in again.why
    other = AttentionShape(2, 48, 3, 16, DTYPE, DEVICE)
    choose_attention("auto", other, time=time)
    assert asked == 2 * measured
    assert set(json.loads(cache.read_text())) == {SHAPE.key, other.key}


def test_a_hair_faster_is_not_faster():
    time, _ = times(flash=1.0, triton=1.0 - TIE / 2)
    assert choose_attention("auto", SHAPE, time=time).backend == "flash"


@pytest.mark.parametrize("content", ["", "[]", "{", '{"x": 1}', '{"x": {"backend": "gone", "milliseconds": {}}}'])
def test_a_damaged_memory_is_measured_again(cache, content):
    cache.parent.mkdir()
    cache.write_text(content)
    time, _ = times(triton=1.0)
    assert choose_attention("auto", SHAPE, time=time).backend == "triton"
    assert list(json.loads(cache.read_text())) == [SHAPE.key]


def test_a_backend_that_is_gone_is_not_taken_from_memory(cache, monkeypatch):
    cache.parent.mkdir()
    cache.write_text(json.dumps({SHAPE.key: {"backend": "flash", "milliseconds": {"flash": 0.1}}}))
    time, asked = times(triton=1.0)
    assert choose_attention("auto", SHAPE, time=time).backend == "flash" and not asked
    reason = module.why_unavailable
    monkeypatch.setattr(module, "why_unavailable", lambda name, at: "gone" if name == "flash" else reason(name, at))
    assert choose_attention("auto", SHAPE, time=time).backend == "triton" and "flash" not in asked
    assert json.loads(cache.read_text())[SHAPE.key]["backend"] == "triton"


def test_a_home_that_cannot_be_written_costs_only_the_memory(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    time, _ = times(triton=1.0)
    assert choose_attention("auto", SHAPE, time=time).backend == "triton"


def test_what_does_not_fit_into_memory_is_left_out():
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


def test_math_is_taken_where_there_is_nothing_else(monkeypatch):
    reason = "not here"
    monkeypatch.setattr(module, "why_unavailable", lambda backend, shape: None if backend == "math" else reason)
    time, asked = times(math=5.0)
    assert choose_attention("auto", SHAPE, time=time).backend == "math" and asked == ["math"]


def test_asking_for_what_is_not_there_says_why_and_what_is():
    if "flash3" in there():
        pytest.skip("FlashAttention-3 is installed")
    with pytest.raises(ValueError, match="FlashAttention-3 cannot be imported") as raised:
        choose_attention("flash3", SHAPE)
    assert "Choose among" in str(raised.value) and "triton" in str(raised.value)


def test_what_is_asked_for_is_not_measured():
    time, asked = times()
    assert choose_attention("triton", SHAPE, time=time).backend == "triton" and not asked
