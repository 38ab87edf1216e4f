"""One training step of this project, and steps with only diffusers and PEFT, on the same base weights."""

from collections.abc import Callable, Mapping

import torch
from diffusers.models.attention_dispatch import attention_backend
from harness import DEVICE
from torch import Tensor, nn

from scfm_core.distributed.engine import EngineConfig, OptimizerConfig, Parameters
from scfm_core.distributed.fsdp2 import Fsdp2Engine, Fsdp2Layout
from scfm_core.distributed.world import World
from scfm_core.flow.path import euler_step, noise_latents, per_sample
from scfm_core.flow.random import sample_noise
from scfm_core.kernels.attention import AttentionChoice
from scfm_core.models.adapters import LoRAConfig
from scfm_core.models.conditioning import Conditioning
from scfm_core.models.families import open_family
from scfm_core.models.student import LoRAModel
from scfm_core.scfm.ema import DualEMA
from scfm_core.scfm.loss import scfm_loss
from scfm_core.scfm.method import PlanConfig
from scfm_core.scfm.plan import ShortcutPlan, sample_plan
from scfm_core.scfm.target import scfm_target
from scfm_core.train.kernels import Kernels
from scfm_core.train.network import compile_blocks, set_activation_checkpointing

GPU = DEVICE.type == "cuda"
DTYPE = torch.bfloat16 if GPU else torch.float32
BATCH = 8 if GPU and torch.cuda.get_device_properties(DEVICE).total_memory > 100e9 else 1
"""Samples per step; 1 if several arms without checkpointing would not fit together."""
LR = 2e-5
TINY = {
    "attention_head_dim": 16, "axes_dims_rope": (4, 6, 6), "guidance_embeds": True, "in_channels": 4,
    "joint_attention_dim": 32, "num_attention_heads": 4, "num_layers": 1, "num_single_layers": 3, "patch_size": 1,
    "pooled_projection_dim": 32,
}  # fmt: skip
DIFFUSERS_BACKENDS = {"cudnn": "_native_cudnn", "flash": "_native_flash", "flash3": "_flash_3", "xformers": "xformers"}


class Setting:
    """Base weights, shapes and inputs of all arms: Flux.1-dev on a GPU, the tiny Flux on a CPU.

    Args:
        batch: samples per step.
        text_length: T5 tokens, on a GPU.
    """

    def __init__(self, batch: int, text_length: int = 256) -> None:
        self.batch = batch
        self.family = open_family("black-forest-labs/FLUX.1-dev", offline=True)
        if not GPU:
            self.family.network_config = TINY
        self.rank = 64 if GPU else 4
        side, length, channels = (64, text_length, 16) if GPU else (4, 4, 1)
        self.tokens, self.text_length = side * side // 4 + length, length
        generator = torch.Generator().manual_seed(0)
        self.latents = torch.randn(batch, channels, side, side, generator=generator).to(DEVICE)
        self.cond = Conditioning(
            fields={
                name: torch.randn(batch, *shape, generator=generator).to(DEVICE, DTYPE)
                for name, shape in self.family.shapes(length).items()
            }
        )
        self.ids = torch.arange(batch)
        base = nn.Module.to(self.family.meta_network(), DTYPE).to_empty(device=DEVICE)
        torch.manual_seed(0)
        for name, parameter in base.named_parameters():
            # Not zero: a GPU multiplies zeros at a higher clock.
            nn.init.ones_(parameter) if "norm_" in name and parameter.ndim == 1 else nn.init.normal_(
                parameter, std=0.02
            )
        self._weights = base.state_dict()

    def network(self) -> nn.Module:
        """A network with the shared weights."""
        network = self.family.meta_network()
        network.load_state_dict(self._weights, assign=True)
        return network

    def draw(self) -> tuple[ShortcutPlan, Tensor, Conditioning]:
        """Inputs of the next step."""
        self.ids = self.ids + self.batch
        plan = sample_plan(PlanConfig(), self.ids, seed=0).to(DEVICE)
        noised = noise_latents(self.latents, sample_noise(self.latents, self.ids, 0), plan.sigma_start)
        return plan, noised, self.cond.with_guidance(plan.guidance)


def make_engine(setting: Setting, parameters: Parameters, networks: Mapping[str, nn.Module]) -> Fsdp2Engine:
    """The trainer's engine on one process, for all arms: they differ only in the passes and updates of the method."""
    config = OptimizerConfig(
        betas=(0.9, 0.999), weight_decay=0.0, clip_norm=10.0, accumulation=1, micro_batch_size=setting.batch, lr=LR,
        compute_dtype="bfloat16" if torch.bfloat16 == DTYPE else "float32",
    )  # fmt: skip
    return Fsdp2Engine(parameters, networks, Fsdp2Layout(EngineConfig(), World(), DEVICE, DTYPE), World(), config)


