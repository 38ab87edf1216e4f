"""Peak memory and time of our step with each kind of activation checkpointing.

    python tests/benchmarks/bench_memory.py [--repeats 5] [--batch N] [--json PATH]

On a GPU: Flux.1-dev, 512 x 512 pixels, T5 length 512, LoRA rank 64; one arm at a time is on the GPU. On a CPU: the tiny
Flux, without memory.
"""

import gc

import torch
from harness import DEVICE, measure, parser, report
from step_arms import BATCH, DTYPE, GPU, Setting, ours

from scfm_core.kernels.attention import AttentionShape, choose_attention


def main(argv: list[str] | None = None) -> None:
    arguments = parser(__doc__, "memory", 5, BATCH).parse_args(argv)
    setting = Setting(arguments.batch, text_length=512)
    arch = setting.family.network_config
    shape = AttentionShape(
        arguments.batch, setting.tokens, arch["num_attention_heads"], arch["attention_head_dim"], DTYPE, DEVICE
    )
    backend = choose_attention("auto", shape).backend
    seconds, peaks = {}, {}
    for mode in ("none", "selective", "full"):
        step = ours(setting, backend=backend, checkpointing=mode)
        if GPU:
            torch.cuda.reset_peak_memory_stats()
        seconds[mode] = measure({mode: step}, arguments.repeats)[mode]
        peaks[mode] = torch.cuda.max_memory_allocated() / 1e9 if GPU else None
        del step
        gc.collect()
    rows = [
        {
            "arm": "reference: none" if mode == "none" else f"ours: {mode}",
            "milliseconds": 1e3 * seconds[mode],
            "x_reference": seconds["none"] / seconds[mode],
            "peak_GB": peaks[mode],
        }
        for mode in seconds
    ]
    columns = {"arm": "", "milliseconds": ".1f", "x_reference": ".2f", "peak_GB": ".1f"}
    report(f"activation checkpointing, batch {arguments.batch}, {setting.tokens} tokens", rows, columns, arguments.json)


if __name__ == "__main__":
    main()
