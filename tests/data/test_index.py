"""`scfm data index`: shards of the writers of other tools, and all faults that they may have."""

import hashlib
import io
import json
import os
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save
from storage import FileServer, S3Server

from data_tools import index as module
from data_tools.index import default_output, index
from recipes.cli import main
from scfm_core.data.corpus import Corpus
from scfm_core.data.members import Members
from scfm_core.data.recipe import CacheConfig, DataConfig, SourceConfig
from scfm_core.data.schema import MANIFEST, Manifest
from scfm_core.data.source import open_source
from scfm_core.data.webdataset import TarWriter
from scfm_core.errors import UserError

SIZES = [(16, 24), (16, 24), (24, 16), (16, 16), (16, 24)]


def picture(height: int, width: int, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (200, 100, 50)).save(buffer, kind, **options)
    return buffer.getvalue()


def write_tars(folder: Path, shards: int = 3) -> Path:
    """Tars of webdataset's own writer, with images of `SIZES` in each; an EXIF tag rotates the last one, a JPEG."""
    import webdataset

    folder.mkdir(parents=True, exist_ok=True)
    with webdataset.ShardWriter(str(folder / "%03d.tar"), maxcount=len(SIZES), verbose=0) as writer:
        for number in range(shards * len(SIZES)):
            height, width = SIZES[number % len(SIZES)]
            fields: dict[str, Any] = {"__key__": f"{number:05d}", "txt": f"caption {number}"}
            if number % len(SIZES) == 4:
                turned = Image.Exif()
                turned[0x0112] = 6
                fields["jpg"] = picture(width, height, "JPEG", exif=turned)
            else:
                fields["png"] = picture(height, width)
            writer.write(fields)
    return folder


def write_mds(folder: Path, **options: Any) -> Path:
    """Several shards of mosaicml-streaming's own writer."""
    from streaming import MDSWriter

    with MDSWriter(out=str(folder), columns={"png": "bytes", "txt": "str"}, size_limit=700, **options) as writer:
        for number in range(9):
            writer.write({"png": picture(*SIZES[number % len(SIZES)]), "txt": f"caption {number}"})
    return folder


def source(uri: object, **more: Any) -> SourceConfig:
    return SourceConfig(name="s", uri=str(uri), **more)


def corpus(of: SourceConfig, cache: Path) -> Corpus:
    """With buckets, which need the sizes in the manifest."""
    return Corpus(
        DataConfig(
            sources=(of,),
            resolution=(16, 16),
            buckets=((16, 16), (16, 24), (24, 16)),
            cache=CacheConfig(dir=str(cache), timeout=20),
        )
    )


def check_every_sample(opened: Corpus, shards: int) -> None:
    assert len(opened) == shards * len(SIZES)
    for item in range(len(opened)):
        record = opened.record(item)
        assert record.image is not None
        assert tuple(record.image.shape[1:]) == SIZES[item % len(SIZES)] == opened.sizes[opened.buckets[item]]


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    with S3Server() as server:
        yield server


