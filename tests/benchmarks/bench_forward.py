"""A pass without gradient: what the adapters cost, and its share of the GPU's peak.

    python tests/benchmarks/bench_forward.py [--repeats 20] [--batch N] [--seconds S] [--json PATH]

On a GPU: Flux.1-dev with random weights, 512 x 512 pixels, T5 length 256, compiled blocks. `cost` is the time of the adapters at rank 64,
as a share of the pass without them.
"""

from collections.abc import Callable

import torch
from bench_step import PEAK
from harness import GPU, NULL, STARTED, measure, parser, report, save
from setting import BATCH, Setting
from torch import Tensor

from scfm_core.kernels.attention import AttentionChoice
from scfm_core.models.adapters import LoRAConfig
from scfm_core.models.student import LoRAModel
from scfm_core.train.kernels import Kernels
from scfm_core.train.network import compile_blocks
from scfm_core.train.trace import trace_forward

COLUMNS = {"arm": "", "milliseconds": ".2f", "of_peak": ".1%", "x_reference": ".2f", "cost": ".1%", "goal": ""}
GOALS = {"ours: adapters": "60% of peak, cost 5%"}


def arms(setting: Setting, backend: str) -> dict[str, Callable[[], Tensor]]:
    """The pass of diffusers' blocks, of ours, and of ours with adapters."""
    family, compiled = setting.family, GPU and not NULL
    plain, network = setting.network(), setting.network()
    for each, fused in ((plain, "none"), (network, "triton" if GPU else "reference")):
        if each is network:
            model = LoRAModel(family, network, LoRAConfig(rank=setting.rank, alpha=float(setting.rank)))
        Kernels(fused, "benchmark", AttentionChoice(backend, "benchmark")).apply(family, each)
        if compiled:
            compile_blocks(family.blocks(each))
    model.bank.keep_copies()
    plan, noised, cond = setting.draw()

    def run(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def inferred() -> Tensor:
            with torch.inference_mode():
                return call()

        return inferred

    sigma, strength = plan.sigma_start, plan.student_strength
    return {
        "reference: diffusers": run(lambda: family.velocity(plain, noised, sigma, cond)),
        "ours": run(lambda: model.velocity("teacher", noised, sigma, cond, strength)),
        "ours: adapters": run(lambda: model.velocity("ema_slow", noised, sigma, cond, strength)),
    }


def main(argv: list[str] | None = None) -> None:
    arguments = parser(__doc__, "forward", 20, BATCH).parse_args(argv)
    setting = Setting(arguments.batch)
    backend = setting.attention()
    traced = trace_forward(
        setting.family, setting.family.meta_network(), setting.latents.shape[1:], setting.text_length
    )
    flops = arguments.batch * (traced.linear + traced.attention)
    peak = next((value for name, value in PEAK.items() if GPU and name in torch.cuda.get_device_name()), None)
    title = f"a pass without gradient, batch {arguments.batch}, {setting.tokens} tokens, {backend} attention"

    def rows(seconds: dict[str, float]) -> list[dict[str, object]]:
        return [
            {
                "arm": arm,
                "milliseconds": 1e3 * time,
                "of_peak": None if peak is None or NULL else flops / time / peak,
                "x_reference": seconds["reference: diffusers"] / time,
                "cost": time / seconds["ours"] - 1 if arm == "ours: adapters" else None,
                "goal": GOALS.get(arm),
            }
            for arm, time in seconds.items()
        ]

    seconds = measure(
        arms(setting, backend),
        arguments.repeats,
        until=STARTED + arguments.seconds,
        after_round=lambda seconds, _: save(title, rows(seconds), COLUMNS, arguments.json),
    )
    report(title, rows(seconds), COLUMNS, arguments.json)


if __name__ == "__main__":
    main()
