"""Malicious shards: nothing in them is executed or written, and reading them raises BadData."""

import contextlib
import gzip
import hashlib
import io
import json
import pickle
import random
import resource
import signal
import struct
import tarfile
import time
import traceback
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save

from scfm_core.data.corpus import Corpus
from scfm_core.data.image import load_picture
from scfm_core.data.mds import MdsWriter
from scfm_core.data.recipe import CacheConfig, DataConfig, SourceConfig
from scfm_core.data.schema import MANIFEST, BadData, Manifest, Record, ShardEntry
from scfm_core.data.webdataset import TarShard
from scfm_core.errors import UserError

BLOCK = 512
CANARIES = {
    "AWS_SECRET_ACCESS_KEY": "canary-of-the-s3-secret",
    "AWS_SESSION_TOKEN": "canary-of-the-session",
    "WANDB_API_KEY": "canary-of-wandb",
    "HF_TOKEN": "canary-of-hugging-face",
}


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.fixture(autouse=True)
def nothing_is_run_or_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tests write only in `data` and `cache`. A shard that executes or writes something does so elsewhere."""
    (tmp_path / "work" / "deep").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work" / "deep")
    yield
    found = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")}
    assert not {name for name in found if not name.startswith(("data", "cache"))} - {"work", "work/deep"}
    assert not any("canary" in name for name in found)


@pytest.fixture
def bomb(tmp_path: Path) -> bytes:
    content = pickle.dumps(Bomb(tmp_path / "canary"))
    pickle.loads(content)
    (tmp_path / "canary").unlink()  # the bomb works: here is its file
    return content


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Ends an endless loop."""

    def stop(*_: object) -> None:
        raise AssertionError(f"it has not ended after {seconds} s")

    handler, left, start = signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL)[0], time.monotonic()
    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        # Restore the timer of pytest-timeout.
        signal.setitimer(signal.ITIMER_REAL, max(1.0, left - (time.monotonic() - start)) if left else 0)
        signal.signal(signal.SIGALRM, handler)


@contextlib.contextmanager
def memory_limit(size: int) -> Iterator[None]:
    """Lets the process take at most so many bytes more; beyond them is MemoryError."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def jpeg(seed: int = 0, kind: str = "JPEG", size: tuple[int, int] = (24, 16)) -> bytes:
    out = io.BytesIO()
    Image.effect_noise(size, 30 + seed).convert("RGB").save(out, kind)
    return out.getvalue()


def cached(seed: int) -> dict[str, bytes]:
    tensors = {"latents": torch.full((1, 2, 2), float(seed)), "text": torch.zeros(2, 3), "pooled": torch.zeros(5)}
    return {"safetensors": save(tensors), "txt": f"caption {seed}".encode()}


def write_dataset(folder: Path, shard: bytes, samples: int, name: str = "x.tar", **fields: Any) -> Path:
    """One shard of any content, with a manifest that agrees with it."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(shard)
    entry = ShardEntry(name=name, samples=samples, bytes=len(shard), sha256=hashlib.sha256(shard).hexdigest(), **fields)
    Manifest(shards=(entry,)).write(folder / MANIFEST)
    return folder


def recipe(folder: Path, **fields: Any) -> DataConfig:
    bad = fields.pop("max_bad_fraction", 0.0)
    return DataConfig(
        sources=(SourceConfig(name="a", uri=str(folder), **fields),),
        resolution=(16, 24),
        max_bad_fraction=bad,
        cache=CacheConfig(dir=str(folder.parent / "cache"), timeout=2),
    )


def tar_of(*members: tuple[str, bytes], **options: Any) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=options.pop("format", tarfile.USTAR_FORMAT)) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        for info in options.pop("infos", ()):
            tar.addfile(info)
    return out.getvalue()


def good_tar(count: int = 3) -> bytes:
    return tar_of(
        *[(f"{n:04d}.{kind}", content) for n in range(count) for kind, content in (("jpg", jpeg(n)), ("txt", b"a"))]
    )


def sealed(header: bytearray) -> bytes:
    """A header with a correct checksum."""
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def header_of(name: str, size: bytes, kind: bytes = b"0") -> bytes:
    header = bytearray(tarfile.TarInfo(name).tobuf(tarfile.USTAR_FORMAT))
    header[124:136], header[156:157] = size.ljust(12, b"\0"), kind
    return sealed(header)


