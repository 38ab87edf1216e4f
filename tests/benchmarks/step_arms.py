"""Steps on the same base weights: this project's, two of diffusers and PEFT, and NeMo Automodel's.

`reference` works as the authors' release, `tuned_reference` is the fastest step with diffusers and PEFT. `automodel` is the Flux LoRA
recipe of NeMo Automodel: an ordinary flow-matching LoRA, one forward and one backward. It has no target passes, half as many adapters
and no averages, so its step is not this method's step: compare samples/s and the share of the GPU's peak, not milliseconds.
"""

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers.models.attention_dispatch import attention_backend
from harness import GPU, NULL
from setting import Arm, Setting
from torch import Tensor, nn

from scfm_core.distributed.engine import EngineConfig, OptimizerConfig, Parameters
from scfm_core.distributed.fsdp2 import Fsdp2Engine, Fsdp2Layout
from scfm_core.distributed.world import World
from scfm_core.flow.path import euler_step, flow_velocity, noise_latents, per_sample
from scfm_core.kernels.attention import AttentionChoice
from scfm_core.models.adapters import LoRAConfig
from scfm_core.models.conditioning import Conditioning
from scfm_core.models.student import LoRAModel
from scfm_core.scfm.ema import DualEMA
from scfm_core.scfm.loss import scfm_loss
from scfm_core.scfm.plan import ShortcutPlan
from scfm_core.scfm.target import scfm_target
from scfm_core.train.kernels import Kernels
from scfm_core.train.network import compile_blocks, set_activation_checkpointing

LR = 2e-5
AUTOMODEL_BATCH = 6
"""Samples a GPU of the recipe."""
DIFFUSERS_BACKENDS = {"cudnn": "_native_cudnn", "flash": "_native_flash", "flash3": "_flash_3", "xformers": "xformers"}
AUTOMODEL_TARGETS = re.compile(
    r".*\.(attn\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)|ff(_context)?\.net\.(0\.proj|2))"
)
"""342 linears of Flux.1-dev: attention of all blocks, and the feed-forward layers of the double blocks."""


def make_engine(setting: Setting, parameters: Parameters, networks: Mapping[str, nn.Module]) -> Fsdp2Engine:
    """The trainer's engine on one process, for all arms of the method: they differ only in its passes and updates."""
    config = OptimizerConfig(
        betas=(0.9, 0.999), weight_decay=0.0, clip_norm=10.0, accumulation=1, micro_batch_size=setting.batch, lr=LR,
        compute_dtype="float32" if setting.is_tiny else "bfloat16",
    )  # fmt: skip
    layout = Fsdp2Layout(EngineConfig(), World(), setting.device, setting.dtype)
    return Fsdp2Engine(parameters, networks, layout, World(), config)


