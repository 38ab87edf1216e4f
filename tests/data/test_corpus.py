"""Manifests, shards and samples: reading returns exactly what was written, and errors name what is wrong."""

import contextlib
import dataclasses
import gzip
import hashlib
import io
import itertools
import json
import multiprocessing
import shutil
import subprocess
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save

from scfm_core.data import corpus as corpus_module
from scfm_core.data import manifest as manifest_module
from scfm_core.data import open_shards
from scfm_core.data.buckets import nearest_size, nearest_sizes
from scfm_core.data.corpus import Corpus, _setting_of
from scfm_core.data.index import ShardIndex
from scfm_core.data.mds import INDEX, MdsWriter
from scfm_core.data.recipe import CacheConfig, DataConfig, SourceConfig, aspect_buckets
from scfm_core.data.schema import MANIFEST, BadData, Manifest, Record, ShardEntry, Size, collate, runs_of
from scfm_core.data.source import PADDING, Source, guess_format, json_value, open_source
from scfm_core.data.webdataset import TarShard, TarWriter
from scfm_core.errors import UserError
from scfm_core.files import file_sha256

CACHED = Manifest(encoder="e" * 64, fields={"text": "tokens", "pooled": "vector"}, text_length=4)
IMAGES = Manifest()
SIZE = (16, 24)
VICTIM = "shard-000001.tar"  # the middle one of the three that the fixture writes


def make_record(index: int, dtype: torch.dtype = torch.bfloat16) -> Record:
    generator = torch.Generator().manual_seed(index)
    return Record(
        key=f"{index:08d}",
        caption=f"猫 {index} 🐈\nnaïve, zweite Zeile",
        latents=torch.randn(1, 2, 3, generator=generator).to(dtype),
        fields={
            "text": torch.randn(4, 3, generator=generator).to(dtype),
            "pooled": torch.randn(5, generator=generator).to(dtype),
        },
        kinds=CACHED.fields,
    )


def tensors_of(record: Record) -> dict[str, torch.Tensor]:
    assert record.latents is not None
    return {"latents": record.latents, **record.fields}


def fields_of(record: Record) -> dict[str, bytes]:
    return {"safetensors": save(tensors_of(record)), "txt": record.caption.encode(), "json": b'{"source": "a file"}'}


def png(red: int = 0, height: int = 8, width: int = 8) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (red, 0, 0)).save(buffer, "png")
    return buffer.getvalue()


Sample = tuple[str, Mapping[str, bytes], Size]


def write_tars(
    folder: Path, samples: Sequence[Sample], draft: Manifest, *, per_shard: int = 3, measured: bool = True
) -> Path:
    folder.mkdir(parents=True)
    entries: list[ShardEntry] = []
    for at in range(0, len(samples), per_shard):
        with TarWriter(folder / f"shard-{len(entries):06d}.tar") as writer:
            for key, content, size in samples[at : at + per_shard]:
                writer.write(key, content, size)
        entries.append(writer.entry if measured else dataclasses.replace(writer.entry, sizes=()))
    dataclasses.replace(draft, shards=tuple(entries)).write(folder / MANIFEST)
    return folder


def write_mds(folder: Path, samples: Sequence[Sample], draft: Manifest, **options: Any) -> Path:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with MdsWriter(folder, list(samples[0][1]), draft, **{"shard_bytes": 1500, **options}) as writer:
        for key, content, size in samples:
            writer.write(key, content, size)
    return folder


def cached_samples(count: int = 7, dtype: torch.dtype = torch.bfloat16) -> list[Sample]:
    return [(f"{index:08d}", fields_of(make_record(index, dtype)), SIZE) for index in range(count)]


def write_cache(folder: Path, count: int = 7, dtype: torch.dtype = torch.bfloat16) -> Path:
    return write_tars(folder, cached_samples(count, dtype), CACHED)


def config_of(path: Path | str, **changes: Any) -> DataConfig:
    return DataConfig(**{"path": str(path), "resolution": SIZE, **changes})


def open_corpus(path: Path | str, **changes: Any) -> Corpus:
    return Corpus(config_of(path, **changes))


def mix(*sources: SourceConfig, **changes: Any) -> Corpus:
    return Corpus(DataConfig(**{"sources": sources, "resolution": SIZE, **changes}))


def open_one(path: Path | str, **options: Any) -> Source:
    return open_source(SourceConfig(name="one", uri=str(path), **options), None, 10.0)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def bits(tensor: torch.Tensor | None) -> tuple[torch.dtype, torch.Size, bytes]:
    assert tensor is not None
    return tensor.dtype, tensor.shape, tensor.contiguous().view(torch.uint8).numpy().tobytes()


def read_manifest(folder: Path) -> Manifest:
    return Manifest.parse((folder / MANIFEST).read_bytes(), str(folder / MANIFEST))


def edit_manifest(folder: Path, **changes: object) -> None:
    path = folder / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_entry(folder: Path, name: str, /, **changes: object) -> None:
    shards = json.loads((folder / MANIFEST).read_text())["shards"]
    shards = [{**shard, **changes} if shard["name"] == name else shard for shard in shards]
    edit_manifest(folder, shards=shards, samples=sum(shard["samples"] for shard in shards))


def reseal(folder: Path, name: str, samples: int = 3) -> None:
    """Set size and hash in the manifest to those of the file, as if it had been damaged before indexing."""
    path = folder / name
    edit_entry(
        folder, name, bytes=path.stat().st_size, sha256=file_sha256(path), samples=samples, sizes=[[*SIZE, samples]]
    )