class TestWhatIsWritten:
    def test_tars_of_webdataset_are_counted_measured_and_hashed(self, tmp_path):
        folder = write_tars(tmp_path / "tars")
        with pytest.raises(UserError, match="scfm data index"):
            open_source(source(folder), None, 1)
        manifest = index(source(folder), folder, timeout=5)
        assert manifest == Manifest.parse((folder / MANIFEST).read_bytes(), "it")
        assert [entry.name for entry in manifest.shards] == ["000.tar", "001.tar", "002.tar"]
        for entry in manifest.shards:
            content = (folder / entry.name).read_bytes()
            assert (entry.samples, entry.bytes) == (5, len(content))
            assert entry.sha256 == hashlib.sha256(content).hexdigest()
            assert entry.sizes == ((16, 24, 2), (24, 16, 1), (16, 16, 1), (16, 24, 1))
        assert (manifest.encoder, manifest.text_length, manifest.format) == (None, None, "webdataset")
        members = Members.beside(folder / MANIFEST)
        assert members is not None and all(members.table(entry) is not None for entry in manifest.shards)
        check_every_sample(corpus(source(folder), tmp_path / "cache"), 3)
        assert default_output(source(folder)) == folder / MANIFEST

    def test_braces_over_folders_use_the_base_of_open_source(self, tmp_path):
        for name in ("a", "b"):
            write_tars(tmp_path / "sets" / name, shards=2)
        of = source(tmp_path / "sets" / "{a,b}" / "{000..001}.tar")
        output = tmp_path / "listed.json"
        manifest = index(of, output, timeout=5)
        assert [entry.name for entry in manifest.shards] == ["a/000.tar", "a/001.tar", "b/000.tar", "b/001.tar"]
        assert default_output(of) == tmp_path / "sets" / MANIFEST
        check_every_sample(corpus(source(of.uri, manifest=str(output)), tmp_path / "cache"), 4)

    def test_a_single_tar_and_a_split_and_relative_paths(self, tmp_path, monkeypatch):
        write_tars(tmp_path / "root" / "train")
        one = source(tmp_path / "root" / "train" / "001.tar")
        assert [entry.name for entry in index(one, tmp_path / "one.json", timeout=5).shards] == ["001.tar"]
        check_every_sample(corpus(source(one.uri, manifest=str(tmp_path / "one.json")), tmp_path / "cache"), 1)
        part = source(tmp_path / "root", split="train")
        assert default_output(part) == tmp_path / "root" / "train" / MANIFEST
        assert len(index(part, default_output(part), timeout=5).shards) == 3
        assert len(open_source(part, None, 1).manifest.shards) == 3
        monkeypatch.chdir(tmp_path / "root" / "train")
        there = index(source("{000..001}.tar"), Path("here.json"), timeout=5)
        assert [entry.name for entry in there.shards] == ["000.tar", "001.tar"]
        with pytest.raises(UserError, match="split is a subfolder"):
            index(source(one.uri, split="train"), tmp_path, timeout=5)

    def test_a_cache_gets_the_same_manifest_again(self, tiny, tmp_path):
        before = (tiny / "cache" / MANIFEST).read_text()
        manifest = index(source(tiny / "cache"), tmp_path / "again.json", timeout=5)
        assert (tmp_path / "again.json").read_text() == before
        assert manifest.encoder is not None
        assert manifest.text_length == 8

    def test_the_image_field_comes_from_the_source(self, tmp_path):
        folder = tmp_path / "tars"
        folder.mkdir()
        with TarWriter(folder / "0.tar") as tar:
            tar.write("a", {"left.png": picture(8, 9), "right.png": picture(10, 11), "txt": b"x"}, (1, 1))
        manifest = index(source(folder, image=("right.png",)), folder, timeout=5)
        assert manifest.shards[0].sizes == ((10, 11, 1),)

    def test_the_order_is_that_of_the_names_not_of_the_threads(self, tmp_path, monkeypatch):
        folder = write_tars(tmp_path / "tars", shards=6)
        seen: list[int] = []

        def progress(items, total):
            for item in items:
                seen.append(total)
                yield item

        manifest = index(source(folder), folder, timeout=5, threads=4, progress=progress)
        assert [entry.name for entry in manifest.shards] == [f"{n:03d}.tar" for n in range(6)]
        assert seen == [6] * 6
        assert main(["data", "index", str(folder), "--threads", "1"]) == 0
        assert open_source(source(folder), None, 5).manifest == manifest


