"""The choice of an attention backend: PyTorch's own, xformers, FlashAttention-3 or 4, or the Triton kernel of `flash.py`.

On Hopper PyTorch's default choice is half as fast as cuDNN. The best backend depends on device, shape and versions.
`auto` therefore measures all available ones once, forward and backward, and saves the result in the user's cache.
`math`, which allocates whole matrices of scores, is measured only if no other backend is available.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from scfm_core.kernels.measured import cache_file, milliseconds, write_measured

BACKENDS = ("cudnn", "flash3", "flash4", "flash", "xformers", "triton", "efficient", "math")
"""In order of preference, if their times are equal."""
TIE = 0.03
"""A later backend must be faster by this fraction. Times vary between runs; the choice should not."""
SDPA = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
"""The backends of PyTorch's `scaled_dot_product_attention`."""
_PROBE_TOKENS = 128


@dataclass(frozen=True)
class AttentionChoice:
    """A backend, and the reason for it."""

    backend: str
    why: str
    milliseconds: dict[str, float] = field(default_factory=dict)
    """Time of a forward and backward, by measured backend."""


@dataclass(frozen=True)
class AttentionShape:
    """Shape of query, key and value: [batch, tokens, heads, head_dim] in `dtype`, on `device`."""

    batch: int
    tokens: int
    heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    kv_heads: int | None = None
    """Heads of key and value; None: as many as of the query. Only `SDPA` takes fewer."""
    masked: bool = False
    """Whether keys are masked, by a bool mask [batch, 1, 1, tokens]. Only `SDPA` takes masks."""

    @property
    def key(self) -> str:
        """A string of everything that the fastest backend depends on."""
        device = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type
        heads = f"{self.heads}" if self.kv_heads in (None, self.heads) else f"{self.heads}/{self.kv_heads}"
        shape = f"{self.batch}x{self.tokens}x{heads}x{self.head_dim}"
        return f"{device}, {shape}, {str(self.dtype).removeprefix('torch.')}{', masked' * self.masked}, torch {torch.__version__}"

    def draw(self) -> tuple[Tensor, Tensor, Tensor]:
        """Random query, key and value that require gradients."""
        query, key, value = (
            torch.randn(self.batch, self.tokens, heads, self.head_dim, dtype=self.dtype, device=self.device)
            for heads in (self.heads, self.kv_heads or self.heads, self.kv_heads or self.heads)
        )
        return query.requires_grad_(), key.requires_grad_(), value.requires_grad_()

    def mask(self) -> Tensor | None:
        """A mask as of captions of half the tokens, if keys are masked."""
        if not self.masked:
            return None
        kept = torch.arange(self.tokens, device=self.device) < (self.tokens + 1) // 2
        return kept.expand(self.batch, 1, 1, -1)


def attention(query: Tensor, key: Tensor, value: Tensor, backend: str, mask: Tensor | None = None) -> Tensor:
    """`softmax(Q K^T / sqrt(D)) V`: query, key, value [B, S, H, D] -> [B, S, H, D].

    Raises:
        ValueError: for a mask, by a backend that is not in `SDPA`.
    """
    if backend in SDPA:
        with sdpa_kernel(SDPA[backend]):
            query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
            grouped = query.shape[1] != key.shape[1]
            result = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=grouped)
            return result.transpose(1, 2)
    if mask is not None:
        raise ValueError(f"{backend} attention takes no mask, and the text of this model is masked")
    if backend == "triton":
        from scfm_core.kernels.flash import flash_attention

        return flash_attention(query, key, value)
    if backend == "flash4":
        from scfm_core.kernels.flash4 import flash4_attention

        return flash4_attention(query, key, value)
    return _xformers(query, key, value) if backend == "xformers" else _flash3(query, key, value)