def flip(path: Path, offset: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1 << bit
    path.write_bytes(content)


def member_offset(path: Path, name: str) -> int:
    with tarfile.open(path) as tar:
        return tar.getmember(name).offset_data


def add_member(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """Seven samples in three shards: 3, 3, 1."""
    return write_cache(tmp_path / "cache")


class TestManifest:
    FULL = Manifest(
        format="mds",
        encoder="e",
        fields={"text": "tokens", "hidden": "masked", "pooled": "vector"},
        text_length=7,
        padding="ab" * 32,
        shards=(
            ShardEntry(name="a.mds", samples=3, bytes=10, sha256="00" * 32, sizes=((8, 16, 2), (16, 8, 1))),
            ShardEntry(name="sub/b.mds", samples=1, bytes=1, sha256=None),
        ),
    )

    def parse(self, **changes: object) -> Manifest:
        return Manifest.parse(json.dumps({**json.loads(self.FULL.dumps()), **changes}), "here/manifest.json")

    def test_round_trip(self, tmp_path):
        assert Manifest.parse(self.FULL.dumps(), "") == self.FULL
        self.FULL.write(tmp_path / "manifest.json")
        assert Manifest.parse((tmp_path / "manifest.json").read_bytes(), "") == self.FULL
        assert names(tmp_path) == ["manifest.json"]
        assert self.FULL.samples == 4
        assert self.FULL.sizes == {(8, 16), (16, 8)}

    def test_has_one_line_for_each_shard(self):
        lines = self.FULL.dumps().splitlines()
        assert [sum(name in line for line in lines) for name in ("a.mds", "sub/b.mds")] == [1, 1]
        assert not any("a.mds" in line and "b.mds" in line for line in lines)

    def test_is_written_to_a_temporary_file(self, tmp_path, monkeypatch):
        """A process that is killed before the rename leaves no manifest, or the old one."""
        monkeypatch.setattr(Path, "replace", lambda *_: sys.exit("killed"))
        with pytest.raises(SystemExit):
            self.FULL.write(tmp_path / "manifest.json")
        assert not (tmp_path / "manifest.json").exists()

    @pytest.mark.parametrize("content", [FULL.dumps()[:-30], "", '"text"', "5", "null", "[]", b"\xff\xfe"])
    def test_of_other_json(self, content):
        with pytest.raises(UserError, match=r"here/manifest.json is damaged.*Make it again"):
            Manifest.parse(content, "here/manifest.json")

    @pytest.mark.parametrize("change", [{"version": 1}, {"version": 4}, {"manifest": "other"}])
    def test_of_another_version(self, change):
        with pytest.raises(UserError, match=r"here/manifest.json has another format or version.*scfm data index"):
            self.parse(**change)

    @pytest.mark.parametrize(("encoder", "fields"), [("e", {"text": "tokens", "pooled": "vector"}), (None, {})])
    def test_of_version_2_has_the_fields_of_that_time(self, encoder, fields):
        data = json.loads(self.FULL.dumps()) | {"version": 2, "encoder": encoder}
        del data["fields"]
        manifest = Manifest.parse(json.dumps(data), "here/manifest.json")
        assert manifest.fields == fields
        assert manifest == dataclasses.replace(self.FULL, encoder=encoder, fields=fields)

    @pytest.mark.parametrize(
        ("fields", "why"),
        [
            ({"text": "words"}, "the field 'text' has the kind 'words'; this release knows tokens, masked, vector"),
            ({"text": ["tokens"]}, r"the field 'text' has the kind \['tokens'\]"),
            ({"latents": "tokens"}, "a field is named 'latents'; this name is reserved"),
            (["text"], "fields must be an object of names and kinds"),
        ],
    )
    def test_with_invalid_fields(self, fields, why):
        with pytest.raises(UserError, match=f"here/manifest.json: {why}.*encode again"):
            self.parse(fields=fields)

    ENTRY = json.loads(FULL.dumps())["shards"][0]

    @pytest.mark.parametrize(
        "change",
        [
            {"shards": [{"name": "x"}]},
            {"encoder": None},
            {"text_length": None},
            {"shards": 1},
            {"new": 1},
            {"shards": [{**ENTRY, "new": 1}], "samples": 3},
            {"shards": [{**ENTRY, "name": 5}], "samples": 3},
            {"shards": [{**ENTRY, "samples": -3, "sizes": []}], "samples": -3},
            {"shards": [{**ENTRY, "bytes": -1}], "samples": 3},
            {"shards": [{**ENTRY, "bytes": None}], "samples": 3},
            {"shards": [{**ENTRY, "sizes": [[8, 16, 2]]}], "samples": 3},  # for 2 of 3 samples
            {"shards": [{**ENTRY, "sizes": [[8, 16]]}], "samples": 3},
        ],
        ids=lambda change: json.dumps(change)[-40:],
    )
    def test_of_other_content(self, change):
        with pytest.raises(UserError, match=r"here/manifest.json is damaged"):
            self.parse(**change)

    @pytest.mark.parametrize("claimed", [3, 5])
    def test_that_lacks_a_shard(self, claimed):
        """The number of samples shows it: otherwise training would silently use fewer samples."""
        with pytest.raises(UserError, match=f"its shards do not add up to {claimed} samples"):
            self.parse(samples=claimed)

    def test_without_samples(self):
        with pytest.raises(UserError, match="lists no samples"):
            self.parse(shards=[], samples=0)

    @pytest.mark.parametrize(
        "name", ["../x.tar", "sub/../../x.tar", "/x.tar", "", "sub\\..\\x.tar", "s3://other/x.tar", "pipe:rm"]
    )
    def test_that_names_a_shard_outside_its_folder(self, name):
        with pytest.raises(UserError, match=r"here/manifest.json names a shard outside its folder: '"):
            self.parse(shards=[{**self.ENTRY, "name": name}], samples=3)

    def test_with_a_flipped_bit_never_ends_in_a_traceback(self, tmp_path):
        folder = write_cache(tmp_path / "cache", count=1)
        manifest = folder / MANIFEST
        good = manifest.read_bytes()
        refused = 0
        for offset in range(len(good)):
            flip(manifest, offset, bit=7 if offset % 2 else offset % 7)  # bit 7 makes the UTF-8 invalid
            try:
                open_corpus(folder).record(0)
            except UserError:
                refused += 1
            manifest.write_bytes(good)
        assert refused > 0.7 * len(good)

    def test_runs_of_sizes(self):
        sizes = [(8, 8), (8, 8), (8, 16), (8, 8)]
        assert runs_of(sizes) == ((8, 8, 2), (8, 16, 1), (8, 8, 1))
        assert runs_of([]) == ()


class TestOpening:
    def test_a_folder(self, cache):
        source = open_one(cache)
        assert source.manifest == read_manifest(cache)
        assert [source.address(number) for number in range(3)] == [f"{cache}/shard-{n:06d}.tar" for n in range(3)]

    def test_below_home(self, cache, monkeypatch):
        monkeypatch.setenv("HOME", str(cache.parent))
        assert open_one("~/cache").address(0) == f"{cache}/shard-000000.tar"
        assert open_one("~/cache/shard-000001.tar").address(0) == f"{cache}/shard-000001.tar"

    @pytest.mark.parametrize(
        ("shards", "samples"),
        [
            ("shard-{000000..000001}.tar", [3, 3]),
            ("shard-00000{2,0}.tar", [1, 3]),  # in the order of the braces
            ("shard-000002.tar", [1]),
            ("{shard-000001,shard-000002}.tar", [3, 1]),
        ],
    )
    def test_named_shards(self, cache, shards, samples):
        source = open_one(cache / shards)
        assert [entry.samples for entry in source.manifest.shards] == samples
        assert source.manifest.encoder == CACHED.encoder
        keys = [source.open(number, check=True).key(0) for number in range(len(samples))]
        assert keys == [f"{3 * int(entry.name[6:12]):08d}" for entry in source.manifest.shards]

    def test_shards_in_several_folders(self, tmp_path):
        whole = write_cache(tmp_path / "whole")
        for number, folder in enumerate(("a", "b", "b")):
            (whole / folder).mkdir(exist_ok=True)
            (whole / f"shard-{number:06d}.tar").rename(whole / folder / f"shard-{number:06d}.tar")
            edit_entry(whole, f"shard-{number:06d}.tar", name=f"{folder}/shard-{number:06d}.tar")
        assert len(open_corpus(whole / "{a/shard-000000,b/shard-000002}.tar")) == 4

    @pytest.mark.parametrize(
        "uri", ["shard-{000000..000001}.tar", "shard-000001.tar", "{shard-000001,shard-000002}.tar"]
    )
    def test_named_shards_in_the_working_folder(self, cache, uri, monkeypatch):
        monkeypatch.chdir(cache)
        assert open_one(uri).manifest.shards

    def test_shards_that_the_manifest_does_not_list(self, cache):
        with pytest.raises(UserError, match=r"names 2 shards that the manifest does not list.*'shard-000003.tar'"):
            open_one(cache / "shard-{000000..000004}.tar")

    @pytest.mark.parametrize(("uri", "what"), [("shard-{0..1.tar", "do not close"), ("{a,a}.tar", "a shard twice")])
    def test_invalid_braces(self, cache, uri, what):
        with pytest.raises(UserError, match=rf"data.sources \(one\): .*{what}"):
            open_one(cache / uri)

    def test_a_split(self, tmp_path):
        write_cache(tmp_path / "set" / "train")
        write_cache(tmp_path / "set" / "val", count=2)
        assert open_one(tmp_path / "set", split="train").manifest.samples == 7
        assert open_one(tmp_path / "set", split="val").manifest.samples == 2
        with pytest.raises(UserError, match=r"no folder .*set/test"):
            open_one(tmp_path / "set", split="test")
        with pytest.raises(UserError, match=r"split is a subfolder of uri, but .* names shards"):
            open_one(tmp_path / "set" / "x.tar", split="train")

    def test_a_manifest_elsewhere(self, cache, tmp_path):
        (cache / MANIFEST).rename(tmp_path / "mine.json")
        source = open_one(cache, manifest=str(tmp_path / "mine.json"))
        assert source.open(2, check=True).key(0) == "00000006"
        assert len(mix(SourceConfig(name="a", uri=str(cache), manifest=str(tmp_path / "mine.json")))) == 7

    def test_a_manifest_below_home(self, cache, monkeypatch):
        monkeypatch.setenv("HOME", str(cache))
        assert open_one(cache, manifest="~/manifest.json").manifest.samples == 7

    def test_no_folder(self, tmp_path):
        with pytest.raises(UserError, match=r"no folder .*nowhere.*scfm data encode"):
            open_one(tmp_path / "nowhere")

    def test_no_manifest(self, cache):
        (cache / MANIFEST).unlink()
        with pytest.raises(UserError, match=rf"no {MANIFEST} in {cache}\.") as caught:
            open_one(cache)
        for advice in ("did not finish", f"scfm data index {str(cache)!r}", "must contain no tars"):
            assert advice in str(caught.value)

    def test_no_index(self, cache):
        with pytest.raises(UserError, match=rf"no {INDEX} in {cache}. It is not an MDS data set"):
            open_one(cache, format="mds")

    def test_a_manifest_of_the_other_format(self, cache):
        edit_manifest(cache, format="mds")
        with pytest.raises(UserError, match=r"has the format 'mds', the recipe says 'webdataset'"):
            open_one(cache)

    def test_a_manifest_that_cannot_be_read(self, cache):
        (cache / MANIFEST).unlink()
        (cache / MANIFEST).mkdir()
        with pytest.raises(UserError, match=rf"{MANIFEST} cannot be read"):
            open_one(cache)

    def test_of_unknown_format(self, cache, tmp_path):
        (tmp_path / "images").mkdir()
        (tmp_path / "tars").mkdir()
        (tmp_path / "tars" / "a.tar").touch()
        mds = write_mds(tmp_path / "mds", cached_samples(), CACHED)
        assert [guess_format(str(path)) for path in (cache, tmp_path / "tars", mds, tmp_path / "images")] == [
            "webdataset",
            "webdataset",
            "mds",
            "folder",
        ]
        assert guess_format("s3://bucket/{0..9}.tar") == "webdataset"

    def test_a_recipe_needs_no_format(self, cache, tmp_path):
        """`auto` is the default. It asks no network for an address, and a missing folder counts as shards."""
        write_mds(tmp_path / "sets" / "mds", cached_samples(), CACHED)
        (tmp_path / "images").mkdir()
        sources = [
            {"uri": str(cache)},
            {"uri": str(tmp_path / "sets"), "split": "mds"},
            {"uri": str(tmp_path / "images")},
            {"uri": f"{cache}/{{a..c}}.tar"},
            {"uri": "s3://bucket/photos"},
            {"uri": str(tmp_path / "gone")},
        ]
        mixture = DataConfig(
            sources=tuple(SourceConfig(name=f"{i}", **each) for i, each in enumerate(sources))
        ).mixture()
        expected = ["webdataset", "mds", "folder", "webdataset", "webdataset", "webdataset"]
        assert [source.format for source in mixture] == expected
        assert [source.format for source in DataConfig(path=str(tmp_path / "images")).mixture()] == ["folder"]

    def test_of_an_unfinished_job(self, tmp_path):
        (tmp_path / ".job").mkdir()
        assert guess_format(str(tmp_path)) == "webdataset"


def write_tar(path: Path, members: Mapping[str, bytes], style: int, folders: Sequence[str] = ()) -> None:
    with tarfile.open(path, "w", format=style) as tar:
        for folder in folders:
            info = tarfile.TarInfo(folder)
            info.type = tarfile.DIRTYPE
            tar.addfile(info)
        for name, content in members.items():
            add_member(tar, name, content)


def by_webdataset(path: Path) -> list[tuple[str, dict[str, bytes]]]:
    import webdataset

    samples = webdataset.WebDataset([str(path)], shardshuffle=False)
    return [(s["__key__"], {name: s[name] for name in s if not name.startswith("__")}) for s in samples]


def by_tar_shard(path: Path) -> list[tuple[str, dict[str, bytes]]]:
    shard = TarShard(path.open("rb"), str(path))
    samples = [(shard.key(n), {name: shard.read(n, name) for name in shard.fields(n)}) for n in range(len(shard))]
    shard.close()
    return samples  # type: ignore[return-value]


STYLES = pytest.mark.parametrize(
    "style", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT], ids=["ustar", "gnu", "pax"]
)


class TestTarsReadAsByWebdataset:
    @STYLES
    @pytest.mark.parametrize(
        "members",
        [
            pytest.param({"a.jpg": b"1", "a.txt": b"2", "b.jpg": b"3", "b.txt": b""}, id="plain"),
            pytest.param({"a.JPG": b"1", "a.Txt": b"2", "B.Json": b"3"}, id="capitals"),
            pytest.param({"x/a.jpg": b"1", "x/a.txt": b"2", "y/a.jpg": b"3", "x/y/z/a.jpg": b"4"}, id="folders"),
            pytest.param({"./a.jpg": b"1", "./a.txt": b"2", "./x/b.jpg": b"3"}, id="find ."),
            pytest.param({"a.seg.png": b"1", "a.jpg": b"2", "v1.5/b.x.y.jpg": b"3", "v1.5/b.jpg": b"4"}, id="dots"),
            pytest.param({f"{'d' * 90}/{'n' * 60}.jpg": b"1", f"{'d' * 90}/{'n' * 60}.txt": b"2"}, id="prefix"),
            pytest.param({"猫/ü.jpg": b"1", "猫/ü.txt": b"2"}, id="utf-8"),
            pytest.param({f"{n}.bin": bytes([n]) * n * 173 for n in range(1, 12)}, id="lengths"),
        ],
    )
    def test_names(self, tmp_path, style, members):
        write_tar(tmp_path / "a.tar", members, style, folders=["x", "x/y", "d.d"])
        ours = by_tar_shard(tmp_path / "a.tar")
        assert ours == by_webdataset(tmp_path / "a.tar")
        assert [content for _, sample in ours for content in sample.values()] == list(members.values())

    @pytest.mark.parametrize("style", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT], ids=["gnu", "pax"])
    @pytest.mark.parametrize("stem", ["n" * 96, "n" * 97, "n" * 120, f"{'d' * 200}/{'é' * 150}"], ids=len)
    def test_long_names(self, tmp_path, style, stem):
        members = {f"{stem}{n}.{ext}": f"{n}{ext}".encode() for n in range(3) for ext in ("jpg", "txt")}
        write_tar(tmp_path / "a.tar", members, style)
        assert by_tar_shard(tmp_path / "a.tar") == by_webdataset(tmp_path / "a.tar")
        assert len(by_tar_shard(tmp_path / "a.tar")) == 3

    @pytest.mark.parametrize("name", ["README", "x/LICENSE", ".DS_Store", "._a.jpg"])
    def test_members_that_belong_to_no_sample(self, tmp_path, name):
        write_tar(tmp_path / "a.tar", {name: b"0", "a.jpg": b"1", "a.txt": b"2"}, tarfile.GNU_FORMAT)
        assert by_tar_shard(tmp_path / "a.tar") == by_webdataset(tmp_path / "a.tar")

    @pytest.mark.processes
    def test_written_by_the_tar_command(self, tmp_path):
        for name in ("1.jpg", "1.txt", "sub/2.jpg", "sub/2.txt"):
            (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "in" / name).write_text(name)
        subprocess.run(["tar", "--sort=name", "-cf", tmp_path / "a.tar", "-C", tmp_path / "in", "."], check=True)
        assert by_tar_shard(tmp_path / "a.tar") == by_webdataset(tmp_path / "a.tar")
        assert [sample["txt"] for _, sample in by_tar_shard(tmp_path / "a.tar")] == [b"1.txt", b"sub/2.txt"]

    def test_written_by_tar_writer(self, cache):
        samples = [sample for entry in read_manifest(cache).shards for sample in by_webdataset(cache / entry.name)]
        assert samples == [(key, content) for key, content, _ in cached_samples()]

    def test_a_missing_field(self, tmp_path):
        write_tar(tmp_path / "a.tar", {"a.jpg": b"1"}, tarfile.GNU_FORMAT)
        assert TarShard((tmp_path / "a.tar").open("rb"), "a").read(0, "txt") is None


