"""Where the fields of a tar's samples are: parsed once, kept as arrays."""

import os
import struct
import tarfile
import zlib
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from scfm_core.data.reading import may_pass, read_at
from scfm_core.data.schema import BadData
from scfm_core.data.text import shown_name

_BLOCK = 512
_COMPRESSIONS = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zX": "unxz", b"\x28\xb5\x2f\xfd": "unzstd"}
"""First bytes of a compressed tar, and the program that decompresses it."""
# Suffixes of members that other loaders would unpickle or import. They are never run here, but in a data set they are a
# sign of an attack.
_HOSTILE_SUFFIXES = frozenset({"pyd", "pickle", "pkl", "pth", "pt", "ckpt", "py", "sh", "so", "dill", "joblib"})


@dataclass(frozen=True)
class TarTable:
    """The places of all fields of a tar, 20 to 40 bytes a sample of three fields.

    The members of sample `i` are `starts[i]` to `starts[i + 1] - 1`, in the order of the tar.
    """

    keys: NDArray[np.bytes_]
    """Names of the samples, UTF-8 [samples]."""
    starts: NDArray[np.unsignedinteger]
    """[samples + 1]."""
    names: tuple[str, ...]
    """All names of fields."""
    fields: NDArray[np.unsignedinteger]
    """The field of each member, as a number into `names`: [members]."""
    blocks: NDArray[np.unsignedinteger]
    """Offset of each member's content, in blocks of 512 bytes: [members]."""
    sizes: NDArray[np.unsignedinteger]
    """Bytes of each member: [members]."""

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return sum(array.nbytes for array in (self.keys, self.starts, self.fields, self.blocks, self.sizes))

    def __len__(self) -> int:
        return len(self.keys)

    def key(self, index: int) -> str:
        """Name of sample `index`."""
        return self.keys[index].decode()

    def fields_of(self, index: int) -> list[str]:
        """Names of the fields of sample `index`."""
        return [self.names[number] for number in self.fields[self.starts[index] : self.starts[index + 1]].tolist()]

    def place(self, index: int, field: str) -> tuple[int, int] | None:
        """Offset and bytes of one field of one sample; None if the sample does not have it."""
        fields = self.fields_of(index)
        if field not in fields:
            return None
        member = int(self.starts[index]) + fields.index(field)
        return int(self.blocks[member]) * _BLOCK, int(self.sizes[member])

    @property
    def end(self) -> int:
        """Offset in bytes after the last member, rounded up to a block. The end mark should begin here."""
        last = int(np.argmax(self.blocks))
        return (int(self.blocks[last]) - (-int(self.sizes[last]) // _BLOCK)) * _BLOCK


def parse_tar(file: BinaryIO, name: str) -> TarTable:
    """Read the table of an open tar from the headers of its members.

    Args:
        file: opened for reading.
        name: of the shard, for messages.

    Raises:
        BadData: if it is not an intact tar, or has a member that data must not have: a link, a path that leaves the
            folder, a pickle, or a name that occurs twice.
        OSError: if it cannot be read.
    """
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    for member, offset, size in _members(file, name):
        folder, _, base = member.rpartition("/")
        stem, _, field = base.partition(".")
        field = field.lower()
        if member.startswith("/") or ".." in member.split("/") or field.rpartition(".")[2] in _HOSTILE_SUFFIXES:
            raise BadData(f"data: shard {name} has a member {member!r}, which is refused. Do not use this data set")
        if not stem or not field:
            continue  # LICENSE, .DS_Store, ._x.jpg: not part of a sample, as in webdataset
        sample = samples.setdefault(f"{folder}/{stem}" if folder else stem, {})
        if field in sample:
            raise BadData(f"data: shard {name} has the member {member!r} twice")
        sample[field] = (offset, size)
    names = dict.fromkeys(field for sample in samples.values() for field in sample)
    numbers = {field: number for number, field in enumerate(names)}
    members = [(numbers[field], *place) for sample in samples.values() for field, place in sample.items()]
    fields, offsets, sizes = np.array(members, np.int64).reshape(-1, 3).T
    return TarTable(
        np.array([key.encode() for key in samples], np.bytes_),
        _small(np.cumsum([0, *(len(sample) for sample in samples.values())])),
        tuple(names),
        _small(fields),
        _small(offsets // _BLOCK),
        _small(sizes),
    )


def _small(values: NDArray[np.int64]) -> NDArray[np.unsignedinteger]:
    """The same numbers in the smallest dtype that holds them."""
    return values.astype(np.min_scalar_type(int(values.max(initial=0))))


def _members(file: BinaryIO, name: str) -> list[tuple[str, int, int]]:
    """(name, offset, bytes) of every file in a tar.

    This function parses plain headers, about twenty times as fast as tarfile. For a tar with other headers (long names,
    extended headers) it uses tarfile.
    """
    descriptor = file.fileno()
    end, at, found = os.fstat(descriptor).st_size, 0, []
    for magic, program in _COMPRESSIONS.items():
        if read_at(descriptor, 0, len(magic)) == magic:
            raise BadData(
                f"data: shard {name} is compressed. Unpack it with `{program}`, because samples are read by offset"
            )
    while at + _BLOCK <= end:
        header = read_at(descriptor, at, _BLOCK)
        if not header.strip(b"\0"):
            break  # the end mark, or an overwritten header: the number of samples in the manifest tells which
        kind, size = header[156:157], header[124:136]
        if kind not in (b"0", b"\0", b"5", b"x") or size[:1] >= b"\x80" or header[345:346] != b"\0":
            return _members_by_tarfile(file, name)
        try:
            digits = size.strip(b"\0 ")
            if digits and not digits.isdigit():  # int() would take a sign
                raise ValueError(f"a size is {size!r}")
            # The low half of Adler-32 is 1 + the sum of the bytes, modulo 65521: ten times as fast as `sum`.
            total = (zlib.adler32(header) & 0xFFFF) - 1 - sum(header[148:156]) + 8 * ord(" ")
            if (int(header[148:156].strip(b"\0 "), 8) - total) % 65521:
                raise ValueError("a header's checksum is wrong")
            count = int(digits or b"0", 8)
            raw = header[:100].partition(b"\0")[0]
            member = raw.decode() if raw.isascii() else shown_name(raw.decode(errors="surrogateescape"))
        except ValueError as error:
            raise BadData(f"data: shard {name} is not an intact tar: at byte {at}, {error}") from error
        if at + _BLOCK + count > end:
            raise BadData(f"data: shard {name} is truncated: member {member!r} ends after the end of the file")
        if kind == b"x" and not _only_times(read_at(descriptor, at + _BLOCK, count)):
            return _members_by_tarfile(file, name)
        if kind not in (b"5", b"x"):
            found.append((member, at + _BLOCK, count))
        at += _BLOCK + -(-count // _BLOCK) * _BLOCK
    if not found:
        raise BadData(f"data: shard {name} is not a tar, or is empty")
    return found


def _only_times(records: bytes) -> bool:
    """Whether an extended header (`LENGTH KEY=VALUE` lines) has only times, which are not needed.

    webdataset's writer stores the time of each member in an extended header.
    """
    keys = [line.partition(b" ")[2].partition(b"=")[0] for line in records.split(b"\n") if line]
    return all(key in (b"mtime", b"atime", b"ctime") for key in keys)


def _members_by_tarfile(file: BinaryIO, name: str) -> list[tuple[str, int, int]]:
    found, end = [], os.fstat(file.fileno()).st_size
    file.seek(0)
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:  # only uncompressed tars: members are read by offset
            for member in tar:
                if member.issym() or member.islnk() or not (member.isfile() or member.isdir()) or member.issparse():
                    raise BadData(
                        f"data: shard {name} has a member {member.name!r} that is not a plain file. Do not use this data set"
                    )
                if member.size < 0 or member.offset_data + member.size > end:
                    raise BadData(
                        f"data: shard {name} is truncated: member {member.name!r} ends after the end of the file"
                    )
                if member.isfile():
                    found.append((shown_name(member.name), member.offset_data, member.size))
    except BadData:
        raise
    except OSError as error:
        if may_pass(error):
            raise
        raise BadData(f"data: shard {name} is not an intact tar ({error})") from error
    except (tarfile.TarError, ValueError, OverflowError, RecursionError, struct.error) as error:
        raise BadData(f"data: shard {name} is not an intact tar ({error})") from error
    return found
