"""Time of one training step: ours, a plain diffusers + PEFT step, and a tuned one.

    python tests/benchmarks/bench_step.py [--repeats 20] [--batch N] [--profile] [--json PATH]

On a GPU: the architecture of Flux.1-dev with random weights, 512 x 512 pixels, T5 length 256, LoRA rank 64, encoders
cached in all arms. `reference` works as the authors' release; `reference: tuned` is compiled, without checkpointing and
copies (step_arms.py). `of peak` counts executed FLOPs with recomputation: 4.2 forwards without it, 5.25 with it.
`--profile` adds a table of the GPU's time in our step by kind of kernel. On a CPU: the tiny Flux, with fused blocks in
plain PyTorch; these figures do not apply to a GPU.
"""

import torch
from harness import DEVICE, measure, parser, report
from step_arms import BATCH, DTYPE, GPU, Setting, ours, reference, tuned_reference

from scfm_core.kernels.attention import AttentionShape, choose_attention
from scfm_core.train.trace import trace_forward

PEAK = {"A100": 312e12, "H100": 989e12, "H200": 989e12}  # bf16 without sparsity, from NVIDIA's data sheets
GROUPS = {  # the first match counts
    "compiled (inductor)": ("triton_",),
    "attention": ("flash", "fmha", "cudnn", "sdpa", "attention", "_backward_keys", "_backward_queries", "_delta"),
    "matrix products": ("gemm", "nvjet", "cutlass", "sm90_xmma", "sm80_xmma", "cublas", "mm_"),
    "fused kernels": ("_forward_kernel", "_backward_kernel", "_modulate", "_gate"),
    "optimizer, EMA": ("multi_tensor", "foreach", "adam", "lerp"),
    "copies": ("memcpy", "copy", "memset"),
}


def profile(step: object) -> list[dict[str, object]]:
    """The GPU's time of one step by group of kernels."""
    activities = [torch.profiler.ProfilerActivity.CUDA if GPU else torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profiler:
        step()  # type: ignore[operator]
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


def main(argv: list[str] | None = None) -> None:
    arguments = parser(__doc__, "step", 20, BATCH)
    arguments.add_argument("--profile", action="store_true")
    arguments = arguments.parse_args(argv)
    setting = Setting(arguments.batch)
    arch = setting.family.network_config
    shape = AttentionShape(
        arguments.batch, setting.tokens, arch["num_attention_heads"], arch["attention_head_dim"], DTYPE, DEVICE
    )
    backend = choose_attention("auto", shape).backend
    arms = {
        "reference": reference(setting),
        "reference: tuned": tuned_reference(setting, backend),
        "ours": ours(setting, backend=backend),
        "ours: diffusers' blocks": ours(setting, backend=backend, fused="none"),
    }
    peaks = dict.fromkeys(arms, 0.0)

    def watched(name: str) -> object:
        def run() -> None:
            if GPU:
                torch.cuda.reset_peak_memory_stats()
            arms[name]()
            if GPU:
                torch.cuda.synchronize()
                peaks[name] = max(peaks[name], torch.cuda.max_memory_allocated() - resident)

        return run

    resident = 0
    for step in arms.values():  # create optimizers and compiled code before the comparison
        step()
        step()
    if GPU:
        torch.cuda.synchronize()
        resident = torch.cuda.memory_allocated()
    seconds = measure({name: watched(name) for name in arms}, arguments.repeats)  # type: ignore[misc]
    traced = trace_forward(
        setting.family, setting.family.meta_network(), setting.latents.shape[1:], setting.text_length
    )
    forward = arguments.batch * (traced.linear + traced.attention)
    peak = next((value for name, value in PEAK.items() if GPU and name in torch.cuda.get_device_name()), None)
    rows = [
        {
            "arm": name,
            "milliseconds": 1e3 * time,
            "x_reference": seconds["reference"] / time,
            "x_tuned": seconds["reference: tuned"] / time,
            "of_peak": None if peak is None else (5.25 if name == "reference" else 4.2) * forward / time / peak,
            "GB_above_resident": peaks[name] / 1e9 if GPU else None,
        }
        for name, time in seconds.items()
    ]
    columns = {
        "arm": "", "milliseconds": ".1f", "x_reference": ".2f", "x_tuned": ".2f", "of_peak": ".1%", "GB_above_resident": ".1f",
    }  # fmt: skip
    title = f"one step, {'Flux.1-dev, bf16 base' if GPU else 'tiny Flux, fp32'}, batch {arguments.batch}, {backend} attention"
    report(title, rows, columns, arguments.json)
    if arguments.profile:
        columns = {"arm": "", "milliseconds": ".1f", "share": ".1%"}
        path = arguments.json.with_name("step_profile.json")
        report(f"profile of {title}", profile(arms["ours"]), columns, path)


if __name__ == "__main__":
    main()
