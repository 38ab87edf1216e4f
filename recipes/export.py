"""`scfm export`: the trained weights as files of other tools, with a card."""

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from recipes.base_model import NOT_ON_THE_HUB, BaseModel, checked_id, find_base_model
from recipes.card import Card, write_card
from recipes.header import Contents, describe, file_name, header
from recipes.measured import measured
from recipes.merged import save_merged
from recipes.push import check_access, push
from scfm_core.errors import UserError
from scfm_core.files import check_writable, saving
from scfm_core.models.formats import Format, convert
from scfm_core.models.protocol import ModelFamily
from scfm_core.models.weights import adapter_files, adapter_metadata, save_tensors
from scfm_core.scfm.method import sampling_strength
from scfm_core.train.checkpoint import Checkpoint
from scfm_core.train.config import RunConfig
from scfm_core.train.runs import open_run, open_trained

TOP_LEVEL = "top-level"
_ADVICE = "Make room there, or export a copy of the run; with --merged, choose another folder"


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Options of `scfm export`."""

    steps: tuple[int, ...] = ()
    """Of a step-scaled adapter: the step counts whose strengths are folded into a file each. None: one file of strength 1."""
    format: Format = "diffusers"
    """Whose names an adapter's tensors have."""
    dtype: Literal["bfloat16", "float32"] | None = None
    """Of the files; None: `train.compute_dtype`."""
    base: str | None = None
    """The base model's hub id, or `none` if it is not on the hub. Needed only if `model.path` is a folder."""
    leave_out: str | None = None
    """Linears that are left out: `top-level`, all outside the blocks, or a regular expression of whole names."""
    merged: Path | None = None
    """Folder of a new pipeline that has the trained weights."""
    single_file: bool = False
    """With `merged`: only the transformer, in one file."""
    push: str | None = None
    """Id of a repository on the hub, OWNER/NAME, to which the files are uploaded."""
    private: bool = False
    """With `push`: create a private repository."""


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What an export has written."""

    folder: Path
    files: list[Path]
    """Of weights; of a merged pipeline its folder."""
    base: BaseModel
    address: str | None
    """Of the repository, if the files were uploaded."""


def export(run_dir: Path, overrides: list[str], options: ExportOptions | None = None) -> Exported:
    """Write adapters into `RUN_DIR/adapter`, or with `merged` a model that needs no adapter; and a card beside them.

    Args:
        run_dir: the run.
        overrides: changes of its configuration, e.g. `sample.weights=ema_slow`.
        options: of the command.

    Raises:
        UserError: if the weights cannot be exported in this way, the target exists, or the upload fails.
    """
    options = options or ExportOptions()
    config = open_run(run_dir, overrides)
    _check(config, options)
    folder = run_dir / "adapter" if options.merged is None else options.merged
    check_writable(folder if options.merged is None else folder.absolute().parent, "the export", _ADVICE)
    checkpoint, family = open_trained(run_dir, config)
    base = find_base_model(family, config.model.path, options.base)
    if options.push is not None:
        if base.id is None and options.base != NOT_ON_THE_HUB:
            raise UserError(
                f"--push: model.path is a folder of this machine, which the card must not name. Give --base OWNER/NAME, the id of "
                f"this model on the hub, or --base {NOT_ON_THE_HUB} if it is not there"
            )
        check_access(options.push)
    card = Card(
        config=config,
        family=family,
        base=base,
        checkpoint=checkpoint.path,
        run_dir=run_dir,
        place=options.push or folder.name,
        measured=measured(config, run_dir, checkpoint.path),
    )
    if options.merged is None:
        files = _export_adapters(folder, config, checkpoint, family, base, options, card)
    else:
        contents = Contents(
            folded=options.steps[0] if options.steps else None,
            format="diffusers",
            dtype=options.dtype or config.train.compute_dtype,
        )
        with saving(folder, "the export", _ADVICE):
            files = [
                save_merged(folder, config, checkpoint, family, base, contents, card, single_file=options.single_file)
            ]
    address = None if options.push is None else push(folder, options.push, private=options.private)
    return Exported(folder=folder, files=files, base=base, address=address)


def _check(config: RunConfig, options: ExportOptions) -> None:
    """UserError if the options do not fit the run, or each other."""
    gain, merged = config.method.step_gain, options.merged
    if merged is None and config.train.weights == "full":
        raise UserError("this run trained full weights, which cannot be exported as an adapter: give --merged FOLDER")
    if merged is not None and gain is not None and not options.steps:
        raise UserError(
            "this adapter's strength depends on the number of steps, which merging fixes: choose the step count with --steps N"
        )
    if options.steps and gain is None:
        raise UserError(
            "--steps is for merging a step-scaled adapter (method.step_gain) or folding its strength in: here the strength does not "
            "depend on the step count. Omit --steps"
        )
    if any(steps < 1 for steps in options.steps):
        raise UserError(f"--steps must be at least 1, got {min(options.steps)}")
    if merged is not None and len(options.steps) > 1:
        raise UserError("--merged has one step count: give --steps once, with one number")
    if merged is not None and (options.format != "diffusers" or options.leave_out is not None):
        raise UserError("--format and --leave-out are for adapters: omit them, or --merged")
    if merged is None and options.single_file:
        raise UserError("--single-file is for --merged FOLDER: an adapter is one file anyway")
    if merged is not None and merged.exists():
        raise UserError(f"{merged} exists already; choose another folder, or delete it")
    if options.push is not None:
        checked_id(options.push, "--push")
    elif options.private:
        raise UserError("--private is for --push OWNER/NAME")


def _export_adapters(
    folder: Path,
    config: RunConfig,
    checkpoint: Checkpoint,
    family: ModelFamily,
    base: BaseModel,
    options: ExportOptions,
    card: Card,
) -> list[Path]:
    """Write one safetensors file for each step count, and a card of all files in `folder` that have these weights."""
    left_out = left_out_pattern(family, options.leave_out)
    dtype = options.dtype or config.train.compute_dtype
    factors = checkpoint.reader.group(config.sample.weights)
    modules = {name.partition(".lora_")[0] for name in factors}
    if left_out is not None and not 0 < sum(bool(left_out.fullmatch(name)) for name in modules) < len(modules):
        raise UserError(
            f"--leave-out {options.leave_out}: it matches none or all of the {len(modules)} adapted linears"
        )
    files, scale = [], config.lora.alpha / config.lora.rank
    for steps in options.steps or (None,):
        contents = Contents(folded=steps, format=options.format, dtype=dtype, left_out=options.leave_out)
        folded = scale * (1.0 if steps is None else sampling_strength(config.method.step_gain, steps))
        contents = replace(contents, rounding_error=rounding_error(factors, folded, getattr(torch, dtype)))
        tensors = convert(
            family, factors, options.format, scale=folded, dtype=getattr(torch, dtype), leave_out=left_out
        )
        path = folder / file_name(config, base, contents)
        try:
            with saving(folder, "the export", _ADVICE):
                save_tensors(path, tensors, header(config, family, base, checkpoint, contents))
        except BaseException:
            with suppress(OSError):  # another export may have written into it
                folder.rmdir()
            raise
        files.append(path)
    same = describe(config, family, base, checkpoint, contents)
    with saving(folder, "the export", _ADVICE):
        write_card(folder, replace(card, files=tuple(_files_like(folder, same))))
    return files


def left_out_pattern(family: ModelFamily, choice: str | None) -> re.Pattern[str] | None:
    """The pattern of the modules that are left out; `top-level` are those outside the family's blocks."""
    if choice is None:
        return None
    try:
        return re.compile(rf"^(?!(?:{'|'.join(family.block_lists)})\.).+$" if choice == TOP_LEVEL else choice)
    except re.error as error:
        raise UserError(f"--leave-out: {choice!r} is neither {TOP_LEVEL} nor a regular expression ({error})") from error