def link(name: str, target: str, kind: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def sparse_member(name: str, size: bytes) -> bytes:
    header = bytearray(tarfile.TarInfo(name).tobuf(tarfile.GNU_FORMAT))
    header[156:157] = b"S"
    header[386:410] = b"00000000000\0" + b"00000000000\0"
    header[483:495] = size.ljust(12, b"\0")  # when extracted
    return sealed(header)


class TestTarMembers:
    @pytest.mark.parametrize(
        "extension", ["pyd", "pkl", "pickle", "pth", "pt", "PKL", "seg.pth", "py", "so", "sh", "dill"]
    )
    def test_that_other_loaders_would_execute(self, tmp_path: Path, bomb: bytes, extension: str) -> None:
        shard = tar_of(("0000.jpg", jpeg()), ("0000.txt", b"a"), (f"0000.{extension}", bomb))
        corpus = Corpus(recipe(write_dataset(tmp_path / "data", shard, 1)))
        with pytest.raises(BadData, match=rf"x\.tar .*has a member '0000\.{extension}', which is refused"):
            corpus.record(0)

    @pytest.mark.parametrize(
        "name",
        ["../canary.txt", "../../canary.txt", "a/../../canary.txt", "/canary.txt", "{tmp}/canary.txt", "a/..", ".."],
    )
    @pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
    def test_paths_outside_the_folder(self, tmp_path: Path, name: str, form: int) -> None:
        name = name.format(tmp=tmp_path)
        shard = tar_of(("0000.jpg", jpeg()), (name, b"x"), format=form)
        with pytest.raises(BadData, match=r"x\.tar has a member '.*', which is refused"):
            Corpus(recipe(write_dataset(tmp_path / "data", shard, 1))).record(0)

    def test_a_long_path_outside_the_folder(self, tmp_path: Path) -> None:
        for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
            shard = tar_of((f"{'long/' * 60}../../canary.txt", b"x"), format=form)
            with pytest.raises(BadData, match="which is refused"):
                Corpus(recipe(write_dataset(tmp_path / "data", shard, 1))).record(0)

    @pytest.mark.parametrize(
        "kind",
        [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE],
        ids=["symlink", "hardlink", "character", "block", "fifo"],
    )
    @pytest.mark.parametrize("place", ["first", "last"])
    def test_that_are_not_files(self, tmp_path: Path, kind: bytes, place: str) -> None:
        odd = link("0000.txt", "/etc/passwd", kind).tobuf(tarfile.USTAR_FORMAT)
        image = tar_of(("0000.jpg", jpeg()))
        blocks = BLOCK + -(-len(jpeg()) // BLOCK) * BLOCK
        shard = odd + image if place == "first" else image[:blocks] + odd + bytes(2 * BLOCK)
        with pytest.raises(BadData, match=r"x\.tar has a member '0000\.txt' that is not a plain file"):
            Corpus(recipe(write_dataset(tmp_path / "data", shard, 1))).record(0)

    @pytest.mark.parametrize("size", [b"00000000100", b"77777777777"], ids=["64 bytes", "8 GB"])
    def test_a_sparse_one(self, tmp_path: Path, size: bytes) -> None:
        shard = sparse_member("0000.jpg", size) + bytes(2 * BLOCK)
        with pytest.raises(BadData, match=r"x\.tar has a member '0000\.jpg' that is not a plain file"):
            Corpus(recipe(write_dataset(tmp_path / "data", shard, 1))).record(0)

    @pytest.mark.parametrize("second", ["0000.txt", "0000.TXT"])
    def test_one_name_twice(self, tmp_path: Path, second: str) -> None:
        """It would be ambiguous."""
        shard = tar_of(("0000.jpg", jpeg()), ("0000.txt", b"a"), ("0001.txt", b"b"), (second, b"c"))
        with pytest.raises(BadData, match=rf"x\.tar has the member '{second}' twice"):
            Corpus(recipe(write_dataset(tmp_path / "data", shard, 2))).record(0)

    def test_folders_are_not_samples(self, tmp_path: Path) -> None:
        shard = tar_of(("a/0000.jpg", jpeg()), ("a/0000.txt", b"x"), infos=[link("a", "", tarfile.DIRTYPE)])
        record = Corpus(recipe(write_dataset(tmp_path / "data", shard, 1))).record(0)
        assert (record.key, record.caption) == ("a/0000", "x")

    @pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
    def test_long_and_non_ascii_names_are_read(self, tmp_path: Path, form: int) -> None:
        key = f"{'ä' * 30}/{'x' * 150}"
        shard = tar_of((f"{key}.jpg", jpeg()), (f"{key}.txt", b"x"), format=form)
        assert Corpus(recipe(write_dataset(tmp_path / "data", shard, 1))).record(0).key == key


class TestTarHeaders:
    def read(self, folder: Path, shard: bytes, samples: int = 1) -> list[bytes | None]:
        corpus = Corpus(recipe(write_dataset(folder / "data", shard, samples)))
        opened = corpus.raw(0)[0]
        assert opened is not None
        return [opened.read(place, "txt") for place in range(len(opened))]

    @pytest.mark.parametrize(
        ("size", "content"),
        [
            (b"77777777777", b""),
            (b"00000004000", b"x" * BLOCK),
            (b"\x80" + b"\xff" * 11, b""),
            (b"\x80" + b"\0" * 6 + b"\1\0\0\0\0", b""),
            (b"9", b""),
            (b"0x10", b""),
            (b"many", b""),
        ],
        ids=["8GB", "2KB", "base256", "4GB", "no octal", "hex", "letters"],
    )
    def test_an_impossible_size(self, tmp_path: Path, size: bytes, content: bytes) -> None:
        with pytest.raises(BadData, match=r"x\.tar"), time_limit(10):
            self.read(tmp_path, header_of("0000.txt", size) + content.ljust(2 * BLOCK, b"\0"))

    @pytest.mark.parametrize(
        "size",
        [
            pytest.param(size)
            for size, reason in [
                (b"-0000001000", "int() accepts the sign: the loop would never end and fill the memory"),
                (b"-0000000001", "int() takes the sign: taken for an empty member"),
                (b"-0000010000", "int() takes the sign: OSError of pread"),
                (b"\xff" * 10 + b"\xfe\0", "tarfile's negative size: taken for a member"),
            ]
        ],
        ids=["-512", "-1", "-4096", "base256"],
    )
    def test_a_negative_size(self, tmp_path: Path, size: bytes) -> None:
        with pytest.raises(BadData, match=r"x\.tar"), time_limit(2):
            self.read(tmp_path, header_of("0000.txt", size) + bytes(4 * BLOCK))

    def test_a_size_in_base_256(self, tmp_path: Path) -> None:
        shard = header_of("0000.txt", b"\x80" + b"\0" * 10 + b"\5") + b"hello".ljust(3 * BLOCK, b"\0")
        assert self.read(tmp_path, shard) == [b"hello"]

    def test_a_wrong_checksum(self, tmp_path: Path) -> None:
        good = tar_of(("0000.txt", b"a"), ("0001.txt", b"b"))
        for at in (0, 2 * BLOCK):
            bad = bytearray(good)
            bad[at] ^= 1  # the member's name
            with pytest.raises(BadData, match=r"x\.tar"):
                self.read(tmp_path, bytes(bad), 2)

    @pytest.mark.parametrize("shard", [b"\0" * 1024, b"\0" * 10240, b"x", b"<html>not found</html>" * 99], ids=len)
    def test_not_a_tar(self, tmp_path: Path, shard: bytes) -> None:
        with pytest.raises(BadData, match=r"x\.tar is no"):
            self.read(tmp_path, shard)

    def test_an_empty_file(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"manifest\.json is damaged|x\.tar is not a tar"):
            self.read(tmp_path, b"")

    @pytest.mark.parametrize("name", ["", "x" * 300], ids=["plain", "with a name"])
    def test_a_compressed_tar(self, tmp_path: Path, name: str) -> None:
        """The name is at the offset of the type of a tar's first member. Stored, so that all offsets are in the file."""
        out = io.BytesIO()
        with gzip.GzipFile(name, "wb", compresslevel=0, fileobj=out) as file:
            file.write(good_tar() + bytes(20_000))
        with pytest.raises(BadData, match=r"x\.tar is compressed. Unpack it with `gunzip`"):
            self.read(tmp_path, out.getvalue())

    def test_a_zeroed_header_is_found_by_the_count(self, tmp_path: Path) -> None:
        shard = bytearray(tar_of(*[(f"{n:04d}.txt", b"x") for n in range(3)]))
        shard[2 * BLOCK : 3 * BLOCK] = bytes(BLOCK)
        with pytest.raises(BadData, match=r"x\.tar holds 1 samples, the manifest says 3"):
            self.read(tmp_path, bytes(shard), 3)

    def test_thousands_of_headers_before_a_member(self, tmp_path: Path) -> None:
        more = header_of("././@LongLink", b"00000000001", b"L") + b"x".ljust(BLOCK, b"\0")
        with contextlib.suppress(BadData):
            self.read(tmp_path, more * 3000 + header_of("x", b"00000000000") + bytes(2 * BLOCK))

    def test_wrong_extended_headers(self, tmp_path: Path) -> None:
        for name, value in [
            ("size", "99999999999"),
            ("size", "-512"),
            ("path", "../canary.txt"),
            ("GNU.sparse.major", "1"),
        ]:
            out = io.BytesIO()
            with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
                info = tarfile.TarInfo("0000.txt")
                info.pax_headers = {name: value, "GNU.sparse.minor": "0"}
                tar.addfile(info)
            with pytest.raises(BadData, match=r"x\.tar"), time_limit(10):
                self.read(tmp_path, out.getvalue())


def mutate(content: bytes, generator: random.Random, blocks: int = BLOCK) -> bytes:
    """Damage it in one of a few ways."""
    data = bytearray(content)
    for _ in range(generator.choice([1, 1, 1, 2, 5])):
        at = generator.randrange(max(1, len(data)))
        length = generator.choice([1, 4, 12, 100, blocks])
        start = at // blocks * blocks
        match generator.randrange(7):
            case 0 if data:
                data[min(at, len(data) - 1)] ^= 1 << generator.randrange(8)
            case 1:
                data[at : at + length] = generator.randbytes(length)
            case 2:
                data[at : at + length] = generator.choice([b"\0", b"\xff", b" ", b"7"]) * length
            case 3:
                del data[at:]
            case 4:
                del data[start : start + blocks]
            case 5:
                data[start:start] = data[: generator.choice([blocks, 3 * blocks])]
            case _:
                data[at:at] = generator.randbytes(length)
    return bytes(data)


def mutate_header(content: bytes, generator: random.Random) -> bytes:
    """A wrong field with a correct checksum."""
    data = bytearray(content)
    starts = [at for at in range(0, len(data), BLOCK) if data[at + 257 : at + 262] == b"ustar"]
    at = generator.choice(starts)
    first, last = generator.choice([(0, 100), (124, 136), (156, 157), (157, 257), (257, 265), (345, 500)])
    place = generator.randrange(first, last)
    data[place] = generator.choice(b"01234567LSKxg5/.\0\x80\xff")
    data[at : at + BLOCK] = sealed(data[at : at + BLOCK])
    return bytes(data)


def outcome(call: Callable[[], Any]) -> Any:
    """The result, or "bad"; any other exception is a failure."""
    try:
        return call()
    except UserError:
        return "bad"


class TestFuzz:
    """The hash in the manifest agrees with the damage: as if the shard had been damaged before it was hashed."""

    def run(self, folder: Path, shard: bytes, note: object, **fields: Any) -> list[str]:
        """The outcome of each sample."""
        try:
            with time_limit(20):
                corpus = outcome(lambda: Corpus(recipe(write_dataset(folder, shard, 3), **fields)))
                if corpus == "bad":
                    return ["bad"] * 3
                return [self.one(outcome(lambda item=item: corpus.record(item))) for item in range(3)]
        except Exception as error:
            raise AssertionError(f"{note}: {error!r}") from error

    def one(self, record: Record | str) -> str:
        if isinstance(record, str):
            return record
        image = record.image
        assert image is not None
        assert (image.shape, image.dtype) == ((3, 16, 24), torch.uint8)
        assert isinstance(record.caption, str)
        return "read"

    @pytest.mark.parametrize("seed", range(4))
    def test_tars(self, tmp_path: Path, seed: int) -> None:
        generator, good = random.Random(seed), good_tar()
        assert self.run(tmp_path / "data", good, "good") == ["read"] * 3
        found = [
            kind
            for number in range(100)
            for kind in self.run(tmp_path / "data", mutate(good, generator), (seed, number))
        ]
        assert {"read", "bad"} == set(found)

    def test_headers(self, tmp_path: Path) -> None:
        generator, good = random.Random(7), good_tar()
        found = [
            kind
            for number in range(150)
            for kind in self.run(tmp_path / "data", mutate_header(good, generator), number)
        ]
        assert {"read", "bad"} == set(found)

    def test_random_bytes(self, tmp_path: Path) -> None:
        generator = random.Random(8)
        for number in range(50):
            content = generator.randbytes(generator.randrange(1, 4000))
            assert self.run(tmp_path / "data", content, number) == ["bad"] * 3

    @pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP"])
    def test_images(self, kind: str) -> None:
        generator, good = random.Random(9), jpeg(kind=kind)
        assert self.one(Record(key="", caption="", image=load_picture(good, 16, 24).pixels)) == "read"
        for number in range(100):
            content = mutate(good, generator, 64)
            try:
                image = outcome(lambda content=content: load_picture(content, 16, 24, "it").pixels)
            except Exception as error:
                raise AssertionError(f"{number}: {error!r}") from error
            assert image == "bad" if isinstance(image, str) else image.shape == (3, 16, 24)

    def test_cached_samples(self, tmp_path: Path) -> None:
        generator = random.Random(10)
        for number in range(150):
            fields = cached(1)
            fields["safetensors"] = mutate(fields["safetensors"], generator, 64)
            shard = tar_of(*[(f"0000.{kind}", content) for kind, content in fields.items()])
            folder = write_dataset(tmp_path / "data", shard, 1, sizes=((16, 24, 1),))
            manifest = json.loads((folder / MANIFEST).read_text()) | {
                "encoder": "e" * 64,
                "fields": KINDS,
                "text_length": 2,
            }
            (folder / MANIFEST).write_text(json.dumps(manifest))
            try:
                record = outcome(lambda folder=folder: Corpus(recipe(folder)).record(0))
            except Exception as error:
                raise AssertionError(f"{number}: {error!r}") from error
            assert record == "bad" or isinstance(record, Record)


def write_mds(folder: Path, columns: dict[str, str], rows: list[dict[str, Any]]) -> Path:
    """With the library's own writer, as other tools do."""
    from streaming import MDSWriter

    with MDSWriter(out=str(folder), columns=columns, hashes=["sha256"]) as writer:
        for row in rows:
            writer.write(row)
    return folder


def edit_index(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    index = json.loads((folder / "index.json").read_text())
    change(index["shards"][0])
    (folder / "index.json").write_text(json.dumps(index))


def reseal_mds(folder: Path, content: bytes) -> None:
    (folder / "shard.00000.mds").write_bytes(content)
    seal = {"bytes": len(content), "hashes": {"sha256": hashlib.sha256(content).hexdigest()}}
    edit_index(folder, lambda shard: shard["raw_data"].update(seal))


class TestMds:
    @pytest.fixture
    def mds(self, tmp_path: Path) -> Path:
        rows = [{"image": jpeg(number), "txt": f"caption {number}"} for number in range(3)]
        return write_mds(tmp_path / "data", {"image": "bytes", "txt": "str"}, rows)

    def test_a_pickled_column_is_not_unpickled(self, tmp_path: Path) -> None:
        rows = [{"image": jpeg(), "bad": Bomb(tmp_path / "canary"), "txt": f"caption {number}"} for number in range(2)]
        folder = write_mds(tmp_path / "data", {"image": "bytes", "bad": "pkl", "txt": "str"}, rows)
        corpus = Corpus(recipe(folder, format="mds"))
        assert [corpus.record(item).caption for item in range(2)] == ["caption 0", "caption 1"]
        shard = corpus.raw(0)[0]
        assert shard is not None
        assert "bad" in shard.fields(0)
        with pytest.raises(BadData, match=r"column 'bad' of shard .* has the encoding 'pkl', which is not supported"):
            shard.read(0, "bad")
        for fields in ({"captions": {"bad": 1.0}}, {"captions": {"json.x": 1.0, "bad": 1.0}}, {"image": ("bad",)}):
            with pytest.raises(BadData, match="'pkl', which is not supported"):
                Corpus(recipe(folder, format="mds", **fields)).record(0)

    def test_a_pickle_under_another_encoding(self, tmp_path: Path, bomb: bytes) -> None:
        rows = [{"image": bomb, "txt": "x"}]
        folder = write_mds(tmp_path / "data", {"image": "bytes", "txt": "str"}, rows)
        edit_index(folder, lambda shard: shard.update(column_encodings=["jpeg", "str"]))
        with pytest.raises(BadData, match="not a readable image"):
            Corpus(recipe(folder, format="mds")).record(0)

    @pytest.mark.parametrize("name", ["../x.mds", "/etc/passwd", "a/../../x.mds", "s3://bucket/x.mds", "..\\x.mds", ""])
    def test_a_path_outside_the_folder(self, mds: Path, name: str) -> None:
        (mds.parent / "cache").mkdir()
        edit_index(mds, lambda shard: shard["raw_data"].update(basename=name))
        with pytest.raises(UserError, match=r"index\.json names a shard outside its folder"):
            Corpus(recipe(mds, format="mds"))

    @pytest.mark.parametrize("name", ["../cache/x.zstd", "a/../../cache/x.zstd"])
    def test_a_path_of_a_compressed_shard_outside_the_folder(self, tmp_path: Path, name: str) -> None:
        with MdsWriter(tmp_path / "data", ["image", "txt"], Manifest(), compression="zstd") as writer:
            writer.write("0", {"image": jpeg(), "txt": b"x"}, None)
        (tmp_path / "cache").mkdir()
        (tmp_path / "data" / "shard.00000.mds.zstd").rename(tmp_path / "cache" / "x.zstd")
        (tmp_path / "data" / "a").mkdir()
        edit_index(tmp_path / "data", lambda shard: shard["zip_data"].update(basename=name))
        with pytest.raises(UserError, match=r"names a shard outside its folder"):
            Corpus(recipe(tmp_path / "data", format="mds")).record(0)

    def test_a_compressed_shard_of_an_unknown_algorithm(self, mds: Path) -> None:
        packed = {"basename": "shard.00000.mds", "bytes": (mds / "shard.00000.mds").stat().st_size, "hashes": {}}
        edit_index(mds, lambda shard: shard.update(compression="rot13", zip_data=packed))
        with pytest.raises(BadData, match="cannot be decompressed"):
            Corpus(recipe(mds, format="mds")).record(0)

    @pytest.mark.parametrize("algorithm", ["zstd:1", "gz:1", "bz2:1", "br:1", "snappy", "zstd of terabytes"])
    def test_a_shard_that_becomes_far_larger_when_decompressed(self, mds: Path, algorithm: str) -> None:
        """The index names the size; memory for more is not taken."""
        from streaming.base.compression import compress

        algorithm, _, claim = algorithm.partition(" of ")
        bomb = compress(algorithm, bytes(80 << 20))
        (mds / "bomb").write_bytes(bomb)
        packed = {"basename": "bomb", "bytes": len(bomb), "hashes": {}}
        edit_index(mds, lambda shard: shard.update(compression=algorithm, zip_data=packed))
        if claim:
            edit_index(mds, lambda shard: shard["raw_data"].update(bytes=10**13))
        (mds / "shard.00000.mds").unlink()
        with pytest.raises(BadData, match=r"shard bomb cannot be decompressed \(.*bytes"), memory_limit(64 << 20):
            Corpus(recipe(mds, format="mds")).record(0)

    @pytest.mark.parametrize("seed", range(3))
    def test_fuzz(self, mds: Path, seed: int) -> None:
        generator, good, found = random.Random(seed), (mds / "shard.00000.mds").read_bytes(), set()
        for number in range(80):
            # Half of them in the table of offsets at the beginning.
            content = mutate(good, generator, 64)
            if number % 2:
                content = good[:4] + mutate(good[4:20], generator, 4)[:16].ljust(16, b"\0") + good[20:]
            reseal_mds(mds, content)
            try:
                corpus = Corpus(recipe(mds, format="mds"))
                for item in range(3):
                    record = outcome(lambda corpus=corpus, item=item: corpus.record(item))
                    found.add("bad" if record == "bad" else record.image.shape)
            except Exception as error:
                raise AssertionError(f"{(seed, number)}: {error!r}") from error
        assert found == {"bad", (3, 16, 24)}

    def test_more_samples_than_the_file_has(self, mds: Path) -> None:
        reseal_mds(mds, struct.pack("<I", 1_000) + (mds / "shard.00000.mds").read_bytes()[4:])
        edit_index(mds, lambda shard: shard.update(samples=1_000))
        with pytest.raises(BadData, match=r"shard\.00000\.mds"):
            Corpus(recipe(mds, format="mds")).record(999)

    def test_an_index_with_odd_values(self, mds: Path) -> None:
        good = json.loads((mds / "index.json").read_text())
        failed = []
        for key in [*good["shards"][0], "raw_data.basename", "raw_data.bytes", "raw_data.hashes"]:
            for value in ODD:
                index = json.loads(json.dumps(good))
                section, _, name = key.partition(".")
                if name:
                    index["shards"][0][section][name] = value
                elif value is MISSING:
                    del index["shards"][0][key]
                else:
                    index["shards"][0][key] = value
                if name and value is MISSING:
                    del index["shards"][0][section][name]
                (mds / "index.json").write_text(json.dumps(index))
                try:
                    outcome(lambda: Corpus(recipe(mds, format="mds")).record(0))
                except Exception as error:
                    failed.append(f"{key} = {value!r}: {error!r}")
        assert not failed, "\n".join(failed)


MISSING = "(missing)"
KINDS = {"text": "tokens", "pooled": "vector"}
ODD: list[Any] = [MISSING, None, 0, -1, 1.5, 10**18, "", "x\0y", [], ["x"], {}, {"x": 1}, True]


class TestManifest:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        return write_dataset(tmp_path / "data", good_tar(), 3, sizes=((16, 24, 3),))

    @pytest.mark.parametrize(
        "name",
        [
            "../x.tar",
            "sub/../../x.tar",
            "/etc/passwd",
            "s3://bucket/x.tar",
            "https://host/x.tar",
            "file:///etc/passwd",
            "pipe:touch canary",
            "C:/x.tar",
            "..\\x.tar",
            "",
            ".",
            "..",
        ],
    )
    def test_a_path_outside_the_folder(self, folder: Path, name: str) -> None:
        (folder.parent / "cache").mkdir()
        (folder.parent / "cache" / "x.tar").write_bytes((folder / "x.tar").read_bytes())
        manifest = json.loads((folder / MANIFEST).read_text())
        manifest["shards"][0]["name"] = name
        (folder / MANIFEST).write_text(json.dumps(manifest))
        with pytest.raises(UserError, match=r"manifest\.json names a shard outside its folder"):
            Corpus(recipe(folder))

    @pytest.mark.parametrize("bad", [0.0, 0.5], ids=["none tolerated", "some tolerated"])
    def test_odd_values(self, folder: Path, bad: float) -> None:
        good = json.loads((folder / MANIFEST).read_text())
        (folder / "sub").mkdir()
        failed = []
        for key in [
            *(f"shards.{key}" for key in good["shards"][0]),
            "format",
            "encoder",
            "fields",
            "text_length",
            "padding",
        ]:
            for value in [*ODD, "sub"]:
                manifest = json.loads(json.dumps(good))
                section, _, name = key.rpartition(".")
                place = manifest["shards"][0] if section else manifest
                if value is MISSING:
                    del place[name]
                else:
                    place[name] = value
                if isinstance(manifest["shards"][0].get("samples"), (int, float)):
                    manifest["samples"] = manifest["shards"][0]["samples"]
                (folder / MANIFEST).write_text(json.dumps(manifest))
                try:
                    outcome(lambda: Corpus(recipe(folder, max_bad_fraction=bad)).record(0))
                except Exception as error:
                    failed.append(f"{key} = {value!r}: {error!r}")
        assert not failed, "\n".join(failed)

    @pytest.mark.parametrize("samples", [10**9, 10**12, 2**63, 10**30])
    def test_a_number_of_samples_that_no_memory_holds(self, folder: Path, samples: int) -> None:
        """Consistent everywhere, but not with the shard."""
        manifest = json.loads((folder / MANIFEST).read_text())
        manifest["samples"] = manifest["shards"][0]["samples"] = samples
        manifest["shards"][0]["sizes"] = [[16, 24, samples]]
        (folder / MANIFEST).write_text(json.dumps(manifest))
        with pytest.raises(UserError, match=r"manifest|holds 3 samples"), memory_limit(300 << 20), time_limit(20):
            Corpus(recipe(folder)).record(0)


class TestImages:
    def read(self, folder: Path, content: bytes) -> Record:
        shard = tar_of(("0000.jpg", content), ("0000.txt", b"x"))
        return Corpus(recipe(write_dataset(folder / "data", shard, 1))).record(0)

    @pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "AVIF", "JPEG2000"])
    def test_supported_formats(self, tmp_path: Path, kind: str) -> None:
        image = self.read(tmp_path, jpeg(kind=kind)).image
        assert image is not None
        assert image.shape == (3, 16, 24)

    @pytest.mark.parametrize("kind", ["EPS", "PDF", "ICO", "PPM", "SGI", "TGA", "PCX"])
    def test_other_formats_under_that_name(self, tmp_path: Path, kind: str) -> None:
        with pytest.raises(BadData, match=r"'0000' of shard .*x\.tar is not a readable image"):
            self.read(tmp_path, jpeg(kind=kind))

    def test_a_psd_a_postscript_program_and_a_shell_script(self, tmp_path: Path) -> None:
        psd = b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 16, 24, 8, 3) + bytes(12) + bytes(2 + 3 * 16 * 24)
        assert Image.open(io.BytesIO(psd)).format == "PSD"
        program = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(%pipe%touch canary) (w) file\n"
        for content in (psd, program, b"#!/bin/sh\ntouch canary\n", b"", b"<svg onload='touch canary'/>"):
            with pytest.raises(BadData, match="is not a readable image"):
                self.read(tmp_path, content)

    @pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
    def test_truncated_ones(self, tmp_path: Path, kind: str) -> None:
        content = jpeg(kind=kind, size=(64, 64))
        for share in (0.1, 0.5, 0.9):
            with pytest.raises(BadData, match="is not a readable image"):
                self.read(tmp_path, content[: int(len(content) * share)])

    @pytest.mark.parametrize("side", [20_000, 60_000])
    def test_a_decompression_bomb(self, tmp_path: Path, side: int) -> None:
        """A kilobyte that claims hundreds of millions of pixels."""

        def chunk(kind: bytes, data: bytes) -> bytes:
            return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

        png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
        png += chunk(b"IDAT", zlib.compress(bytes(100_000))) + chunk(b"IEND", b"")
        with pytest.raises(BadData, match=r"is not a readable image .*(bomb|pixels)"):
            self.read(tmp_path, png)

    def test_a_text_bomb_in_a_png(self, tmp_path: Path) -> None:
        text = b"a\0\0" + zlib.compress(bytes(100_000_000))
        bomb = struct.pack(">I", len(text)) + b"zTXt" + text + struct.pack(">I", zlib.crc32(b"zTXt" + text))
        png = jpeg(kind="PNG")
        with pytest.raises(BadData, match="is not a readable image"):
            self.read(tmp_path, png[:33] + bomb + png[33:])


