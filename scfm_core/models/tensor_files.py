"""Reading any range of any tensor from safetensors files.

Ranges are read with `pread` into the memory where they are needed. safetensors' own reader maps files into memory: there an I/O
error ends the process with SIGBUS, and every process counts the pages as its own. The page cache is the same: processes of a
machine read the disk once. The format: https://github.com/huggingface/safetensors#format.
"""

import itertools
import json
import math
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from scfm_core.errors import UserError
from scfm_core.launched import launched_rank
from scfm_core.progress import beat
from scfm_core.wording import count

MAX_HEADER = 100_000_000
"""Bytes; safetensors itself allows no longer header."""
CHUNK = 8 << 20
"""Bytes that are in host memory at a time on their way to a device. They fit a processor's cache, so reading 64 MiB at a time is slower."""
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_STEM = "diffusion_pytorch_model.safetensors"


@dataclass(frozen=True)
class _Place:
    path: Path
    offset: int
    """Of the first byte in the file."""
    dtype: torch.dtype
    shape: tuple[int, ...]


def adapter_settings(path: Path) -> str:
    """PEFT's settings of an adapter, as JSON: from the file's header, where diffusers writes them, or from the file beside it.

    Raises:
        OSError: if a file cannot be read.
        SafetensorError: if it has no valid header.
    """
    with safe_open(path, "pt") as file:
        settings: str | None = (file.metadata() or {}).get("lora_adapter_metadata")
    beside = path.with_name("adapter_config.json")  # as PEFT saves an adapter
    if settings is None and beside.is_file():
        settings = beside.read_text(encoding="utf-8")
    return settings or "{}"


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file, without its metadata, and the offset of the first tensor's bytes.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it has no valid header.
    """
    with path.open("rb", buffering=0) as file:
        try:
            length = struct.unpack("<Q", file.read(8))[0]
            if length > min(MAX_HEADER, os.fstat(file.fileno()).st_size):
                raise ValueError(f"it names a header of {length:,} bytes, which it does not have")
            header = json.loads(os.pread(file.fileno(), length, 8))
            header.pop("__metadata__", None)
        except (struct.error, AttributeError, TypeError, RecursionError) as error:
            raise ValueError(f"it has no header of safetensors: {error}") from error
    return header, 8 + length


def quantised_error(folder: Path, how: str) -> UserError:
    """The error of a network whose weights in `folder` are quantised; `how` says by what this is seen."""
    return UserError(
        f"model.path: the weights in {folder} are quantised ({how}), which scfm does not read. Give the model in bf16, fp16 or fp32; "
        f"model.base=nf4 (or int8, float8) quantises it while it is loaded"
    )


class TensorFiles:
    """The weights of a pipeline's network. Opening reads only the headers; close it, or use it with `with`.

    Args:
        folder: the component's folder, with one file or several and their index, as diffusers writes them.

    Raises:
        UserError: if files are missing, damaged or incomplete.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open: dict[Path, FileIO] = {}
        self._buffer = torch.empty(CHUNK, dtype=torch.uint8)
        self._places: dict[str, _Place] = {}
        for name in self._file_names():
            try:
                self._add(folder / name)
            except UserError:
                raise
            except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
                raise self._damaged(error) from error

    def _file_names(self) -> list[str]:
        """The files that diffusers loads without a variant."""
        index = self._folder / f"{_STEM}.index.json"
        if index.is_file():
            try:
                names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
                if outside := [name for name in names if Path(name).name != name]:
                    raise ValueError(f"{index.name} names a file outside the folder, {outside[0]!r}")
                return names
            except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise self._damaged(error) from error
        if (self._folder / _STEM).is_file():
            return [_STEM]
        others = sorted(path.name for path in self._folder.glob("*.safetensors"))
        raise UserError(
            f"model.path: {self._folder} has no .safetensors weights; is the download complete?"
            if not others
            else f"model.path: {self._folder} has no {_STEM}, only {', '.join(others)}. Rename the file that you want to use"
        )

    def _add(self, path: Path) -> None:
        header, first = read_header(path)
        end, ranges = path.stat().st_size, []
        for name, entry in header.items():
            dtype, shape, (begin, stop) = _DTYPES.get(entry["dtype"]), tuple(entry["shape"]), entry["data_offsets"]
            if dtype is None:
                raise quantised_error(path.parent, f"{name} in {path.name} has dtype {entry['dtype']}")
            if any(type(number) is not int or number < 0 for number in (begin, *shape)):
                raise ValueError(f"{path.name}: its header is wrong: {name} has shape {list(shape)} at {begin}")
            if stop - begin != math.prod(shape) * dtype.itemsize or first + stop > end:
                raise ValueError(f"{path.name} ends before the end of {name}, or its header is wrong")
            ranges.append((begin, stop, name))
            self._places[name] = _Place(path, first + begin, dtype, shape)
        ranges.sort()
        for (_, stop, name), (begin, _, other) in itertools.pairwise(ranges):
            if begin < stop:
                raise ValueError(f"{path.name}: its header is wrong: {name} and {other} share bytes")

    def check(self, expected: Mapping[str, Tensor]) -> None:
        """Check that the files hold a network's tensors. Other tensors in the files are not used, which rank 0 says.

        Args:
            expected: the network's tensors by name, also on the meta device.

        Raises:
            UserError: if a tensor is missing or has another shape, or if the weights are quantised.
        """
        wrong = [
            f"{name} is missing"
            if name not in self._places
            else f"{name} has shape {list(self._places[name].shape)}, not {list(tensor.shape)}"
            for name, tensor in expected.items()
            if name not in self._places or self._places[name].shape != tuple(tensor.shape)
        ]
        if wrong:
            raise UserError(
                f"model.path: the weights in {self._folder} do not fit its config.json. {len(wrong)} of {len(expected)} tensors: "
                f"{'; '.join(wrong[:3])}{'; ...' if len(wrong) > 3 else ''}. Download weights and config.json again"
            )
        unused = sorted(self._places.keys() - expected.keys())
        is_fp8 = any(place.dtype.itemsize == 1 for place in self._places.values())
        if is_fp8 and (scales := [name for name in unused if "scale" in name.rpartition(".")[2]]):
            raise quantised_error(self._folder, f"{scales[0]} is a scale of fp8 weights")
        if unused and launched_rank() == 0:
            print(
                f"model.path: {count(len(unused), 'tensor')} of the weights in {self._folder} are not used: "
                f"{', '.join(unused[:3])}{', ...' if len(unused) > 3 else ''}",
                flush=True,
            )

    def fill(self, name: str, part: Tensor, start: int) -> None:
        """See `scfm_core.filling.Fill`; elements are converted to the dtype of `part`.

        Raises:
            UserError: if the file cannot be read.
        """
        place = self._places[name]
        size = max(1, CHUNK // place.dtype.itemsize)
        for chunk, target in enumerate(part.split(size)):
            beat(f"loading {name}")
            first = start + chunk * size
            try:
                target.copy_(self._read(place, first, target.numel()))
            except OSError as error:
                raise UserError(
                    f"model.path: {place.path} cannot be read ({error.strerror or error}). If the file is whole, check the disk or "
                    f"the network file system, and run the same command again"
                ) from error

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor by name, in the files' dtypes, one at a time: what `fill` reads, so no other file of the folder.

        Raises:
            UserError: if a file cannot be read.
        """
        for name, place in self._places.items():
            tensor = torch.empty(place.shape, dtype=place.dtype)
            self.fill(name, tensor.view(-1), 0)
            yield name, tensor

    def _read(self, place: _Place, start: int, count: int) -> Tensor:
        """Elements of a flattened tensor, 1-D in the file's dtype; the next call overwrites them."""
        if place.path not in self._open:
            self._open[place.path] = FileIO(place.path)
        elements = self._buffer[: count * place.dtype.itemsize].view(place.dtype)
        left = memoryview(elements.view(torch.uint8).numpy())  # type: ignore[arg-type]
        offset = place.offset + start * place.dtype.itemsize
        while left:
            read = os.preadv(self._open[place.path].fileno(), [left], offset)
            if not read:
                raise OSError("the file has become shorter")
            left, offset = left[read:], offset + read
        return elements

    def _damaged(self, error: Exception) -> UserError:
        return UserError(
            f"model.path: the weights in {self._folder} cannot be read ({type(error).__name__}: {error}). "
            f"They are damaged or incomplete: download them again"
        )

    def close(self) -> None:
        """Close the files."""
        for file in self._open.values():
            file.close()
        self._open.clear()

    def __enter__(self) -> "TensorFiles":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
