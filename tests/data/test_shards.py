"""Shards: what goes in comes out bit by bit, and whatever is wrong with a cache is named before training starts."""

import contextlib
import dataclasses
import gzip
import hashlib
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save

from scfm_core.data.schema import MANIFEST, Manifest, Record
from scfm_core.data.webdataset import CachedDataset, ShardWriter
from scfm_core.errors import UserError

DRAFT = Manifest(encoder="e" * 64, text_length=4, resolution=(16, 24), samples=0, shards=())
VICTIM = "shard-000001.tar"  # the middle one of the three that the fixture writes


def make_record(index: int, dtype: torch.dtype = torch.bfloat16) -> Record:
    generator = torch.Generator().manual_seed(index)
    width = 2 + index % 2  # one shard may hold several sizes
    return Record(
        key=f"{index:08d}",
        caption=f"猫 {index} 🐈\nnaïve, zweite Zeile",
        latents=torch.randn(1, 2, width, generator=generator).to(dtype),
        text=torch.randn(4, 3, generator=generator).to(dtype),
        pooled=torch.randn(5, generator=generator).to(dtype),
    )


def write_cache(folder: Path, count: int = 7, samples_per_shard: int = 3, dtype: torch.dtype = torch.bfloat16) -> Path:
    with ShardWriter(folder, DRAFT, samples_per_shard) as writer:
        for index in range(count):
            writer.write(make_record(index, dtype), {"height": 16, "width": 24, "source": f"{index}.png"})
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def bits(tensor: torch.Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    return tensor.dtype, tensor.shape, tensor.contiguous().view(torch.uint8).numpy().tobytes()


def edit_manifest(folder: Path, **changes: object) -> None:
    path = folder / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_entry(folder: Path, name: str, /, **changes: object) -> None:
    shards = json.loads((folder / MANIFEST).read_text())["shards"]
    shards = [{**shard, **changes} if shard["name"] == name else shard for shard in shards]
    edit_manifest(folder, shards=shards, samples=sum(shard["samples"] for shard in shards))


def reseal(folder: Path, name: str, /, **changes: object) -> None:
    """Make size and hash in the manifest those of the file: the damage was there when the cache was written."""
    content = (folder / name).read_bytes()
    edit_entry(folder, name, bytes=len(content), sha256=hashlib.sha256(content).hexdigest(), **changes)


def flip(path: Path, offset: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1 << bit
    path.write_bytes(content)


def member_offset(path: Path, name: str) -> int:
    with tarfile.open(path) as tar:
        return tar.getmember(name).offset_data


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """Seven samples in three shards: 3, 3, 1."""
    return write_cache(tmp_path / "cache")


@pytest.fixture
def tiny_disk(tmp_path: Path):
    """A file system of one megabyte."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if not mounted or mounted.returncode:
        pytest.skip("a file system can only be mounted by root, on Linux")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


class TestRoundTrip:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    def test_every_bit_and_letter_comes_back(self, tmp_path, dtype):
        dataset = CachedDataset(write_cache(tmp_path / "cache", dtype=dtype))
        assert len(dataset) == 7
        for index in range(7):
            written, read = make_record(index, dtype), dataset[index]
            assert (read.key, read.caption) == (written.key, written.caption)
            assert dataset.caption(index) == written.caption
            for name in ("latents", "text", "pooled"):
                assert bits(getattr(read, name)) == bits(getattr(written, name)), name
            assert read.image is None

    def test_manifest_counts_and_hashes_what_lies_there(self, cache):
        assert names(cache) == [MANIFEST, "shard-000000.tar", "shard-000001.tar", "shard-000002.tar"]
        manifest = Manifest.read(cache)
        assert (manifest.encoder, manifest.text_length, manifest.resolution) == ("e" * 64, 4, (16, 24))
        assert manifest.samples == 7
        assert [shard.samples for shard in manifest.shards] == [3, 3, 1]
        for shard in manifest.shards:
            content = (cache / shard.name).read_bytes()
            assert (shard.bytes, shard.sha256) == (len(content), hashlib.sha256(content).hexdigest())

    def test_full_last_shard_is_not_followed_by_an_empty_one(self, tmp_path):
        folder = write_cache(tmp_path / "cache", count=6)
        assert [shard.samples for shard in Manifest.read(folder).shards] == [3, 3]
        assert "shard-000002.tar" not in names(folder)

    def test_equal_input_gives_equal_hashes_on_another_day(self, cache, tmp_path, monkeypatch):
        monkeypatch.setattr(time, "time", lambda: 1e9)
        again = write_cache(tmp_path / "again")
        assert Manifest.read(again) == Manifest.read(cache)
        assert CachedDataset(again).fingerprint == CachedDataset(cache).fingerprint

    def test_other_input_gives_another_fingerprint(self, cache, tmp_path):
        other = write_cache(tmp_path / "other", dtype=torch.float32)
        assert names(other) == names(cache)
        assert CachedDataset(other).fingerprint != CachedDataset(cache).fingerprint

    def test_tensors_that_are_views_are_stored_as_they_look(self, tmp_path):
        record = make_record(0)
        record = dataclasses.replace(record, latents=torch.arange(6.0).view(1, 2, 3).transpose(1, 2))
        with ShardWriter(tmp_path, DRAFT) as writer:
            writer.write(record, {})
        assert torch.equal(CachedDataset(tmp_path)[0].latents, record.latents)

    def test_the_webdataset_library_reads_the_same(self, cache):
        import webdataset

        shards = [str(cache / shard.name) for shard in Manifest.read(cache).shards]
        samples = list(webdataset.WebDataset(shards, shardshuffle=False))
        assert [sample["__key__"] for sample in samples] == [f"{index:08d}" for index in range(7)]
        for index, sample in enumerate(samples):
            written, tensors = make_record(index), load(sample["safetensors"])
            assert sample["txt"].decode() == written.caption
            assert json.loads(sample["json"]) == {"height": 16, "width": 24, "source": f"{index}.png"}
            assert tensors.keys() == {"latents", "text", "pooled"}
            assert bits(tensors["latents"]) == bits(written.latents)


def cut(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes()[:-512])


def lengthen(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes() + b"\0" * 512)


def flip_a_latent_bit(shard: Path) -> None:
    flip(shard, member_offset(shard, "00000004.safetensors") + 200)


def zero_first_header(shard: Path) -> None:
    shard.write_bytes(b"\0" * 512 + shard.read_bytes()[512:])


def zero_inner_header(shard: Path) -> None:
    content, header = bytearray(shard.read_bytes()), member_offset(shard, "00000004.txt") - 512
    content[header : header + 512] = b"\0" * 512
    shard.write_bytes(content)


class TestDamagedShards:
    @pytest.mark.parametrize(
        ("damage", "what"),
        [
            (cut, "bytes, the manifest says"),
            (lengthen, "bytes, the manifest says"),
            (flip_a_latent_bit, "corrupt"),
            (zero_first_header, "corrupt"),
            (zero_inner_header, "corrupt"),
            (Path.unlink, "missing"),
        ],
    )
    def test_is_named(self, cache, damage, what):
        damage(cache / VICTIM)
        with pytest.raises(UserError, match=f"{VICTIM}.*{what}.*[Cc]opy it again"):
            CachedDataset(cache)

    @pytest.mark.parametrize("damage", [cut, lengthen, zero_first_header, zero_inner_header, Path.unlink])
    def test_is_named_without_hashing(self, cache, damage):
        """`verify=False` skips the hash, not the size, and every member's header is walked either way."""
        damage(cache / VICTIM)
        with pytest.raises(UserError, match=VICTIM):
            CachedDataset(cache, verify=False)

    def test_hashing_can_be_switched_off(self, cache):
        flip_a_latent_bit(cache / VICTIM)
        assert len(CachedDataset(cache, verify=False)) == 7

    @pytest.mark.parametrize("claimed", [2, 4])
    def test_wrong_sample_count(self, cache, claimed):
        edit_entry(cache, VICTIM, samples=claimed)
        with pytest.raises(UserError, match=f"{VICTIM} holds 3 complete samples, the manifest says {claimed}"):
            CachedDataset(cache)

    @pytest.mark.parametrize("member", ["00000003.txt", "00000004.json", "00000005.safetensors"])
    def test_sample_that_lacks_a_member_does_not_count(self, cache, member):
        with tarfile.open(cache / VICTIM) as source, tarfile.open(cache / "rest.tar", "w") as target:
            for info in source:
                if info.name != member:
                    target.addfile(info, source.extractfile(info))
        (cache / "rest.tar").replace(cache / VICTIM)
        reseal(cache, VICTIM)
        with pytest.raises(UserError, match=f"{VICTIM} holds 2 complete samples, the manifest says 3"):
            CachedDataset(cache)

    @pytest.mark.parametrize("kept", [512 * 2 + 100, 512 * 5, 512 * 7 + 1])
    def test_shard_that_was_cut_before_it_was_hashed(self, cache, kept):
        (cache / VICTIM).write_bytes((cache / VICTIM).read_bytes()[:kept])
        reseal(cache, VICTIM)
        with pytest.raises(UserError, match=VICTIM):
            CachedDataset(cache)

    def test_file_that_is_no_tar(self, cache):
        (cache / VICTIM).write_bytes(b"<html>404 not found</html>" * 100)
        reseal(cache, VICTIM)
        with pytest.raises(UserError, match=f"{VICTIM} is not a readable tar"):
            CachedDataset(cache)

    def test_compressed_shard_is_refused_at_the_start(self, cache):
        (cache / VICTIM).write_bytes(gzip.compress((cache / VICTIM).read_bytes()))
        reseal(cache, VICTIM)
        with pytest.raises(UserError, match=f"{VICTIM} is not a readable tar"):
            CachedDataset(cache)

    def test_sample_that_cannot_be_decoded_is_named_with_its_shard(self, cache):
        flip(cache / VICTIM, member_offset(cache / VICTIM, "00000004.safetensors") + 7, bit=7)  # its header's length
        dataset = CachedDataset(cache, verify=False)
        assert dataset[3].key == "00000003"
        with pytest.raises(UserError, match=f"'00000004' of shard .*{VICTIM} cannot be decoded"):
            dataset[4]

    def test_record_without_one_of_its_tensors(self, cache):
        with tarfile.open(cache / VICTIM, "w") as tar:
            add_sample(tar, "only", save({"latents": torch.zeros(1), "text": torch.zeros(1)}))
        reseal(cache, VICTIM, samples=1)
        with pytest.raises(UserError, match=f"'only' of shard .*{VICTIM} cannot be decoded .*pooled"):
            CachedDataset(cache)[3]

    @pytest.mark.parametrize(
        "read",
        [
            lambda dataset: dataset[4],
            lambda dataset: dataset.caption(4),
        ],
        ids=["record", "caption"],
    )
    def test_caption_that_is_not_utf8(self, cache, read):
        flip(cache / VICTIM, member_offset(cache / VICTIM, "00000004.txt"), bit=6)
        with pytest.raises(UserError, match=VICTIM):
            read(CachedDataset(cache, verify=False))


class TestDamagedManifest:
    def test_no_folder(self, tmp_path):
        with pytest.raises(UserError, match=r"no folder .*nowhere.*scfm data encode"):
            CachedDataset(tmp_path / "nowhere")

    def test_no_manifest(self, cache):
        (cache / MANIFEST).unlink()
        with pytest.raises(UserError, match=rf"has no {MANIFEST}.*did not finish.*data.format=folder"):
            CachedDataset(cache)

    def test_cut_json(self, cache):
        (cache / MANIFEST).write_text((cache / MANIFEST).read_text()[:-30])
        with pytest.raises(UserError, match=rf"{MANIFEST} is damaged"):
            CachedDataset(cache)

    @pytest.mark.parametrize("change", [{"version": 2}, {"format": "other"}])
    def test_other_version(self, cache, change):
        edit_manifest(cache, **change)
        with pytest.raises(UserError, match=rf"{MANIFEST} is of another format or version"):
            CachedDataset(cache)

    @pytest.mark.parametrize("change", [{"shards": [{"name": "x"}]}, {"shards": 1}, {"resolution": None}, {"new": 1}])
    def test_other_fields(self, cache, change):
        edit_manifest(cache, **change)
        with pytest.raises(UserError, match=rf"{MANIFEST} is damaged"):
            CachedDataset(cache)

    def test_no_samples(self, tmp_path):
        write_cache(tmp_path / "empty", count=0)
        with pytest.raises(UserError, match="lists no sample"):
            CachedDataset(tmp_path / "empty")

    def test_lost_entry(self, cache):
        """A manifest that lost a shard would train on less, silently."""
        edit_manifest(cache, shards=json.loads((cache / MANIFEST).read_text())["shards"][:2])
        with pytest.raises(UserError, match=MANIFEST):
            CachedDataset(cache)

    @pytest.mark.parametrize("content", ['"text"', "5", "null"])
    def test_json_that_is_no_object(self, cache, content):
        (cache / MANIFEST).write_text(content)
        with pytest.raises(UserError, match=rf"{MANIFEST} is damaged"):
            CachedDataset(cache)

    def test_no_flipped_bit_ends_in_a_traceback(self, tmp_path):
        folder = write_cache(tmp_path / "cache", count=1)
        manifest = folder / MANIFEST
        good = manifest.read_bytes()
        for offset in range(len(good)):
            flip(manifest, offset, bit=7 if offset % 2 else offset % 7)  # bit 7 breaks the UTF-8
            with contextlib.suppress(UserError):
                CachedDataset(folder)
            manifest.write_bytes(good)

    @pytest.mark.parametrize("name", ["../x.tar", "sub/x.tar", "{parent}/x.tar"])
    def test_shard_outside_the_folder(self, cache, name):
        """The shard is there and fits the manifest: nothing but its place is wrong."""
        name = name.format(parent=cache.parent)
        target = cache / name
        target.parent.mkdir(exist_ok=True)
        shutil.copy(cache / VICTIM, target)
        edit_entry(cache, VICTIM, name=name)
        with pytest.raises(UserError, match=r"names a shard outside its folder: '.*x\.tar'"):
            CachedDataset(cache)


class TestInterruptedWriting:
    def write_and_fail(self, folder: Path) -> None:
        with pytest.raises(KeyboardInterrupt), ShardWriter(folder, DRAFT, 2) as writer:
            for index in range(3):
                writer.write(make_record(index), {})
            raise KeyboardInterrupt

    def test_leaves_no_manifest_and_no_partial_shard(self, tmp_path):
        self.write_and_fail(tmp_path / "cache")
        assert names(tmp_path / "cache") == ["shard-000000.tar"]
        with pytest.raises(UserError, match="did not finish"):
            CachedDataset(tmp_path / "cache")

    def test_can_be_done_again(self, tmp_path):
        self.write_and_fail(tmp_path / "cache")
        assert len(CachedDataset(write_cache(tmp_path / "cache"))) == 7

    def test_is_silent_about_itself(self, tmp_path, monkeypatch):
        complaints = []
        monkeypatch.setattr(sys, "unraisablehook", complaints.append)
        self.write_and_fail(tmp_path / "cache")
        assert not complaints

    def test_full_disk_between_shards(self, tiny_disk):
        with pytest.raises(OSError, match="No space left"), ShardWriter(tiny_disk / "cache", DRAFT, 1000) as writer:
            for index in range(1000):
                writer.write(make_record(index), {})
        assert names(tiny_disk / "cache") == []

    def test_full_disk_at_the_very_end(self, tiny_disk):
        filler = tiny_disk / "filler"
        filler.write_bytes(b"\0" * (shutil.disk_usage(tiny_disk).free - 4096))
        with pytest.raises(OSError, match="No space left"), ShardWriter(tiny_disk / "cache", DRAFT, 1000) as writer:
            writer.write(make_record(0), {})  # less than the writer's buffer: it reaches the disk on closing
        assert names(tiny_disk / "cache") == []


class Bomb:
    """Unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def add_member(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def add_sample(tar: tarfile.TarFile, key: str, tensors: bytes) -> None:
    for extension, content in (("safetensors", tensors), ("txt", b"a caption"), ("json", b"{}")):
        add_member(tar, f"{key}.{extension}", content)


def add_link(tar: tarfile.TarFile, name: str, target: str, kind: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    tar.addfile(info)


def test_hostile_members_are_neither_extracted_nor_executed(cache, tmp_path, monkeypatch):
    working, marker, outside = tmp_path / "working", tmp_path / "executed", tmp_path / "outside"
    working.mkdir()
    monkeypatch.chdir(working)
    bomb, tensors = pickle.dumps(Bomb(marker)), save({name: torch.ones(1) for name in ("latents", "text", "pooled")})
    secret = tmp_path / "secret"
    secret.write_text("not for training")
    with tarfile.open(cache / VICTIM, "w") as tar:
        add_sample(tar, "good", tensors)
        for extension in ("pyd", "pkl", "pickle", "pth", "py"):
            add_member(tar, f"good.{extension}", bomb)
        add_sample(tar, "../../outside", tensors)
        add_sample(tar, str(outside), tensors)  # an absolute path is a key like any other
        for key, kind in (("symbolic", tarfile.SYMTYPE), ("hard", tarfile.LNKTYPE)):
            add_member(tar, f"{key}.safetensors", tensors)
            add_member(tar, f"{key}.json", b"{}")
            add_link(tar, f"{key}.txt", str(secret), kind)
        add_link(tar, "fifo.txt", "", tarfile.FIFOTYPE)
    reseal(cache, VICTIM, samples=2)
    before = sorted(tmp_path.rglob("*"))

    dataset = CachedDataset(cache)
    records = [dataset[index] for index in range(len(dataset))]

    assert [record.key for record in records[3:5]] == ["good", str(outside)]
    assert {record.caption for record in records[3:5]} == {"a caption"}
    assert sorted(tmp_path.rglob("*")) == before
    assert not marker.exists()


def test_pickle_in_place_of_tensors_is_not_executed(cache, tmp_path):
    with tarfile.open(cache / VICTIM, "w") as tar:
        add_sample(tar, "bad", pickle.dumps(Bomb(tmp_path / "executed")))
    reseal(cache, VICTIM, samples=1)
    with pytest.raises(UserError, match=f"'bad' of shard .*{VICTIM} cannot be decoded"):
        CachedDataset(cache)[3]
    assert not (tmp_path / "executed").exists()