class TestCaptions:
    @pytest.mark.parametrize(
        "caption", ["$(touch canary)", "`touch canary`", "; touch canary", "{a}%s\x1b[2J", "../canary"]
    )
    def test_are_only_text(self, tmp_path: Path, caption: str) -> None:
        shard = tar_of(
            ("0000.jpg", jpeg()), ("0000.txt", caption.encode()), ("0000.json", json.dumps({"c": caption}).encode())
        )
        folder = write_dataset(tmp_path / "data", shard, 1)
        assert Corpus(recipe(folder)).record(0).caption == caption
        assert Corpus(recipe(folder, captions={"json.c": 1.0})).record(0).caption == caption

    @pytest.mark.parametrize(
        "content",
        [b"\xff\xfe", b'{"c": 5}', b'{"c": ["x"]}', b"[]", b"5", b"{", b"[" * 100_000, b'{"c":' * 100_000, b""],
    )
    def test_json_without_a_caption(self, tmp_path: Path, content: bytes) -> None:
        shard = tar_of(("0000.jpg", jpeg()), ("0000.json", content))
        with pytest.raises(BadData, match=r"'0000' of shard .*x\.tar"):
            Corpus(recipe(write_dataset(tmp_path / "data", shard, 1), captions={"json.c": 1.0})).record(0)

    @pytest.mark.parametrize(("name", "content"), [("txt", b"x"), ("json", b"{")])
    def test_of_many_megabytes(self, tmp_path: Path, name: str, content: bytes) -> None:
        shard = tar_of(("0000.jpg", jpeg()), (f"0000.{name}", content.ljust(17 << 20)))
        field = "txt" if name == "txt" else "json.c"
        with pytest.raises(BadData, match=r"'0000' of shard .*x\.tar has 17 MiB, and may have 16"):
            Corpus(recipe(write_dataset(tmp_path / "data", shard, 1), captions={field: 1.0})).record(0)

    def test_keys(self, tmp_path: Path) -> None:
        key = "$(touch canary)"
        shard = tar_of((f"{key}.jpg", jpeg()), (f"{key}.txt", b"x"))
        assert Corpus(recipe(write_dataset(tmp_path / "data", shard, 1))).record(0).key == key


