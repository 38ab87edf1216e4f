"""Time of one training step: ours (no checkpointing; compiled on a GPU) against a plain diffusers + PEFT step, interleaved in one process.

    python tests/benchmarks/bench_step.py [--repeats 20] [--json PATH]

On a GPU: the architecture of Flux.1-dev with random weights, batch 8, 512 x 512 pixels, T5 length 256, LoRA rank 64,
encoders cached in both arms. On a CPU: the tiny Flux, so that this file cannot rot; its figures say nothing of a GPU.

`reference` does what the authors' single-GPU release does: adapters copied in and out of the model to switch between
teacher, EMAs and student, two sub-batches in the near pass, activation checkpointing, eager. Adapters are fp32 in both.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from scfm_core.distributed.engine import EngineConfig, OptimizerConfig
from scfm_core.distributed.fsdp2 import Fsdp2Engine, Fsdp2Layout, Parameters
from scfm_core.distributed.world import World
from scfm_core.flow.path import euler_step, noise_latents, per_sample
from scfm_core.flow.random import sample_noise
from scfm_core.models.adapters import LoRAConfig
from scfm_core.models.flux import Flux
from scfm_core.models.protocol import Conditioning
from scfm_core.models.student import LoRAModel
from scfm_core.scfm.ema import DualEMA
from scfm_core.scfm.loss import scfm_loss
from scfm_core.scfm.plan import PlanConfig, ShortcutPlan, sample_plan
from scfm_core.scfm.target import scfm_target
from scfm_core.train.build import compile_blocks

TINY = {
    "attention_head_dim": 16, "axes_dims_rope": (4, 6, 6), "guidance_embeds": True, "in_channels": 4,
    "joint_attention_dim": 32, "num_attention_heads": 4, "num_layers": 1, "num_single_layers": 3, "patch_size": 1,
    "pooled_projection_dim": 32,
}  # fmt: skip
LR = 2e-5


class Setting:
    """Shapes, device and inputs that all arms share."""

    def __init__(self, device: torch.device, batch: int) -> None:
        gpu = device.type == "cuda"
        self.device, self.dtype, self.batch = device, torch.bfloat16 if gpu else torch.float32, batch
        self.family = Flux("black-forest-labs/FLUX.1-dev", offline=True)
        if not gpu:
            self.family.network_config = TINY
        self.rank = 64 if gpu else 4
        side, length, channels = (64, 256, 16) if gpu else (8, 8, 1)
        config = self.family.network_config
        generator = torch.Generator().manual_seed(0)
        self.latents = torch.randn(batch, channels, side, side, generator=generator).to(device)
        text = torch.randn(batch, length, config["joint_attention_dim"], generator=generator)
        pooled = torch.randn(batch, config["pooled_projection_dim"], generator=generator)
        self.cond = Conditioning(text=text.to(device, self.dtype), pooled=pooled.to(device, self.dtype))
        self.ids = torch.arange(batch)

    def network(self) -> nn.Module:
        return self.family.random_network(self.dtype, self.device, seed=0)

    def draw(self) -> tuple[ShortcutPlan, Tensor, Conditioning]:
        self.ids = self.ids + self.batch
        plan = sample_plan(PlanConfig(), self.ids, seed=0).to(self.device)
        noised = noise_latents(self.latents, sample_noise(self.latents, self.ids, 0), plan.sigma_start)
        return plan, noised, self.cond.with_guidance(plan.guidance)


def make_engine(setting: Setting, parameters: Parameters, networks: Mapping[str, nn.Module]) -> Fsdp2Engine:
    """The trainer's own, of one process, in both arms: what differs is the method's share of a step."""
    config = OptimizerConfig(
        betas=(0.9, 0.999), weight_decay=0.0, clip_norm=10.0, accumulation=1, micro_batch_size=setting.batch, lr=LR,
        compute_dtype="bfloat16" if setting.dtype == torch.bfloat16 else "float32",
    )  # fmt: skip
    layout = Fsdp2Layout(EngineConfig(), World(), setting.device, setting.dtype)
    return Fsdp2Engine(parameters, networks, layout, World(), config)


def ours(setting: Setting, *, compiled: bool) -> Callable[[], None]:
    network = setting.network()
    model = LoRAModel(setting.family, network, LoRAConfig(rank=setting.rank, alpha=float(setting.rank)))
    if compiled:
        compile_blocks(network)
    engine = make_engine(setting, model.parameters, model.networks)
    emas = DualEMA(*(model.parameters(role) for role in ("student", "ema_fast", "ema_slow")))

    def step() -> None:
        plan, noised, cond = setting.draw()
        target = scfm_target(plan, noised, cond, model.near_velocity, model.far_velocity)
        prediction = model.student_velocity(noised, plan.sigma_start, cond, plan.student_strength)
        engine.backward(scfm_loss(prediction, target, plan))
        engine.reduce()
        engine.step(LR)
        emas.update()

    return step


def reference(setting: Setting) -> Callable[[], None]:
    from peft import LoraConfig

    network = setting.network().requires_grad_(False)
    linears = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    network.add_adapter(LoraConfig(r=setting.rank, lora_alpha=setting.rank, target_modules=linears))
    network.enable_gradient_checkpointing()
    trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
    for parameter in trained.values():
        parameter.data = parameter.data.float()
    student, fast, slow = ({n: p.detach().clone() for n, p in trained.items()} for _ in range(3))
    engine = make_engine(setting, lambda role: trained, {})
    autocast = setting.device.type == "cuda"

    @torch.no_grad()
    def copy(weights: dict[str, Tensor]) -> None:
        for name, parameter in trained.items():
            parameter.copy_(weights[name])

    def velocity(x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        with torch.autocast(setting.device.type, dtype=torch.bfloat16, enabled=autocast):
            return setting.family.velocity(network, x, sigma, cond)

    @torch.no_grad()
    def target_of(plan: ShortcutPlan, x: Tensor, cond: Conditioning) -> Tensor:
        near = torch.zeros_like(x)
        teacher, rest = plan.is_teacher.nonzero()[:, 0], (~plan.is_teacher).nonzero()[:, 0]
        if len(teacher):
            network.disable_adapters()
            near[teacher] = velocity(x[teacher], plan.sigma_start[teacher], cond[teacher]).to(x.dtype)
            network.enable_adapters()
        copy(fast)
        if len(rest):
            near[rest] = velocity(x[rest], plan.sigma_start[rest], cond[rest]).to(x.dtype)
        delta1, delta2 = plan.sigma_start - plan.sigma_mid, plan.sigma_mid - plan.sigma_end
        copy(slow)
        far = velocity(euler_step(x, near, delta1), plan.sigma_mid, cond)
        weight1, weight2 = per_sample(delta1, x), per_sample(delta2, x)
        return (weight1 * near + weight2 * far) / (weight1 + weight2)

    def step() -> None:
        plan, noised, cond = setting.draw()
        target = target_of(plan, noised, cond)
        copy(student)
        engine.backward(scfm_loss(velocity(noised, plan.sigma_start, cond), target, plan))
        engine.reduce()
        engine.step(LR)
        with torch.no_grad():
            for name, parameter in trained.items():
                student[name].copy_(parameter)
                fast[name].lerp_(parameter, 0.01)
                slow[name].lerp_(parameter, 0.001)

    return step


def measure(device: torch.device, repeats: int, batch: int) -> list[dict[str, object]]:
    """Median seconds a step for each arm, the arms taking turns."""
    setting = Setting(device, batch)
    gpu = device.type == "cuda"
    # Two networks of 24 GB are as many as fit beside the activations.
    arms = {"reference": reference(setting), "ours": ours(setting, compiled=gpu)}
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    peak: dict[str, int] = dict.fromkeys(arms, 0)
    for number in range(repeats + 2):  # two rounds of warm-up
        for name, step in arms.items():
            if gpu:
                torch.cuda.reset_peak_memory_stats(device)
                torch.cuda.synchronize(device)
            began = time.perf_counter()
            step()
            if gpu:
                torch.cuda.synchronize(device)
                peak[name] = max(peak[name], torch.cuda.max_memory_allocated(device))
            if number >= 2:
                seconds[name].append(time.perf_counter() - began)
    base = statistics.median(seconds["reference"])
    return [
        {
            "arm": name,
            "median_s": statistics.median(times),
            "speedup": base / statistics.median(times),
            # Both arms are alive at once: the weights of both count.
            "peak_gb_both_arms_resident": peak[name] / 1e9 if gpu else None,
        }
        for name, times in seconds.items()
    ]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--json", type=Path, default=Path("runs/bench/step.json"))
    arguments = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU"
    shape = "Flux.1-dev, bf16 base" if device.type == "cuda" else "tiny Flux, fp32"
    rows = measure(device, arguments.repeats or (20 if device.type == "cuda" else 10), arguments.batch)
    print(f"one step, {shape}, batch {arguments.batch}, {name}, torch {torch.__version__}")
    print(f"{'arm':<28}{'median ms':>12}{'x reference':>13}")
    for row in rows:
        print(f"{row['arm']:<28}{1000 * row['median_s']:12.1f}{row['speedup']:13.2f}")
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps({"device": name, "torch": torch.__version__, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