def _xformers(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    try:
        from xformers.ops import memory_efficient_attention
    except ImportError as error:
        raise ValueError(
            f"xformers cannot be imported ({error}); install it with: pip install 'scfm[xformers]'"
        ) from error
    return memory_efficient_attention(query, key, value)  # type: ignore[no-any-return]


def _flash3(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    try:
        from flash_attn_interface import flash_attn_func
    except ImportError as error:
        raise ValueError(
            f"FlashAttention-3 cannot be imported ({error}); it is built from source, for Hopper GPUs: "
            f"https://github.com/Dao-AILab/flash-attention, folder hopper"
        ) from error
    result = flash_attn_func(query, key, value)
    return result[0] if isinstance(result, tuple) else result  # type: ignore[no-any-return]


def why_unavailable(backend: str, shape: AttentionShape) -> str | None:
    """Why `backend` cannot run `shape`; None if it can. It tries a forward and backward of one head of keys on a few tokens."""
    if backend == "triton":
        from scfm_core.kernels.launch import why_no_triton

        if (reason := why_no_triton(shape.device)) is not None:
            return reason
    if backend == "flash4":
        from scfm_core.kernels.flash4 import why_no_flash4

        if (reason := why_no_flash4(shape.device)) is not None:
            return reason
    if backend == "xformers" and shape.device.type != "cuda":
        return "xformers has no kernel for a CPU"
    try:
        heads = shape.heads // (shape.kv_heads or shape.heads)
        probed = replace(shape, batch=1, tokens=min(_PROBE_TOKENS, shape.tokens), heads=heads, kv_heads=1)
        inputs = probed.draw()
        attention(*inputs, backend, probed.mask()).sum().backward()
        if shape.device.type == "cuda":
            torch.cuda.synchronize(shape.device)
    except _failures(backend) as error:
        if backend in SDPA and ("No viable backend" in str(error) or "No available kernel" in str(error)):
            return f"PyTorch has no {backend} attention for this device, dtype and head size"
        return _first_line(error)
    return None


def _failures(backend: str) -> tuple[type[Exception], ...]:
    """What a backend raises that cannot run a shape."""
    # FlashAttention-4 checks by assertions, and its compiler has errors of its own.
    return (Exception,) if backend == "flash4" else (RuntimeError, ValueError, *triton_errors())


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def triton_errors() -> tuple[type[Exception], ...]:
    """Errors of a kernel that does not compile here, or that needs more memory than this GPU has."""
    try:
        from triton.errors import TritonError
    except ImportError:
        return ()
    return (TritonError,)


def choose_attention(
    name: str,
    shape: AttentionShape,
    *,
    backends: Sequence[str] = BACKENDS,
    time: Callable[[str, AttentionShape], float] | None = None,
) -> AttentionChoice:
    """Choose the backend for `shape`.

    Args:
        name: `auto`, or one of `BACKENDS`, which must be available.
        shape: of attention in the training.
        backends: those of `BACKENDS` that the network's blocks can use.
        time: returns the milliseconds of a backend at a shape; by default they are measured on the GPU.

    Raises:
        ValueError: if the named backend is unavailable (the message says why, and names the available ones), or if no
            backend runs the shape.
    """
    if name != "auto":
        reason = (
            why_unavailable(name, shape) if name in backends else "the blocks of this network call PyTorch's attention"
        )
        if reason is None:
            return AttentionChoice(name, "asked for")
        available = [other for other in backends if other != name and why_unavailable(other, shape) is None]
        raise ValueError(
            f"kernels.attention={name} is unavailable for {shape.key}: {reason}. Choose among {', '.join(available)}, "
            f"or auto, which chooses the fastest"
        )
    if shape.device.type != "cuda" and time is None:
        return AttentionChoice("flash", "PyTorch's own for a CPU")
    path = cache_file("attention.json")
    measured = _read(path)
    if (
        (entry := measured.get(shape.key)) is not None
        and entry["backend"] in backends
        and not why_unavailable(entry["backend"], shape)
    ):
        return AttentionChoice(entry["backend"], f"measured before ({path})", entry["milliseconds"])
    available = [backend for backend in backends if why_unavailable(backend, shape) is None]
    times, failed = {}, {}
    for backend in available if available == ["math"] else [name for name in available if name != "math"]:
        try:
            times[backend] = (time or _milliseconds)(backend, shape)
        except torch.OutOfMemoryError:
            failed[backend] = "no memory: lower train.micro_batch_size"
        except _failures(backend) as error:  # cuDNN chooses its plan for each shape
            failed[backend] = _first_line(error)
    if shape.device.type == "cuda":
        torch.cuda.empty_cache()
    if not times:
        reasons = "; ".join(f"{backend}: {reason}" for backend, reason in failed.items())
        raise ValueError(f"no attention backend runs {shape.key}: {reasons}")
    best = next(iter(times))
    for backend, taken in times.items():
        if taken < times[best] * (1 - TIE):
            best = backend
    write_measured(path, measured | {shape.key: {"backend": best, "milliseconds": times}})
    return AttentionChoice(best, "the fastest here, forward and backward", times)


def _milliseconds(backend: str, shape: AttentionShape) -> float:
    """Of a forward and backward."""
    inputs, mask = shape.draw(), shape.mask()
    grad = torch.randn_like(inputs[0])
    return milliseconds(
        lambda: torch.autograd.grad(attention(*inputs, backend, mask), inputs, grad), torch.device(shape.device)
    )


def _read(path: Path) -> dict[str, dict]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {key: entry for key, entry in found.items() if entry["backend"] in BACKENDS and entry["milliseconds"]}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}  # a missing or damaged file: measure again
