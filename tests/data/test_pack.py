"""`pack`: the other format has the same bytes in the same order, and readers of other libraries find them."""

import multiprocessing
import os
import re
import signal
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_fixtures import streaming_alone

from data_tools.encode import EncodeConfig, encode
from data_tools.pack import pack
from recipes.cli import main
from scfm_core.data.corpus import Corpus
from scfm_core.data.recipe import CacheConfig, DataConfig, SourceConfig
from scfm_core.data.schema import MANIFEST, Manifest
from scfm_core.data.source import PADDING
from scfm_core.data.webdataset import TarWriter
from scfm_core.errors import UserError
from scfm_core.models.families import open_family

# Seconds faster than a new interpreter with torch, and killed in the same way.
FORK = multiprocessing.get_context("fork")

Contents = list[tuple[str, dict[str, bytes]]]


@pytest.fixture(scope="module")
def open_corpus(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`open_corpus(folder, format)`; several folders make a mixture with the names s0, s1 ..."""
    config = {"resolution": (16, 16), "cache": CacheConfig(dir=str(tmp_path_factory.mktemp("copies")))}

    def opened(folder: Path | list[Path], format: Any = "webdataset", **changes: Any) -> Corpus:
        if isinstance(folder, list):
            formats = [format] * len(folder) if isinstance(format, str) else format
            sources = tuple(
                SourceConfig(name=f"s{number}", uri=str(path), format=kind)
                for number, (path, kind) in enumerate(zip(folder, formats, strict=True))
            )
            return Corpus(DataConfig(sources=sources, **{**config, **changes}))
        return Corpus(DataConfig(path=str(folder), format=format, **{**config, **changes}))

    return opened


@pytest.fixture(scope="module")
def trimmed(tiny: Path, open_corpus: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with trimmed texts. Tests must not change it."""
    folder = tmp_path_factory.mktemp("trimmed") / "cache"
    config = EncodeConfig(text_length=40, trim_padding=True, samples_per_shard=20)
    encode(open_corpus(tiny / "digits", "folder"), folder, open_family(str(tiny / "flux")), config)
    return folder


def manifest_of(folder: Path) -> Manifest:
    return Manifest.parse((folder / MANIFEST).read_text(), str(folder))


def by_tarfile(folder: Path) -> Contents:
    """Keys and fields of tars, read by the standard library."""
    found: Contents = []
    for entry in manifest_of(folder).shards:
        with tarfile.open(folder / entry.name) as tar:
            for member in tar:
                name = re.fullmatch(r"((?:.*/)?[^./]+)\.([^/]+)", member.name)
                if not found or found[-1][0] != name[1]:
                    found.append((name[1], {}))
                found[-1][1][name[2]] = tar.extractfile(member).read()
    return found


def by_webdataset(folder: Path) -> Contents:
    from webdataset import WebDataset

    shards = [str(folder / entry.name) for entry in manifest_of(folder).shards]
    samples = list(WebDataset(shards, shardshuffle=False, empty_check=False))
    return [(s["__key__"], {name: value for name, value in s.items() if name[0] != "_"}) for s in samples]


def by_streaming(folder: Path) -> Contents:
    from streaming import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    with streaming_alone():
        clean_stale_shared_memory()
        samples = list(StreamingDataset(local=str(folder), batch_size=1, shuffle=False))
    found = []
    for sample in samples:
        key = sample.pop("__key__")
        found.append((key, {name: v.encode() if name == "txt" else v for name, v in sample.items()}))
    return found


def flat_sizes(folder: Path) -> list[tuple[int, int]]:
    return [(h, w) for entry in manifest_of(folder).shards for h, w, n in entry.sizes for _ in range(n)]


def same_records(one: Corpus, other: Corpus) -> bool:
    assert len(one) == len(other) > 0
    pairs = [(one.record(item), other.record(item)) for item in range(len(one))]
    return all(
        a.caption == b.caption
        and a.latents.equal(b.latents)
        and a.fields.keys() == b.fields.keys()
        and all(a.fields[name].equal(b.fields[name]) for name in a.fields)
        for a, b in pairs
    )


def write_tar(folder: Path, samples: Contents, sizes: Iterable[Any] | None = None) -> Path:
    folder.mkdir()
    with TarWriter(folder / "part.tar") as writer:
        for (key, fields), size in zip(samples, sizes or [None] * len(samples), strict=True):
            writer.write(key, fields, size)
    Manifest(shards=(writer.entry,)).write(folder / MANIFEST)
    return folder


def write_foreign_mds(folder: Path, rows: list[dict[str, Any]], columns: dict[str, str], limit: int = 1 << 20) -> Path:
    from streaming import MDSWriter

    with MDSWriter(out=str(folder), columns=columns, size_limit=limit) as writer:
        for row in rows:
            writer.write(row)
    return folder


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class TestRoundTrip:
    @pytest.mark.parametrize("cache", ["whole", "trimmed"])
    def test_to_mds_and_back(self, tiny, trimmed, open_corpus, tmp_path, cache):
        source = tiny / "cache" if cache == "whole" else trimmed
        original, there, back = by_tarfile(source), tmp_path / "mds", tmp_path / "tars"
        assert len({key for key, _ in original}) == 48

        calls = []
        written = pack(
            open_corpus(source), there, to="mds", shard_bytes=15_000, progress=lambda s, n: calls.append(n) or s
        )
        assert written == manifest_of(there)
        assert len(written.shards) > 2
        assert calls == [48]
        assert pack(open_corpus(there, "mds"), back, to="webdataset", samples_per_shard=7) == manifest_of(back)
        assert [entry.samples for entry in manifest_of(back).shards] == [7] * 6 + [6]

        assert by_streaming(there) == original
        assert by_webdataset(back) == original
        assert by_tarfile(back) == original
        for folder, format in ((there, "mds"), (back, "webdataset")):
            new, old = manifest_of(folder), manifest_of(source)
            assert (new.format, new.encoder, new.fields, new.text_length, new.padding) == (
                format, old.encoder, old.fields, old.text_length, old.padding
            )  # fmt: skip
            assert flat_sizes(folder) == flat_sizes(source) == [(16, 16)] * 48
            corpus = open_corpus(folder, format)
            assert corpus.is_cached
            assert same_records(open_corpus(source), corpus)
            if cache == "trimmed":
                assert (folder / PADDING).read_bytes() == (source / PADDING).read_bytes()
            assert (folder / PADDING).exists() == (cache == "trimmed")

    def test_to_the_same_format_again(self, tiny, open_corpus, tmp_path):
        """With the same number of samples per shard every byte is the same: the hashes prove it."""
        pack(open_corpus(tiny / "cache"), tmp_path / "new", to="webdataset", samples_per_shard=20)
        assert manifest_of(tmp_path / "new") == manifest_of(tiny / "cache")

    def test_compressed(self, trimmed, open_corpus, tmp_path):
        sizes = {}
        for compression in (None, "zstd:7"):
            folder = tmp_path / f"{compression}"
            option = [] if compression is None else ["--compression", compression]
            assert main(["data", "pack", str(trimmed), "-o", str(folder), "--to", "mds", *option]) == 0
            sizes[compression] = sum(path.stat().st_size for path in folder.glob("shard*"))
            assert same_records(open_corpus(trimmed), open_corpus(folder, "mds"))
            assert bool(list(folder.glob("*.zstd"))) == (compression is not None)
        assert sizes["zstd:7"] < 0.9 * sizes[None]
        assert by_streaming(tmp_path / "zstd:7") == by_tarfile(trimmed)

    def test_a_shard_for_every_sample(self, tiny, open_corpus, tmp_path):
        words = ["-o", str(tmp_path / "mds"), "--to", "mds", "--shard-mb", "1e-6"]
        assert main(["data", "pack", str(tiny / "cache"), *words]) == 0
        assert same_records(open_corpus(tiny / "cache"), open_corpus(tmp_path / "mds", "mds"))
        pack(open_corpus(tmp_path / "mds", "mds"), tmp_path / "tars", to="webdataset", samples_per_shard=1)
        assert by_tarfile(tmp_path / "tars") == by_tarfile(tiny / "cache")


class TestMixtures:
    @pytest.mark.parametrize("to", ["webdataset", "mds"])
    def test_sources_with_the_same_keys(self, tiny, open_corpus, tmp_path, to):
        corpus, single = open_corpus([tiny / "cache"] * 2), by_tarfile(tiny / "cache")
        pack(corpus, tmp_path / "both", to=to, samples_per_shard=1000)
        found = (by_tarfile if to == "webdataset" else by_streaming)(tmp_path / "both")
        assert found == [(f"s{n}/{key}", fields) for n in range(2) for key, fields in single]
        assert same_records(corpus, open_corpus(tmp_path / "both", to))

    def test_different_paddings_are_refused(self, tiny, trimmed, open_corpus, tmp_path):
        folder, config = tmp_path / "exact", EncodeConfig(text_length=40, trim_padding=True, dtype=torch.float32)
        encode(open_corpus(tiny / "digits", "folder"), folder, open_family(str(tiny / "flux")), config)
        assert manifest_of(folder).padding not in (None, manifest_of(trimmed).padding)
        with pytest.raises(
            UserError, match=r"the trimmed text of s0, s1 has different paddings.* Pack each source separately"
        ):
            pack(open_corpus([trimmed, folder]), tmp_path / "both", to="mds")
        assert left(tmp_path) == ["exact"]

    def test_a_trimmed_and_an_untrimmed_source_together(self, tiny, trimmed, open_corpus, tmp_path):
        config = EncodeConfig(text_length=40)
        encode(open_corpus(tiny / "digits", "folder"), tmp_path / "kept", open_family(str(tiny / "flux")), config)
        for sources in ([trimmed, tmp_path / "kept"], [tmp_path / "kept", trimmed]):
            corpus, output = open_corpus(sources), tmp_path / f"to_{sources[0].name}"
            pack(corpus, output, to="webdataset")
            assert (output / PADDING).read_bytes() == (trimmed / PADDING).read_bytes()
            assert same_records(corpus, open_corpus(output))

    @pytest.mark.parametrize("to", ["webdataset", "mds"])
    def test_unknown_sizes_stay_unknown(self, open_corpus, tmp_path, to):
        samples = [(f"{n}", {"jpg": b"x" * 50, "txt": b"c"}) for n in range(4)]
        unknown = write_tar(tmp_path / "unknown", samples)
        known = write_tar(tmp_path / "known", samples, [(8, 9), (8, 9), (10, 11), (10, 11)])
        pack(open_corpus([unknown, known]), tmp_path / "new", to=to, samples_per_shard=3, shard_bytes=500)
        shards = manifest_of(tmp_path / "new").shards
        assert [entry.samples for entry in shards] == [3, 3, 2]
        assert [entry.sizes for entry in shards] == [(), (), ((10, 11, 2),)]  # the second shard mixes both sources


class TestKeys:
    def test_in_tars(self, open_corpus, tmp_path):
        kept = ["a_b", "x/y", "v1.5/z", "é", "with space", "00000001"]
        odd = ["a.b", "../up", "/abs", "a//b", "", ".", "line\nfeed", "k" * 200, "é" * 60, "folder.d/x.y", "a_b"]
        rows = [{"__key__": key, "txt": f"{n}", "jpg": b"%d" % n} for n, key in enumerate(kept + odd)]
        columns = {"__key__": "str", "txt": "str", "jpg": "bytes"}
        source = write_foreign_mds(tmp_path / "mds", rows, columns)
        corpus = open_corpus(source, "mds")
        assert [corpus.raw(n)[0].key(n) for n in range(len(rows))] == kept + odd
        pack(corpus, tmp_path / "tars", to="webdataset")
        new = open_corpus(tmp_path / "tars")
        keys = [new.raw(n)[0].key(n) for n in range(len(rows))]
        assert keys[: len(kept)] == kept
        assert len(set(keys)) == len(keys)
        for number in range(len(kept), len(rows)):
            assert re.fullmatch(rf"[\w-]*-{number:08d}", keys[number]), keys[number]
        assert keys[len(kept)] == "a_b-00000006"
        expected = [(key, {"txt": b"%d" % n, "jpg": b"%d" % n}) for n, key in enumerate(keys)]
        assert by_webdataset(tmp_path / "tars") == by_tarfile(tmp_path / "tars") == expected
        pack(new, tmp_path / "again", to="webdataset")
        assert by_tarfile(tmp_path / "again") == expected
        pack(corpus, tmp_path / "cut", to="webdataset", samples_per_shard=9)  # the second "a_b" is in another tar
        assert [key for key, _ in by_tarfile(tmp_path / "cut")] == [*keys[:-1], "a_b"]

    def test_numbers_that_start_again_in_every_shard(self, open_corpus, tmp_path):
        """MDS of other tools has no keys. An appended number must not hide a sample that has the same name."""
        rows = [{"jpg": b"%04d" % n, "txt": f"{n}"} for n in range(20)]
        source = write_foreign_mds(tmp_path / "mds", rows, {"jpg": "bytes", "txt": "str"}, limit=300)
        assert len(open_corpus(source, "mds").sources[0].manifest.shards) > 2
        pack(open_corpus(source, "mds"), tmp_path / "tars", to="webdataset")
        found = by_tarfile(tmp_path / "tars")
        assert [fields["txt"] for _, fields in found] == [b"%d" % n for n in range(20)]
        assert len({key for key, _ in found}) == 20

    def test_a_changed_key_that_is_used_already(self, open_corpus, tmp_path):
        rows = [{"__key__": key, "txt": key} for key in ("a_b-00000002", "a_b-00000002_", "a.b")]
        source = write_foreign_mds(tmp_path / "mds", rows, {"__key__": "str", "txt": "str"})
        pack(open_corpus(source, "mds"), tmp_path / "tars", to="webdataset")
        assert [fields["txt"] for _, fields in by_tarfile(tmp_path / "tars")] == [row["txt"].encode() for row in rows]


class TestImages:
    @pytest.fixture
    def images(self, tmp_path: Path) -> Path:
        """Four images of different sizes, with names in folders."""
        folder = tmp_path / "images"
        (folder / "v1.5").mkdir(parents=True)
        for number, name in enumerate(("b.png", "c.PNG", "v1.5/a.png", "v1.5/x.y.png")):
            path = folder / name
            Image.new("RGB", (20 + number, 30), (number * 50, 0, 0)).save(path, "PNG")
            path.with_suffix(".txt").write_text(f"caption of {name} é\n")
        return folder

    @pytest.mark.parametrize("to", ["webdataset", "mds"])
    def test_a_folder(self, images, open_corpus, tmp_path, to):
        names = ["b.png", "c.PNG", "v1.5/a.png", "v1.5/x.y.png"]
        pack(open_corpus(images, "folder"), tmp_path / "new", to=to)
        found = (by_webdataset if to == "webdataset" else by_streaming)(tmp_path / "new")
        last = "v1_5_x_y-00000003" if to == "webdataset" else "v1.5/x.y"
        assert found == [
            (key, {"png": (images / name).read_bytes(), "txt": f"caption of {name} é".encode()})
            for key, name in zip(["b", "c", "v1.5/a", last], names, strict=True)
        ]
        assert flat_sizes(tmp_path / "new") == [(30, 20), (30, 21), (30, 22), (30, 23)]
        manifest = manifest_of(tmp_path / "new")
        assert (manifest.encoder, manifest.text_length, manifest.padding) == (None, None, None)
        old, new = open_corpus(images, "folder"), open_corpus(tmp_path / "new", to)
        for item in range(4):
            assert old.record(item).image.equal(new.record(item).image)
            assert old.record(item).caption == new.record(item).caption

    def test_two_images_of_one_name(self, images, open_corpus, tmp_path):
        Image.new("RGB", (16, 16)).save(images / "b.jpg")
        with pytest.raises(
            UserError, match=r"sample 'b' has the fields png, txt, the first sample jpg, txt; .*webdataset"
        ):
            pack(open_corpus(images, "folder"), tmp_path / "mds", to="mds")
        assert left(tmp_path) == ["images"]
        pack(open_corpus(images, "folder"), tmp_path / "tars", to="webdataset")
        assert [(key, *sorted(fields)) for key, fields in by_tarfile(tmp_path / "tars")][:3] == [
            ("b", "jpg", "txt"),
            ("b-00000001", "png", "txt"),
            ("c", "png", "txt"),
        ]

    def test_other_fields_are_copied_too(self, open_corpus, tmp_path):
        samples = [
            (f"{n}", {"jpg": b"j%d" % n, "long.txt": b"long", "npy": b"\x00\xff", "json": b"{}"}) for n in range(3)
        ]
        source = write_tar(tmp_path / "tars", samples)
        pack(open_corpus(source), tmp_path / "mds", to="mds")
        assert by_streaming(tmp_path / "mds") == samples
        pack(open_corpus(tmp_path / "mds", "mds"), tmp_path / "back", to="webdataset")
        assert by_webdataset(tmp_path / "back") == samples
        assert manifest_of(tmp_path / "mds").shards[0].sizes == ()


class TestRefusals:
    @pytest.mark.parametrize("there", ["file", "folder"])
    def test_an_output_that_exists(self, tiny, open_corpus, tmp_path, there):
        (tmp_path / "new").mkdir() if there == "folder" else (tmp_path / "new").write_text("precious")
        with pytest.raises(UserError, match=f"{tmp_path / 'new'} exists already"):
            pack(open_corpus(tiny / "cache"), tmp_path / "new", to="webdataset")
        assert left(tmp_path) == ["new"]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"to": "webdataset", "samples_per_shard": 0}, "samples per shard must be at least 1 .* got 0"),
            ({"to": "mds", "shard_bytes": 0}, r"bytes per shard in 1\.\.2\^32-1, got 1000 and 0"),
            ({"to": "mds", "shard_bytes": 1 << 32}, "got 1000 and 4294967296"),
            ({"to": "webdataset", "compression": "zstd"}, "compression 'zstd' is only for mds"),
            ({"to": "mds", "compression": "rar"}, "the compression 'rar' .* zstd:7"),
        ],
    )
    def test_arguments(self, tiny, open_corpus, tmp_path, arguments, message):
        with pytest.raises(UserError, match=message):
            pack(open_corpus(tiny / "cache"), tmp_path / "new", **arguments)
        assert left(tmp_path) == []

    @pytest.mark.parametrize("to", ["webdataset", "mds"])
    def test_an_output_that_cannot_be_written(self, tiny, open_corpus, tmp_path, to):
        (tmp_path / "file").write_text("precious")
        with pytest.raises(UserError, match=f"packing into {tmp_path / 'file' / 'new'} failed.*run again"):
            pack(open_corpus(tiny / "cache"), tmp_path / "file" / "new", to=to)
        assert (tmp_path / "file").read_text() == "precious"

    @pytest.mark.parametrize("other", [{"jpg": b"x"}, {"jpg": b"x", "txt": b"c", "json": b"{}"}])
    def test_different_fields_cannot_be_packed_into_mds(self, open_corpus, tmp_path, other):
        source = write_tar(tmp_path / "tars", [("a", {"jpg": b"x", "txt": b"c"}), ("b", other)])
        with pytest.raises(
            UserError, match=rf"sample 'b' has the fields {', '.join(sorted(other))}, the first sample jpg, txt;"
        ):
            pack(open_corpus(source), tmp_path / "mds", to="mds")
        assert left(tmp_path) == ["tars"]

    def test_text_that_is_not_utf8_cannot_be_packed_into_mds(self, open_corpus, tmp_path):
        source = write_tar(tmp_path / "tars", [("a", {"txt": b"fine"}), ("b", {"txt": b"\xff"})])
        with pytest.raises(UserError, match="sample 'b' has text that is not UTF-8"):
            pack(open_corpus(source), tmp_path / "mds", to="mds")
        assert left(tmp_path) == ["tars"]

    @pytest.mark.parametrize(
        ("column", "message"),
        [
            ("Image", "sample 'k' .* of its fields Image, txt a reader would find image, txt"),
            ("_hidden", "of its fields _hidden, txt a reader would find txt"),
            ("pt", "readers would refuse them: .*'k.pt'"),
            ("a/b", "of its fields a/b, txt a reader would find txt"),
            ("c" * 90, "sample 'k': the name of its field 'c+' is too long for a tar"),
        ],
    )
    def test_columns_that_tars_cannot_store(self, open_corpus, tmp_path, column, message):
        rows = [{"__key__": "k", column: b"x", "txt": "c"}]
        source = write_foreign_mds(tmp_path / "mds", rows, {"__key__": "str", column: "bytes", "txt": "str"})
        with pytest.raises(UserError, match=message):
            pack(open_corpus(source, "mds"), tmp_path / "tars", to="webdataset")
        assert left(tmp_path) == ["mds"]

    @pytest.mark.parametrize("to", ["webdataset", "mds"])
    def test_a_corrupt_shard(self, tiny, open_corpus, tmp_path, to):
        pack(open_corpus(tiny / "cache"), tmp_path / "bad", to="webdataset", samples_per_shard=20)
        content = bytearray((tmp_path / "bad" / "shard-000001.tar").read_bytes())
        content[5000] ^= 1
        (tmp_path / "bad" / "shard-000001.tar").write_bytes(content)
        with pytest.raises(UserError, match=r"shard-000001\.tar is corrupt"):
            pack(open_corpus(tmp_path / "bad"), tmp_path / "new", to=to, shard_bytes=4000)
        assert left(tmp_path) == ["bad"]