class TestMds:
    @pytest.mark.parametrize("options", [{}, {"hashes": ["sha256"]}, {"compression": "zstd:3"}])
    def test_sizes_and_missing_hashes_are_added(self, tmp_path, options):
        folder = write_mds(tmp_path / "mds", **options)
        of = source(folder, format="mds")
        with pytest.raises(UserError, match="does not have the sizes of the images"):
            corpus(of, tmp_path / "cache")
        manifest = index(of, folder, timeout=5)
        assert len(manifest.shards) > 2
        assert [size for entry in manifest.shards for h, w, n in entry.sizes for size in [(h, w)] * n] == [
            SIZES[number % len(SIZES)] for number in range(9)
        ]
        opened = corpus(of, tmp_path / "cache")
        records = [opened.record(item) for item in range(9)]
        assert [record.caption for record in records] == [f"caption {number}" for number in range(9)]
        if "compression" not in options:
            for entry in manifest.shards:
                assert entry.sha256 == hashlib.sha256((folder / entry.name).read_bytes()).hexdigest()

    def test_a_damaged_shard_is_excluded_by_braces(self, tmp_path):
        folder = write_mds(tmp_path / "mds")
        path = folder / "shard.00001.mds"
        path.write_bytes(path.read_bytes()[:-9])
        with pytest.raises(
            UserError, match=r"1 shards or samples[^$]*shard\.00001\.mds is corrupt: it has .* index\.json"
        ):
            index(source(folder, format="mds"), folder, timeout=5)
        chosen = source(folder / "shard.{00000,00002}.mds", format="mds")
        manifest = index(chosen, tmp_path / "m.json", timeout=5)
        assert [bool(entry.sizes) for entry in manifest.shards[:3]] == [True, False, True]
        listed = open_source(source(chosen.uri, format="mds", manifest=str(tmp_path / "m.json")), None, 1)
        assert [entry.name for entry in listed.manifest.shards] == ["shard.00000.mds", "shard.00002.mds"]

    def test_folders_without_mds_are_refused(self, tmp_path):
        write_tars(tmp_path / "tars")
        with pytest.raises(UserError, match=r"no .*index\.json"):
            index(source(tmp_path / "tars", format="mds"), tmp_path, timeout=5)
        folder = write_mds(tmp_path / "mds")
        with pytest.raises(UserError, match=r"'x.mds', which .* does not list"):
            index(source(folder / "{x,shard.00000}.mds", format="mds"), tmp_path, timeout=5)


