"""The time of a step outside the network's passes: optimizer, EMAs, switching between teacher, EMAs and student.

    python tests/benchmarks/bench_update.py [--repeats 20] [--json PATH]

On a GPU: the 504 adapted linears of Flux.1-dev at rank 64, 347 M parameters. `reference` copies adapters in and out of
the model three times per step and updates tensor by tensor, as the authors' release does; its optimizer is the same.
"""

import torch
from harness import DEVICE, STARTED, measure, parser, report
from setting import Setting
from step_arms import LR, make_engine
from torch import nn

from scfm_core.models.adapters import LoRAConfig
from scfm_core.models.student import LoRAModel
from scfm_core.scfm.ema import DualEMA


def main(argv: list[str] | None = None) -> None:
    arguments = parser(__doc__, "update", 20).parse_args(argv)
    setting = Setting(1)
    model = LoRAModel(setting.family, setting.network(), LoRAConfig(rank=setting.rank, alpha=float(setting.rank)))
    model.bank.keep_copies()
    engine = make_engine(setting, model.parameters, model.networks)
    emas = DualEMA(*(engine.ema_tensors(role) for role in ("student", "ema_fast", "ema_slow")))
    student = model.parameters("student")
    gradients = [torch.randn_like(parameter) for parameter in student.values()]
    strength = torch.ones(1, device=DEVICE)

    def give_gradients() -> None:
        for parameter, gradient in zip(student.values(), gradients, strict=True):
            parameter.grad = gradient

    def step() -> None:
        give_gradients()
        engine.reduce()
        engine.step(LR)

    def ours() -> None:
        for role in ("ema_fast", "ema_slow", "student"):
            model.bank.select(role, strength)
        step()
        emas.update()

    in_model = [nn.Parameter(parameter.detach().clone()) for parameter in student.values()]
    copies = {role: [p.detach().clone() for p in student.values()] for role in ("student", "ema_fast", "ema_slow")}

    @torch.no_grad()
    def reference() -> None:
        for role in ("ema_fast", "ema_slow", "student"):
            for parameter, saved in zip(in_model, copies[role], strict=True):
                parameter.copy_(saved)
        with torch.enable_grad():
            step()
        for role, weight in (("student", 1.0), ("ema_fast", 0.01), ("ema_slow", 0.001)):
            for parameter, saved in zip(in_model, copies[role], strict=True):
                saved.lerp_(parameter, weight)

    arms = {"reference": reference, "ours": ours, "ours: optimizer alone": step, "ours: EMAs alone": emas.update}
    seconds = measure(arms, arguments.repeats, until=STARTED + arguments.seconds)
    rows = [
        {
            "arm": arm,
            "milliseconds": 1e3 * time,
            "x_reference": seconds["reference"] / time,
            "goal": "5 ms" if arm == "ours" else None,
        }
        for arm, time in seconds.items()
    ]
    trained = sum(parameter.numel() for parameter in student.values())
    columns = {"arm": "", "milliseconds": ".2f", "x_reference": ".2f", "goal": ""}
    report(f"switching, optimizer and EMAs, {trained / 1e6:.2f} M adapter parameters", rows, columns, arguments.json)


if __name__ == "__main__":
    main()