class TestInterruption:
    @pytest.mark.parametrize("to", ["webdataset", "mds"])
    def test_leaves_no_file(self, tiny, open_corpus, tmp_path, to):
        def progress(samples: Iterable[Any], total: int) -> Iterator[Any]:
            for number, sample in enumerate(samples):
                if number == 30:
                    raise KeyboardInterrupt
                yield sample

        with pytest.raises(KeyboardInterrupt):
            pack(open_corpus(tiny / "cache"), tmp_path / "new", to=to, samples_per_shard=8, progress=progress)
        assert left(tmp_path) == []

    @pytest.mark.parametrize("to", ["webdataset", "mds"])
    def test_two_jobs_into_one_folder_do_not_mix(self, tiny, open_corpus, tmp_path, to):
        """The first that ends has it."""

        def after_another(samples: Iterable[Any], total: int) -> Iterator[Any]:
            yield next(rest := iter(samples))
            pack(open_corpus(tiny / "cache"), tmp_path / "new", to=to)
            yield from rest

        with pytest.raises(UserError, match="exists already: another process has written it"):
            pack(open_corpus(tiny / "cache"), tmp_path / "new", to=to, progress=after_another)
        pack(open_corpus(tiny / "cache"), tmp_path / "other", to=to)
        assert left(tmp_path) == ["new", "other"]
        contents = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("new", "other")]
        assert contents[0] == contents[1]

    @pytest.mark.processes
    @pytest.mark.parametrize("to", ["webdataset", "mds"])
    def test_kill_nine(self, tiny, open_corpus, tmp_path, to):
        def killing(samples: Iterable[Any], total: int) -> Iterator[Any]:
            for number, sample in enumerate(samples):
                if number == 30:
                    os.kill(os.getpid(), signal.SIGKILL)
                yield sample

        arguments = {"to": to, "samples_per_shard": 8, "shard_bytes": 8000}
        process = FORK.Process(
            target=pack,
            args=(open_corpus(tiny / "cache"), tmp_path / "new"),
            kwargs={**arguments, "progress": killing},
        )
        process.start()
        process.join(120)
        assert process.exitcode == -signal.SIGKILL
        assert not (tmp_path / "new").exists()
        assert any("tmp" in name for name in left(tmp_path))  # it was killed while it was writing
        for name in ("new", "other"):
            pack(open_corpus(tiny / "cache"), tmp_path / name, **arguments)
        assert left(tmp_path) == ["new", "other"]
        contents = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("new", "other")]
        assert contents[0] == contents[1]