class TestRemote:
    @pytest.mark.parametrize("form", ["", "/{000..002}.tar"])
    def test_a_prefix_and_braces_of_s3(self, s3, tmp_path, monkeypatch, form):
        for name, value in s3.environment.items():
            monkeypatch.setenv(name, value)
        bucket = f"bucket{len(form)}"
        s3.upload(write_tars(tmp_path / "tars"), bucket, "deep/set")
        s3.upload_bytes(b"other", bucket, "deep/set/readme.md")
        s3.upload_bytes(b"other", bucket, "deep/set/below/9.tar")
        scratch = tmp_path / "scratch"
        scratch.mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(scratch))
        uri = f"s3://{bucket}/deep/set{form}"
        with pytest.raises(UserError, match="--output"):
            default_output(source(uri))
        output, left = tmp_path / "m.json", []

        def progress(items, total):
            yield from items
            left.extend(path.name for path in scratch.rglob("*") if path.is_file())

        manifest = index(source(uri), output, timeout=20, threads=2, progress=progress)
        assert left == []  # each copy is deleted after it was read
        assert list(scratch.iterdir()) == []
        assert manifest == index(source(tmp_path / "tars"), tmp_path, timeout=5)
        check_every_sample(corpus(source(uri, manifest=str(output)), tmp_path / "cache"), 3)
        s3.upload_bytes(output.read_bytes(), bucket, f"deep/set/{MANIFEST}")
        check_every_sample(corpus(source(uri), tmp_path / "cache"), 3)

    def test_missing_and_damaged_shards_are_all_named(self, s3, tmp_path, monkeypatch):
        for name, value in s3.environment.items():
            monkeypatch.setenv(name, value)
        folder = write_tars(tmp_path / "tars")
        (folder / "001.tar").write_bytes((folder / "001.tar").read_bytes()[:2000])
        s3.upload(folder, "damaged")
        with pytest.raises(UserError) as raised:
            index(source("s3://damaged/{000..004}.tar"), tmp_path / "m.json", timeout=20)
        text = str(raised.value)
        assert "3 shards or samples" in text
        assert "shard s3://damaged/001.tar" in text
        assert "there is no s3://damaged/003.tar" in text
        assert "there is no s3://damaged/004.tar" in text
        assert not (tmp_path / "m.json").exists()
        with pytest.raises(UserError, match=r"has no \.tar|there is no s3"):
            index(source("s3://damaged/nothing"), tmp_path / "m.json", timeout=20)

    def test_http_needs_braces(self, tmp_path):
        with FileServer(write_tars(tmp_path / "tars")) as server:
            with pytest.raises(UserError, match=r"cannot be listed.*with braces"):
                index(source(server.endpoint), tmp_path / "m.json", timeout=5)
            with pytest.raises(UserError, match="name of the bucket or host"):
                index(source("http://{a,b}/0.tar"), tmp_path / "m.json", timeout=5)
            uri = f"{server.endpoint}/{{000..002}}.tar"
            manifest = index(source(uri), tmp_path / "m.json", timeout=20)
            assert manifest.samples == 15

    def test_gives_up_early_if_the_server_is_dead(self, tmp_path, monkeypatch):
        tried: list[str] = []
        fetch = module.fetch

        def counted(uri: str, *rest: Any) -> None:
            tried.append(uri)
            fetch(uri, *rest)

        monkeypatch.setattr(module, "fetch", counted)
        with pytest.raises(UserError, match="The first 8 shards were all unavailable"):
            index(source("http://127.0.0.1:9/{000..199}.tar"), tmp_path / "m.json", timeout=0.5, threads=4)
        assert len(tried) < 40

    def test_a_full_disk_says_which(self, tmp_path, monkeypatch):
        def full(uri, target, deadline):
            raise OSError(28, "No space left on device", str(target))

        monkeypatch.setattr(module, "fetch", full)
        with pytest.raises(UserError, match="full"):
            index(source("http://127.0.0.1:9/{000..003}.tar"), tmp_path / "m.json", timeout=0.5)


