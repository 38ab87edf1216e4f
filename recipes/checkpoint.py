"""`scfm checkpoint`: inspect checkpoints, verify them, convert them to another format."""

import shutil
from pathlib import Path
from typing import Any

from scfm_core.distributed.convert import write_dcp, write_zero
from scfm_core.distributed.engine import FAKE_GROUPS, GROUPS
from scfm_core.distributed.reader import DCP_FOLDER, module_name
from scfm_core.distributed.world import World
from scfm_core.errors import UserError
from scfm_core.files import check_writable, saving
from scfm_core.train.checkpoint import (
    Checkpoint,
    CheckpointWriter,
    find_checkpoint,
    load_checkpoint,
    read_manifest,
    verify_checkpoint,
)
from scfm_core.train.run_dir import checkpoint_folders, checkpoint_path
from scfm_core.wording import count


def inspect(path: Path) -> str:
    """Describe the content of a checkpoint, or of a run's newest one, as text.

    Raises:
        UserError: if it is not a complete checkpoint.
    """
    checkpoint = _open(path, verify=False)
    state, reader = checkpoint.state, checkpoint.reader
    files = read_manifest(checkpoint.path)
    lines = [
        f"checkpoint  {checkpoint.path}",
        f"written by  {state['engine']} on {count(state['world_size'], 'process', 'processes')}",
        f"run         {state['config']['run']['dir']}, step {state['step']:,} of {state['config']['train']['steps']:,}",
        f"progress    {state['updates']:,} updates applied, {state['step'] - state['updates']:,} steps skipped, "
        f"{count(state['rollbacks'], 'rollback')}, {state['samples']:,} samples, {state['seconds'] / 3600:,.2f} hours",
        f"weights     {state['config']['train']['weights']}, {len(state['shapes']):,} tensors of "
        f"{state['config']['model']['path']}",
        f"base        {state['base_fingerprint'][:12]}   data {state['data_fingerprint'][:12]}",
        f"files       {len(files)}, {sum(size for size, _ in files.values()) / 1e6:,.1f} MB",
    ]
    present = {key.partition(".")[0] for key in reader.shapes}
    for group in (group for group in (*GROUPS, *FAKE_GROUPS) if group in present):
        elements, squared = 0, 0.0
        for key in (key for key in reader.shapes if key.startswith(f"{group}.")):  # one tensor in memory at a time
            tensor = reader.tensor(key)
            elements, squared = elements + tensor.numel(), squared + float(tensor.double().square().sum())
        lines.append(f"  {group:<15} {elements:>15,} elements, norm {squared**0.5:.6g}")
    return "\n".join(lines)


def verify(path: Path) -> str:
    """Hash every file of a checkpoint, or of all checkpoints of a run.

    Raises:
        UserError: if any is damaged; it lists the state of each.
    """
    folders = checkpoint_folders(path) if (path / "checkpoints").is_dir() else [path]
    if not folders:
        raise UserError(f"{path} has no checkpoint")
    lines, damaged = [], 0
    for folder in folders:
        try:
            verify_checkpoint(folder)
            lines.append(f"{folder}: intact")
        except UserError as error:
            damaged += 1
            lines.append(str(error))
    if damaged:
        raise UserError(
            f"{damaged} of {len(folders)} checkpoints are damaged:\n"
            + "\n".join(lines)
            + "\n`scfm train` resumes from the newest intact one"
        )
    return "\n".join(lines)


def convert(source: Path, target: Path, kind: str, stage: int, ranks: int) -> Path:
    """Convert a checkpoint to another engine's format, as a new run.

    Training does not need this: every engine reads every format, on any number of processes. It is for other tools, and for
    moving a run to another format permanently.

    Args:
        source: a checkpoint, or a run, whose newest checkpoint is converted.
        target: the new run's folder; `scfm train ... run.dir=TARGET` resumes from it.
        kind: `dcp` or `zero`.
        stage, ranks: ZeRO stage and number of processes of the format `zero`.

    Raises:
        UserError: if the source is damaged or the target exists.
    """
    if target.exists():
        raise UserError(f"{target} exists already; choose another folder, or delete it")
    if ranks < 1:
        raise UserError(f"--ranks must be at least 1, got {ranks}")
    advice = "Choose another folder"
    check_writable(target.absolute().parent, "the new run", advice)
    checkpoint = _open(source, verify=True)
    reader, state = checkpoint.reader, dict(checkpoint.state)
    shapes = {name: tuple(shape) for name, shape in state["shapes"].items()}

    def write(folder: Path, _: World) -> Any:
        if kind == "zero":
            files = write_zero(reader, shapes, module_name, folder, stage, ranks)
        else:
            files = write_dcp(reader, list(reader.shapes), folder / DCP_FOLDER)
        return lambda: files

    state |= {"kind": kind, "engine": f"ZeRO-{stage}" if kind == "zero" else "fsdp2"}
    state["world_size"] = ranks if kind == "zero" else 1
    with saving(target, "the new run", advice, target):
        CheckpointWriter(target, keep=1).save(state["step"], write, state)
        for name in ("config.yaml", "metrics.jsonl", "incidents.jsonl"):
            file = checkpoint.path.parents[1] / name
            if file.is_file():
                shutil.copy(file, target / name)
    return checkpoint_path(target, state["step"])


def _open(path: Path, *, verify: bool) -> Checkpoint:
    if not path.is_dir():
        raise UserError(f"there is no folder {path}. Give a run's folder, or one of its checkpoints/step_XXXXXXXX")
    path = path.absolute()  # its parents are asked for
    if (path / "checkpoints").is_dir():
        found = find_checkpoint(path)
        if found is None:
            raise UserError(f"{path} has no complete checkpoint yet; train first")
        return load_checkpoint(found, verify=False)
    return load_checkpoint(path, verify=verify)