def ours(
    setting: Setting,
    *,
    backend: str,
    fused: str = "triton" if GPU else "reference",
    compiled: bool = GPU,
    checkpointing: str = "none",
    prepare: Callable[[nn.Module], object] = lambda network: None,
) -> Callable[[], None]:
    """This project's step: a bank of adapters, one near pass, no copies."""
    network = setting.network()
    model = LoRAModel(setting.family, network, LoRAConfig(rank=setting.rank, alpha=float(setting.rank)))
    Kernels(fused, "benchmark", AttentionChoice(backend, "benchmark")).apply(setting.family, network)
    blocks = setting.family.blocks(network)
    set_activation_checkpointing(blocks, checkpointing)
    if compiled:
        compile_blocks(blocks)
    prepare(network)
    engine = make_engine(setting, model.parameters, model.networks)
    emas = DualEMA(*(engine.ema_tensors(role) for role in ("student", "ema_fast", "ema_slow")))

    def step() -> None:
        plan, noised, cond = setting.draw()
        target = scfm_target(plan, noised, cond, model.near_velocity, model.far_velocity)
        prediction = model.student_velocity(noised, plan.sigma_start, cond, plan.student_strength)
        engine.backward(scfm_loss(prediction, target, plan))
        engine.reduce()
        engine.step(LR)
        emas.update()

    return step


class _Peft:
    """A diffusers network with PEFT adapters, and the three passes as a plain script would run them."""

    def __init__(self, setting: Setting, adapters: tuple[str, ...]) -> None:
        from peft import LoraConfig

        self.setting = setting
        self.network = setting.network().requires_grad_(False)
        linears = [name for name, module in self.network.named_modules() if isinstance(module, nn.Linear)]
        for adapter in adapters:
            config = LoraConfig(r=setting.rank, lora_alpha=setting.rank, target_modules=linears)
            self.network.add_adapter(config, adapter_name=adapter)
        for name, parameter in self.network.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.float()

    def weights(self, adapter: str) -> dict[str, nn.Parameter]:
        part = f".{adapter}."
        return {n.replace(part, "."): p for n, p in self.network.named_parameters() if "lora_" in n and part in n}

    def velocity(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16, enabled=GPU):
            return self.setting.family.velocity(self.network, x, sigma, cond)

    @torch.no_grad()
    def target(
        self, plan: ShortcutPlan, x: Tensor, cond: Conditioning, fast: Callable[[], object], slow: Callable[[], object]
    ) -> Tensor:
        """The target; `fast` and `slow` select the EMAs."""
        near = torch.zeros_like(x)
        teacher, rest = plan.is_teacher.nonzero()[:, 0], (~plan.is_teacher).nonzero()[:, 0]
        if len(teacher):
            self.network.disable_adapters()
            near[teacher] = self.velocity(x[teacher], plan.sigma_start[teacher], cond[teacher]).to(x.dtype)
            self.network.enable_adapters()
        fast()
        if len(rest):
            near[rest] = self.velocity(x[rest], plan.sigma_start[rest], cond[rest]).to(x.dtype)
        delta1, delta2 = plan.sigma_start - plan.sigma_mid, plan.sigma_mid - plan.sigma_end
        slow()
        far = self.velocity(euler_step(x, near, delta1), plan.sigma_mid, cond)
        weight1, weight2 = per_sample(delta1, x), per_sample(delta2, x)
        return (weight1 * near + weight2 * far) / (weight1 + weight2)


def reference(setting: Setting) -> Callable[[], None]:
    """The step of the authors' single-GPU release, with fp32 adapters.

    It copies adapters in and out of the model, has two sub-batches in the near pass and activation checkpointing, and
    is eager.
    """
    peft = _Peft(setting, ("default",))
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
        engine.backward(scfm_loss(peft.velocity(noised, plan.sigma_start, cond), target, plan))
        engine.reduce()
        engine.step(LR)
        with torch.no_grad():
            for name, parameter in trained.items():
                student[name].copy_(parameter)
                fast[name].lerp_(parameter, 0.01)
                slow[name].lerp_(parameter, 0.001)

    return step


def tuned_reference(setting: Setting, backend: str) -> Callable[[], None]:
    """The fastest step with diffusers and PEFT.

    It switches three adapters without copies, and has compiled blocks, the best attention backend, no checkpointing and
    foreach EMA updates.
    """
    peft = _Peft(setting, ("student", "ema_fast", "ema_slow"))
    network = peft.network
    if backend in DIFFUSERS_BACKENDS:
        with attention_backend("native"):  # restores the global backend, which set_attention_backend changes
            network.set_attention_backend(DIFFUSERS_BACKENDS[backend])
    if GPU:
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
        engine.backward(scfm_loss(peft.velocity(noised, plan.sigma_start, cond), target, plan))
        engine.reduce()
        engine.step(LR)
        torch._foreach_lerp_(tensors["ema_fast"], tensors["student"], 0.01)
        torch._foreach_lerp_(tensors["ema_slow"], tensors["student"], 0.001)

    return step
