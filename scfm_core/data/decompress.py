"""Decompression of MDS shards that stops at the size that the index names. A few bytes can otherwise become any number of gigabytes.

mosaicml-streaming compresses with five algorithms. Its own functions decompress without a limit, so they are not used.
"""

import bz2
import zlib
from collections.abc import Callable
from typing import Any

LARGEST = 1 << 32
"""Bytes of the largest shard: MDS has offsets of 32 bits."""
_ZSTD, _ZSTD_SKIPPED = 0xFD2FB528, 0x184D2A50


def decompress(algorithm: str, content: bytes, size: int) -> bytes:
    """Decompress a whole file in memory.

    Args:
        algorithm: as mosaicml-streaming names it: `zstd`, `gz`, `bz2`, `br` or `snappy`, with or without `:LEVEL`.
        content: of the compressed file.
        size: bytes of the decompressed one; more is an error, before there is memory for it.

    Raises:
        ValueError: if it is not of this algorithm, ends early, or becomes larger than `size`.
        Exception: of the algorithm's package, for damaged content.
    """
    if size > LARGEST:
        raise ValueError(f"its index names {size:,} bytes, and no shard has more than {LARGEST:,}")
    name = algorithm.partition(":")[0]
    if name not in _ALGORITHMS:
        raise ValueError(f"the compression {algorithm!r} is unknown; it may be {', '.join(_ALGORITHMS)}")
    return _ALGORITHMS[name](content, size)


def _too_large(size: int) -> ValueError:
    return ValueError(f"it becomes larger than the {size:,} bytes that its index names")


def _in_parts(make: Callable[[], Any], content: bytes, size: int) -> bytes:
    """Concatenated streams, each by its own decompressor."""
    whole = bytearray()
    while content:
        stream = make()
        whole += stream.decompress(content, size + 1 - len(whole))
        if len(whole) > size:
            raise _too_large(size)
        if not stream.eof:
            raise ValueError("it ends early")
        content = stream.unused_data
    return bytes(whole)


def _gzip(content: bytes, size: int) -> bytes:
    return _in_parts(lambda: zlib.decompressobj(wbits=31), content, size)


def _bzip2(content: bytes, size: int) -> bytes:
    return _in_parts(bz2.BZ2Decompressor, content, size)


def _brotli(content: bytes, size: int) -> bytes:
    import brotli

    stream = brotli.Decompressor()
    whole = bytes(stream.process(content, output_buffer_limit=size + 1))
    if len(whole) > size:
        raise _too_large(size)
    if not stream.is_finished():
        raise ValueError("it ends early")
    return whole


def _snappy(content: bytes, size: int) -> bytes:
    import snappy

    claimed, shift = (
        0,
        0,
    )  # the first bytes are the size, as a varint: https://github.com/google/snappy, format_description.txt
    for byte in content[:5]:
        claimed |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            break
    if claimed > size:
        raise _too_large(size)
    return bytes(snappy.decompress(content))


def _zstd(content: bytes, size: int) -> bytes:
    import zstd

    if _zstd_size(content) > size:
        raise _too_large(size)
    return bytes(zstd.decompress(content))


def _zstd_size(content: bytes) -> int:
    """The bytes that the headers of all frames claim; zstd writes no more. The format: RFC 8878, section 3.1.

    Raises:
        ValueError: if there is no frame, a frame does not name its size, or the last one ends early.
    """
    at = total = 0
    while at < len(content) or not at:
        magic = int.from_bytes(content[at : at + 4], "little")
        if magic & 0xFFFFFFF0 == _ZSTD_SKIPPED:
            at += 8 + int.from_bytes(content[at + 4 : at + 8], "little")
            continue
        if magic != _ZSTD or at + 5 > len(content):
            raise ValueError("it is not in zstd's format")
        flags = content[at + 4]
        is_single = flags >> 5 & 1
        at += 5 + (1 - is_single) + (0, 1, 2, 4)[flags & 3]
        width = (is_single, 2, 4, 8)[flags >> 6]
        if not width:
            raise ValueError("it does not name its decompressed size")
        total += int.from_bytes(content[at : at + width], "little") + (256 if width == 2 else 0)
        at, is_last = at + width, 0
        while not is_last:
            if at + 3 > len(content):
                raise ValueError("it ends early")
            block = int.from_bytes(content[at : at + 3], "little")
            is_last, is_run = block & 1, block >> 1 & 3 == 1
            at += 3 + (1 if is_run else block >> 3)
        at += 4 * (flags >> 2 & 1)  # the checksum
    return total


_ALGORITHMS: dict[str, Callable[[bytes, int], bytes]] = {
    "zstd": _zstd,
    "gz": _gzip,
    "bz2": _bzip2,
    "br": _brotli,
    "snappy": _snappy,
}
