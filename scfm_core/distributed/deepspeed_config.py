"""DeepSpeed's configuration: the recipe's values, merged with the user's own DeepSpeed JSON."""

import difflib
import json
from pathlib import Path
from typing import Any

from scfm_core.distributed.engine import EngineConfig, OptimizerConfig
from scfm_core.errors import UserError

# Keys of a DeepSpeed JSON that are passed on: the recipe decides nothing about them.
_PASSED_ON = (
    "checkpoint",
    "comms_logger",
    "communication_data_type",
    "data_types",
    "dump_state",
    "flops_profiler",
    "gradient_predivide_factor",
    "memory_breakdown",
    "prescale_gradients",
    "steps_per_print",
    "torch_autocast",
    "wall_clock_breakdown",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "zero_optimization",
)
# Keys that cannot work with EMAs on the shards, and why.
_REFUSED = {
    "zero_optimization.zero_hpz_partition_size": "keeps a second copy of the weights, which EMA updates do not change",
    "zero_optimization.zero_quantized_weights": "would quantize teacher and EMAs",
    "zero_optimization.zero_quantized_gradients": "is untested with this method",
    "zero_optimization.mics_shard_size": "is another engine; use engine.name=fsdp2 with engine.shard for hybrid sharding",
    "zero_optimization.offload_param": "would take the EMAs' shards with it; use engine.cpu_offload=true with fsdp2",
    "scheduler": "is the recipe's train.lr_schedule and train.warmup_steps",
    "amp": "casts the whole module; set train.compute_dtype",
}


def deepspeed_config(config: EngineConfig, optimizer: OptimizerConfig, world_size: int, weights: str) -> dict[str, Any]:
    """The recipe's values, and the keys that the user's JSON adds to them.

    Args:
        config: stage, offload, and the JSON's path.
        optimizer: the recipe's optimisation.
        world_size: processes.
        weights: `lora` or `full`.

    Raises:
        UserError: if the JSON contradicts the recipe (the message names both values of each difference), or has a key
            that is unknown or cannot work here.
    """
    mixed = optimizer.compute_dtype == "bfloat16"
    batch = optimizer.micro_batch_size * optimizer.accumulation * world_size
    # Values that both may set: place in the JSON, the recipe's key, the recipe's value.
    recipe: list[tuple[str, str, Any]] = [
        ("train_batch_size", "train.global_batch_size", batch),
        ("train_micro_batch_size_per_gpu", "train.micro_batch_size", optimizer.micro_batch_size),
        ("gradient_accumulation_steps", "global batch / micro-batch / processes", optimizer.accumulation),
        ("gradient_clipping", "train.clip_norm", optimizer.clip_norm),
        ("optimizer.type", "the optimizer", "AdamW"),
        ("optimizer.params.lr", "train.lr", optimizer.lr),
        ("optimizer.params.betas", "train.betas", list(optimizer.betas)),
        ("optimizer.params.eps", "AdamW's eps", 1e-8),
        ("optimizer.params.weight_decay", "train.weight_decay", optimizer.weight_decay),
        ("bf16.enabled", f"train.compute_dtype={optimizer.compute_dtype}", mixed),
        ("fp16.enabled", f"train.compute_dtype={optimizer.compute_dtype}", False),
        ("zero_optimization.stage", "engine.zero_stage", config.zero_stage),
        ("zero_optimization.offload_optimizer.device", "engine.cpu_offload", "cpu" if config.cpu_offload else "none"),
    ]
    user = _read_json(config.deepspeed_config)
    _refuse(user, recipe, config.deepspeed_config or "")
    merged = {key: value for key, value in user.items() if key in _PASSED_ON}
    zero = {key: value for key, value in merged.get("zero_optimization", {}).items() if value != "auto"}
    zero["stage"] = config.zero_stage
    if config.cpu_offload:
        zero["offload_optimizer"] = {"pin_memory": True, **zero.get("offload_optimizer", {}), "device": "cpu"}
    merged |= {
        "train_micro_batch_size_per_gpu": optimizer.micro_batch_size,
        "gradient_accumulation_steps": optimizer.accumulation,
        "gradient_clipping": optimizer.clip_norm,
        "zero_optimization": zero,
        # torch's fused AdamW has its own CPU kernel, so nothing is compiled on the cluster.
        "zero_force_ds_cpu_optimizer": False,
    }
    if mixed and weights == "full":
        merged.setdefault("torch_autocast", {"enabled": True, "dtype": "bfloat16"})
    merged.setdefault("steps_per_print", None)
    return merged


def _read_json(path: str | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        tree = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"engine.deepspeed_config: {path} cannot be read as JSON ({error})") from error
    if not isinstance(tree, dict):
        raise UserError(f"engine.deepspeed_config: {path} must hold an object, but holds {type(tree).__name__}")
    return tree


def _refuse(user: dict[str, Any], recipe: list[tuple[str, str, Any]], path: str) -> None:
    known = {*_PASSED_ON, *(place.partition(".")[0] for place, _, _ in recipe)}
    reasons = [f"  {place} {why}" for place, why in _REFUSED.items() if _at(user, place) not in (None, False, 1)]
    for key in user:
        if key not in known and key not in _REFUSED:
            near = difflib.get_close_matches(key, known, n=1)
            reasons.append(f"  {key} is unknown here{f'; did you mean {near[0]}?' if near else ''}")
    parameters = {*_at(user, "optimizer.params", {})} - {"lr", "betas", "eps", "weight_decay"}
    reasons += [f"  optimizer.params.{key} is unknown here" for key in sorted(parameters)]
    for place, name, value in recipe:
        given = _at(user, place)
        if given in (None, "auto") or given == value or (place == "optimizer.type" and given in ("Adam", "AdamW")):
            continue
        # An absent section leaves the dtype to the recipe; `enabled: false` asks for fp32.
        reasons.append(f"  {place} is {given!r} there, {name} asks for {value!r}")
    if reasons:
        raise UserError(
            f"engine.deepspeed_config: {path} does not fit the recipe:\n"
            + "\n".join(reasons)
            + "\nChange one of the two"
            " (`auto` in the JSON takes the recipe's value)"
        )


def _at(tree: Any, place: str, default: Any = None) -> Any:
    for part in place.split("."):
        if not isinstance(tree, dict) or part not in tree:
            return default
        tree = tree[part]
    return tree
