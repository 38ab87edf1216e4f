"""Our step on one process with FSDP2 and without: the cost of FSDP2 itself.

    python tests/benchmarks/bench_fsdp.py [--repeats 10] [--batch N] [--json PATH]

A run of one process never shards. This measures only FSDP2's hooks and copies, without communication.
"""

import tempfile

import torch
import torch.distributed as dist
from harness import DEVICE, measure, parser, report
from step_arms import BATCH, DTYPE, GPU, Setting, ours
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from scfm_core.distributed.engine import EngineConfig
from scfm_core.distributed.fsdp2 import Fsdp2Layout
from scfm_core.distributed.world import World
from scfm_core.filling import stored_tensors
from scfm_core.kernels.attention import AttentionShape, choose_attention


def main(argv: list[str] | None = None) -> None:
    arguments = parser(__doc__, "fsdp", 10, BATCH).parse_args(argv)
    setting = Setting(arguments.batch)
    arch = setting.family.network_config
    shape = AttentionShape(
        arguments.batch, setting.tokens, arch["num_attention_heads"], arch["attention_head_dim"], DTYPE, DEVICE
    )
    backend = choose_attention("auto", shape).backend
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(
            "nccl" if GPU else "gloo", init_method=f"file://{folder}/store", rank=0, world_size=1
        )  # fmt: skip
        try:
            layout = Fsdp2Layout(EngineConfig(), World(), DEVICE, DTYPE)
            layout.mesh = init_device_mesh(DEVICE.type, (1,), mesh_dim_names=("shard",))

            def shard(network: nn.Module) -> None:
                weights = {name: tensor.detach() for name, tensor in stored_tensors(network).items()}

                def fill(name: str, part: Tensor, start: int) -> None:
                    part.copy_(weights[name].view(-1)[start : start + part.numel()])

                layout.prepare(network, setting.family.blocks(network), fill)

            arms = {
                "reference": ours(setting, backend=backend),
                "ours: FSDP2": ours(setting, backend=backend, prepare=shard),
            }
            seconds = measure(arms, arguments.repeats)
        finally:
            dist.destroy_process_group()
    rows = [
        {"arm": arm, "milliseconds": 1e3 * time, "x_reference": seconds["reference"] / time}
        for arm, time in seconds.items()
    ]
    columns = {"arm": "", "milliseconds": ".1f", "x_reference": ".3f"}
    report(
        f"FSDP2 on one process, batch {arguments.batch}, {torch.get_num_threads()} threads",
        rows,
        columns,
        arguments.json,
    )


if __name__ == "__main__":
    main()
