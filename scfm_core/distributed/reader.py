"""Reading any flat range of any tensor of a checkpoint, from any engine and any number of processes.

There are two formats: PyTorch's distributed checkpoint (DCP) and DeepSpeed's ZeRO files. Both are read without the
engine that wrote them, and range by range, so a reader never needs the memory of a whole checkpoint. Both contain
pickles. The unpickler here allows only the classes that such files hold; any other class is refused, and nothing is
executed.
"""

import io
import math
import pickle
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, TensorStorageMetadata

from scfm_core.distributed.engine import FAKE_GROUPS, GROUPS, MOMENTS, Slot, moment_group
from scfm_core.errors import UserError
from scfm_core.progress import beat

DCP_FOLDER = "dcp"

_CONTAINERS = frozenset({"set", "frozenset", "dict", "list", "tuple", "int", "float", "bool", "str"})
_PICKLED: dict[str, frozenset[str]] = {
    "builtins": _CONTAINERS,
    "__builtin__": _CONTAINERS,
    "collections": frozenset({"OrderedDict", "defaultdict"}),
    "pathlib": frozenset({"PosixPath", "PurePosixPath"}),
    "torch": frozenset({"Size", "Tensor", "FloatStorage", "BFloat16Storage", "device"}),
    "torch._tensor": frozenset({"_rebuild_from_type_v2"}),
    "torch._utils": frozenset({"_rebuild_tensor_v2", "_rebuild_parameter"}),
    "torch.nn.parameter": frozenset({"Parameter"}),
    "torch.serialization": frozenset({"_get_layout"}),
    "torch.storage": frozenset({"UntypedStorage"}),
    "torch.distributed.checkpoint.filesystem": frozenset({"_StorageInfo"}),
    "torch.distributed.checkpoint.metadata": frozenset(
        {
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        }
    ),
}


class _Opaque:
    """Replaces an object of a DeepSpeed class; only its fields are read."""

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {})


def _member(kind: type, name: str) -> Any:
    """What `getattr` may be in a pickle: Python 3.11.0 to 3.11.3 write the member of an Enum as an attribute of its class."""
    if kind is _Opaque:
        return _Opaque(name)
    if not (isinstance(kind, type) and issubclass(kind, Enum)):
        raise pickle.UnpicklingError("it holds builtins.getattr, which no checkpoint needs")
    return kind[name]


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module in ("builtins", "__builtin__") and name == "getattr":
            return _member
        if module.partition(".")[0] == "deepspeed":
            return _Opaque  # no code of DeepSpeed runs, and it need not be installed
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if name in _PICKLED.get(module, ()) or is_dtype:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it holds {module}.{name}, which no checkpoint needs")


# torch.load takes a module with the parts of `pickle` that it uses.
_PICKLE = ModuleType("scfm_pickle")
_PICKLE.Unpickler = _Unpickler  # type: ignore[attr-defined]
_PICKLE.load = lambda file, **options: _Unpickler(file, **options).load()  # type: ignore[attr-defined]


class Reader(ABC):
    """The tensors of one checkpoint by `<group>.<name>`; the groups are `GROUPS`, and with a fake score `FAKE_GROUPS`."""

    shapes: dict[str, tuple[int, ...]]
    """Shape of every tensor. The file may hold it flattened."""

    @abstractmethod
    def read(self, key: str, start: int, stop: int) -> Tensor:
        """Elements `start` to `stop - 1` of the flattened tensor, 1-D on the CPU."""

    def tensor(self, key: str) -> Tensor:
        """A whole tensor."""
        return self.read(key, 0, math.prod(self.shapes[key])).view(self.shapes[key])

    def group(self, group: str) -> dict[str, Tensor]:
        """All tensors of a group by parameter name, in memory."""
        prefix = f"{group}."
        return {key.removeprefix(prefix): self.tensor(key) for key in self.shapes if key.startswith(prefix)}

    @torch.no_grad()
    def fill(self, slots: Mapping[str, Slot]) -> None:
        """Copy each slot's range into it.

        Raises:
            UserError: if the checkpoint lacks a tensor.
        """
        for key, slot in slots.items():
            if key not in self.shapes:
                raise UserError(
                    f"the checkpoint has no tensor {key!r}; it was written by another version or for another model"
                )
            beat(f"restoring {key}")
            flat = slot.local.view(-1)
            if flat.numel():
                flat.copy_(self.read(key, slot.start, slot.start + flat.numel()))