class TestCachedSamples:
    def read(self, folder: Path, safetensors: bytes, padding: bytes | None = None) -> Record:
        shard = tar_of(("0000.safetensors", safetensors), ("0000.txt", b"x"))
        write_dataset(folder / "data", shard, 1, sizes=((16, 24, 1),))
        extra: dict[str, Any] = {"encoder": "e" * 64, "fields": KINDS, "text_length": 4}
        if padding is not None:
            (folder / "data" / "padding.safetensors").write_bytes(padding)
            extra["padding"] = hashlib.sha256(padding).hexdigest()
        manifest = json.loads((folder / "data" / MANIFEST).read_text()) | extra
        (folder / "data" / MANIFEST).write_text(json.dumps(manifest))
        return Corpus(recipe(folder / "data")).record(0)

    def test_a_pickle_in_place_of_tensors(self, tmp_path: Path, bomb: bytes) -> None:
        stored = io.BytesIO()
        torch.save({"latents": torch.zeros(1)}, stored)
        for content in (bomb, stored.getvalue(), b"", b"\xff" * 8, struct.pack("<Q", 10**15)):
            with pytest.raises(BadData, match=r"'0000' of shard .* cannot be decoded"):
                self.read(tmp_path, content)

    @pytest.mark.parametrize(
        "text",
        [
            torch.zeros(2, 3),
            pytest.param(torch.tensor(1.0)),
            torch.zeros(2, 3, 1),
            torch.zeros(2, 5),
        ],
        ids=["right", "scalar", "3-d", "wide"],
    )
    def test_shapes_that_do_not_fit_the_padding(self, tmp_path: Path, text: torch.Tensor) -> None:
        content = save({"latents": torch.zeros(1, 2, 2), "text": text, "pooled": torch.zeros(5)})
        if text.shape == (2, 3):
            filled = self.read(tmp_path, content, save({"text": torch.ones(4, 3)})).fields["text"]
            assert filled is not None
            assert filled.shape == (4, 3)
        else:
            with pytest.raises(BadData, match=r"'0000' of shard .* cannot be decoded"):
                self.read(tmp_path, content, save({"text": torch.ones(4, 3)}))

    @pytest.mark.parametrize("padding", [b"no tensors", save({"other": torch.zeros(1)})])
    def test_an_invalid_padding(self, tmp_path: Path, padding: bytes) -> None:
        with pytest.raises(UserError, match=r"padding\.safetensors"):
            self.read(tmp_path, cached(1)["safetensors"], padding)


