"""Our step on one process with FSDP2 and without: the cost of FSDP2 itself.

    python tests/benchmarks/bench_fsdp.py [--repeats 10] [--batch N] [--json PATH]

A run of one process never shards. This measures only FSDP2's hooks and copies, without communication.
"""

import torch
from harness import DEVICE, GPU, NULL, STARTED, measure, parser, report, save
from setting import BATCH, Setting, build
from step_arms import ours, process_group
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from scfm_core.distributed.engine import EngineConfig
from scfm_core.distributed.fsdp2 import Fsdp2Layout
from scfm_core.distributed.world import World
from scfm_core.filling import stored_tensors

COLUMNS = {"arm": "", "milliseconds": ".1f", "x_reference": ".3f", "steps": "d", "goal": ""}
GOALS = {"ours: FSDP2": "0.99 x"}


def rows(seconds: dict[str, float], steps: int) -> list[dict[str, object]]:
    return [
        {
            "arm": arm,
            "milliseconds": 1e3 * time,
            "x_reference": seconds["reference"] / time,
            "steps": steps,
            "goal": GOALS.get(arm),
        }
        for arm, time in seconds.items()
    ]


def main(argv: list[str] | None = None) -> None:
    arguments = parser(__doc__, "fsdp", 10, BATCH).parse_args(argv)
    setting = Setting(arguments.batch)
    backend = setting.attention()
    title = f"FSDP2 on one process, batch {arguments.batch}, {torch.get_num_threads()} threads"
    with process_group():
        layout = Fsdp2Layout(EngineConfig(), World(), DEVICE, setting.dtype)
        layout.mesh = init_device_mesh(DEVICE.type, (1,), mesh_dim_names=("shard",))

        def shard(network: nn.Module) -> None:
            weights = {name: tensor.detach() for name, tensor in stored_tensors(network).items()}

            def fill(name: str, part: Tensor, start: int) -> None:
                part.copy_(weights[name].view(-1)[start : start + part.numel()])

            layout.prepare(network, setting.family.blocks(network), fill)

        arms = build(
            {
                "reference": lambda: ours(setting, backend=backend, checkpointing="selective"),
                "ours: FSDP2": lambda: ours(setting, backend=backend, checkpointing="selective", prepare=shard),
            }
        )
        seconds = measure(
            {name: arm.step for name, arm in arms.items()},
            arguments.repeats,
            block=5 if GPU and not NULL else 1,
            turn=lambda name: arms[name].on_gpu(),
            until=STARTED + arguments.seconds,
            after_round=lambda seconds, steps: save(title, rows(seconds, steps), COLUMNS, arguments.json),
        )
    report(title, rows(seconds, arguments.repeats), COLUMNS, arguments.json)


if __name__ == "__main__":
    main()