class Readers(Reader):
    """Several readers as one: of a ZeRO checkpoint, DeepSpeed's files hold what is trained and the optimizer, and a DCP the EMAs.

    Args:
        parts: the readers; a key is in one of them.
        shapes: whole shapes of the trained parameters, by name without group.
    """

    def __init__(self, parts: list[Reader], shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._by_key = {key: part for part in parts for key in part.shapes}
        self.shapes = {key: shapes.get(key.partition(".")[2], part.shapes[key]) for key, part in self._by_key.items()}

    def read(self, key: str, start: int, stop: int) -> Tensor:
        """See `Reader`."""
        return self._by_key[key].read(key, start, stop)


class DcpReader(Reader):
    """A folder written by `torch.distributed.checkpoint.save`: `.metadata` and one `.distcp` file per rank."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with (folder / ".metadata").open("rb") as file:
            metadata = _Unpickler(file).load()
        entries = {key: entry for key, entry in metadata.state_dict_metadata.items() if _is_tensor(entry)}
        self._chunks = {key: entry.chunks for key, entry in entries.items()}
        self._places = {
            (index.fqn, tuple(index.offset)): place
            for index, place in metadata.storage_data.items()
            if index.offset is not None
        }
        self.shapes = {key: tuple(entry.size) for key, entry in entries.items()}
        self._last: tuple[tuple[str, tuple[int, ...]], Tensor] = (("", ()), torch.empty(0))
        """The chunk that was read last, and its elements."""

    def read(self, key: str, start: int, stop: int) -> Tensor:
        """See `Reader`. Chunks are ranges of rows, because FSDP2 and ZeRO shard the first dimension."""
        row = math.prod(self.shapes[key][1:])
        parts = []
        for chunk in sorted(self._chunks[key], key=lambda chunk: tuple(chunk.offsets)):
            assert tuple(chunk.sizes[1:]) == self.shapes[key][1:], f"{key} is not sharded by rows"
            first = (chunk.offsets[0] if chunk.offsets else 0) * row
            begin, end = max(start, first), min(stop, first + math.prod(chunk.sizes))
            if begin < end:
                parts.append(self._chunk(key, tuple(chunk.offsets))[begin - first : end - first])
        return parts[0].clone() if len(parts) == 1 else torch.cat(parts)

    def _chunk(self, key: str, offsets: tuple[int, ...]) -> Tensor:
        if self._last[0] != (key, offsets):  # successive reads often hit the same chunk
            place = self._places[key, offsets]
            with (self._folder / place.relative_path).open("rb") as file:
                file.seek(place.offset)
                tensor: Tensor = torch.load(io.BytesIO(file.read(place.length)), map_location="cpu", weights_only=True)
            self._last = ((key, offsets), tensor.reshape(-1))
        return self._last[1]


def _is_tensor(entry: TensorStorageMetadata | BytesStorageMetadata) -> bool:
    return isinstance(entry, TensorStorageMetadata)


class ZeroReader(Reader):
    """Student, fake score and optimizer from DeepSpeed's files, of any stage and any number of ranks.

    The layout is the one that DeepSpeed's zero_to_fp32.py reads. Stages 1 and 2 flatten all parameters of a role into one vector,
    and each rank has a slice of it. In stage 3 each rank has a slice of every parameter, padded to equal lengths.
    """

    def __init__(self, folder: Path) -> None:
        states = sorted(folder.glob("zero_pp_rank_*_optim_states.pt"), key=_rank_of)
        models = sorted(folder.glob("*model_states.pt"))
        self._ranks = [{**_load(path)["optimizer_state_dict"], "rank": _rank_of(path)} for path in states]
        # In every stage the first rank's model file lists the parameters in the order of the flat vectors, one list for each role.
        groups = _load(models[0])["param_shapes"]
        named = {name: tuple(shape) for group in groups for name, shape in group.items()}
        sharded = "fp32_flat_groups" in self._ranks[0]
        self._pieces = [
            _stage3_pieces(rank, named, len(states)) if sharded else _flat_pieces(rank) for rank in self._ranks
        ]
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._places: dict[str, tuple[str, str]] = {}
        """By key: the name in the files, and which vector: `weights` or a moment."""
        for kind in ("weights", *MOMENTS):
            for name, shape in named.items():
                role, short = parameter_name(name)
                key = f"{role if kind == 'weights' else moment_group(role, kind)}.{short}"
                self.shapes[key], self._places[key] = shape, (name, kind)

    def read(self, key: str, start: int, stop: int) -> Tensor:
        """See `Reader`."""
        name, kind = self._places[key]
        position, parts = 0, []
        for rank, pieces in zip(self._ranks, self._pieces, strict=True):
            if name not in pieces:
                continue
            vector, offset, length = pieces[name]
            begin, end = max(start, position), min(stop, position + length)
            if begin < end:
                flat = _vector(rank, kind, vector)
                parts.append(flat[offset + begin - position : offset + end - position])
            position += length
        return parts[0].clone() if len(parts) == 1 else torch.cat(parts)


def module_name(name: str, role: str = "student") -> str:
    """The inverse of `parameter_name`."""
    return "networks.student." + re.sub(r"\.lora_([AB])\.weight$", rf".lora_\1.{role}.weight", name)


def parameter_name(name: str) -> tuple[str, str]:
    """A trained parameter's role and canonical name, from its name in the module that DeepSpeed gets."""
    name = name.removeprefix("networks.student.")
    adapter = re.search(r"\.lora_[AB]\.(\w+)\.weight$", name)
    return ("student", name) if adapter is None else (adapter[1], name.replace(f".{adapter[1]}.weight", ".weight"))


def _rank_of(path: Path) -> int:
    return int(path.name.removeprefix("zero_pp_rank_").partition("_")[0])


def _load(path: Path) -> dict[str, Any]:
    """A file of DeepSpeed's; its tensors are memory-mapped, so only the parts that are used are read."""
    # torch.load would pass an archive of TorchScript to torch.jit.load, which runs code of it and asks no unpickler.
    if "constants.pkl" in torch._C.PyTorchFileReader(str(path)).get_all_records():
        raise ValueError(f"{path.name} is an archive of TorchScript, which no checkpoint needs")
    return dict(torch.load(path, map_location="cpu", mmap=True, weights_only=False, pickle_module=_PICKLE))  # nosec B614


Pieces = dict[str, tuple[int, int, int]]
"""By name of each parameter of which a rank has a part: index of the flat vector, offset in it, number of elements."""


def _flat_pieces(rank: dict[str, Any]) -> Pieces:
    return {
        name: (number, *_address(address))
        for number, mapping in enumerate(rank["param_slice_mappings"])
        for name, address in mapping.items()
    }


def _address(address: Any) -> tuple[int, int]:
    """Start and length, from DeepSpeed's `fragment_address` or from the pair that `write_zero` writes."""
    return address if isinstance(address, tuple) else (address.start, address.numel)


def _stage3_pieces(rank: dict[str, Any], shapes: Mapping[str, tuple[int, ...]], ranks: int) -> Pieces:
    pieces, vector, offset = {}, 0, 0
    own = rank["rank"]
    for name, shape in shapes.items():
        count = math.prod(shape)
        slice_length = -(-count // ranks)
        if offset + slice_length > rank["fp32_flat_groups"][vector].numel():  # the next sub-group
            vector, offset = vector + 1, 0
        pieces[name] = (vector, offset, max(0, min(count - own * slice_length, slice_length)))
        offset += slice_length
    return pieces


def _vector(rank: dict[str, Any], kind: str, number: int) -> Tensor:
    if kind == "weights":
        vectors = rank["fp32_flat_groups"] if "fp32_flat_groups" in rank else rank["single_partition_of_fp32_groups"]
        return vectors[number].detach()
    base = rank["optimizer_state_dict" if "fp32_flat_groups" in rank else "base_optimizer_state"]
    return base["state"][number][kind]


def open_reader(folder: Path, kind: str, shapes: Mapping[str, list[int]]) -> Reader:
    """Open a checkpoint's folder for reading.

    Args:
        folder: of one checkpoint.
        kind: `dcp` or `zero`, from its state.json.
        shapes: of the trained parameters, by name.

    Raises:
        UserError: if the files are damaged or incomplete.
    """
    try:
        parts: list[Reader] = [DcpReader(folder / DCP_FOLDER)]
        if kind == "zero":
            parts.append(ZeroReader(folder))
    except Exception as error:  # a damaged pickle can raise any type
        raise UserError(f"checkpoint {folder} cannot be read as {kind}: {str(error) or repr(error)}") from error
    reader = Readers(parts, {name: tuple(shape) for name, shape in shapes.items()})
    present = {key.partition(".")[0] for key in reader.shapes}
    needed = GROUPS if present.isdisjoint(FAKE_GROUPS) else (*GROUPS, *FAKE_GROUPS)
    if missing := [group for group in needed if group not in present]:
        raise UserError(f"checkpoint {folder} has no tensors of {', '.join(missing)}")
    return reader
