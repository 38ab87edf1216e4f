"""Opening a finished or running run: its configuration and its weights, for sampling, evaluation and export."""

from pathlib import Path

from scfm_core.errors import UserError
from scfm_core.models.student import FullModel, LoRAModel
from scfm_core.models.weights import network_fingerprint
from scfm_core.train.build import build_family, build_model, resolve_device
from scfm_core.train.checkpoint import find_checkpoint, load_checkpoint
from scfm_core.train.config import RunConfig, load_config
from scfm_core.train.trainer import load_weights


def open_run(run_dir: Path, overrides: list[str]) -> RunConfig:
    """The configuration that the run stored, with overrides.

    Raises:
        UserError: if the folder is not a run.
    """
    if not (run_dir / "config.yaml").is_file():
        raise UserError(f"{run_dir} is not a run: it has no config.yaml. Give the run.dir of a `scfm train`")
    return load_config(run_dir / "config.yaml", overrides)


def load_trained(run_dir: Path, config: RunConfig) -> tuple[LoRAModel | FullModel, int]:
    """The run's model with its newest checkpoint's student and EMAs, and the checkpoint's step.

    Raises:
        UserError: if there is no complete checkpoint.
    """
    path = find_checkpoint(run_dir)
    if path is None:
        raise UserError(f"{run_dir} has no complete checkpoint yet; train first")
    checkpoint = load_checkpoint(path, ("student", "ema_fast", "ema_slow"), verify=False)
    model = build_model(config, build_family(config), resolve_device(config.run.device), train=False)
    if checkpoint.state["base_fingerprint"] != network_fingerprint(model.family.folder):
        raise UserError(
            f"{model.family.folder} is not the model that {run_dir} was trained on. Set model.path to that one"
        )
    for role in ("student", "ema_fast", "ema_slow"):
        load_weights(model.parameters(role), checkpoint.tensors[role])
    for network in model.networks.values():
        network.eval().requires_grad_(False)
    return model, int(checkpoint.state["step"])