def _files_like(folder: Path, metadata: dict[str, object]) -> list[tuple[str, Contents]]:
    """Name and contents of the files in a folder that have the same weights as `metadata`, the header of one of them.

    Files of earlier checkpoints may be there too; a card describes one set of weights.
    """
    found = []
    for path in adapter_files(folder):
        try:
            own = adapter_metadata(path)
        except UserError:  # not complete, or of another program
            continue
        of_weights = ("weights", "trained_steps", "base_model", "rank", "shift", "guidance", "adapters")
        if metadata.keys() <= own.keys() and all(own[key] == metadata[key] for key in of_weights):
            contents = Contents(
                folded=own["folded_steps"],
                format=own["format"],
                dtype=own["dtype"],
                left_out=own["left_out"],
                rounding_error=own["rounding_error"],
            )
            found.append((path.name, contents))
    return sorted(found, key=lambda file: (file[1].format != "diffusers", file[1].folded or 0, file[0]))


def rounding_error(factors: Mapping[str, Tensor], scale: float, dtype: torch.dtype) -> float:
    """The relative error of an adapter's matrix products after the cast of its factors.

    Norm of `B' A' - B A` over all modules, divided by the norm of `B A`, with B times `scale`. The difference is `dB A' + B dA`, a
    product of factors of twice the rank, so that its norm needs only the factors' Gram matrices.

    Args:
        factors: `<module>.lora_A.weight` [rank, in] and `<module>.lora_B.weight` [out, rank], fp32.
        scale: of B.
        dtype: of the file.
    """
    if dtype == torch.float32:
        return 0.0
    error = norm = 0.0
    for name, down in factors.items():
        if ".lora_A." not in name:
            continue
        up = factors[name.replace(".lora_A.", ".lora_B.")] * scale
        cast_down = down.to(dtype).float()
        left = torch.cat([up.to(dtype).float() - up, up], dim=1)
        right = torch.cat([cast_down, cast_down - down])
        error += max(0.0, float(((left.T @ left) * (right @ right.T)).sum()))
        norm += float(((up.T @ up) * (down @ down.T)).sum())
    return (error / norm) ** 0.5 if norm > 0 else 0.0