def _optimizer_state(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    for state in optimizer.state.values():
        yield from state.values()


def _own(*networks: nn.Module) -> Iterator[Tensor]:
    for network in networks:
        yield from network.parameters()
        yield from network.buffers()


def _update(setting: Setting, engine: Fsdp2Engine, loss: Tensor) -> None:
    """From the loss to the optimizer's step."""
    with setting.phase("backward"):
        engine.backward(loss)
    with setting.phase("reduce"):
        engine.reduce()
    with setting.phase("adam"):
        engine.step(LR)


def ours(
    setting: Setting,
    *,
    backend: str,
    fused: str = "triton" if GPU else "reference",
    compiled: bool = GPU and not NULL,
    checkpointing: str = "none",
    prepare: Callable[[nn.Module], object] | None = None,
) -> Arm:
    """This project's step: a bank of adapters, one near pass, no copies. `prepare` shards the network."""
    network = setting.network()
    model = LoRAModel(setting.family, network, LoRAConfig(rank=setting.rank, alpha=float(setting.rank)))
    Kernels(fused, "benchmark", AttentionChoice(backend, "benchmark")).apply(setting.family, network)
    blocks = setting.family.blocks(network)
    set_activation_checkpointing(blocks, checkpointing)
    if compiled:
        compile_blocks(blocks)
    if prepare is None:
        model.bank.keep_copies()
    else:
        prepare(network)
    engine = make_engine(setting, model.parameters, model.networks)
    emas = DualEMA(*(engine.ema_tensors(role) for role in ("student", "ema_fast", "ema_slow")))

    def near(*inputs: Any) -> Tensor:
        with setting.phase("near"):
            return model.near_velocity(*inputs)

    def far(*inputs: Any) -> Tensor:
        with setting.phase("far"):
            return model.far_velocity(*inputs)

    def step() -> None:
        plan, noised, cond = setting.draw()
        with torch.inference_mode(prepare is None):  # as train/step.py
            target = scfm_target(plan, noised, cond, near, far)
        target = target.clone()
        with setting.phase("student"):
            prediction = model.student_velocity(noised, plan.sigma_start, cond, plan.student_strength)
        _update(setting, engine, scfm_loss(prediction, target, plan))
        with setting.phase("ema"):
            emas.update()

    def held() -> Iterator[Tensor]:
        yield from _own(network)
        yield from _optimizer_state(engine._optimizer)

    forwards = 5.25 if checkpointing == "full" else 4.2
    return Arm(step, setting, held, forwards, "adapters and Adam fp32")


class _Peft:
    """A diffusers network with PEFT adapters, and the three passes as a plain script would run them."""

    def __init__(self, setting: Setting, adapters: tuple[str, ...], backend: str) -> None:
        from peft import LoraConfig

        self.setting = setting
        self.network = setting.network().requires_grad_(False)
        _use_backend(self.network, backend)
        linears = [name for name, module in self.network.named_modules() if isinstance(module, nn.Linear)]
        for adapter in adapters:
            config = LoraConfig(r=setting.rank, lora_alpha=setting.rank, target_modules=linears)
            with setting.device:  # beside a base on the meta device PEFT would make them on the CPU
                self.network.add_adapter(config, adapter_name=adapter)
        for name, parameter in self.network.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.float()

    def weights(self, adapter: str) -> dict[str, nn.Parameter]:
        part = f".{adapter}."
        return {n.replace(part, "."): p for n, p in self.network.named_parameters() if "lora_" in n and part in n}

    def velocity(self, phase: str, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        setting, enabled = self.setting, not self.setting.is_tiny
        with setting.phase(phase), torch.autocast(setting.device.type, dtype=torch.bfloat16, enabled=enabled):
            return setting.family.velocity(self.network, x, sigma, cond)

    @torch.no_grad()
    def target(
        self, plan: ShortcutPlan, x: Tensor, cond: Conditioning, fast: Callable[[], object], slow: Callable[[], object]
    ) -> Tensor:
        """The target; `fast` and `slow` select the EMAs. The numbers of rows are known on the CPU, so nothing waits."""
        near = torch.zeros_like(x)
        is_teacher = plan.near_strength == 0
        self.network.disable_adapters()
        self._rows_of_near(near, is_teacher.nonzero()[:, 0], plan, x, cond)
        self.network.enable_adapters()
        fast()
        self._rows_of_near(near, (~is_teacher).nonzero()[:, 0], plan, x, cond)
        delta1, delta2 = plan.sigma_start - plan.sigma_mid, plan.sigma_mid - plan.sigma_end
        slow()
        far = self.velocity("far", euler_step(x, near, delta1), plan.sigma_mid, cond)
        weight1, weight2 = per_sample(delta1, x), per_sample(delta2, x)
        return (weight1 * near + weight2 * far) / (weight1 + weight2)

    def _rows_of_near(self, near: Tensor, rows: Tensor, plan: ShortcutPlan, x: Tensor, cond: Conditioning) -> None:
        if len(rows):
            there = rows.to(x.device)
            near[there] = self.velocity("near", x[there], plan.sigma_start[there], cond[rows]).to(x.dtype)


def _use_backend(network: nn.Module, backend: str) -> None:
    """A backend of attention in diffusers' own blocks; PyTorch's default, if they do not have it."""
    if backend in DIFFUSERS_BACKENDS:
        with attention_backend("native"):  # restores the global backend, which set_attention_backend changes
            network.set_attention_backend(DIFFUSERS_BACKENDS[backend])


def reference(setting: Setting, backend: str) -> Arm:
    """The step of the authors' single-GPU release, with fp32 adapters and the fastest attention.

    It copies adapters in and out of the model, has two sub-batches in the near pass and activation checkpointing, and
    is eager.
    """
    peft = _Peft(setting, ("default",), backend)
    peft.network.enable_gradient_checkpointing()
    trained = peft.weights("default")
    student, fast, slow = ({n: p.detach().clone() for n, p in trained.items()} for _ in range(3))
    engine = make_engine(setting, lambda role: trained, {})

    @torch.no_grad()
    def put(weights: dict[str, Tensor]) -> None:
        for name, parameter in trained.items():
            parameter.copy_(weights[name])

    def step() -> None:
        plan, noised, cond = setting.draw()
        target = peft.target(plan, noised, cond, lambda: put(fast), lambda: put(slow))
        put(student)
        _update(setting, engine, scfm_loss(peft.velocity("student", noised, plan.sigma_start, cond), target, plan))
        with torch.no_grad(), setting.phase("ema"):
            for name, parameter in trained.items():
                student[name].copy_(parameter)
                fast[name].lerp_(parameter, 0.01)
                slow[name].lerp_(parameter, 0.001)

    def held() -> Iterator[Tensor]:
        yield from _own(peft.network)
        for weights in (student, fast, slow):
            yield from weights.values()
        yield from _optimizer_state(engine._optimizer)

    return Arm(step, setting, held, 5.25, "adapters and Adam fp32")


def tuned_reference(setting: Setting, backend: str, *, compiled: bool = GPU and not NULL) -> Arm:
    """The fastest step with diffusers and PEFT.

    It switches three adapters without copies, and has compiled blocks, the best attention backend, no checkpointing and
    foreach EMA updates.
    """
    peft = _Peft(setting, ("student", "ema_fast", "ema_slow"), backend)
    network = peft.network
    if compiled:
        torch._dynamo.config.recompile_limit = 64
        for block in setting.family.blocks(network):
            block.compile(dynamic=True)  # sub-batches of any size
    weights = {adapter: peft.weights(adapter) for adapter in ("student", "ema_fast", "ema_slow")}
    network.set_adapter("student")
    engine = make_engine(setting, lambda role: weights["student"], {})
    tensors = {adapter: [p.data for p in group.values()] for adapter, group in weights.items()}

    def step() -> None:
        plan, noised, cond = setting.draw()
        target = peft.target(
            plan, noised, cond, lambda: network.set_adapter("ema_fast"), lambda: network.set_adapter("ema_slow")
        )
        network.set_adapter("student")
        _update(setting, engine, scfm_loss(peft.velocity("student", noised, plan.sigma_start, cond), target, plan))
        with setting.phase("ema"):
            torch._foreach_lerp_(tensors["ema_fast"], tensors["student"], 0.01)
            torch._foreach_lerp_(tensors["ema_slow"], tensors["student"], 0.001)

    def held() -> Iterator[Tensor]:
        yield from _own(network)
        yield from _optimizer_state(engine._optimizer)

    return Arm(step, setting, held, 4.2, "adapters and Adam fp32")


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """A group of this process alone, for DDP and FSDP2."""
    if NULL:
        from torch.testing._internal.distributed.fake_pg import FakeStore

        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    else:
        dist.init_process_group("nccl" if GPU else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


class _AutomodelLinear(nn.Module):
    """A linear with NeMo Automodel's LoRA: factors in the dtype of the base, a scale, no fused product."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        at = {"device": base.weight.device, "dtype": base.weight.dtype}
        self.base, self.scale = base, 1.0
        self.lora_A = nn.Linear(base.in_features, rank, bias=False, **at)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False, **at)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.lora_B(self.lora_A(x)) * self.scale


def automodel(setting: Setting, backend: str) -> Arm:
    """The step of NeMo Automodel's Flux LoRA recipe, rebuilt from its sources of 2026 (a dependency would bring the whole of NeMo).

    https://github.com/NVIDIA-NeMo/Automodel/pull/2251: DDP, fused AdamW, 6 samples a GPU, no fp8; not compiled, no checkpointing.
    examples/diffusion/finetune/flux_t2i_flow_lora.yaml: rank 64, the targets above, logit-normal sigmas, weight decay 0.01, guidance 1.
    recipes/diffusion/train.py and _diffusers/auto_diffusion_pipeline.py: factors in bf16, gradients clipped at 1.0, the norm and the
    loss read in each step. The recipe's attention is FlashAttention-2; here all arms have the fastest. DDP is used if there is a
    process group; among one process it copies the gradients and sends nothing.
    """
    network = setting.network().requires_grad_(False)
    _use_backend(network, backend)
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.Linear) and AUTOMODEL_TARGETS.fullmatch(name):
            parent, _, child = name.rpartition(".")
            setattr(network.get_submodule(parent), child, _AutomodelLinear(module, setting.rank))
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    called: nn.Module = network
    if dist.is_initialized() and dist.get_backend() != "fake":  # DDP needs the results of its collectives
        called = nn.parallel.DistributedDataParallel(network, init_sync=False)  # one process: nothing to compare
    optimizer = torch.optim.AdamW(trained, lr=LR, betas=(0.9, 0.999), weight_decay=0.01, fused=True)
    cond = setting.cond.with_guidance(torch.ones(setting.batch, device=setting.device))

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        sigma = torch.randn(setting.batch, device=setting.device).sigmoid()
        noise = torch.randn_like(setting.latents)
        noised = noise_latents(setting.latents, noise, sigma)
        with setting.phase("student"):
            prediction = setting.family.velocity(called, noised, sigma, cond)
        loss = F.mse_loss(prediction.float(), flow_velocity(setting.latents, noise))
        with setting.phase("backward"):
            loss.backward()
        with setting.phase("reduce"):
            nn.utils.clip_grad_norm_(trained, 1.0, foreach=True).item()
        with setting.phase("adam"):
            optimizer.step()
        loss.item()

    def held() -> Iterator[Tensor]:
        yield from _own(network)
        yield from (parameter.grad for parameter in trained if parameter.grad is not None)
        yield from _optimizer_state(optimizer)

    return Arm(step, setting, held, 2.1, f"adapters and Adam {'fp32' if setting.is_tiny else 'bf16'}")
