"""Opening a run that has finished or is running: configuration and weights, for sampling, evaluation and export."""

import sys
from pathlib import Path

from scfm_core.distributed.engine import Slot
from scfm_core.errors import UserError
from scfm_core.models.protocol import ModelFamily
from scfm_core.models.student import ShortcutModel
from scfm_core.train.assemble import build_family, build_model
from scfm_core.train.checkpoint import Checkpoint, find_checkpoint, load_checkpoint
from scfm_core.train.config import RunConfig
from scfm_core.train.device import resolve_device
from scfm_core.train.kernels import choose_kernels
from scfm_core.train.parse import load_config


def open_run(run_dir: Path, overrides: list[str]) -> RunConfig:
    """The run's stored configuration, with overrides.

    Raises:
        UserError: if the folder is not a run.
    """
    if not (run_dir / "config.yaml").is_file():
        raise UserError(f"{run_dir} is not a run: it has no config.yaml. Give the run.dir of a `scfm train`")
    return load_config(run_dir / "config.yaml", overrides, stored=True)


def open_trained(run_dir: Path, config: RunConfig) -> tuple[Checkpoint, ModelFamily]:
    """The run's newest intact checkpoint, and the model that it was trained on.

    Raises:
        UserError: if there is no complete checkpoint, or `model.path` contains another model now.
    """
    path = find_checkpoint(run_dir)
    if path is None:
        raise UserError(f"{run_dir} has no complete checkpoint yet; train first")
    checkpoint, family = load_checkpoint(path, verify=False), build_family(config)
    check_same_model(checkpoint, family, run_dir)
    return checkpoint, family


def check_same_model(checkpoint: Checkpoint, family: ModelFamily, run_dir: Path) -> None:
    """UserError unless the checkpoint was trained on this model.

    The files of `model.adapters` are compared by content if they have the names and weights of the run's own, in whatever folder they
    are. Others are what a person asks for: a run's weights can be used together with adapters that they were not trained with. Then
    the rest of the model is compared, and a note names the adapters that differ.
    """
    recorded = checkpoint.state["base_fingerprint"]
    trained = checkpoint.state["config"]["model"].get("adapters", [])
    now = [(Path(adapter.path).name, adapter.weight) for adapter in family.adapters]
    is_own = now == [(Path(adapter["path"]).name, adapter["weight"]) for adapter in trained]
    difference = family.different_network(recorded, with_adapters=is_own)
    if difference is not None:
        raise UserError(
            f"{family.folder} is not the model that {run_dir} was trained on: {difference}. Set model.path and model.adapters to that "
            f"model"
        )
    if not is_own and (others := family.different_network(recorded)) is not None:
        print(f"scfm: note: {run_dir} was trained with other model.adapters: {others}", file=sys.stderr)


def load_trained(run_dir: Path, config: RunConfig, *, with_teacher: bool) -> ShortcutModel:
    """The run's model in one process, with the weights of `sample.weights` from its newest checkpoint.

    Args:
        run_dir, config: the run.
        with_teacher: also load the teacher, if the run trained full weights with one or on its paths.

    Raises:
        UserError: as in `open_trained`.
    """
    return build_trained(*open_trained(run_dir, config), config, with_teacher=with_teacher)


def build_trained(
    checkpoint: Checkpoint, family: ModelFamily, config: RunConfig, *, with_teacher: bool
) -> ShortcutModel:
    """`load_trained` of what `open_trained` returns."""
    device = resolve_device(config.run.device)
    kernels = choose_kernels(config, family, device, training=False)
    model = build_model(config, family, device, kernels=kernels, with_teacher=with_teacher)
    role = config.sample.weights
    checkpoint.reader.fill({f"{role}.{name}": Slot(p.detach()) for name, p in model.parameters(role).items()})
    for network in model.networks.values():
        network.eval().requires_grad_(False)
    return model
