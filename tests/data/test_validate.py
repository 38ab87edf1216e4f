"""`scfm data validate`: lists every fault, for any combination of faults."""

import dataclasses
import hashlib
import io
import json
import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load, save
from storage import S3Server

from data_tools import validate as module
from data_tools.index import index
from data_tools.validate import Problem, format_problems, validate
from recipes.cli import main
from scfm_core import files
from scfm_core.data.corpus import Corpus
from scfm_core.data.recipe import CacheConfig, DataConfig, SourceConfig
from scfm_core.data.schema import MANIFEST, Manifest, ShardEntry
from scfm_core.data.source import PADDING
from scfm_core.data.webdataset import TarWriter
from scfm_core.errors import UserError

LENGTH = 6
KINDS: dict[str, Any] = {"text": "tokens", "pooled": "vector"}
Fields = dict[str, bytes]


def picture(number: int, kind: str = "PNG", size: int = 16) -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(number).integers(0, 256, (size, size, 3), np.uint8)
    Image.fromarray(noise).save(buffer, kind)
    return buffer.getvalue()


def image_fields(number: int) -> Fields:
    return {"png": picture(number), "txt": f"caption {number}".encode()}


def tensors(number: int, height: int = 16, tokens: int = LENGTH) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(number)
    shapes = {"latents": (2, height // 2, 8), "text": (tokens, 3), "pooled": (5,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def cached_fields(number: int, **changes: torch.Tensor) -> Fields:
    return {"safetensors": save(tensors(number) | changes), "txt": f"caption {number}".encode()}


def write(folder: Path, shards: dict[str, list[tuple[str, Fields]]], *, height: int = 16, **draft: Any) -> Path:
    """Tars of these samples, with a correct manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    entries: list[ShardEntry] = []
    for name, samples in shards.items():
        writer = TarWriter(folder / name)
        with writer:
            for key, fields in samples:
                writer.write(key, fields, (height, 16))
        entries.append(writer.entry)
    Manifest(shards=tuple(entries), **draft).write(folder / MANIFEST)
    return folder


def images(folder: Path, changes: dict[str, Fields | None] | None = None, shards: int = 3) -> Path:
    """Shards of four samples, `00` to `03` in the first; `changes` replace their fields, by key."""
    numbered = {f"{number:02d}": image_fields(number) for number in range(4 * shards)}
    return write(folder, _truncate(numbered, changes or {}))


def cache(folder: Path, changes: dict[str, Fields | None] | None = None, shards: int = 3) -> Path:
    numbered = {f"{number:02d}": cached_fields(number) for number in range(4 * shards)}
    return write(folder, _truncate(numbered, changes or {}), encoder="e" * 64, fields=KINDS, text_length=LENGTH)


def _truncate(numbered: dict[str, Fields], changes: dict[str, Any]) -> dict[str, list[tuple[str, Fields]]]:
    samples = list((numbered | changes).items())
    return {f"{at // 4}.tar": samples[at : at + 4] for at in range(0, len(samples), 4)}


def open_(*folders: Any, **changes: Any) -> Corpus:
    sources = tuple(
        folder if isinstance(folder, SourceConfig) else SourceConfig(name=folder.name, uri=str(folder))
        for folder in folders
    )
    return Corpus(DataConfig(sources=sources, resolution=(16, 16), max_bad_fraction=0.5, **changes))


def found(problems: list[Problem]) -> dict[tuple[str, str | None], str]:
    """(file, key) -> reason; each occurs at most once."""
    listed = {(problem.shard.rpartition("/")[2], problem.key): problem.reason for problem in problems}
    assert len(listed) == len(problems)
    return listed


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    with S3Server() as server:
        yield server


class TestNoProblems:
    @pytest.mark.processes
    def test_images_caches_and_folders(self, tiny, tmp_path):
        assert validate(open_(images(tmp_path / "images"))) == []
        assert validate(open_(cache(tmp_path / "cache"))) == []
        assert validate(open_(tiny / "cache"), processes=2) == []
        assert validate(open_(SourceConfig(name="f", uri=str(tiny / "digits"), format="folder"))) == []

    def test_trimmed_padding_and_two_sizes(self, tmp_path):
        folder = tmp_path / "cache"
        folder.mkdir()
        padding = save({"text": torch.zeros(LENGTH, 3)})
        (folder / PADDING).write_bytes(padding)
        parts = []
        for number, height in enumerate((16, 32)):
            samples = [
                (f"{height}-{at}", {"safetensors": save(tensors(at, height, tokens=2 + at)), "txt": b"x"})
                for at in range(3)
            ]
            write(folder, {f"{number}.tar": samples}, height=height, encoder="e", fields=KINDS, text_length=LENGTH)
            parts.append(Manifest.parse((folder / MANIFEST).read_bytes(), "it").shards[0])
        digest = hashlib.sha256(padding).hexdigest()
        Manifest(encoder="e", fields=KINDS, text_length=LENGTH, padding=digest, shards=tuple(parts)).write(
            folder / MANIFEST
        )
        assert validate(open_(folder, buckets=((16, 16), (32, 16)))) == []

    def test_mds_without_keys_has_no_duplicate_key(self, tmp_path):
        from streaming import MDSWriter

        of = SourceConfig(name="m", uri=str(tmp_path / "mds"), format="mds")
        with MDSWriter(out=of.uri, columns={"png": "bytes", "txt": "str"}, size_limit=3000) as writer:
            for number in range(9):
                writer.write({"png": picture(number), "txt": "x" if number else ""})  # an empty caption is valid
        corpus = open_(of, cache=CacheConfig(dir=str(tmp_path / "copies")))
        assert len(list((tmp_path / "mds").glob("*.mds"))) > 1
        assert validate(corpus) == []

    @pytest.mark.processes
    def test_the_callers_corpus_and_progress_bar(self, tmp_path):
        corpus = open_(images(tmp_path / "images"), verify=True)
        seen: list[int] = []

        def progress(items, total):
            for item in items:
                seen.append(total)
                yield item

        assert validate(corpus, progress=progress) == []
        assert validate(corpus, progress=progress, processes=2) == []
        assert seen == [3] * 6
        assert corpus.config.verify


class TestShards:
    @pytest.mark.parametrize("processes", [1, 2])
    def test_all_damaged_shards_and_bad_samples_of_the_others(self, tmp_path, processes):
        folder = images(tmp_path / "images", {"17": {"txt": b"x"}}, shards=6)
        content = (folder / "0.tar").read_bytes()
        (folder / "0.tar").write_bytes(content[:-5])
        flip(folder / "1.tar", 700)
        (folder / "2.tar").unlink()
        (folder / "3.tar").unlink()
        (folder / "3.tar").mkdir()
        manifest = json.loads((folder / MANIFEST).read_text())
        manifest["shards"][5] |= {"samples": 5, "sizes": []}
        (folder / MANIFEST).write_text(json.dumps(manifest | {"samples": 25}))
        problems = validate(open_(folder), processes=processes)
        assert [problem.shard.rpartition("/")[2] for problem in problems] == [f"{n}.tar" for n in range(6)]
        reasons = found(problems)
        assert reasons["0.tar", None].startswith("is corrupt: it ")
        assert f"has {len(content) - 5} bytes, the manifest says {len(content)}" in reasons["0.tar", None]
        assert "sha256" in reasons["1.tar", None]
        assert "missing" in reasons["2.tar", None]
        assert "cannot be opened (Is a directory)" in reasons["3.tar", None]
        assert reasons["4.tar", "17"].startswith("has no jpg or ")
        assert "holds 4 samples, the manifest says 5" in reasons["5.tar", None]
        assert {problem.source for problem in problems} == {"images"}

    def test_hashes_if_the_recipe_does_not(self, tmp_path):
        folder = images(tmp_path / "images")
        flip(folder / "2.tar", 700)
        assert list(found(validate(open_(folder, verify=False)))) == [("2.tar", None)]
        assert list(found(validate(open_(folder, verify=False), decode=False))) == [("2.tar", None)]

    def test_hashes_alone(self, tmp_path, capsys):
        """A sample that is no image was hashed as it is."""
        folder = images(tmp_path / "images", {"02": {"png": b"no image", "txt": b"x"}})
        words = ["data", "validate", str(folder), "data.resolution=[16,16]"]
        assert [main([*words, *option]) for option in ([], ["--no-decode"])] == [1, 0]
        assert "all 12 samples are valid" in capsys.readouterr().out

    def test_hashes_once(self, tmp_path, monkeypatch):
        corpus, hashed = open_(images(tmp_path / "images"), verify=True), []
        original = files.sha256_of
        monkeypatch.setattr(files, "sha256_of", lambda file: hashed.append(file.name) or original(file))
        assert validate(corpus) == []
        assert len(hashed) == 3

    def test_hashes_again_after_reading(self, tmp_path):
        folder = images(tmp_path / "images")
        corpus = open_(folder)
        corpus.record(0)
        flip(folder / "0.tar", 700)
        assert list(found(validate(corpus))) == [("0.tar", None)]

    def test_of_several_sources(self, tmp_path):
        one, two = images(tmp_path / "one"), images(tmp_path / "two", {"01": {"png": b"", "txt": b"x"}})
        flip(one / "1.tar", 700)
        problems = validate(open_(one, two))
        assert [(problem.source, problem.key) for problem in problems] == [("one", None), ("two", "01")]

    @pytest.mark.processes
    def test_of_a_folder_between_shards(self, tmp_path):
        one, two = images(tmp_path / "one"), images(tmp_path / "two", {"05": {"png": b"", "txt": b"x"}})
        (tmp_path / "loose").mkdir()
        for number in range(3):
            (tmp_path / "loose" / f"{number}.png").write_bytes(picture(number) if number else b"")
            (tmp_path / "loose" / f"{number}.txt").write_text("x")
        loose = SourceConfig(name="loose", uri=str(tmp_path / "loose"), format="folder")
        problems = validate(open_(one, loose, two), processes=2)
        assert [(problem.source, problem.key) for problem in problems] == [("loose", "0.png"), ("two", "05")]

    @pytest.mark.processes
    @pytest.mark.parametrize("processes", [1, 2])
    def test_remote_ones(self, s3, tmp_path, monkeypatch, processes):
        for name, value in s3.environment.items():
            monkeypatch.setenv(name, value)
        bucket = f"bucket{processes}"
        folder = images(tmp_path / "images", {"00": {"png": b"no", "txt": b"x"}})
        s3.upload(folder, bucket)
        s3.delete(bucket, "1.tar")
        flip(folder / "2.tar", 700)
        s3.upload_bytes((folder / "2.tar").read_bytes(), bucket, "2.tar")
        of = SourceConfig(name="r", uri=f"s3://{bucket}")
        corpus = open_(of, cache=CacheConfig(dir=str(tmp_path / "copies"), timeout=60))
        reasons = found(validate(corpus, processes=processes))
        assert list(reasons) == [("0.tar", "00"), ("1.tar", None), ("2.tar", None)]
        assert "404" in reasons["1.tar", None]
        assert "after two downloads" in reasons["2.tar", None]

    def test_a_server_that_is_gone(self, tmp_path, monkeypatch):
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody-knows-it")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "nobody-knows-it")
        folder = images(tmp_path / "images", shards=2)
        of = SourceConfig(name="r", uri="s3://gone", manifest=str(folder / MANIFEST))
        reasons = found(validate(open_(of, cache=CacheConfig(dir=str(tmp_path / "copies"), timeout=1))))
        assert list(reasons) == [("0.tar", None), ("1.tar", None)]
        assert "could not be read within" in reasons["0.tar", None]


class TestImages:
    def test_every_bad_sample(self, tmp_path):
        jpeg, png = picture(1, "JPEG", 64), picture(2, "PNG", 64)
        folder = images(
            tmp_path / "images",
            {
                "00": {"png": b"", "txt": b"x"},
                "01": {"jpg": jpeg[: len(jpeg) // 2], "txt": b"x"},
                "02": {"png": png[: len(png) // 2], "txt": b"x"},
                "04": {"png": b"no image", "txt": b"x"},
                "05": {"png": picture(5)},
                "06": {"png": picture(5), "txt": "B\xe4r".encode("latin-1")},
                "07": {"tiff": picture(5), "txt": b"x"},
                "08": {"png": picture(5), "txt": b""},
            },
        )
        reasons = found(validate(open_(folder)))
        assert sorted(key for _, key in reasons if key) == ["00", "01", "02", "04", "05", "06", "07"]
        for key in ("00", "01", "02", "04"):
            assert "not a readable image" in reasons[f"{int(key) // 4}.tar", key]
        assert reasons["1.tar", "05"] == "has no caption in txt, but png"
        assert reasons["1.tar", "06"].startswith("the caption txt is not UTF-8 text")
        assert re.fullmatch("has no jpg or .* or image, but tiff, txt. Name the right field.*", reasons["1.tar", "07"])
        lighter = found(validate(open_(folder), decode=False))
        assert sorted(key for _, key in lighter if key) == ["05", "06", "07"]

    def test_every_caption_that_may_be_chosen(self, tmp_path):
        good = {"png": picture(1), "txt": b"x", "json": b'{"a": {"b": "y"}}'}
        folder = images(
            tmp_path / "images",
            {
                "00": good,
                "01": good | {"json": b"{"},
                "02": good | {"json": b'{"a": 3}'},  # missing: the other one is used
                "03": {"png": picture(1), "json": b'{"a": {"b": "y"}}'},
                "04": {"png": picture(1), "json": b'{"a": 3}'},
            },
        )
        of = SourceConfig(name="i", uri=str(folder), captions={"txt": 1.0, "json.a.b": 1.0})
        reasons = found(validate(open_(of)))
        assert [key for _, key in reasons] == ["01", "04"]
        assert reasons["0.tar", "01"].startswith("the caption json.a.b is not in JSON")

    def test_a_folder(self, tmp_path):
        for number in range(5):
            (tmp_path / f"{number}.png").write_bytes(picture(number) if number % 2 else b"")
            (tmp_path / f"{number}.txt").write_text("x")
        problems = validate(open_(SourceConfig(name="f", uri=str(tmp_path), format="folder")))
        assert [(problem.source, problem.shard, problem.key) for problem in problems] == [
            ("f", str(tmp_path), f"{number}.png") for number in (0, 2, 4)
        ]

    @pytest.mark.processes
    def test_duplicate_keys(self, tmp_path):
        samples = [(f"{number}", image_fields(number)) for number in range(6)]
        folder = write(tmp_path / "images", {"0.tar": samples[:4], "1.tar": samples[3:], "2.tar": samples[3:4]})
        reasons = found(validate(open_(folder), processes=2))
        assert list(reasons) == [("1.tar", "3"), ("2.tar", "3")]
        assert all(reason == f"has the key of a sample of {folder}/0.tar" for reason in reasons.values())
        two = open_(folder, images(tmp_path / "others", {"3": image_fields(3)}))  # also "3", but in another source
        assert {problem.source for problem in validate(two)} == {"images"}


class TestCaches:
    def test_every_bad_sample(self, tmp_path):
        bad = tensors(1)["latents"]
        bad[1, 2, 3] = float("nan")
        folder = cache(
            tmp_path / "cache",
            {
                "00": {"safetensors": b"no tensors", "txt": b"x"},
                "01": {"safetensors": cached_fields(1)["safetensors"][:-40], "txt": b"x"},
                "02": {"safetensors": cached_fields(1)["safetensors"]},
                "03": {"txt": b"x"},
                "04": cached_fields(4, latents=bad),
                "05": cached_fields(5, text=torch.full((LENGTH, 3), float("inf"))),
                "06": {"safetensors": save({"latents": bad}), "txt": b"x"},
                "07": cached_fields(7) | {"txt": b"\xff"},
            },
            shards=4,
        )
        reasons = found(validate(open_(folder)))
        assert [key for _, key in reasons] == [f"{number:02d}" for number in range(8)]
        assert reasons["0.tar", "02"] == "needs safetensors and txt, but has safetensors"
        assert reasons["1.tar", "04"] == "latents has 1 of 128 values that are not finite"
        assert reasons["1.tar", "05"] == f"text has {3 * LENGTH} of {3 * LENGTH} values that are not finite"
        assert reasons["1.tar", "06"] == "has no text and no pooled, but latents. Encode it again"
        lighter = found(validate(open_(folder), decode=False))
        assert [key for _, key in lighter] == ["02", "03", "07"]

    def test_types(self, tmp_path):
        latents = tensors(0)["latents"]
        folder = cache(
            tmp_path / "cache",
            {
                "00": cached_fields(0, latents=latents.to(torch.int32)),
                "01": cached_fields(1, latents=latents.bfloat16()),
                "02": cached_fields(2, latents=latents.to(torch.float8_e4m3fn)),
            },
        )
        assert found(validate(open_(folder))) == {
            ("0.tar", "00"): "latents has the dtype torch.int32, which is not floating point"
        }

    @pytest.mark.parametrize("processes", [1, 2])
    def test_shapes_that_differ_from_most(self, tmp_path, processes):
        folder = cache(
            tmp_path / "cache",
            {
                # All samples of the first shard differ: in that shard they are the majority.
                **{f"{n:02d}": cached_fields(n, latents=torch.zeros(2, 8, 9)) for n in range(4)},
                "05": cached_fields(5, text=torch.zeros(LENGTH - 1, 3)),
                "06": cached_fields(6, text=torch.zeros(LENGTH, 4), pooled=torch.zeros(6)),
                "07": cached_fields(7, latents=torch.zeros(8, 8)),
            },
            shards=4,
        )
        reasons = found(validate(open_(folder), processes=processes))
        assert [key for _, key in reasons] == ["00", "01", "02", "03", "05", "06", "07"]
        assert reasons["0.tar", "00"] == "latents has the shape [2, 8, 9], most of 16 x 16 pixels have [2, 8, 8]"
        assert reasons["1.tar", "05"] == f"has text of the shape [5, 3], not [{LENGTH}, ...]. Encode it again"
        assert "text has the shape [6, 4]" in reasons["1.tar", "06"]
        assert "pooled has the shape [6], most of samples have [5]" in reasons["1.tar", "06"]
        assert "latents has the shape [8, 8]" in reasons["1.tar", "07"]

    def test_invalid_shapes(self, tmp_path):
        changes = {f"{n:02d}": cached_fields(n, latents=torch.zeros(8, 8), pooled=torch.zeros(1, 5)) for n in range(11)}
        reasons = found(validate(open_(cache(tmp_path / "cache", changes))))
        assert len(reasons) == 11
        assert reasons["0.tar", "00"] == (
            "latents has the shape [8, 8], not [C, h, w]; pooled has the shape [1, 5], not [D]"
        )

    @pytest.mark.processes
    def test_of_two_equal_halves_the_first_is_right(self, tmp_path, monkeypatch):
        changes = {f"{n:02d}": cached_fields(n, pooled=torch.zeros(6)) for n in range(4, 8)}
        corpus = open_(cache(tmp_path / "cache", changes, shards=2))
        monkeypatch.setattr(module, "as_completed", lambda futures: reversed(list(futures)))
        assert {key for _, key in found(validate(corpus, processes=2))} == {"04", "05", "06", "07"}

    @pytest.mark.processes
    def test_the_order_is_that_of_the_recipe(self, tmp_path):
        changes = {
            "01": cached_fields(1, pooled=torch.zeros(6)),
            "06": cached_fields(6) | {"txt": b"\xff"},
            "09": cached_fields(9, pooled=torch.zeros(6)),
        }
        for processes in (1, 3):
            problems = validate(open_(cache(tmp_path / f"cache{processes}", changes)), processes=processes)
            assert [problem.key for problem in problems] == ["01", "06", "09"]

    def test_a_text_length_that_no_sample_has(self, tmp_path):
        folder = cache(tmp_path / "cache")
        path = folder / MANIFEST
        dataclasses.replace(Manifest.parse(path.read_bytes(), "it"), text_length=7).write(path)
        reasons = found(validate(open_(folder)))
        assert len(reasons) == 12
        assert reasons["0.tar", "00"] == "has text of the shape [6, 3], not [7, ...]. Encode it again"

    def test_a_text_longer_than_its_padding(self, tmp_path):
        folder = tmp_path / "cache"
        folder.mkdir()
        padding = save({"text": torch.zeros(LENGTH, 3)})
        (folder / PADDING).write_bytes(padding)
        samples = [(f"{n}", cached_fields(n, text=torch.zeros(LENGTH + n // 2, 3))) for n in range(3)]
        draft: dict[str, Any] = {
            "encoder": "e",
            "fields": KINDS,
            "text_length": LENGTH,
            "padding": hashlib.sha256(padding).hexdigest(),
        }
        reasons = found(validate(open_(write(folder, {"0.tar": samples}, **draft))))
        assert list(reasons) == [("0.tar", "2")]


class TestMds:
    def test_a_damaged_one_without_hashes(self, tmp_path):
        from streaming import MDSWriter

        of = SourceConfig(name="m", uri=str(tmp_path / "mds"), format="mds")
        with MDSWriter(out=of.uri, columns={"png": "bytes", "txt": "str"}) as writer:
            for number in range(5):
                writer.write({"png": picture(number), "txt": "x"})
        path = tmp_path / "mds" / "shard.00000.mds"
        content = bytearray(path.read_bytes())
        content[12:16] = b"\xff\xff\xff\x7f"  # the end of the second sample
        path.write_bytes(content)
        corpus = open_(of, cache=CacheConfig(dir=str(tmp_path / "copies")))
        reasons = found(validate(corpus))
        assert {key for _, key in reasons} == {"000001", "000002"}

    @pytest.mark.parametrize("processes", [1, 2])
    def test_a_damaged_first_sample(self, tmp_path, processes):
        from streaming import MDSWriter

        of = SourceConfig(name="m", uri=str(tmp_path / "mds"), format="mds")
        with MDSWriter(out=of.uri, columns={"__key__": "str", "png": "bytes", "txt": "str"}) as writer:
            for number in range(3):
                writer.write({"__key__": f"k{number}", "png": picture(number), "txt": "x"})
        path = tmp_path / "mds" / "shard.00000.mds"
        content = bytearray(path.read_bytes())
        content[4:8] = b"\xff\xff\xff\x7f"  # its beginning
        path.write_bytes(content)
        corpus = open_(of, cache=CacheConfig(dir=str(tmp_path / "copies")))
        assert list(found(validate(corpus, processes=processes))) == [("shard.00000.mds", "000000")]

    def test_keys_of_a_column(self, tmp_path):
        from streaming import MDSWriter

        of = SourceConfig(name="m", uri=str(tmp_path / "mds"), format="mds")
        with MDSWriter(out=of.uri, columns={"__key__": "str", "png": "bytes", "txt": "str"}) as writer:
            for number in range(5):
                writer.write({"__key__": f"k{number % 4}", "png": picture(number), "txt": "x"})
        index(of, tmp_path / "mds", timeout=5)
        corpus = open_(of, cache=CacheConfig(dir=str(tmp_path / "copies")))
        assert list(found(validate(corpus))) == [("shard.00000.mds", "k0")]


class TestUnexpectedErrors:
    def test_a_decoder_that_raises_an_unexpected_error(self, tmp_path, monkeypatch):
        corpus, record = open_(images(tmp_path / "images")), Corpus.record

        def odd(self, item, sample_id=0):
            if item % 5 == 0:
                raise ZeroDivisionError("odd")
            return record(self, item, sample_id)

        monkeypatch.setattr(Corpus, "record", odd)
        assert [(p.key, p.reason) for p in validate(corpus)] == [
            (key, "ZeroDivisionError: odd") for key in ("00", "05", "10")
        ]

    @pytest.mark.processes
    def test_a_killed_process_is_an_error(self, tmp_path, monkeypatch):
        monkeypatch.setattr(module, "_check_piece", lambda *rest: os.kill(os.getpid(), 9))
        with pytest.raises(UserError, match="was killed"):
            validate(open_(images(tmp_path / "images")), processes=2)


class TestText:
    def test_every_problem_has_a_line(self):
        problems = [
            Problem("a", "/x/0.tar", None, "is corrupt"),
            Problem("a", "/x/1.tar", "k1", "has no caption"),
            Problem("a", "/x/1.tar", "k2", "one"),
            Problem("a", "/x/1.tar", "k2", "two"),
        ]
        assert format_problems(problems).split("\n") == [
            "1 shard and 2 samples cannot be used as they are",
            "a: /x/0.tar",
            "  is corrupt",
            "a: /x/1.tar",
            "  k1: has no caption",
            "  k2: one",
            "  k2: two",
        ]
        assert format_problems([]) == "no problem found"

    def test_a_key_does_not_control_the_terminal(self, tmp_path):
        folder = tmp_path / "images"
        folder.mkdir()
        with tarfile.open(folder / "0.tar", "w") as tar:
            member = tarfile.TarInfo("\x1b[2J\nall is well 猫.png")
            tar.addfile(member, io.BytesIO())
        content = (folder / "0.tar").read_bytes()
        entry = ShardEntry(name="0.tar", samples=1, bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
        Manifest(shards=(entry,)).write(folder / MANIFEST)
        text = format_problems(validate(open_(folder)))
        assert len(text.split("\n")) == 3
        assert "\x1b" not in text
        assert "\\x1b[2J\\nall is well 猫: has no caption" in text


def test_the_fixtures_are_valid():
    assert tuple(load(cached_fields(3)["safetensors"])["latents"].shape) == (2, 8, 8)
