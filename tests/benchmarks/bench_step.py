"""Time of one training step: ours, diffusers + PEFT plain and tuned, and NeMo Automodel's Flux LoRA recipe.

    python tests/benchmarks/bench_step.py [--repeats 20] [--batch N] [--seconds S] [--eager] [--arms NAME,...] [--profile] [--json PATH]

On a GPU: the architecture of Flux.1-dev with random weights, 512 x 512 pixels, T5 length 256, LoRA rank 64, encoders cached in all arms,
the fastest attention in all arms. `reference` works as the authors' release; `reference: tuned` is compiled, without checkpointing and
copies; `reference: automodel` trains an ordinary LoRA, with other passes and half the adapters (step_arms.py): `x reference` and
`x tuned` are ratios of samples/s, and of that arm they say little; `of peak` is the fair comparison. It counts executed FLOPs: 4.2
forwards a sample of this method, 5.25 with recomputation, 2.1 of an ordinary LoRA. `peak GiB` is `max_memory_allocated` of the arm with
the shared base weights; the other arms are on the host meanwhile. `--profile` adds a table of the GPU's time in our step by kind of
kernel. On a CPU: the tiny Flux, with fused blocks in plain PyTorch; these figures do not apply to a GPU.
"""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from harness import GPU, NULL, STARTED, measure, parser, report, save
from setting import BATCH, Arm, Setting, build
from step_arms import AUTOMODEL_BATCH, automodel, ours, process_group, reference, tuned_reference

from scfm_core.train.trace import trace_forward

PEAK = {"A100": 312e12, "H100": 989e12, "H200": 989e12}  # bf16 without sparsity, from NVIDIA's data sheets
ARMS = ("reference", "reference: automodel", "ours", "reference: tuned", "ours: diffusers' blocks")
"""The eager ones come first: they need no minutes to compile."""
GOALS = {"ours": "2.2 x reference, 1.15 x tuned, 50% of peak"}
COLUMNS = {
    "arm": "", "batch": "d", "milliseconds": ".1f", "samples_per_s": ".2f", "x_reference": ".2f", "x_tuned": ".2f", "of_peak": ".1%",
    "peak_GiB": ".1f", "steps": "d", "dtypes": "", "goal": "",
}  # fmt: skip
GROUPS = {  # the first match counts
    "compiled (inductor)": ("triton_",),
    "attention": ("flash", "fmha", "cudnn", "sdpa", "attention", "_backward_keys", "_backward_queries", "_delta"),
    "matrix products": ("gemm", "nvjet", "cutlass", "sm90_xmma", "sm80_xmma", "cublas", "mm_"),
    "fused kernels": ("_forward_kernel", "_backward_kernel", "_modulate", "_gate"),
    "optimizer, EMA": ("multi_tensor", "foreach", "adam", "lerp"),
    "copies": ("memcpy", "copy", "memset"),
}