class TestWriting:
    def test_the_manifest_has_counts_and_hashes_of_the_files(self, cache):
        assert names(cache) == [MANIFEST, "shard-000000.tar", "shard-000001.tar", "shard-000002.tar"]
        for shard, count in zip(read_manifest(cache).shards, (3, 3, 1), strict=True):
            content = (cache / shard.name).read_bytes()
            assert (shard.samples, shard.bytes) == (count, len(content))
            assert shard.sha256 == hashlib.sha256(content).hexdigest()
            assert shard.sizes == ((*SIZE, count),)

    def test_equal_input_gives_equal_hashes_on_another_day(self, cache, tmp_path, monkeypatch):
        monkeypatch.setattr(time, "time", lambda: 1e9)
        assert read_manifest(write_cache(tmp_path / "again")) == read_manifest(cache)

    def test_an_interrupted_shard_leaves_no_file(self, tmp_path, monkeypatch):
        complaints: list[Any] = []
        monkeypatch.setattr(sys, "unraisablehook", complaints.append)
        with pytest.raises(KeyboardInterrupt), TarWriter(tmp_path / "a.tar") as writer:
            writer.write(*cached_samples()[0])
            raise KeyboardInterrupt
        assert names(tmp_path) == []
        assert not complaints

    def test_a_shard_has_a_temporary_name_until_it_is_complete(self, tmp_path):
        with TarWriter(tmp_path / "a.tar") as writer:
            writer.write(*cached_samples()[0])
            assert names(tmp_path) == ["a.tar.tmp"]
        assert names(tmp_path) == ["a.tar"]

    def test_full_disk_in_the_middle(self, tiny_disk):
        with pytest.raises(OSError, match="No space left"), TarWriter(tiny_disk / "a.tar") as writer:
            for sample in itertools.cycle(cached_samples()):
                writer.write(*sample)
        assert names(tiny_disk) == []

    def test_full_disk_at_the_end(self, tiny_disk):
        filler = tiny_disk / "filler"
        filler.write_bytes(b"\0" * (shutil.disk_usage(tiny_disk).free - 4096))
        with pytest.raises(OSError, match="No space left"), TarWriter(tiny_disk / "a.tar") as writer:
            writer.write(*cached_samples()[0])  # smaller than the writer's buffer: it is written to the disk at close
        assert names(tiny_disk) == ["filler"]

    def test_interrupted_mds_leaves_no_file(self, tmp_path):
        with pytest.raises(KeyboardInterrupt), MdsWriter(tmp_path / "mds", ["txt"], IMAGES) as writer:
            writer.write("a", {"txt": b"a"}, None)
            raise KeyboardInterrupt
        assert names(tmp_path) == []


def truncate(shard: Path) -> None:
    """Truncate in the middle of the last sample's tensors."""
    content = shard.read_bytes()
    shard.write_bytes(content[: member_offset(shard, "00000005.safetensors") + 100])


def truncate_between_members(shard: Path) -> None:
    """Truncate before the first member of the last sample."""
    content = shard.read_bytes()
    shard.write_bytes(content[: member_offset(shard, "00000005.json") - 512])


def lengthen(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes() + b"\0" * 512)


def flip_a_latent_bit(shard: Path) -> None:
    flip(shard, member_offset(shard, "00000004.safetensors") + 200)


def zero_first_header(shard: Path) -> None:
    shard.write_bytes(b"\0" * 512 + shard.read_bytes()[512:])


def zero_inner_header(shard: Path) -> None:
    content, header = bytearray(shard.read_bytes()), member_offset(shard, "00000004.safetensors") - 512
    content[header : header + 512] = b"\0" * 512
    shard.write_bytes(content)


def damage_inner_header(shard: Path) -> None:
    flip(shard, member_offset(shard, "00000004.safetensors") - 512 + 3)


def empty(shard: Path) -> None:
    shard.write_bytes(b"")


def not_a_tar(shard: Path) -> None:
    shard.write_bytes(b"<html>404 not found</html>" * 100)


def compress(shard: Path) -> None:
    shard.write_bytes(gzip.compress(shard.read_bytes()))


