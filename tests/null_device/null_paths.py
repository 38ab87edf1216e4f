"""What runs only on a GPU, on a tiny model: each path from data to metrics, on the null device.

`null_paths.py TINY FOLDER` takes the `tiny` folder of the tests, and prints a line of JSON for each path. The card is one with fp8.
"""

import contextlib
import functools
import gc
import io
import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from null_driver import Device
from null_step import read_finite
from runs import ALL_TARGETS
from tiny_fixtures import smallest_tree

from recipes.cli import main as scfm
from scfm_core.train import trainer as trainer_module
from scfm_core.train.parse import parse_config
from scfm_core.train.sources import Sources
from scfm_core.train.trainer import Trainer

Tree = dict[str, dict[str, Any]]
PATHS: dict[str, Tree] = {
    "adapters": {"train": {"activation_checkpointing": "selective"}},
    "CUDA graphs": {"kernels": {"cuda_graphs": True}},
    "triton attention": {"kernels": {"attention": "triton"}},
    "reference blocks": {"kernels": {"fused": "reference"}},
    "blocks of diffusers": {"kernels": {"fused": "none", "attention": "efficient"}},
    "images": {"data": {"path": "digits", "format": "folder"}},
    "prompts": {"sample": {"prompts": ["a handwritten digit zero"], "every": 2}},
    "flow map, compiled": {
        "train": {"compile": True},
        "method": {"flow_map_fraction": 1.0, "teacher_fraction": 0.0, "step_gain": {"gamma": 0.5}},
    },
    "all weights": {"train": {"weights": "full"}},
    "pretraining": {
        "model": {"init": "random"},
        "train": {"weights": "full"},
        "method": {"teacher_fraction": 0.0, "flow_fraction": 0.5},
    },
    "compiled, fp8": {"kernels": {"fp8": True}, "train": {"compile": True}},
}


def config_tree(tiny: Path, run_dir: Path, changes: Tree) -> dict[str, Any]:
    tree = smallest_tree(tiny, run_dir, ALL_TARGETS)
    tree["run"]["device"] = "cuda"
    tree["train"] |= {"compute_dtype": "bfloat16", "steps": 3}
    tree["kernels"] = {"attention": "flash"}
    for section, values in changes.items():
        tree.setdefault(section, {}).update(values)
    if changes.get("data"):
        tree["data"]["path"] = str(tiny / changes["data"]["path"])
    return tree


def train_path(tiny: Path, run_dir: Path, changes: Tree) -> dict[str, Any]:
    """Two steps of a trainer: what the second one needs."""
    device = Device()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    trainer = Trainer(parse_config(config_tree(tiny, run_dir, changes), source="test"))
    resident = torch.cuda.memory_allocated()
    steps = trainer.train_steps()
    next(steps)
    before, launched = device.counters.values(), device.kernels()
    with device.waits() as lines:
        row = next(steps)
    counted = {name: value - before[name] for name, value in device.counters.values().items()}
    dynamo = torch._dynamo.utils.counters
    return {
        "row": row,
        "graphs": dynamo["stats"]["unique_graphs"],
        "graph_breaks": sum(dynamo["graph_break"].values()),
        "resident": resident,
        "is_expandable": any(segment["is_expandable"] for segment in torch.cuda.memory_snapshot()),
        "kernels": dict(device.kernels() - launched),
        "lines": dict(lines),
        "chosen": str(trainer.kernels),
        **{name: counted[name] for name in ("launches", "products", "graph_nodes", "waits", "pageable")},
    }


def commands(tiny: Path, run_dir: Path) -> dict[str, Any]:
    """`scfm train` twice, the second time from its checkpoint, then `scfm sample`: exit codes and what they print."""
    tree = config_tree(tiny, run_dir, {"sample": {"prompts": ["a handwritten digit zero"], "every": 2, "steps": [2]}})
    file = run_dir.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(tree))
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        codes = [
            scfm(["train", str(file)]),
            scfm(["train", str(file), "train.steps=4"]),
            scfm(["sample", str(run_dir), "--steps", "2", "--prompt", "a handwritten digit one"]),
        ]
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {
        "codes": codes,
        "printed": printed.getvalue()[-3000:],
        "steps": [row["step"] for row in rows if "loss" in row],
    }


def main() -> None:
    tiny, folder = Path(sys.argv[1]), Path(sys.argv[2])
    trainer_module.Sources = functools.partial(Sources, read_back=read_finite)  # type: ignore[misc]
    paths: dict[str, Callable[[Path], dict[str, Any]]] = {
        name: lambda run_dir, changes=changes: train_path(tiny, run_dir, changes)  # type: ignore[misc]
        for name, changes in PATHS.items()
    }
    paths["commands"] = lambda run_dir: commands(tiny, run_dir)
    for number, (name, path) in enumerate(paths.items()):
        try:
            result = path(folder / f"run{number}")
        except Exception:
            result = {"error": traceback.format_exc()}
        print(json.dumps([name, result]), flush=True)
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
