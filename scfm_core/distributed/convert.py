"""Converting a checkpoint to another engine's format, in one process on a CPU, with a fraction of it in memory."""

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex

from scfm_core.distributed.dcp import quiet_dcp
from scfm_core.distributed.engine import MOMENTS, moment_group
from scfm_core.distributed.reader import DCP_FOLDER, Reader
from scfm_core.distributed.written import HashingWriter, torch_save
from scfm_core.files import FileEntry, Written


class _LazySavePlanner(dcp.DefaultSavePlanner):
    """Plans with meta tensors, and reads each tensor when DCP writes it."""

    def __init__(self, read: Callable[[str], Tensor]) -> None:
        super().__init__()
        self._read = read

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self._read(index.fqn)


def write_dcp(reader: Reader, keys: Iterator[str] | list[str], folder: Path) -> Written:
    """Write tensors as a DCP of one process, one tensor at a time. Any number of FSDP2 processes can load it."""
    quiet_dcp()
    writer = HashingWriter(folder)
    planned = {key: torch.empty(reader.shapes[key], device="meta") for key in keys}
    dcp.save(planned, storage_writer=writer, planner=_LazySavePlanner(reader.tensor), no_dist=True)
    return writer.files


def write_zero(
    reader: Reader,
    shapes: Mapping[str, tuple[int, ...]],
    name_of: Callable[[str, str], str],
    folder: Path,
    stage: int,
    ranks: int,
) -> Written:
    """Write DeepSpeed's files of ZeRO `stage` for `ranks` processes; one rank's part in memory at a time.

    The files hold what a run needs to resume and what DeepSpeed's zero_to_fp32.py needs; `ZeroReader` has the layout.

    Args:
        reader: the source.
        shapes: of the trained parameters, in the order of DeepSpeed's flat vectors.
        name_of: maps a parameter's name and role to its name in the module that DeepSpeed gets.
        folder: of the new checkpoint.
        stage: 1, 2 or 3.
        ranks: processes.
    """
    roles = [role for role in ("student", "fake") if any(key.startswith(f"{role}.") for key in reader.shapes)]
    names = {role: {name: name_of(name, role) for name in shapes} for role in roles}
    listings = [OrderedDict((names[role][name], torch.Size(shape)) for name, shape in shapes.items()) for role in roles]
    files: dict[Path, FileEntry] = {}
    for rank in range(ranks):
        parts = (
            _parts_of_each_parameter(shapes, rank, ranks) if stage == 3 else _parts_of_flat_vector(shapes, rank, ranks)
        )
        vectors = {
            role: {
                "weights": _vector(reader, role, parts),
                **{moment: _vector(reader, moment_group(role, moment), parts) for moment in MOMENTS},
            }
            for role in roles
        }
        optimizer = _optimizer_file(vectors, parts, names, stage, ranks)
        path = folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        files[path] = torch_save(optimizer, path)
        if stage == 3 or rank == 0:
            module = OrderedDict((name, torch.empty(0)) for listing in listings for name in listing)
            prefix = f"zero_pp_rank_{rank}_" if stage == 3 else ""
            state: dict[str, Any] = {
                "module": module,
                "buffer_names": [],
                "param_shapes": listings,
                "shared_params": {},
                "ds_version": "",
            }
            state |= {"frozen_param_shapes": None, "frozen_param_fragments": None, "dp_world_size": ranks}
            path = folder / f"{prefix}mp_rank_00_model_states.pt"
            files[path] = torch_save(state, path)
    return {**files, **write_dcp(reader, [key for key in reader.shapes if key.startswith("ema_")], folder / DCP_FOLDER)}


Parts = list[tuple[str, int, int, int]]
"""A rank's parts of parameters: name, first element, end (exclusive), and number of zeros that follow as padding."""


def _parts_of_flat_vector(shapes: Mapping[str, tuple[int, ...]], rank: int, ranks: int) -> Parts:
    """Stages 1 and 2: each rank has an equal part of the vector of all parameters; the last parts may be shorter."""
    sizes = [math.prod(shape) for shape in shapes.values()]
    share = -(-sum(sizes) // ranks)
    first, last = rank * share, (rank + 1) * share
    parts = []
    for name, end, size in zip(shapes, accumulate(sizes), sizes, strict=True):
        begin, stop = max(first, end - size), min(last, end)
        if begin < stop:
            parts.append((name, begin - (end - size), stop - (end - size), 0))
    return parts


def _parts_of_each_parameter(shapes: Mapping[str, tuple[int, ...]], rank: int, ranks: int) -> Parts:
    """Stage 3: each rank has an equal part of every parameter, padded."""
    parts = []
    for name, shape in shapes.items():
        size = math.prod(shape)
        share = -(-size // ranks)
        begin, stop = min(size, rank * share), min(size, (rank + 1) * share)
        parts.append((name, begin, stop, share - (stop - begin)))
    return parts


def _vector(reader: Reader, group: str, parts: Parts) -> Tensor:
    vector = torch.zeros(sum(stop - begin + padding for _, begin, stop, padding in parts))
    at = 0
    for name, begin, stop, padding in parts:
        if begin < stop:
            vector[at : at + stop - begin] = reader.read(f"{group}.{name}", begin, stop)
        at += stop - begin + padding
    return vector


def _optimizer_file(
    vectors: Mapping[str, Mapping[str, Tensor]],
    parts: Parts,
    names: Mapping[str, Mapping[str, str]],
    stage: int,
    ranks: int,
) -> dict[str, Any]:
    """One rank's: a flat vector for each role, and its moments under the vector's number."""
    moments = {number: {moment: own[moment] for moment in MOMENTS} for number, own in enumerate(vectors.values())}
    base = {"state": moments, "param_groups": []}
    weights = [own["weights"] for own in vectors.values()]
    if stage == 3:
        state: dict[str, Any] = {
            "zero_stage": 3,
            "partition_count": ranks,
            "optimizer_state_dict": base,
            "fp32_flat_groups": weights,
        }
    else:
        starts = list(accumulate((stop - begin for _, begin, stop, _ in parts), initial=0))
        mappings = [
            {own[name]: (start, stop - begin) for (name, begin, stop, _), start in zip(parts, starts, strict=False)}
            for own in names.values()
        ]
        state = {
            "zero_stage": stage,
            "partition_count": [ranks] * len(names),
            "base_optimizer_state": base,
            "single_partition_of_fp32_groups": weights,
            "param_slice_mappings": mappings,
        }
    return {"optimizer_state_dict": state, "ds_version": ""}