class TestFaults:
    def write_bad(self, folder: Path, count: int = 1) -> None:
        """Samples without a valid size."""
        with TarWriter(folder / "bad.tar") as tar:
            tar.write("good", {"png": picture(8, 8), "txt": b"x"}, (8, 8))
            for number in range(count):
                tar.write(f"empty{number}", {"png": b"", "txt": b"x"}, (8, 8))
            tar.write("text", {"png": b"no image", "txt": b"x"}, (8, 8))
            tar.write("ico", {"png": picture(8, 8, "ICO"), "txt": b"x"}, (8, 8))
            tar.write("none", {"tiff": picture(8, 8), "txt": b"x"}, (8, 8))

    def test_all_are_listed_and_nothing_is_written(self, tmp_path):
        folder = write_tars(tmp_path / "tars", shards=5)
        (folder / MANIFEST).write_text("the old one")
        for name, damage in {"000": lambda c: c[:1500], "001": lambda c: b"\1" + c[1:], "002": lambda c: b""}.items():
            (folder / f"{name}.tar").write_bytes(damage((folder / f"{name}.tar").read_bytes()))
        os.mkfifo(folder / "pipe.tar")  # not a regular file: not listed
        self.write_bad(folder)
        with pytest.raises(UserError) as raised:
            index(source(folder), folder, timeout=5)
        text = str(raised.value)
        assert "7 shards or samples" in text
        assert "braces" in text
        for part in (
            "000.tar is not a",
            "001.tar is not an intact tar",
            "002.tar is not a tar",
            "'empty0' of shard",
            "'text' of shard",
            "'ico' of shard",
            "'none' of shard",
            " or image, but tiff, txt. Name the right field with `image:`",
        ):
            assert part in text
        assert "003.tar" not in text
        assert "'good'" not in text
        assert (folder / MANIFEST).read_text() == "the old one"
        assert not list(folder.glob("manifest.json.*"))
        rest = index(source(folder / "{003..004}.tar"), folder, timeout=5)
        assert rest.samples == 10
        assert (folder / MANIFEST).read_text() == rest.dumps()

    @pytest.mark.parametrize("where", ["data", "padding", "header", "blocks"])
    def test_a_truncation_anywhere_is_found(self, tmp_path, where):
        write_tars(tmp_path, shards=1)
        with tarfile.open(tmp_path / "000.tar") as tar:
            third = tar.getmembers()[2]
        size = {
            "data": third.offset_data + 10,
            "padding": third.offset_data + third.size + 1,
            "header": third.offset + 100,
            "blocks": third.offset,
        }[where]
        content = (tmp_path / "000.tar").read_bytes()
        (tmp_path / "000.tar").write_bytes(content[:size])
        with pytest.raises(
            UserError,
            match=r"000\.tar (is truncated|has no end mark: it is truncated|is not an intact tar \(unexpected end of data\))",
        ):
            index(source(tmp_path), tmp_path, timeout=5)
        # After a crash a file may have its full size, but zeros at its end.
        (tmp_path / "000.tar").write_bytes(content[: third.offset] + bytes(2 << 20))
        with pytest.raises(UserError, match=rf"ends at byte {third.offset} of"):
            index(source(tmp_path), tmp_path, timeout=5)
        (tmp_path / "000.tar").write_bytes(content[: third.offset] + bytes(512) + content[third.offset + 512 :])
        with pytest.raises(UserError, match=rf"ends at byte {third.offset} of"):
            index(source(tmp_path), tmp_path, timeout=5)

    def test_a_share_of_unreadable_images_is_tolerated(self, tmp_path):
        """They get the size of the sample before, and training finds them."""
        folder = write_tars(tmp_path / "tars")
        with tarfile.open(folder / "000.tar") as tar:
            place = tar.getmember("00002.png").offset_data
        with (folder / "000.tar").open("r+b") as file:
            file.seek(place)
            file.write(b"no image")
        with pytest.raises(UserError, match=r"1 shards or samples.*\n.*'00002'"):
            index(source(folder), folder, timeout=5, max_bad_fraction=1 / 16)
        manifest = index(source(folder), folder, timeout=5, max_bad_fraction=1 / 15)
        assert manifest.samples == 15
        assert manifest.shards[0].sizes == ((16, 24, 3), (16, 16, 1), (16, 24, 1))
        assert manifest.shards[1].sizes == ((16, 24, 2), (24, 16, 1), (16, 16, 1), (16, 24, 1))

    def test_all_are_counted_and_twenty_are_listed(self, tmp_path):
        self.write_bad(tmp_path, count=40)
        with pytest.raises(UserError) as raised:
            index(source(tmp_path), tmp_path, timeout=5)
        assert "43 shards or samples" in str(raised.value)
        assert str(raised.value).count("of shard") == 20
        assert "... and 23 more" in str(raised.value)

    def test_damaged_shards_are_not_taken_for_a_dead_server(self, tmp_path):
        for number in range(12):
            (tmp_path / f"{number:02d}.tar").write_bytes(b"no tar")
        with pytest.raises(UserError, match="12 shards or samples"):
            index(source(tmp_path), tmp_path, timeout=5)

    def test_missing_and_forbidden_local_shards(self, tmp_path):
        folder = write_tars(tmp_path / "tars")
        (folder / "003.tar").mkdir()
        with pytest.raises(UserError, match=r"2 shards[^$]*003\.tar cannot be read[^$]*004\.tar cannot be read"):
            index(source(folder / "{000..004}.tar"), folder, timeout=5)

    def test_a_tar_without_samples(self, tmp_path):
        (tmp_path / "LICENSE").write_text("x")
        with tarfile.open(tmp_path / "0.tar", "w") as tar:
            tar.add(tmp_path / "LICENSE", "LICENSE")
        with pytest.raises(UserError, match=r"0\.tar has no samples"):
            index(source(tmp_path), tmp_path, timeout=5)

    def test_a_hostile_member_is_refused(self, tmp_path):
        with TarWriter(tmp_path / "0.tar") as tar:
            tar.write("a", {"png": picture(8, 8), "pickle": b"x"}, (8, 8))
        with pytest.raises(UserError, match="refused"):
            index(source(tmp_path), tmp_path, timeout=5)

    def test_names_that_open_source_would_refuse_are_not_listed(self, tmp_path):
        write_tars(tmp_path / "tars", shards=1)
        (tmp_path / "tars" / "000.tar").rename(tmp_path / "tars" / "a:b.tar")
        with pytest.raises(UserError, match="outside its folder"):
            index(source(tmp_path / "tars"), tmp_path, timeout=5)

    @pytest.mark.parametrize(
        "detail", [None, b"{", b"[]", b'{"height": 16}', b'{"height": 0, "width": 8}', b'{"height": "8", "width": 8}']
    )
    def test_a_cached_sample_without_its_size(self, tmp_path, detail):
        fields = {"safetensors": save({"latents": torch.zeros(1, 2, 2)}), "txt": b"x"}
        with TarWriter(tmp_path / "0.tar") as tar:
            tar.write("a", fields | ({} if detail is None else {"json": detail}), (8, 8))
        with pytest.raises(UserError, match=r"'a' of shard .* json does not have height and width"):
            index(source(tmp_path), tmp_path, timeout=5)