def profile(step: Callable[[], object]) -> list[dict[str, object]]:
    """The GPU's time of one step by group of kernels."""
    activities = [torch.profiler.ProfilerActivity.CUDA if GPU else torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profiler:
        step()
        if GPU:
            torch.cuda.synchronize()
    spent: dict[str, float] = {}
    for event in profiler.key_averages():
        time = event.self_device_time_total if GPU else event.self_cpu_time_total
        name = event.key.lower()
        group = next((group for group, parts in GROUPS.items() if any(part in name for part in parts)), "other")
        spent[group] = spent.get(group, 0.0) + time / 1e3
    total = sum(spent.values())
    return [
        {"arm": f"ours: {group}", "milliseconds": time, "share": time / total}
        for group, time in sorted(spent.items(), key=lambda item: -item[1])
    ]


def makers(setting: Setting, backend: str, eager: bool) -> dict[str, Callable[[], Arm]]:
    """How to make each arm, by name."""
    compiled = GPU and not eager
    return {
        "reference": partial(reference, setting, backend),
        "reference: automodel": partial(automodel, setting.resized(AUTOMODEL_BATCH if GPU else setting.batch), backend),
        "ours": partial(ours, setting, backend=backend, compiled=compiled),
        "reference: tuned": partial(tuned_reference, setting, backend, compiled=compiled),
        "ours: diffusers' blocks": partial(ours, setting, backend=backend, fused="none", compiled=compiled),
        "ours: selective": partial(ours, setting, backend=backend, compiled=compiled, checkpointing="selective"),
    }


class Table:
    """The rows of the arms; saved after each round."""

    def __init__(self, setting: Setting, arms: dict[str, Arm], title: str, path: Any) -> None:
        self.arms, self.title, self.path = arms, title, path
        self.peaks = dict.fromkeys(arms, 0.0)
        forward = trace_forward(
            setting.family, setting.family.meta_network(), setting.latents.shape[1:], setting.text_length
        )
        self._forward = forward.linear + forward.attention
        self._speed = next(
            (value for name, value in PEAK.items() if GPU and name in torch.cuda.get_device_name()), None
        )

    @contextlib.contextmanager
    def turn(self, name: str) -> Iterator[None]:
        """One arm on the GPU, and its peak of memory."""
        with self.arms[name].on_gpu():
            if GPU:
                torch.cuda.reset_peak_memory_stats()
            yield
            if GPU:
                torch.cuda.synchronize()
                self.peaks[name] = max(self.peaks[name], torch.cuda.max_memory_allocated())

    def rows(self, seconds: dict[str, float], steps: int) -> list[dict[str, Any]]:
        rates = {name: self.arms[name].setting.batch / time for name, time in seconds.items()}
        against = {"x_reference": rates.get("reference"), "x_tuned": rates.get("reference: tuned")}
        speed = None if NULL else self._speed
        return [
            {
                "arm": name,
                "batch": self.arms[name].setting.batch,
                "milliseconds": 1e3 * time,
                "samples_per_s": rates[name],
                **{key: None if rate is None else rates[name] / rate for key, rate in against.items()},
                "of_peak": None if speed is None else self.arms[name].forwards * self._forward * rates[name] / speed,
                "peak_GiB": self.peaks[name] / 2**30 if GPU else None,
                "steps": steps,
                "dtypes": self.arms[name].dtypes,
                "goal": GOALS.get(name),
            }
            for name, time in seconds.items()
        ]

    def save(self, seconds: dict[str, float], steps: int) -> None:
        save(self.title, self.rows(seconds, steps), COLUMNS, self.path)


def main(argv: list[str] | None = None) -> None:
    arguments = parser(__doc__, "step", 20, BATCH)
    arguments.add_argument("--eager", action="store_true", default=NULL, help="compile nothing")
    arguments.add_argument("--profile", action="store_true")
    arguments.add_argument("--arms", default=",".join(ARMS), help="the default leaves out `ours: selective`")
    arguments = arguments.parse_args(argv)
    setting = Setting(arguments.batch)
    backend = setting.attention()
    size = "tiny Flux, base fp32" if setting.is_tiny else "Flux.1-dev, base bf16"
    title = f"one step, {size}, batch {arguments.batch}, {backend} attention"
    with process_group():
        every = makers(setting, backend, arguments.eager)
        arms = build({name: every[name] for name in arguments.arms.split(",")})
        table = Table(setting, arms, title, arguments.json)
        seconds = measure(
            {name: arm.step for name, arm in arms.items()},
            arguments.repeats,
            block=5 if GPU and not NULL else 1,
            turn=table.turn,
            until=STARTED + arguments.seconds,
            after_round=table.save,
        )
        report(title, table.rows(seconds, arguments.repeats), COLUMNS, arguments.json)
        if arguments.profile and "ours" in arms:
            with table.turn("ours"):
                rows = profile(arms["ours"])
            columns = {"arm": "", "milliseconds": ".1f", "share": ".1%"}
            report(f"profile of {title}", rows, columns, arguments.json.with_name("step_profile.json"))


if __name__ == "__main__":
    main()