OTHER_LENGTH = [truncate, truncate_between_members, lengthen, empty, not_a_tar, compress]
SAME_LENGTH = [flip_a_latent_bit, zero_first_header, zero_inner_header, damage_inner_header]
UNREADABLE = [
    truncate,
    truncate_between_members,
    not_a_tar,
    compress,
    zero_first_header,
    zero_inner_header,
    damage_inner_header,
]


def each(damages: list[Callable[[Path], object]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("damage", damages, ids=lambda damage: damage.__name__)


def usable(corpus: Corpus) -> tuple[list[int], set[str]]:
    """The samples that can be read, and the messages for the others."""
    good, said = [], set()
    for item in range(len(corpus)):
        try:
            assert int(corpus.record(item).key) == item
            good.append(item)
        except BadData as error:
            said.add(str(error))
    return good, said


class TestDamagedShards:
    """The message always names the shard. If bad data is tolerated, the other shards are read."""

    @each(OTHER_LENGTH)
    def test_of_another_length_are_named_at_the_start(self, cache, damage):
        damage(cache / VICTIM)
        with pytest.raises(UserError, match=f"{VICTIM} has .* bytes, the manifest says .*Copy it again"):
            open_corpus(cache)
        with pytest.raises(UserError, match=f"{VICTIM} has .* bytes, the manifest says"):
            open_corpus(cache, verify=False)

    def test_that_are_missing_are_named_at_the_start(self, cache):
        (cache / VICTIM).unlink()
        with pytest.raises(UserError, match=f"{VICTIM} is listed in the manifest but missing; copy it again"):
            open_corpus(cache)

    @each(SAME_LENGTH)
    def test_of_the_same_length_are_named_when_they_are_used(self, cache, damage):
        damage(cache / VICTIM)
        corpus = open_corpus(cache)
        assert corpus.record(2).key == "00000002"
        with pytest.raises(BadData, match=f"shard {cache}/{VICTIM} is corrupt: its sha256 .*Copy it again"):
            corpus.record(3)

    @each([*OTHER_LENGTH, *SAME_LENGTH])
    def test_are_skipped_if_bad_data_is_tolerated(self, cache, damage):
        damage(cache / VICTIM)
        good, said = usable(open_corpus(cache, max_bad_fraction=0.5))
        assert good == [0, 1, 2, 6]
        assert len(said) == 1
        assert f"shard {cache}/{VICTIM} is corrupt" in said.pop()

    def test_that_are_missing_are_skipped_if_bad_data_is_tolerated(self, cache):
        (cache / VICTIM).unlink()
        good, said = usable(open_corpus(cache, max_bad_fraction=0.5))
        assert good == [0, 1, 2, 6]
        assert VICTIM in said.pop()

    def test_are_read_only_once(self, cache, monkeypatch):
        flip_a_latent_bit(cache / VICTIM)
        opened: list[int] = []
        original = Source.open

        def counting(source: Source, number: int, **options: Any) -> Any:
            opened.append(number)
            return original(source, number, **options)

        monkeypatch.setattr(Source, "open", counting)
        corpus = open_corpus(cache, max_bad_fraction=0.5)
        for _ in range(3):
            usable(corpus)
        assert opened == [0, 1, 2]

    @each([zero_first_header, zero_inner_header, damage_inner_header])
    def test_are_found_without_hashing(self, cache, damage):
        """`verify=False` skips the hash; the header of every member is parsed in both cases."""
        damage(cache / VICTIM)
        good, said = usable(open_corpus(cache, verify=False, max_bad_fraction=0.5))
        assert good == [0, 1, 2, 6]
        assert VICTIM in said.pop()

    def test_are_not_hashed_if_verify_is_off(self, cache):
        flip_a_latent_bit(cache / VICTIM)
        assert usable(open_corpus(cache, verify=False))[0] == list(range(7))

    @each(UNREADABLE)
    def test_that_were_damaged_before_they_were_hashed(self, cache, damage):
        damage(cache / VICTIM)
        reseal(cache, VICTIM)
        good, said = usable(open_corpus(cache))
        assert good == [0, 1, 2, 6]
        assert all(f"shard {cache}/{VICTIM} " in reason for reason in said)

    @pytest.mark.parametrize("members", range(1, 9))
    def test_truncated_between_any_two_members(self, cache, members):
        """Three samples of three members: the number of complete samples is below that in the manifest."""
        with tarfile.open(cache / VICTIM) as tar:
            offsets = [member.offset for member in tar]
        (cache / VICTIM).write_bytes((cache / VICTIM).read_bytes()[: offsets[members]])
        reseal(cache, VICTIM)
        good, said = usable(open_corpus(cache))
        if members < 7:
            assert good == [0, 1, 2, 6]
            assert f"{VICTIM} holds {-(-members // 3)} samples, the manifest says 3" in said.pop()
        else:  # all samples exist; the last one lacks a field
            assert good == [0, 1, 2, 3, 4, 6]
            reason = said.pop()
            assert "'00000005'" in reason
            assert VICTIM in reason

    @pytest.mark.parametrize("claimed", [2, 4])
    def test_with_another_number_of_samples(self, cache, claimed):
        edit_entry(cache, VICTIM, samples=claimed, sizes=[[*SIZE, claimed]])
        with pytest.raises(BadData, match=f"{VICTIM} holds 3 samples, the manifest says {claimed}"):
            open_corpus(cache).record(3)

    def test_with_long_names(self, tmp_path):
        """Damage that tarfile does not report: truncation, or a damaged header, which it takes for the end."""
        members = {f"{'n' * 150}{n}.{field}": b"0" * 700 for n in range(3) for field in ("jpg", "txt")}
        write_tar(tmp_path / "good.tar", members, tarfile.GNU_FORMAT)
        good = (tmp_path / "good.tar").read_bytes()
        third = member_offset(tmp_path / "good.tar", f"{'n' * 150}1.jpg")
        for content in (good[: third + 100], good[: third - 512 + 3] + b"?" + good[third - 512 + 4 :]):
            (tmp_path / "bad.tar").write_bytes(content)
            entry = ShardEntry(name="bad.tar", samples=3, bytes=len(content), sha256=None, sizes=((8, 8, 3),))
            Manifest(shards=(entry,)).write(tmp_path / MANIFEST)
            with pytest.raises(BadData, match=r"shard .*/bad.tar "):
                open_corpus(tmp_path, resolution=(8, 8)).record(0)


class TestBadSamples:
    def test_that_cannot_be_decoded_are_named_with_their_shard(self, cache):
        # A bit of the length of its header.
        flip(cache / VICTIM, member_offset(cache / VICTIM, "00000004.safetensors") + 7, bit=7)
        corpus = open_corpus(cache, verify=False)
        assert corpus.record(3).key == "00000003"
        with pytest.raises(BadData, match=f"sample '00000004' of shard .*{VICTIM} cannot be decoded"):
            corpus.record(4)

    def replace_victim(self, folder: Path, **fields: bytes) -> Corpus:
        """Replace the victim with a shard of one sample."""
        with tarfile.open(folder / VICTIM, "w") as tar:
            for name, content in fields.items():
                add_member(tar, f"only.{name}", content)
        reseal(folder, VICTIM, samples=1)
        return open_corpus(folder)

    def test_without_a_tensor(self, cache):
        content = save({"latents": torch.zeros(1), "text": torch.zeros(1)})
        with pytest.raises(BadData, match=f"'only' of shard .*{VICTIM} has no pooled, but latents, text"):
            self.replace_victim(cache, safetensors=content, txt=b"a").record(3)

    @pytest.mark.parametrize("fields", [{"txt": b"a"}, {"safetensors": b""}, {"json": b"{}"}], ids=str)
    def test_without_a_field(self, cache, fields):
        has = ", ".join(fields)
        with pytest.raises(BadData, match=f"'only' of shard .*{VICTIM} needs safetensors and txt, but has {has}"):
            self.replace_victim(cache, **fields).record(3)

    def test_whose_caption_is_not_utf8(self, cache):
        flip(cache / VICTIM, member_offset(cache / VICTIM, "00000004.txt"), bit=6)
        with pytest.raises(BadData, match=f"the caption of sample '00000004' of shard .*{VICTIM} is not UTF-8"):
            open_corpus(cache, verify=False).record(4)

    @pytest.mark.parametrize("captions", [{"txt": 1.0}, {"json.text": 1.0}], ids=str)
    def test_when_only_the_caption_is_read(self, tmp_path, captions):
        path = write_tars(tmp_path / "images", [("a", {"png": png(), "txt": b"\xff", "json": b"{"}, (8, 8))], IMAGES)
        with pytest.raises(BadData, match=r"'a' of shard"):
            mix(SourceConfig(name="a", uri=str(path), captions=captions)).caption(0)


class TestMds:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        return write_mds(tmp_path / "mds", cached_samples(), CACHED)

    @pytest.mark.parametrize("compression", [None, "zstd:3", "gz"])
    def test_reads_the_same_as_the_library(self, tmp_path, compression):
        from streaming import LocalDataset

        theirs = LocalDataset(str(write_mds(tmp_path / "plain", cached_samples(), CACHED)))
        folder = write_mds(tmp_path / "mds", cached_samples(), CACHED, compression=compression)
        corpus = open_corpus(folder, format="mds", cache=CacheConfig(dir=str(tmp_path / "copies"), timeout=20))
        assert len(corpus.sources[0].manifest.shards) > 2
        assert len(theirs) == len(corpus) == 7
        for item in range(7):
            shard, at, _ = corpus.raw(item)
            ours = {name: shard.read(at, name) for name in shard.fields(at)}
            row = theirs[item]
            assert {"__key__": shard.key(at), **ours} == {**row, "txt": row["txt"].encode()}
            assert (shard.key(at), ours) == cached_samples()[item][:2]

    def test_manifest_is_the_index_with_sizes(self, tmp_path):
        sizes = [(16, 24 + 8 * number) for number in range(7)]
        samples = [(key, fields, size) for (key, fields, _), size in zip(cached_samples(), sizes, strict=True)]
        folder = write_mds(tmp_path / "mds", samples, CACHED)
        entries = read_manifest(folder).shards
        assert len(entries) > 2
        index = json.loads((folder / INDEX).read_text())["shards"]
        assert [entry.name for entry in entries] == [shard["raw_data"]["basename"] for shard in index]
        for entry in entries:
            assert entry.bytes == (folder / entry.name).stat().st_size
            assert entry.sha256 == file_sha256(folder / entry.name)
            assert entry.sizes == runs_of(sizes[: entry.samples])
            del sizes[: entry.samples]

    def test_that_was_truncated_before_it_was_indexed(self, tmp_path):
        """Size and number of samples agree with the index; the last column is shorter than its table says."""
        write_foreign(tmp_path / "mds")
        shard, index = tmp_path / "mds" / "shard.00001.mds", tmp_path / "mds" / INDEX
        shard.write_bytes(shard.read_bytes()[:-3])
        data = json.loads(index.read_text())
        data["shards"][1]["raw_data"]["bytes"] -= 3
        index.write_text(json.dumps(data))
        corpus = open_corpus(tmp_path / "mds", format="mds", resolution=(8, 8))
        assert corpus.record(2).caption == "caption 2"
        with pytest.raises(BadData, match=f"sample 1 of shard {shard} is corrupt"):
            corpus.record(3)

    def test_of_other_tools_does_not_need_a_manifest(self, tmp_path):
        write_foreign(tmp_path / "mds", hashes=["sha256"])
        corpus = open_corpus(tmp_path / "mds", format="mds", resolution=(8, 8))
        assert len(corpus) == 5
        assert [corpus.caption(n) for n in range(5)] == [f"caption {n}" for n in range(5)]
        assert [corpus.record(n).key for n in range(5)] == ["000000", "000001", "000000", "000001", "000000"]
        assert [int(corpus.record(n).image[0, 0, 0]) for n in range(5)] == [0, 1, 2, 3, 4]

    def test_unsupported_columns_are_named(self, tmp_path):
        write_foreign(tmp_path / "mds")
        config = SourceConfig(name="a", uri=str(tmp_path / "mds"), format="mds", image=("label",), captions={"txt": 1})
        with pytest.raises(BadData, match=r"column 'label' of shard .*shard.00000.mds has the encoding 'int'"):
            mix(config, resolution=(8, 8)).record(0)

    @pytest.mark.parametrize("hashed", [True, False])
    def test_with_a_flipped_bit(self, tmp_path, hashed):
        """The hash shows it, if the library wrote hashes."""
        write_foreign(tmp_path / "mds", hashes=["sha256"] if hashed else [])
        shard = tmp_path / "mds" / "shard.00001.mds"
        flip(shard, shard.read_bytes().index(b"caption 2"), 5)
        corpus = open_corpus(tmp_path / "mds", format="mds", resolution=(8, 8))
        if hashed:
            with pytest.raises(BadData, match=f"{shard} is corrupt: its sha256"):
                corpus.caption(2)
        else:
            assert corpus.caption(2) == "Caption 2"

    @pytest.mark.parametrize("offset", [0, 4, 5, 6, 8])
    def test_with_a_damaged_table(self, tmp_path, offset):
        write_foreign(tmp_path / "mds")
        shard = tmp_path / "mds" / "shard.00001.mds"
        flip(shard, offset, 6)
        corpus = open_corpus(tmp_path / "mds", format="mds", resolution=(8, 8), max_bad_fraction=0.5)
        with pytest.raises(BadData, match=str(shard)):
            [corpus.record(item) for item in (2, 3)]
        assert corpus.record(4).caption == "caption 4"

    @pytest.mark.parametrize("change", ["cut", "gone"])
    def test_with_a_truncated_or_missing_shard(self, folder, change):
        shard = folder / read_manifest(folder).shards[1].name
        if change == "cut":
            shard.write_bytes(shard.read_bytes()[:-5])
        else:
            shard.unlink()
        with pytest.raises(
            UserError, match=rf"{shard} (has \d+ bytes, the manifest says|is listed in the manifest but)"
        ):
            open_corpus(folder, format="mds")

    def test_with_the_manifest_of_another_index(self, folder):
        edit_entry(folder, read_manifest(folder).shards[0].name, bytes=5)
        with pytest.raises(UserError, match=rf"{MANIFEST} lists other shards than .*{INDEX}.*scfm data index"):
            open_one(folder, format="mds")

    @pytest.mark.parametrize(
        ("content", "what"),
        [
            (b"", "is damaged"),
            (b"{}", "is damaged"),
            (b"[]", "is damaged"),
            (b'{"version": 1, "shards": []}', "does not have MDS version 2"),
            (b'{"version": 2, "shards": []}', "lists no samples"),
            (b'{"version": 2, "shards": [{"format": "csv"}]}', "does not have MDS version 2"),
        ],
    )
    def test_with_an_invalid_index(self, folder, content, what):
        (folder / INDEX).write_bytes(content)
        with pytest.raises(UserError, match=f"{folder / INDEX} {what}|{what}"):
            open_one(folder, format="mds")

    def test_with_an_index_that_names_shards_outside_the_folder(self, folder):
        data = json.loads((folder / INDEX).read_text())
        data["shards"][0]["raw_data"]["basename"] = "../shard.00000.mds"
        (folder / INDEX).write_text(json.dumps(data))
        (folder / MANIFEST).unlink()
        with pytest.raises(UserError, match="names a shard outside its folder"):
            open_one(folder, format="mds")


def write_foreign(folder: Path, **options: Any) -> None:
    """Five images in three shards, as another tool would write them."""
    from streaming import MDSWriter

    columns = {"image": "png", "txt": "str", "label": "int"}
    with MDSWriter(out=str(folder), columns=columns, size_limit=500, **options) as writer:
        for number in range(5):
            writer.write({"image": Image.open(io.BytesIO(png(number))), "txt": f"caption {number}", "label": number})
    assert len(list(folder.glob("*.mds"))) == 3


class TestCachedRecords:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    @pytest.mark.parametrize("form", ["webdataset", "mds"])
    def test_round_trip_is_exact(self, tmp_path, dtype, form):
        write = write_tars if form == "webdataset" else write_mds
        corpus = open_corpus(write(tmp_path / "cache", cached_samples(7, dtype), CACHED), format=form)
        assert len(corpus) == 7
        assert corpus.is_cached
        assert (corpus.encoder, corpus.text_length) == ("e" * 64, 4)
        for index in range(7):
            written, read = make_record(index, dtype), corpus.record(index)
            assert (read.key, read.caption) == (written.key, written.caption)
            assert corpus.caption(index) == written.caption
            for (name, tensor), (other, stored) in zip(
                tensors_of(read).items(), tensors_of(written).items(), strict=True
            ):
                assert (name, bits(tensor)) == (other, bits(stored))
            assert read.image is None

    @pytest.mark.parametrize("index", [-1, -7, 7, 1000])
    def test_numbers_beyond_the_last_raise(self, tmp_path, index):
        corpus = open_corpus(write_tars(tmp_path / "cache", cached_samples(), CACHED, per_shard=7))
        for read in (corpus.record, corpus.caption, corpus.raw):
            with pytest.raises(IndexError):
                read(index)

    PADDING = torch.arange(12.0).view(4, 3).bfloat16()

    def trimmed(self, folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
        """Texts of 0 to 4 tokens, with the padding's file."""
        samples = []
        for index in range(5):
            record = make_record(index, dtype)
            record.fields["text"] = record.fields["text"][:index]
            samples.append((record.key, fields_of(record), SIZE))
        content = save({"text": self.PADDING})
        draft = dataclasses.replace(CACHED, padding=hashlib.sha256(content).hexdigest())
        write_tars(folder, samples, draft)
        (folder / PADDING).write_bytes(content)
        return folder

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    def test_trimmed_texts_are_padded(self, tmp_path, dtype):
        corpus = open_corpus(self.trimmed(tmp_path / "cache", dtype))
        for index in range(5):
            text, whole = corpus.record(index).fields["text"], make_record(index, dtype).fields["text"]
            assert bits(text) == bits(torch.cat([whole[:index], self.PADDING[index:].to(dtype)]))

    def test_trimmed_texts_of_a_batch_are_padded_later(self, tmp_path):
        corpus = open_corpus(self.trimmed(tmp_path / "cache"))
        text = collate(range(5), [corpus.record(index, padded=False) for index in range(5)]).fields["text"]
        assert text.lengths == (0, 1, 2, 3, 4)
        assert len(text.tokens) == 10
        whole = torch.stack([corpus.record(index).fields["text"] for index in range(5)])
        assert bits(text.padded(corpus.paddings["text"])) == bits(whole)

    @pytest.mark.parametrize("length", [3, 5])
    def test_a_text_that_is_not_trimmed_has_the_full_length(self, tmp_path, length):
        """A batch with trimmed texts of another source would hide that it is damaged."""
        records = [make_record(0), make_record(1)]
        records[1].fields["text"] = torch.zeros(length, *records[1].fields["text"].shape[1:])
        samples = [(record.key, fields_of(record), SIZE) for record in records]
        corpus = open_corpus(write_tars(tmp_path / "cache", samples, CACHED))
        assert len(corpus.record(0).fields["text"]) == CACHED.text_length
        with pytest.raises(
            BadData, match=rf"{records[1].key}.* of shard .*text of the shape \[{length}, 3\], not \[4, "
        ):
            corpus.record(1, padded=False)

    @pytest.mark.parametrize("replace_victim", [Path.unlink, lambda path: flip(path, -1)], ids=["gone", "damaged"])
    def test_without_their_padding_are_refused(self, tmp_path, replace_victim):
        folder = self.trimmed(tmp_path / "cache")
        replace_victim(folder / PADDING)
        with pytest.raises(UserError, match=f"{folder / PADDING} is missing or differs from the manifest"):
            open_corpus(folder)


def image_samples(count: int = 6, **fields: bytes) -> list[Sample]:
    return [(f"k{n}", {"png": png(n), "txt": f"caption {n}".encode(), **fields}, (8, 8)) for n in range(count)]


def red(record: Record) -> int:
    assert record.image is not None
    return int(record.image[0, 0, 0])


class TestImageRecords:
    def images(self, folder: Path, *samples: Mapping[str, bytes], **options: Any) -> Corpus:
        path = write_tars(folder / "images", [(f"k{n}", fields, (8, 8)) for n, fields in enumerate(samples)], IMAGES)
        return mix(SourceConfig(name="images", uri=str(path), **options), resolution=(8, 8))

    def test_have_an_image_and_its_caption(self, tmp_path):
        corpus = self.images(tmp_path, *[fields for _, fields, _ in image_samples()])
        assert not corpus.is_cached
        for n in range(6):
            record = corpus.record(n)
            assert (record.key, record.caption, red(record)) == (f"k{n}", f"caption {n}", n)
            assert record.image.shape == (3, 8, 8)
            assert (record.latents, record.fields) == (None, {})

    def test_use_the_first_image_field_that_exists(self, tmp_path):
        samples = [
            {"webp": png(1), "png": png(2), "txt": b""},
            {"webp": png(1), "jpg": png(3), "txt": b""},
            {"webp": png(1), "txt": b""},
        ]
        corpus = self.images(tmp_path / "a", *samples)
        assert [red(corpus.record(n)) for n in range(3)] == [2, 3, 1]
        corpus = self.images(tmp_path / "b", *samples, image=("webp", "png"))
        assert [red(corpus.record(n)) for n in range(3)] == [1, 1, 1]

    def test_of_a_dotted_field(self, tmp_path):
        assert (
            red(self.images(tmp_path, {"seg.png": png(9), "png": png(1), "txt": b""}, image=("seg.png",)).record(0))
            == 9
        )

    def test_without_an_image_field(self, tmp_path):
        corpus = self.images(tmp_path, {"gif": png(), "txt": b"a"})
        known = " or ".join(SourceConfig(name="a", uri="b").image)
        message = rf"sample 'k0' of shard .*shard-000000.tar has no {known}, but gif, txt"
        with pytest.raises(BadData, match=message):
            corpus.record(0)

    def test_of_a_broken_image(self, tmp_path):
        corpus = self.images(tmp_path, {"png": png()[:-40], "txt": b"a"})
        with pytest.raises(BadData, match=r"sample 'k0' of shard .*shard-000000.tar is not a readable image"):
            corpus.record(0)

    def test_of_fields_in_capitals(self, tmp_path):
        with tarfile.open(tmp_path / "a.tar", "w") as tar:
            add_member(tar, "IMG_1.PNG", png(5))
            add_member(tar, "IMG_1.TXT", b"a caption")
        entry = ShardEntry(name="a.tar", samples=1, bytes=(tmp_path / "a.tar").stat().st_size, sha256=None)
        Manifest(shards=(entry,)).write(tmp_path / MANIFEST)
        record = open_corpus(tmp_path, resolution=(8, 8)).record(0)
        assert (record.key, record.caption, red(record)) == ("IMG_1", "a caption", 5)

    def test_choose_among_captions_by_weight(self, tmp_path):
        content = {"png": png(), "txt": b"short", "json": json.dumps({"long": "long", "deep": {"er": "deep"}}).encode()}
        corpus = self.images(tmp_path, content, captions={"txt": 1.0, "json.long": 3.0, "json.deep.er": 0.0})
        captions = [corpus.record(0, sample_id).caption for sample_id in range(600)]
        assert captions == [corpus.record(0, sample_id).caption for sample_id in range(600)]
        count = Counter(captions)
        assert set(count) == {"short", "long"}
        assert abs(count["long"] - 450) < 4 * (600 * 0.75 * 0.25) ** 0.5
        assert corpus.caption(0) == captions[0]

    def test_a_caption_of_a_field_with_a_dot(self, tmp_path):
        """`0001.caption.txt` beside `0001.jpg`."""
        corpus = self.images(tmp_path, {"png": png(), "caption.txt": b"a fox"}, captions={"caption.txt": 1.0})
        assert corpus.record(0).caption == "a fox"

    def test_choose_again_for_every_sample_id(self, tmp_path):
        content = {"png": png(), "txt": b"short", "json": b'{"long": "long"}'}
        corpus = self.images(tmp_path, *[content] * 40, captions={"txt": 1.0, "json.long": 1.0})
        assert len({corpus.record(item, 7).caption for item in range(40)}) == 2

    @pytest.mark.parametrize("metadata", [None, b"{}", b'{"long": null}', b'{"long": 5}', b'{"long": {"er": "no"}}'])
    def test_fall_back_if_the_chosen_caption_is_missing(self, tmp_path, metadata):
        content = {"png": png(), "txt": b"short"} | ({} if metadata is None else {"json": metadata})
        corpus = self.images(tmp_path, content, captions={"json.long": 1.0, "txt": 0.0})
        assert [corpus.record(0, sample_id).caption for sample_id in range(20)] == ["short"] * 20

    def test_without_a_caption(self, tmp_path):
        corpus = self.images(tmp_path, {"png": png(), "json": b"{}"}, captions={"txt": 1.0, "json.a.b": 1.0})
        message = r"sample 'k0' of shard .* has no caption in (txt, json.a.b|json.a.b, txt), but the fields json, png"
        with pytest.raises(BadData, match=message):
            corpus.record(0)

    @pytest.mark.parametrize("fields", [{"txt": b"\xff"}, {"json": b"{"}, {"json": b"\xff"}], ids=str)
    def test_with_a_caption_that_cannot_be_read(self, tmp_path, fields):
        corpus = self.images(tmp_path, {"png": png(), **fields}, captions={"txt": 1.0, "json.a": 1.0})
        with pytest.raises(BadData, match=r"sample 'k0' of shard .*shard-000000.tar is not (UTF-8|in JSON)"):
            corpus.record(0)

    def test_json_values(self):
        content = b'{"a": {"b": "c"}, "d": [1]}'
        assert json_value(content, ["a", "b"]) == "c"
        assert json_value(content, ["a", "x"]) is json_value(content, ["d", "x"]) is json_value(b"[]", ["a"]) is None


class TestBuckets:
    SIZES = ((8, 8), (8, 16), (16, 8), (16, 16))

    @pytest.mark.parametrize(
        ("size", "nearest"),
        [
            ((8, 16), (8, 16)),
            ((100, 210), (8, 16)),
            ((900, 500), (16, 8)),
            ((512, 512), (16, 16)),  # equal ratios: the nearest area
            ((3, 3), (8, 8)),
            ((9, 11), (8, 8)),  # 1.2 is below the square root of 2, which is the middle between 1 and 2
            ((10, 15), (8, 16)),
            ((1, 1000), (8, 16)),
        ],
    )
    def test_nearest_size(self, size, nearest):
        assert self.SIZES[nearest_size(size, self.SIZES)] == nearest

    @pytest.mark.parametrize("resolution", [(512, 512), (768, 512), (100, 60)])
    def test_nearest_sizes_of_many(self, resolution):
        """As of each alone, also where two sizes are equally near by ratio or by area, up to the last bit."""
        sizes = aspect_buckets(resolution, 16)
        random = np.random.default_rng(0)
        found = np.concatenate(
            [
                random.integers(1, 4000, (3000, 2)),
                np.array(sizes) * random.integers(1, 9, (len(sizes), 1)),  # the ratio of a bucket
                np.array([(1, 100_000), (100_000, 1), (1, 1)]),
                # Between two buckets: the geometric mean of their ratios, nearly.
                np.array([(a * c, b * d) for a, b in sizes[:12] for c, d in sizes[-12:]]),
                np.array([(a * d, b * c) for a, b in sizes[:12] for c, d in sizes[-12:]]),
            ]
        )
        expected = [nearest_size((height, width), sizes) for height, width in found.tolist()]
        assert nearest_sizes(found, sizes).tolist() == expected
        assert nearest_sizes(found[:9], sizes[:1]).tolist() == [0] * 9
        # Two sizes of one ratio, whose areas are equally near to that of a third: 2 and 8 to 4, by their logarithms.
        twins = ((16, 16), (8, 8))
        assert nearest_sizes(np.array([[12, 12], [11, 11], [128, 128], [32, 8]]), twins).tolist() == [
            nearest_size(size, twins) for size in [(12, 12), (11, 11), (128, 128), (32, 8)]
        ]
        close = ((1000, 500), (500, 1000), (2000, 1000), (250, 125))
        several = [(707, 354), (1000, 1000), (1414, 707), (500, 250), (3, 3)]
        assert nearest_sizes(np.array(several), close).tolist() == [nearest_size(size, close) for size in several]

    @pytest.mark.parametrize(
        ("resolution", "step"), [((512, 512), 64), ((768, 512), 64), ((64, 64), 8), ((100, 60), 16)]
    )
    def test_aspect_buckets(self, resolution, step):
        sizes = aspect_buckets(resolution, step)
        assert resolution in sizes
        assert list(sizes) == sorted(set(sizes))
        for height, width in set(sizes) - {resolution}:
            assert height % step == width % step == 0
            assert height * width <= resolution[0] * resolution[1]
            assert height * (width + step) > resolution[0] * resolution[1]
            assert max(height, width) <= 2 * min(height, width)
        if resolution[0] == resolution[1]:
            assert {(width, height) for height, width in sizes} >= {s for s in sizes if (s[1], s[0]) in sizes}
        assert len(sizes) >= 3

    def test_of_images_are_the_nearest_sizes(self, tmp_path):
        shown = [(50, 50), (40, 90), (90, 40), (30, 31), (10, 30)]
        samples = [(f"k{n}", {"png": png(n, *size), "txt": b"a"}, size) for n, size in enumerate(shown)]
        path = write_tars(tmp_path / "images", samples, IMAGES, per_shard=2)
        corpus = open_corpus(path, buckets=((8, 8), (8, 16), (16, 8)))
        assert corpus.buckets.tolist() == [0, 1, 2, 0, 1]
        assert [tuple(corpus.record(n).image.shape[1:]) for n in range(5)] == [
            (8, 8),
            (8, 16),
            (16, 8),
            (8, 8),
            (8, 16),
        ]
        assert corpus.items_of((8, 16)).tolist() == [1, 4]
        assert corpus.items_of((64, 64)).tolist() == []

    def test_of_caches_are_the_sizes_of_encoding(self, tmp_path):
        sizes = [SIZE, (8, 8), (8, 8), SIZE, (8, 8)]
        samples = [(key, fields, size) for (key, fields, _), size in zip(cached_samples(5), sizes, strict=True)]
        path = write_tars(tmp_path / "cache", samples, CACHED)
        assert open_corpus(path, buckets=((8, 8), SIZE)).buckets.tolist() == [1, 0, 0, 1, 0]

    def test_of_one_size_need_no_sizes_in_the_manifest(self, tmp_path):
        path = write_tars(tmp_path / "images", image_samples(), IMAGES, measured=False)
        assert open_corpus(path, resolution=(8, 8)).buckets.tolist() == [0] * 6


class TestRefusals:
    def source(self, path: Path, name: str = "one", **options: Any) -> SourceConfig:
        return SourceConfig(name=name, uri=str(path), **options)

    @pytest.mark.parametrize(
        "change", [{"encoder": "f" * 64}, {"text_length": 8}, {"fields": {"text": "masked", "pooled": "vector"}}]
    )
    def test_caches_of_two_models_or_lengths(self, cache, tmp_path, change):
        other = write_cache(tmp_path / "other")
        edit_manifest(other, **change)
        message = (
            r"all must be images, or cached by one model.*one: cached by eeeeeeeeeeee, 4 tokens, .*, two: cached by"
        )
        with pytest.raises(UserError, match=message):
            mix(self.source(cache), self.source(other, "two"))

    @pytest.mark.parametrize("form", ["webdataset", "folder"])
    def test_a_cache_beside_images(self, cache, tmp_path, form):
        if form == "webdataset":
            write_tars(tmp_path / "images", image_samples(), IMAGES)
        else:
            (tmp_path / "images").mkdir()
            (tmp_path / "images" / "a.png").write_bytes(png())
            (tmp_path / "images" / "a.txt").write_text("a")
        with pytest.raises(
            UserError,
            match=r"one: cached by eeeeeeeeeeee, 4 tokens, .*, two: images. Encode all of them in the same way",
        ):
            mix(self.source(cache), self.source(tmp_path / "images", "two", format=form))

    def test_images_of_unknown_size_in_buckets(self, tmp_path):
        path = write_tars(tmp_path / "images", image_samples(), IMAGES, measured=False)
        with pytest.raises(
            UserError, match=rf"\(data\): its manifest does not have the sizes of the images.*scfm data index '{path}'"
        ):
            open_corpus(path, buckets=((8, 8), (8, 16)))

    @pytest.mark.parametrize("changes", [{"resolution": (8, 8)}, {"buckets": ((8, 8), (24, 16))}])
    def test_a_cache_of_another_size(self, cache, changes):
        asked = r"\(8, 8\)( and \(24, 16\))?"
        advice = r"Set data\.resolution=16,24, or encode"
        with pytest.raises(UserError, match=rf"with data.resolution \(16, 24\), this run asks for {asked}\. {advice}"):
            open_corpus(cache, **changes)
        assert _setting_of({(8, 16), (8, 8)}) == "data.buckets=[[8,8],[8,16]]"

    def test_a_weight_that_gives_no_sample(self, cache, tmp_path):
        other = self.source(write_cache(tmp_path / "other"), "two", weight=1.0)
        with pytest.raises(UserError, match=r"\(two\): its weight gives it less than one of the 14 samples"):
            mix(self.source(cache, weight=1000.0), other).order(2, 0)

    def test_partitions_that_do_not_divide_the_batch(self, cache):
        with pytest.raises(UserError, match=r"data.partitions 3 does not divide train.global_batch_size 8"):
            open_corpus(cache, partitions=3).order(8, 0)

    def test_a_remote_folder_of_images(self):
        with pytest.raises(UserError, match=r"format folder is for this machine's files"):
            mix(SourceConfig(name="a", uri="s3://bucket/images", format="folder"))


class TestFingerprint:
    def test_depends_on_content_not_on_place(self, cache, tmp_path):
        first = open_corpus(cache).fingerprint
        shutil.copytree(cache, tmp_path / "elsewhere")
        assert open_corpus(tmp_path / "elsewhere").fingerprint == first
        assert open_corpus(tmp_path / "elsewhere" / "shard-{000000..000002}.tar").fingerprint == first
        (tmp_path / "elsewhere" / MANIFEST).rename(tmp_path / "mine.json")
        moved = SourceConfig(name="data", uri=str(tmp_path / "elsewhere"), manifest=str(tmp_path / "mine.json"))
        assert mix(moved).fingerprint == first

    def test_differs_for_other_content(self, cache, tmp_path):
        other = write_cache(tmp_path / "other", dtype=torch.float32)
        found = [
            open_corpus(cache).fingerprint,
            open_corpus(other).fingerprint,
            open_corpus(cache / "shard-{000000..000001}.tar").fingerprint,
            open_corpus(cache / "shard-00000{1,0,2}.tar").fingerprint,
            mix(SourceConfig(name="renamed", uri=str(cache))).fingerprint,
            mix(SourceConfig(name="a", uri=str(cache)), SourceConfig(name="b", uri=str(other))).fingerprint,
            mix(SourceConfig(name="b", uri=str(cache)), SourceConfig(name="a", uri=str(other))).fingerprint,
            mix(SourceConfig(name="a", uri=str(other)), SourceConfig(name="b", uri=str(cache))).fingerprint,
        ]
        assert len(set(found)) == len(found)

    def test_differs_for_one_more_sample(self, tmp_path):
        few, more = (write_cache(tmp_path / str(count), count) for count in (6, 7))
        assert open_corpus(few).fingerprint != open_corpus(more).fingerprint


class TestDraws:
    def draws(self, tmp_path: Path, weights: tuple[float | None, float | None], **changes: Any) -> list[int]:
        sources = []
        for number, (count, weight) in enumerate(zip((7, 3), weights, strict=True)):
            path = tmp_path / str(number)
            if not path.exists():
                write_cache(path, count)
            sources.append(SourceConfig(name=f"s{number}", uri=str(path), weight=weight))
        return [source.draws for source in mix(*sources, **changes).order(2, 0).sources]

    def test_follow_the_weights(self, tmp_path):
        assert self.draws(tmp_path, (None, None)) == [7, 3]
        assert self.draws(tmp_path, (1.0, 1.0)) == [5, 5]
        assert self.draws(tmp_path, (0.3, 0.1), epoch_size=100) == [75, 25]
        assert self.draws(tmp_path, (None, None), epoch_size=1000) == [700, 300]

    def test_fill_the_epoch_exactly(self, tmp_path):
        for size in range(7, 40):
            for weights in ((1.0, 2.0), (1.0, 1.0), (0.7, 0.2)):
                draws = self.draws(tmp_path, weights, epoch_size=size)
                assert sum(draws) == size
                assert abs(draws[0] - size * weights[0] / sum(weights)) <= 0.5

    def test_come_from_the_right_source(self, tmp_path):
        a, b = write_cache(tmp_path / "a", 7), write_tars(tmp_path / "b", [("x", cached_samples()[0][1], SIZE)], CACHED)
        corpus = mix(SourceConfig(name="a", uri=str(a)), SourceConfig(name="b", uri=str(b)))
        assert [corpus.record(item).key for item in (0, 3, 6, 7)] == ["00000000", "00000003", "00000006", "x"]
        assert [corpus.shard_of(item) for item in (0, 2, 3, 6, 7)] == [0, 0, 1, 2, 3]
        assert corpus.shard_bytes(3) == 0  # read in place
        order = corpus.order(2, 0)
        assert [(s.name, s.start, s.shards, s.draws) for s in order.sources] == [
            ("a", 0, (3, 3, 1), 7),
            ("b", 7, (1,), 1),
        ]

    def test_settings_of_the_recipe_reach_the_order(self, cache):
        order = open_corpus(cache, shuffle=False, shuffle_block=5, partitions=2, seed=9).order(4, 1)
        assert (order.batch_size, order.seed, order.shuffle, order.block, order.partitions) == (4, 9, False, 5, 2)
        assert open_corpus(cache).order(4, 1).seed == 1


class TestOpenShards:
    def test_never_exceed_the_limit(self, tmp_path, monkeypatch):
        monkeypatch.setattr(open_shards, "most_open", lambda: 2)
        path = write_tars(tmp_path / "cache", cached_samples(20), CACHED, per_shard=1)
        corpus = open_corpus(path)
        opened: list[int] = []
        original = Source.open

        def counting(source: Source, number: int, **options: Any) -> Any:
            opened.append(number)
            return original(source, number, **options)

        monkeypatch.setattr(Source, "open", counting)
        for item in [*range(20), 19, 18, 19, 18, 5, 18, 19]:
            assert corpus.record(item).key == f"{item:08d}"
            files = [str(path.readlink()) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
            assert sum(str(path) in name for name in files) == min(2, len(set(opened)))
        # The last two stay open; 5 replaces 19, the least recently used one.
        assert opened == [*range(20), 5, 19]

    @pytest.mark.processes
    def test_are_safe_to_share_with_forked_processes(self, cache):
        """Reading does not move the file offset, which processes share."""
        corpus = open_corpus(cache)
        corpus.record(0)  # opened before the fork
        context = multiprocessing.get_context("fork")
        queue = context.SimpleQueue()

        def work(start: int) -> None:
            keys = [corpus.record((start + at) % 7).key for at in range(300)]
            queue.put(keys == [f"{(start + at) % 7:08d}" for at in range(300)])

        processes = [context.Process(target=work, args=(start,)) for start in range(4)]
        for process in processes:
            process.start()
        assert [queue.get() for _ in processes] == [True] * 4
        for process in processes:
            process.join()

    @pytest.mark.processes
    def test_are_hashed_by_one_process_only(self, cache, monkeypatch):
        checks: list[bool] = []
        original = Source.open

        def counting(source: Source, number: int, **options: Any) -> Any:
            checks.append(options["check"])
            return original(source, number, **options)

        corpus = open_corpus(cache)
        context = multiprocessing.get_context("fork")
        process = context.Process(target=corpus.prefetch, args=(1,))
        process.start()
        process.join()
        monkeypatch.setattr(Source, "open", counting)
        corpus.record(3)  # the child has hashed it
        corpus.record(0)
        assert checks == [False, True]

    def test_prefetch_fails_as_reading_does(self, cache):
        flip_a_latent_bit(cache / VICTIM)
        corpus = open_corpus(cache, max_bad_fraction=0.5)
        corpus.prefetch(0)
        for _ in range(2):
            with pytest.raises(BadData, match=VICTIM):
                corpus.prefetch(1)
        with contextlib.suppress(BadData):
            corpus.record(3)
        assert corpus.record(0).key == "00000000"


class TestIndex:
    """The shards of a manifest as arrays; a large manifest is parsed by one process of a machine, once."""

    ENTRIES = (
        ShardEntry(name="a.tar", samples=3, bytes=10, sha256="0a" * 32, sizes=((8, 16, 2), (16, 8, 1))),
        ShardEntry(name="ü/b.tar", samples=2, bytes=7, sha256=None, sizes=((8, 16, 2),)),
        ShardEntry(name="empty.tar", samples=0, bytes=1024, sha256="ff" * 32),
        ShardEntry(
            name="c.tar", samples=3, bytes=2**40, sha256="0b" * 32, sizes=((8, 16, 1), (70000, 8, 1), (8, 16, 1))
        ),
    )

    def test_gives_the_entries_back(self):
        index = ShardIndex.of(self.ENTRIES)
        assert index == self.ENTRIES
        assert tuple(index) == self.ENTRIES
        assert index[-1] == self.ENTRIES[-1]
        assert index[1:3] == list(self.ENTRIES[1:3])
        assert [entry.name for entry in index.files()] == [entry.name for entry in self.ENTRIES]
        assert index.sizes == {(8, 16), (16, 8), (70000, 8)}
        assert index.has_sizes
        assert index.select([3, 0]) == [self.ENTRIES[3], self.ENTRIES[0]]
        assert not ShardIndex.of([dataclasses.replace(self.ENTRIES[0], sizes=())]).has_sizes
        assert len(ShardIndex.of(())) == 0
        with pytest.raises(IndexError):
            index[4]

    def test_has_a_key_of_its_whole_content(self):
        """The buckets that are shared under the key depend on the order of the sizes too."""
        first = self.ENTRIES[0]
        changes: list[dict[str, Any]] = [
            {}, {"name": "b.tar"}, {"bytes": 11}, {"sha256": None}, {"sizes": ()}, {"sizes": ((16, 8, 1), (8, 16, 2))},
        ]  # fmt: skip
        keys = {ShardIndex.of([dataclasses.replace(first, **change), *self.ENTRIES[1:]]).key for change in changes}
        assert len(keys) == len(changes)

    @pytest.mark.parametrize("style", [{}, {"indent": 1}, {"separators": (",", ":")}, {"sort_keys": True}], ids=str)
    def test_of_json_that_another_program_wrote(self, style):
        manifest = Manifest(settings={"shards": []}, shards=self.ENTRIES)
        assert Manifest.parse(manifest.dumps(), "") == manifest
        assert Manifest.parse(json.dumps(json.loads(manifest.dumps()), **style), "") == manifest

    @pytest.mark.parametrize("end", ["}\n  ]\n}\n", "x}\n  ]\n}\n", "}}\n  ]\n}\n", '}, {"name"}\n  ]\n}\n'])
    def test_of_a_damaged_end(self, end):
        text = Manifest(shards=self.ENTRIES).dumps().removesuffix("}\n  ]\n}\n")
        if end == "}\n  ]\n}\n":
            assert Manifest.parse(text + end, "").samples == 8
        else:
            with pytest.raises(UserError, match="is damaged"):
                Manifest.parse(text + end, "here")

    def large(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """Every manifest counts as large; a list of those that are parsed."""
        parsed: list[str] = []
        parse = Manifest.parse
        monkeypatch.setattr(manifest_module, "_LARGE", 0)
        monkeypatch.setattr(corpus_module, "LARGE", 0)
        monkeypatch.setattr(
            Manifest, "parse", lambda text, where, step: parsed.append(where) or parse(text, where, step)
        )
        return parsed

    def test_of_a_large_manifest_is_made_once(self, tmp_path, monkeypatch):
        sizes = [SIZE, (8, 8), (8, 8), SIZE, (8, 8)]
        samples = [(key, fields, size) for (key, fields, _), size in zip(cached_samples(5), sizes, strict=True)]
        path = write_tars(tmp_path / "data", samples, CACHED)
        options: dict[str, Any] = {"buckets": ((8, 8), SIZE), "cache": CacheConfig(dir=str(tmp_path / "machine"))}
        plain, parsed = open_corpus(path, **options), self.large(monkeypatch)
        for _ in range(2):
            corpus = open_corpus(path, **options)
            assert corpus.fingerprint == plain.fingerprint
            assert corpus.buckets.tolist() == plain.buckets.tolist() == [1, 0, 0, 1, 0]
            assert corpus.sources[0].manifest == plain.sources[0].manifest
            assert [corpus.record(item).key for item in range(5)] == [key for key, _, _ in samples]
            assert equal_orders(corpus, plain)
        assert parsed == [f"{path}/{MANIFEST}"]
        edit_manifest(path, settings={"x": 1})  # another hash
        assert open_corpus(path, **options).sources[0].manifest.settings == {"x": 1}
        assert len(parsed) == 2

    def test_of_a_manifest_that_changes_while_it_is_read(self, cache, monkeypatch, tmp_path):
        self.large(monkeypatch)
        hashed = manifest_module.file_sha256
        monkeypatch.setattr(manifest_module, "file_sha256", lambda path: hashed(path)[::-1])
        with pytest.raises(UserError, match=rf"{MANIFEST} was changed while it was read. Start again"):
            open_corpus(cache, cache=CacheConfig(dir=str(tmp_path / "machine")))

    def test_of_a_damaged_large_manifest(self, cache, monkeypatch, tmp_path):
        self.large(monkeypatch)
        (cache / MANIFEST).write_text("{")
        with pytest.raises(UserError, match=rf"{MANIFEST} is damaged"):
            open_corpus(cache, cache=CacheConfig(dir=str(tmp_path / "machine")))


def equal_orders(one: Corpus, other: Corpus) -> bool:
    return bool((one.order(2, 0).epoch(0).items == other.order(2, 0).epoch(0).items).all())