class TestRefusals:
    def test_a_cache_without_manifest(self, tiny, tmp_path):
        for path in (tiny / "cache").glob("*.tar"):
            (tmp_path / path.name).symlink_to(path)
        with pytest.raises(UserError, match=r"which encoder .* there is no .*`scfm data encode` writes its own"):
            index(source(tmp_path), tmp_path, timeout=5)
        of_images = Manifest.parse((tiny / "cache" / MANIFEST).read_bytes(), "it")
        Manifest(shards=of_images.shards).write(tmp_path / MANIFEST)
        with pytest.raises(UserError, match=r"which encoder .* it is not in"):
            index(source(tmp_path), tmp_path, timeout=5)
        borrowed = source(tmp_path, manifest=str(tiny / "cache" / MANIFEST))
        assert index(borrowed, tmp_path, timeout=5) == of_images

    def test_a_mixture_of_cached_samples_and_images(self, tiny, tmp_path):
        for path in (tiny / "cache").iterdir():
            (tmp_path / path.name).symlink_to(path)
        write_tars(tmp_path, shards=1)
        with pytest.raises(UserError, match="mix cached samples and images"):
            index(source(tmp_path), tmp_path / "m.json", timeout=5)

    def test_sources_without_shards(self, tmp_path):
        folder = write_tars(tmp_path / "tars", shards=1)
        with pytest.raises(UserError, match=r"no folder .*nowhere.* for m\.json"):
            index(source(folder), tmp_path / "nowhere" / "m.json", timeout=5)
        with pytest.raises(UserError, match="there is no folder"):
            index(source(tmp_path / "nothing"), tmp_path, timeout=5)
        with pytest.raises(UserError, match="If they are in subfolders"):
            index(source(tmp_path), tmp_path, timeout=5)
        with pytest.raises(UserError, match="does not need a manifest"):
            index(source(folder, format="folder"), tmp_path, timeout=5)
        with pytest.raises(UserError, match=r"mmm cannot be written \(File name too long\)"):
            index(source(folder), tmp_path / ("m" * 252), timeout=5)  # the temporary file has a longer name


def test_the_manifest_is_plain_json(tmp_path):
    index(source(write_tars(tmp_path / "tars")), tmp_path / "tars", timeout=5)
    assert json.loads((tmp_path / "tars" / MANIFEST).read_text())["samples"] == 15
