"""What all arms of the step share: the base weights, the inputs, and a place on the GPU for one arm at a time."""

import contextlib
import gc
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from harness import DEVICE, GPU, NULL
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from scfm_core.flow.path import noise_latents
from scfm_core.flow.random import sample_noise
from scfm_core.kernels.attention import AttentionShape, choose_attention
from scfm_core.models.conditioning import Conditioning
from scfm_core.models.families import open_family
from scfm_core.scfm.method import PlanConfig
from scfm_core.scfm.plan import ShortcutPlan, sample_plan

BATCH = 8 if GPU and torch.cuda.get_device_properties(DEVICE).total_memory > 100e9 else 4
"""Samples a step on a GPU: what fits without checkpointing."""
TINY = {
    "attention_head_dim": 16, "axes_dims_rope": (4, 6, 6), "guidance_embeds": True, "in_channels": 4,
    "joint_attention_dim": 32, "num_attention_heads": 4, "num_layers": 1, "num_single_layers": 3, "patch_size": 1,
    "pooled_projection_dim": 32,
}  # fmt: skip


class Setting:
    """Base weights, shapes and inputs of all arms: Flux.1-dev in bf16, or the tiny Flux in fp32.

    Args:
        batch: samples per step.
        text_length: T5 tokens of Flux.1-dev.
        device: where the arms run; on `meta` an arm is only traced.
        tiny: the tiny Flux.
    """

    def __init__(
        self, batch: int, text_length: int = 256, *, device: torch.device = DEVICE, tiny: bool = not GPU
    ) -> None:
        self.batch, self.device, self.is_tiny = batch, device, tiny
        self.phase: Callable[[str], contextlib.AbstractContextManager[object]] = contextlib.nullcontext
        """`with setting.phase(name)` is around each phase of an arm's step, for who looks at them one by one."""
        self.dtype = torch.float32 if tiny else torch.bfloat16
        self.family = open_family("black-forest-labs/FLUX.1-dev", offline=True)
        if tiny:
            self.family.network_config = TINY
        self.rank = 4 if tiny else 64
        side, length, channels = (4, 4, 1) if tiny else (64, text_length, 16)
        self.tokens, self.text_length = side * side // 4 + length, length
        generator = torch.Generator().manual_seed(0)
        self.latents = torch.randn(batch, channels, side, side, generator=generator).to(device)
        self.cond = Conditioning(
            fields={
                name: torch.randn(batch, *shape, generator=generator).to(device, self.dtype)
                for name, shape in self.family.shapes(length).items()
            }
        )
        self.ids = torch.arange(batch)
        base = nn.Module.to(self.family.meta_network(), self.dtype)
        if device.type != "meta":
            base = base.to_empty(device=device)
        torch.manual_seed(0)
        for name, parameter in base.named_parameters():
            # Not zero: a GPU multiplies zeros at a higher clock.
            nn.init.ones_(parameter) if "norm_" in name and parameter.ndim == 1 else nn.init.normal_(
                parameter, std=0.02
            )
        self.weights = base.state_dict()

    def resized(self, batch: int) -> "Setting":
        """The same weights with another number of samples, repeated from these."""
        other = object.__new__(Setting)
        other.__dict__.update(self.__dict__)
        rows = torch.arange(batch) % self.batch
        other.batch, other.ids = batch, torch.arange(batch)
        other.latents, other.cond = self.latents[rows.to(self.device)], self.cond[rows]
        return other

    def attention(self) -> str:
        """The fastest backend of attention at this size."""
        arch = self.family.network_config
        heads, width = arch["num_attention_heads"], arch["attention_head_dim"]
        return choose_attention(
            "flash" if NULL else "auto", AttentionShape(self.batch, self.tokens, heads, width, self.dtype, self.device)
        ).backend

    def network(self) -> nn.Module:
        """A network with the shared weights."""
        network = self.family.meta_network()
        network.load_state_dict(self.weights, assign=True)
        return network

    def draw(self) -> tuple[ShortcutPlan, Tensor, Conditioning]:
        """Inputs of the next step."""
        self.ids = self.ids + self.batch
        plan = sample_plan(PlanConfig(), self.ids, seed=0).to(self.device)
        noised = noise_latents(self.latents, sample_noise(self.latents, self.ids, 0), plan.sigma_start)
        return plan, noised, self.cond.with_guidance(plan.guidance)


class Parking:
    """A place on the host for storages of the GPU, in pinned memory. The tensors stay the same objects.

    On a null device there are no values, so nothing is copied.
    """

    _CHUNK = 2**30  # torch rounds pinned memory up to a power of two

    def __init__(self) -> None:
        self._sizes: dict[torch.UntypedStorage, int] = {}
        self._places: dict[torch.UntypedStorage, Tensor] = {}
        self._free = torch.empty(0, dtype=torch.uint8)

    def out(self, storages: Iterable[torch.UntypedStorage]) -> None:
        """Move storages to the host; on the GPU they have no bytes then."""
        parked = list(storages)
        for storage in parked:
            self._sizes[storage] = storage.nbytes()
            if NULL:
                continue
            if storage not in self._places:
                self._places[storage] = self._take(storage.nbytes())
            self._places[storage].copy_(_bytes(storage), non_blocking=True)
        if GPU:
            torch.cuda.synchronize()
        for storage in parked:
            storage.resize_(0)

    def back(self) -> None:
        """Move all that are out back to the GPU."""
        for storage, size in self._sizes.items():
            if not storage.nbytes():
                storage.resize_(size)
                if not NULL:
                    _bytes(storage).copy_(self._places[storage], non_blocking=True)

    def _take(self, size: int) -> Tensor:
        if size > len(self._free):
            self._free = torch.empty(max(self._CHUNK, size), dtype=torch.uint8, pin_memory=GPU)
        place, self._free = self._free[:size], self._free[size:]
        return place


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


@dataclass(frozen=True)
class Arm:
    """One way to train. Calling it makes a step. Only one arm is on the GPU at a time, besides the shared weights."""

    step: Callable[[], None]
    setting: Setting
    held: Callable[[], Iterable[Tensor]]
    """The tensors that it holds between steps."""
    forwards: float
    """FLOPs of a step, in forward passes without adapters of its samples."""
    dtypes: str
    """Of base, adapters and optimizer, for the table."""
    _parking: Parking = field(default_factory=Parking)

    def __call__(self) -> None:
        self.step()

    def out(self) -> None:
        """Leave the GPU."""
        shared = {weight.untyped_storage()._cdata for weight in self.setting.weights.values()}
        tensors = (tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in self.held())
        storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in tensors}
        self._parking.out(
            storage
            for address, storage in storages.items()
            if address not in shared and storage.device.type == "cuda" and storage.nbytes()
        )
        torch.cuda.empty_cache()

    @contextlib.contextmanager
    def on_gpu(self) -> Iterator[None]:
        """`back`, and `out` at the end. Nothing on a CPU."""
        if self.setting.device.type != "cuda":
            yield
            return
        self._parking.back()
        try:
            yield
        finally:
            self.out()


def build(makers: dict[str, Callable[[], Arm]]) -> dict[str, Arm]:
    """The arms that fit. On a GPU each makes two steps, which create optimizers and compiled code, and leaves it."""
    arms = {}
    for name, make in makers.items():
        arm = None
        try:
            arm = make()
            for _ in range(2 * GPU):
                arm()
            arms[name] = arm
        except torch.OutOfMemoryError as error:
            print(f"{name}: {str(error).splitlines()[0]}", flush=True)
        if GPU and name in arms:
            arms[name].out()
        del arm
        gc.collect()
    return arms