def test_no_secret_of_the_environment_in_any_error(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """All kinds of errors of this layer, with their tracebacks, and everything that is printed and logged."""
    caplog.set_level("INFO")
    for name, value in CANARIES.items():
        monkeypatch.setenv(name, value)
    for name, value in (
        ("AWS_ACCESS_KEY_ID", "testing"),
        ("AWS_ENDPOINT_URL", "http://127.0.0.1:9"),
        ("AWS_DEFAULT_REGION", "us-east-1"),
    ):
        monkeypatch.setenv(name, value)
    bad_tar = write_dataset(tmp_path / "data", header_of("0000.pkl", b"0") + bytes(2 * BLOCK), 1)
    (tmp_path / "data-mds").mkdir()
    (tmp_path / "data-mds" / "index.json").write_text("{")
    (tmp_path / "data-manifest").mkdir()
    (tmp_path / "data-manifest" / MANIFEST).write_text('{"manifest": ')
    calls: list[Callable[[], Any]] = [
        lambda: Corpus(recipe(bad_tar)).record(0),
        lambda: Corpus(recipe(tmp_path / "data-mds", format="mds")),
        lambda: Corpus(recipe(tmp_path / "data-manifest")),
        lambda: Corpus(recipe(tmp_path / "nowhere")),
        lambda: Corpus(DataConfig(path="s3://bucket/x", cache=CacheConfig(dir=str(tmp_path / "cache"), timeout=0.5))),
        lambda: Corpus(
            DataConfig(path="http://127.0.0.1:9/x", cache=CacheConfig(dir=str(tmp_path / "cache"), timeout=0.5))
        ),
        lambda: Corpus(DataConfig(path="gs://bucket/x", cache=CacheConfig(dir=str(tmp_path / "cache"), timeout=0.5))),
        lambda: load_picture(b"x", 16, 24, "it"),
        lambda: TarShard((bad_tar / MANIFEST).open("rb"), "it"),
        lambda: DataConfig(path="pipe:env"),
    ]
    texts = []
    for call in calls:
        with pytest.raises(ValueError) as refused:
            call()
        texts.append("".join(traceback.format_exception(refused.value)))
    texts += [caplog.text, *capfd.readouterr()]
    for name, value in CANARIES.items():
        assert not [text for text in texts if value in text], name
