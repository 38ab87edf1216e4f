"""`encode`: the cache has the output of the pipeline's own encoders, for any number of processes and restarts."""

import functools
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tarfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file, save

from data_tools import encode as encode_module
from data_tools.encode import CUT, EncodeConfig, encode
from data_tools.job import Job, Made, PlannedShard, plan_shards, processes
from recipes.cli import main
from recipes.tiny import write_digits, write_pipeline
from scfm_core.data.corpus import Corpus
from scfm_core.data.folder import ImageFolder
from scfm_core.data.image import ANIMATED, ENLARGED, TRANSPARENT, unit_range
from scfm_core.data.members import Members
from scfm_core.data.recipe import DataConfig, SourceConfig
from scfm_core.data.schema import MANIFEST, Manifest, Record, collate
from scfm_core.data.source import PADDING
from scfm_core.data.webdataset import TarWriter
from scfm_core.errors import UserError
from scfm_core.models.encoders import Autoencoder, TextEncoders
from scfm_core.models.families import open_family
from scfm_core.models.fingerprint import encoder_fingerprint
from scfm_core.models.protocol import ModelFamily
from scfm_core.train.config import ModelConfig, RunConfig, RunSection
from scfm_core.train.inputs import BatchEncoder

COUNT, BATCH, LENGTH = 20, 8, 8
OPTIONS = {"text_length": LENGTH, "batch_size": BATCH, "samples_per_shard": 9}


def images_of(folder: Path, **changes: Any) -> Corpus:
    return Corpus(DataConfig(**{"path": str(folder), "format": "folder", "resolution": (16, 16), **changes}))


def run(images: Path | Corpus, output: Path, family: ModelFamily, **changes: Any) -> Manifest:
    """One process encodes everything."""
    corpus = images if isinstance(images, Corpus) else images_of(images)
    manifest = encode(corpus, output, family, EncodeConfig(**{**OPTIONS, **changes})).manifest
    assert manifest is not None
    return manifest


def open_cache(folder: Path, **changes: Any) -> Corpus:
    return Corpus(DataConfig(**{"path": str(folder), "resolution": (16, 16), **changes}))


def read_manifest(folder: Path) -> Manifest:
    return Manifest.parse((folder / MANIFEST).read_bytes(), str(folder))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> ModelFamily:
    folder = tmp_path_factory.mktemp("pipeline")
    write_pipeline(folder, vae_steps=0)
    return open_family(str(folder))


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty images with captions of 2 to 4 words. Tests must not change them."""
    folder = tmp_path_factory.mktemp("digits")
    write_digits(folder, count=COUNT)
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    for number, row in enumerate(rows):
        row["text"] = " ".join(row["text"].split()[-(2 + number % 3) :])
    (folder / "metadata.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return folder


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A few digits that a test may change."""
    write_digits(tmp_path / "images", count=6)
    return tmp_path / "images"


@pytest.fixture(scope="module")
def cache(digits: Path, family: ModelFamily, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With trimmed padding. Tests must not change it."""
    folder = tmp_path_factory.mktemp("encoded") / "cache"
    run(digits, folder, family, trim_padding=True)
    return folder


class TestContent:
    def test_manifest(self, cache, family):
        manifest = read_manifest(cache)
        assert manifest.encoder == encoder_fingerprint(family.folder)
        assert (manifest.text_length, manifest.sizes, manifest.samples) == (LENGTH, {(16, 16)}, COUNT)
        sizes = {"data.resolution": [16, 16], "data.buckets": "none"}
        assert manifest.settings == {"model.text_length": LENGTH, **sizes}
        assert [shard.samples for shard in manifest.shards] == [9, 9, 2]
        assert sorted(contents(cache)) == [
            "job.json", MANIFEST, "manifest.members", PADDING, *(f"shard-{n:06d}.tar" for n in range(3))
        ]  # fmt: skip
        assert Members.beside(cache / MANIFEST).table(read_manifest(cache).shards[2]) is not None

    def test_returned_manifest_is_the_written_one(self, digits, tmp_path, family):
        assert run(digits, tmp_path / "cache", family) == read_manifest(tmp_path / "cache")

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    def test_with_padding_equals_the_encoders_output_bit_by_bit(self, digits, tmp_path, family, dtype):
        """The same as training on the images: the same images in the same batches."""
        run(digits, tmp_path / "cache", family, dtype=dtype)
        assert not (tmp_path / "cache" / PADDING).exists()
        cached, fly = open_cache(tmp_path / "cache"), images_of(digits)
        vae, text = Autoencoder(family, dtype, "cpu"), TextEncoders(family, LENGTH, dtype, "cpu")
        assert len(cached) == len(fly) == COUNT
        rows = [
            list(range(at, at + n)) for at, n in ((0, 8), (8, 1), (9, 8), (17, 1), (18, 2))
        ]  # shards of 9, in batches of 8
        for batch in rows:
            records = [fly.record(row) for row in batch]
            latents = vae.encode(unit_range(torch.stack([record.image for record in records])))
            cond = text.encode([record.caption for record in records])
            for at, row in enumerate(batch):
                record = cached.record(row)
                assert record.latents.dtype == dtype
                assert torch.equal(record.latents, latents[at])
                for name in ("text", "pooled"):
                    assert record.fields[name].dtype == dtype
                    assert torch.equal(record.fields[name], cond.fields[name][at])
                assert record.caption == records[at].caption

    def test_shapes_are_the_models(self, cache, family):
        record = open_cache(cache).record(0)
        assert record.latents.shape == family.latent_shape(16, 16)
        assert record.fields["text"].shape == (LENGTH, 32)
        assert record.fields["pooled"].shape == (32,)

    def test_records_differ(self, cache):
        """If the random encoders returned a constant, every comparison above would pass."""
        first, second = (open_cache(cache).record(number) for number in (0, 1))
        assert not torch.equal(first.latents, second.latents)
        for name in ("text", "pooled"):
            assert not torch.equal(first.fields[name], second.fields[name])

    def test_non_square_resolution(self, images, tmp_path, family):
        run(images_of(images, resolution=(8, 24)), tmp_path / "cache", family)
        corpus = open_cache(tmp_path / "cache", resolution=(8, 24))
        assert corpus.record(0).latents.shape == family.latent_shape(8, 24)
        with pytest.raises(UserError, match=r"encoded with data.resolution \(8, 24\)"):
            open_cache(tmp_path / "cache")

    def test_each_sample_names_its_file(self, cache):
        sources = []
        for shard in read_manifest(cache).shards:
            with tarfile.open(cache / shard.name) as tar:
                rows = [json.load(tar.extractfile(member)) for member in tar if member.name.endswith(".json")]
            assert all((row["height"], row["width"]) == (16, 16) for row in rows)
            sources += [row["source"] for row in rows]
        assert sources == [f"{number:04d}.png" for number in range(COUNT)]

    def test_names_with_dots_and_folders_do_not_reach_the_keys(self, images, tmp_path, family):
        """For webdataset a key ends at the first dot, and the name of a folder is part of it."""
        (images / "v1.5").mkdir()
        (images / "0000.png").rename(images / "v1.5" / "a.b.png")
        (images / "v1.5" / "a.b.txt").write_text("moved")
        run(images, tmp_path / "cache", family)
        corpus = open_cache(tmp_path / "cache")
        assert [corpus.record(row).key for row in range(6)] == [f"{row:08d}" for row in range(6)]
        assert corpus.caption(5) == "moved"

    def test_from_shards_equals_from_a_folder(self, digits, cache, tmp_path, family):
        folder, entries = ImageFolder(digits), []
        (tmp_path / "tars").mkdir()
        for numbers in (range(13), range(13, COUNT)):
            with TarWriter(tmp_path / "tars" / f"{len(entries)}.tar") as writer:
                for number in numbers:
                    fields = {"png": folder.paths[number].read_bytes(), "txt": folder.caption(number).encode()}
                    writer.write(f"key{number}", fields, (16, 16))
            entries.append(writer.entry)
        Manifest(shards=tuple(entries)).write(tmp_path / "tars" / MANIFEST)
        run(images_of(tmp_path / "tars", format="webdataset"), tmp_path / "cache", family, trim_padding=True)
        ours, theirs = open_cache(tmp_path / "cache"), open_cache(cache)
        for number in range(COUNT):
            mine, other = ours.record(number), theirs.record(number)
            assert mine.caption == other.caption
            assert torch.equal(mine.latents, other.latents)
            assert torch.equal(mine.fields["text"], other.fields["text"])

    def test_progress_sees_every_image(self, digits, tmp_path, family):
        seen = []

        def progress(images, total):
            for image in images:
                seen.append(total)
                yield image

        encode(images_of(digits), tmp_path / "cache", family, EncodeConfig(**OPTIONS), progress=progress)
        assert seen == [COUNT] * COUNT


def stored_texts(folder: Path) -> list[torch.Tensor]:
    from safetensors.torch import load

    texts = []
    for shard in read_manifest(folder).shards:
        with tarfile.open(folder / shard.name) as tar:
            texts += [load(tar.extractfile(m).read())["text"] for m in tar if m.name.endswith(".safetensors")]
    return texts


class TestPadding:
    def test_is_stored_up_to_the_captions_end(self, cache, family, digits):
        text = TextEncoders(family, LENGTH, torch.bfloat16, "cpu")
        counts = text.token_counts([ImageFolder(digits).caption(n) for n in range(COUNT)])
        lengths = [text.kept(count) for count in counts]
        assert lengths == [3 + n % 3 for n in range(COUNT)]  # the words and the end token
        assert [len(row) for row in stored_texts(cache)] == lengths

    def test_is_the_output_for_an_empty_caption(self, cache, digits, tmp_path, family):
        run(digits, tmp_path / "exact", family)
        empty = TextEncoders(family, LENGTH, torch.bfloat16, "cpu").encode([""]).fields["text"][0]
        assert torch.equal(load_file(cache / PADDING)["text"], empty)
        trimmed, exact = open_cache(cache), open_cache(tmp_path / "exact")
        for number in range(COUNT):
            length = 3 + number % 3
            ours, whole = (corpus.record(number).fields["text"] for corpus in (trimmed, exact))
            assert torch.equal(ours[:length], whole[:length])
            assert torch.equal(ours[length:], empty[length:])
            assert ours.shape == whole.shape

    def test_is_added_before_the_network_gets_the_batch(self, cache, family):
        corpus, items = open_cache(cache), [0, 1, 2, 7]
        batch = collate(items, [corpus.record(item, padded=False) for item in items])
        assert len(batch.fields["text"].tokens) == sum(3 + item % 3 for item in items)
        model = ModelConfig(path=str(family.folder), text_length=LENGTH)
        config = RunConfig(run=RunSection(dir="unused"), model=model, data=corpus.config)
        _, cond = BatchEncoder(config, family, corpus, torch.device("cpu")).encode(batch)
        assert torch.equal(cond.fields["text"], torch.stack([corpus.record(item).fields["text"] for item in items]))

    def test_is_most_of_the_bytes_of_a_cache(self, images, tmp_path, family):
        sizes = []
        for trim in (False, True):
            manifest = run(images, tmp_path / str(trim), family, text_length=256, trim_padding=trim)
            sizes.append(sum(shard.bytes for shard in manifest.shards))
        # 6 samples of 256 rows of 32 bf16, or of 5 rows. The rest is blocks of the tar.
        assert sizes[0] - sizes[1] == pytest.approx(6 * 251 * 64, rel=0.05)
        assert sizes[1] <= sizes[0] / 4

    def test_error_is_reported_correctly(self, digits, tmp_path, family):
        config = EncodeConfig(**OPTIONS, trim_padding=True, dtype=torch.float32)
        error = encode(images_of(digits), tmp_path / "trimmed", family, config).padding_error
        run(digits, tmp_path / "exact", family, dtype=torch.float32)
        difference = whole = 0.0
        trimmed, exact = open_cache(tmp_path / "trimmed"), open_cache(tmp_path / "exact")
        for number in range(COUNT):
            ours, theirs = (corpus.record(number).fields["text"][3 + number % 3 :] for corpus in (trimmed, exact))
            difference += float((ours - theirs).square().sum())
            whole += float(theirs.square().sum())
        assert error == pytest.approx((difference / whole) ** 0.5, rel=1e-4)
        assert error > 0

    def test_kept_has_no_error(self, digits, tmp_path, family):
        config = EncodeConfig(**OPTIONS)
        assert encode(images_of(digits), tmp_path / "cache", family, config).padding_error is None

    def test_before_the_caption_cannot_be_trimmed(self, digits, tmp_path, family):
        folder = shutil.copytree(family.folder, tmp_path / "pipeline")
        path = folder / "tokenizer_2" / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"padding_side": "left"}))
        with pytest.raises(UserError, match=f"the tokenizer of {folder} pads before the caption.*Remove the option"):
            run(digits, tmp_path / "cache", open_family(str(folder)), trim_padding=True)
        assert not (tmp_path / "cache").exists()

    def test_of_a_caption_that_fills_all_tokens_is_empty(self, images, tmp_path, family):
        (images / "metadata.jsonl").unlink()
        for path in images.glob("*.png"):
            path.with_suffix(".txt").write_text("a handwritten digit " * 9)
        run(images, tmp_path / "cache", family, trim_padding=True)
        assert [len(row) for row in stored_texts(tmp_path / "cache")] == [LENGTH] * 6


class TestBuckets:
    SHOWN = ((40, 40), (20, 60), (60, 20), (44, 40), (16, 48), (300, 100))
    SIZES = ((16, 16), (8, 24), (24, 8))

    @pytest.fixture
    def shapes(self, tmp_path) -> Path:
        """Twelve images: square, wide and tall in turn."""
        (tmp_path / "shapes").mkdir()
        for number in range(12):
            height, width = self.SHOWN[number % 6]
            image = Image.new("RGB", (width, height), (20 * number, 0, 0))
            image.save(tmp_path / "shapes" / f"{number:02d}.png")
            (tmp_path / "shapes" / f"{number:02d}.txt").write_text(f"caption {number}")
        return tmp_path / "shapes"

    def test_each_shard_has_one_size(self, shapes, tmp_path, family):
        manifest = run(images_of(shapes, buckets=self.SIZES), tmp_path / "cache", family, samples_per_shard=3)
        assert [shard.sizes for shard in manifest.shards] == [
            ((16, 16, 3),),
            ((16, 16, 1),),
            ((8, 24, 3),),
            ((8, 24, 1),),
            ((24, 8, 3),),
            ((24, 8, 1),),
        ]
        corpus = open_cache(tmp_path / "cache", buckets=self.SIZES)
        captions = {}
        for item in range(12):
            record = corpus.record(item)
            size = corpus.sizes[corpus.buckets[item]]
            assert record.latents.shape == family.latent_shape(*size)
            captions[int(record.caption.split()[1])] = size
        square, wide, tall = self.SIZES
        assert captions == {n: (square, wide, tall, square, wide, tall)[n % 6] for n in range(12)}

    def test_are_encoded_as_they_are_cropped(self, shapes, tmp_path, family):
        corpus = images_of(shapes, buckets=self.SIZES)
        run(corpus, tmp_path / "cache", family, batch_size=1)
        vae, cached = (
            Autoencoder(family, torch.bfloat16, "cpu"),
            open_cache(tmp_path / "cache", buckets=self.SIZES),
        )
        by_caption = {cached.caption(item): cached.record(item) for item in range(12)}
        for item in range(12):
            record = corpus.record(item)
            assert torch.equal(by_caption[record.caption].latents, vae.encode(unit_range(record.image[None]))[0])

    def test_sizes_that_the_model_does_not_support(self, shapes, tmp_path, family):
        with pytest.raises(UserError, match="multiples of 4"):
            run(images_of(shapes, buckets=((16, 16), (8, 30))), tmp_path / "cache", family)
        assert not (tmp_path / "cache").exists()


# Seconds faster than a new interpreter with torch, and killed in the same way.
FORK = multiprocessing.get_context("fork")


class Started:
    """A process that encodes with the given environment, and may kill itself before it reads an image.

    Args:
        die_at: number of the image, from 1; 0: never.
        environment: RANK and the like.
    """

    def __init__(self, images: Path, output: Path, family: ModelFamily, *, die_at: int = 0, **environment: str) -> None:
        self._result, result = FORK.Pipe(duplex=False)
        self.process = FORK.Process(target=self._run, args=(result, images, output, family, die_at, environment))
        self.process.start()
        result.close()

    @staticmethod
    def _run(
        result: Any, images: Path, output: Path, family: ModelFamily, die_at: int, environment: dict[str, str]
    ) -> None:
        os.environ.update(environment)
        corpus, count = images_of(images), 0
        record = corpus.record

        def counting(item: int, sample_id: int = 0) -> Record:
            nonlocal count
            count += 1
            if count == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return record(item, sample_id)

        corpus.record = counting  # type: ignore[method-assign]
        rank, world_size = processes()
        config = EncodeConfig(text_length=LENGTH, batch_size=2, samples_per_shard=3)
        manifest = encode(corpus, output, family, config, rank=rank, world_size=world_size).manifest
        result.send((count, manifest is not None))

    def is_killed(self) -> bool:
        self.process.join(300)
        return self.process.exitcode == -signal.SIGKILL

    def ends(self) -> tuple[int, bool]:
        """Number of images that it read, and whether it found the data set complete."""
        self.process.join(300)
        assert self.process.exitcode == 0
        return self._result.recv()  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def small_shards(digits: Path, family: ModelFamily, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache that `Started` makes of the digits without interruption: seven shards of three."""
    folder = tmp_path_factory.mktemp("small") / "cache"
    run(digits, folder, family, batch_size=2, samples_per_shard=3)
    return folder


class TestInterrupted:
    @pytest.mark.processes
    def test_resumes_after_kill_9(self, digits, small_shards, tmp_path, family):
        """Killed twice, at the ninth image and at the nineteenth; every finished batch is kept."""
        output = tmp_path / "cache"
        for die_at, complete in ((9, 2), (11, 6)):
            assert Started(digits, output, family, die_at=die_at).is_killed()
            assert len(list(output.glob("*.tar"))) == complete
            assert not (output / MANIFEST).exists()
            with pytest.raises(UserError, match="did not finish"):
                open_cache(output)
        assert Started(digits, output, family).ends() == (2, True)
        assert contents(output) == contents(small_shards)

    def test_leaves_no_finished_data_set(self, images, tmp_path, family):
        good = (images / "0004.png").read_bytes()
        (images / "0004.png").write_bytes(bytes(len(good)))
        with pytest.raises(UserError, match=r"0004\.png is not a readable image"):
            run(images, tmp_path / "cache", family, batch_size=2, samples_per_shard=3)
        assert not (tmp_path / "cache" / MANIFEST).exists()
        assert not list((tmp_path / "cache").glob("*.tmp"))
        (images / "0004.png").write_bytes(good)
        run(images, tmp_path / "cache", family, batch_size=2, samples_per_shard=3)
        assert len(open_cache(tmp_path / "cache")) == 6

    @pytest.fixture
    def unfinished(self, images, tmp_path, family) -> Path:
        """One finished shard of two."""
        config = EncodeConfig(**{**OPTIONS, "samples_per_shard": 3})
        assert encode(images_of(images), tmp_path / "cache", family, config, rank=0, world_size=2).manifest is None
        return tmp_path / "cache"

    @pytest.mark.parametrize(
        ("change", "what"),
        [
            ({"text_length": 16}, "text_length: 8 before, 16 now"),
            ({"samples_per_shard": 4}, "samples_per_shard: 3 before, 4 now"),
            ({"dtype": torch.float32}, "dtype: 'torch.bfloat16' before, 'torch.float32' now"),
            ({"trim_padding": True}, "keep_padding: True before, False now"),
            ({"latents_only": True}, "latents_only: None before, True now"),
        ],
    )
    def test_does_not_resume_with_other_arguments(self, unfinished, images, family, change, what):
        before = contents(unfinished)
        with pytest.raises(UserError, match=rf"{unfinished} has unfinished shards of another job:\n  {what}\nStart"):
            run(images, unfinished, family, **{"samples_per_shard": 3, **change})
        assert contents(unfinished) == before

    def test_does_not_resume_with_other_sizes_or_models(self, unfinished, images, family, tmp_path):
        write_pipeline(tmp_path / "other", vae_steps=0, seed=1)
        with pytest.raises(
            UserError, match=r"another job:\n  encoder: .*text_encoder/model.safetensors \(other content\)"
        ):
            run(images, unfinished, open_family(str(tmp_path / "other")), samples_per_shard=3)
        with pytest.raises(UserError, match=r"sizes: \[\[16, 16\]\] before, \[\[8, 8\]\] now"):
            run(images_of(images, resolution=(8, 8)), unfinished, family, samples_per_shard=3)

    @pytest.mark.parametrize("change", ["pixels", "caption", "removed"])
    def test_encodes_what_was_changed_since_again(self, unfinished, images, family, tmp_path, change):
        """Bitmaps of one size: only their content tells that they were edited."""
        if change == "pixels":
            inverted = ImageOps.invert(Image.open(images / "0000.png"))
            inverted.save(images / "0000.png")
        elif change == "caption":
            text = (images / "metadata.jsonl").read_text()
            (images / "metadata.jsonl").write_text(text.replace('"text": "', '"text": "another ', 1))
        else:
            (images / "0000.png").unlink()
        run(images, unfinished, family, samples_per_shard=3)
        run(images, tmp_path / "fresh", family, samples_per_shard=3)
        assert contents(unfinished) == contents(tmp_path / "fresh")

    def test_keys_are_of_one_job_though_an_image_was_added(self, images, family, tmp_path):
        """Of the shard of another size, which is finished, no image has changed; but numbers behind the new image have."""
        corpus = functools.partial(images_of, images, buckets=((16, 16), (8, 16)))
        flat = Image.new("RGB", (16, 8))
        flat.save(images / "0001.png")
        config = EncodeConfig(**OPTIONS)
        assert encode(corpus(), tmp_path / "cache", family, config, rank=0, world_size=2).manifest is None
        flat.save(images / "0000b.png")
        with (images / "metadata.jsonl").open("a") as file:
            file.write('{"file_name": "0000b.png", "text": "new"}\n')
        run(corpus(), tmp_path / "cache", family)
        run(corpus(), tmp_path / "fresh", family)
        assert contents(tmp_path / "cache") == contents(tmp_path / "fresh")

    def test_the_command_keeps_the_size_of_its_shards(self, images, family, tmp_path, monkeypatch, capsys):
        """By default it depends on the number of images and the batch size, and both may change: an image is removed, memory is short."""
        words = ["data", "encode", str(images), "-o", str(tmp_path / "cache"), "--model", str(family.folder)]
        words += ["--resolution", "16", "16", "--text-length", "8"]
        with monkeypatch.context() as patch:
            patch.setenv("RANK", "0")
            patch.setenv("WORLD_SIZE", "2")
            assert main([*words, "--batch-size", "4"]) == 0  # shards of 4 and 2
        (images / "0005.png").unlink()
        assert main([*words, "--batch-size", "1"]) == 0, capsys.readouterr().err
        assert [shard.samples for shard in read_manifest(tmp_path / "cache").shards] == [4, 1]
        (images / "0004.png").unlink()
        assert main([*words, "--batch-size", "1"]) == 2
        assert "they have changed since" in capsys.readouterr().err

    @pytest.mark.parametrize("change", [{"captions": {"other": 1.0}}, {"image": ("other",)}], ids=str)
    def test_does_not_resume_with_other_fields(self, tmp_path, images, family, change):
        with TarWriter(tmp_path / "0.tar") as writer:
            for number in range(6):
                png = (images / f"{number:04d}.png").read_bytes()
                fields = {"png": png, "txt": b"one", "other": b"two" if "captions" in change else png}
                writer.write(f"{number}", fields, (16, 16))
        Manifest(shards=(writer.entry,)).write(tmp_path / MANIFEST)

        def corpus(**options: Any) -> Corpus:
            source = SourceConfig(name="a", uri=str(tmp_path), **options)
            return Corpus(DataConfig(sources=(source,), resolution=(16, 16)))

        config = EncodeConfig(**{**OPTIONS, "samples_per_shard": 3})
        encode(corpus(), tmp_path / "cache", family, config, rank=0, world_size=2)
        with pytest.raises(UserError, match="another job"):
            encode(corpus(**change), tmp_path / "cache", family, config)


class TestSeveralProcesses:
    @pytest.mark.processes
    @pytest.mark.parametrize("world_size", [2, 3])
    def test_share_the_shards(self, digits, small_shards, tmp_path, family, world_size):
        output = tmp_path / "cache"
        of_all = {"WORLD_SIZE": str(world_size)}
        started = [Started(digits, output, family, **of_all, RANK=str(rank)) for rank in range(world_size)]
        ends = [process.ends() for process in started]
        assert [count for count, _ in ends] == ([11, 9] if world_size == 2 else [8, 6, 6])  # the seventh shard has two
        assert any(done for _, done in ends)
        assert contents(output) == contents(small_shards)

    @pytest.mark.processes
    def test_of_a_slurm_array_one_of_which_is_killed(self, digits, small_shards, tmp_path, family):
        output = tmp_path / "cache"
        task = {"SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_MAX": "2", "SLURM_ARRAY_TASK_COUNT": "2"}
        killed = Started(digits, output, family, die_at=5, **task, SLURM_ARRAY_TASK_ID="1")
        other = Started(digits, output, family, **task, SLURM_ARRAY_TASK_ID="2")
        assert killed.is_killed()
        assert other.ends() == (9, False)
        assert not (output / MANIFEST).exists()
        assert Started(digits, output, family, **task, SLURM_ARRAY_TASK_ID="1").ends() == (8, True)
        assert contents(output) == contents(small_shards)


class TestProcesses:
    @pytest.fixture(autouse=True)
    def clean(self, monkeypatch) -> None:
        for name in [*os.environ]:
            if name in ("RANK", "WORLD_SIZE") or name.startswith("SLURM_"):
                monkeypatch.delenv(name)

    def of(self, monkeypatch: pytest.MonkeyPatch, **environment: str) -> tuple[int, int]:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        return processes()

    def test_of_a_single_process(self, monkeypatch):
        assert self.of(monkeypatch) == (0, 1)

    def test_of_a_launcher(self, monkeypatch):
        assert self.of(monkeypatch, RANK="3", WORLD_SIZE="4") == (3, 4)

    def test_of_a_launcher_inside_an_array(self, monkeypatch):
        array = {"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_COUNT": "9"}
        assert self.of(monkeypatch, RANK="1", WORLD_SIZE="2", **array) == (1, 2)

    @pytest.mark.parametrize(("first", "count"), [(0, 4), (1, 4), (10, 3)])
    def test_of_an_array(self, monkeypatch, first, count):
        """`--array=FIRST-LAST`, as sbatch(1) describes its variables."""
        found = []
        for number in range(first, first + count):
            array = {"SLURM_ARRAY_TASK_MIN": str(first), "SLURM_ARRAY_TASK_MAX": str(first + count - 1)}
            array |= {"SLURM_ARRAY_TASK_COUNT": str(count), "SLURM_ARRAY_TASK_ID": str(number)}
            found.append(self.of(monkeypatch, **array))
        assert found == [(rank, count) for rank in range(count)]

    def test_of_an_array_with_steps(self, monkeypatch):
        """`--array=0-8:4` has the tasks 0, 4 and 8: the three processes must get different shares."""
        found = []
        for number in (0, 4, 8):
            array = {"SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_TASK_MAX": "8", "SLURM_ARRAY_TASK_STEP": "4"}
            array |= {"SLURM_ARRAY_TASK_COUNT": "3", "SLURM_ARRAY_TASK_ID": str(number)}
            found.append(self.of(monkeypatch, **array))
        assert found == [(0, 3), (1, 3), (2, 3)]

    def test_of_an_array_with_gaps(self, monkeypatch):
        """`--array=0,1,7`: the place of a task is unknown."""
        array = {"SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_TASK_MAX": "7", "SLURM_ARRAY_TASK_STEP": "1"}
        with pytest.raises(UserError, match=r"only if the array is a range"):
            self.of(monkeypatch, **array, SLURM_ARRAY_TASK_COUNT="3", SLURM_ARRAY_TASK_ID="7")

    def test_a_task_of_an_array_that_is_started_again_does_the_rest(self, monkeypatch):
        array = {"SLURM_ARRAY_TASK_MIN": "7", "SLURM_ARRAY_TASK_MAX": "7", "SLURM_ARRAY_TASK_COUNT": "1"}
        assert self.of(monkeypatch, **array, SLURM_ARRAY_TASK_ID="7") == (0, 1)


def make(items: Sequence[int]) -> Made:
    return Made([(f"{item:08d}", {"txt": b"a" * item}, (8, 8)) for item in items])


def job(folder: Path, shards: list[PlannedShard], make: Callable[[Sequence[int]], Made] = make, **options: Any) -> Any:
    """Run a job with batches of two; returns the manifest."""
    return Job(folder, {"a": 1}).run(shards, make, Manifest(), **{"batch_size": 2, **options})


class TestJob:
    def test_shards_do_not_mix_groups(self):
        shards = plan_shards([list(range(7)), [], list(range(7, 10))], 3)
        assert [shard.items for shard in shards] == [[0, 1, 2], [3, 4, 5], [6], [7, 8, 9]]
        assert [shard.name for shard in shards] == [f"shard-{number:06d}.tar" for number in range(4)]

    def test_the_last_process_writes_the_manifest(self, tmp_path):
        shards = plan_shards([list(range(7))], 2)
        ends = []
        for rank in (2, 0, 1):
            ends.append(job(tmp_path, shards, rank=rank, world_size=3))
            assert (tmp_path / MANIFEST).exists() == (len(ends) == 3)
        assert ends[:2] == [None, None]
        assert ends[2] == read_manifest(tmp_path)
        assert [entry.samples for entry in ends[2].shards] == [2, 2, 2, 1]
        assert not (tmp_path / ".job").exists()

    @pytest.mark.processes
    @pytest.mark.parametrize(
        ("name", "file"),
        [
            ("read_bytes", "shard-000001.tar.json"),
            ("read_bytes", "parameters.json"),
            ("write_text", ".manifest."),
            ("replace", ".manifest."),
        ],
    )
    def test_two_processes_that_finish_at_the_same_time_agree(self, tmp_path, monkeypatch, name, file):
        """Before one process calls Path.`name` on a path that begins with `file`, another one finishes the job."""
        shards = plan_shards([list(range(4))], 2)
        first, second = Job(tmp_path, {}), Job(tmp_path, {})
        first.run(shards, make, Manifest(), batch_size=2, rank=0, world_size=2)
        original, others = getattr(Path, name), []

        def call(path: Path, *arguments: Any, **options: Any) -> Any:
            if path.name.startswith(file) and not others and (first.notes / "shard-000001.tar.json").exists():
                others.append(FORK.Process(target=first.run, args=(shards, make, Manifest()), kwargs={"batch_size": 2}))
                others[0].start()
                others[0].join()
            return original(path, *arguments, **options)

        monkeypatch.setattr(Path, name, call)
        manifest = second.run(shards, make, Manifest(), batch_size=2, rank=1, world_size=2)
        assert manifest == read_manifest(tmp_path)
        assert manifest.samples == 4
        assert [other.exitcode for other in others] == [0]
        assert sorted(contents(tmp_path)) == [
            "job.json",
            MANIFEST,
            "manifest.members",
            "shard-000000.tar",
            "shard-000001.tar",
        ]

    def test_a_late_process_without_work(self, tmp_path):
        """With three processes for two shards, the third one may start after the others have ended."""
        shards = plan_shards([list(range(4))], 2)
        for rank in range(2):
            manifest = job(tmp_path, shards, rank=rank, world_size=3)
        assert Job(tmp_path, {"a": 1}).finished == manifest
        with pytest.raises(UserError, match="already holds a finished cache"):
            Job(tmp_path, {"a": 2})

    @pytest.mark.parametrize(
        "parameters",
        [pytest.param({"a": 1}, id="by the same job"), pytest.param({"a": 2}, id="by another")],
    )
    def test_killed_before_the_manifest_is_written(self, tmp_path, monkeypatch, parameters):
        shards = plan_shards([list(range(4))], 2)
        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            patch.setattr(Manifest, "write", lambda *_: sys.exit("killed"))
            job(tmp_path, shards)
        if parameters == {"a": 1}:
            assert job(tmp_path, shards).samples == 4
            assert sorted(contents(tmp_path)) == [
                "job.json",
                MANIFEST,
                "manifest.members",
                "shard-000000.tar",
                "shard-000001.tar",
            ]
        else:
            with pytest.raises(UserError, match="another job"):
                Job(tmp_path, parameters)

    @pytest.mark.parametrize("spoil", [Path.unlink, lambda path: path.write_bytes(b"cut")], ids=["deleted", "cut"])
    def test_a_lost_shard_is_written_again(self, tmp_path, spoil):
        shards = plan_shards([list(range(4))], 2)
        job(tmp_path, shards, rank=0, world_size=2)
        spoil(tmp_path / "shard-000000.tar")
        manifest = job(tmp_path, shards)
        assert [(tmp_path / shard.name).stat().st_size for shard in manifest.shards] == [
            shard.bytes for shard in manifest.shards
        ]

    @pytest.mark.parametrize("world_size", [1, 2])
    def test_more_invalid_samples_than_tolerated_end_the_job_with_the_reasons(self, tmp_path, world_size):
        """One of six is tolerated, two are not, also if each process finds one of them."""
        shards, invalid = plan_shards([list(range(6))], 3), {1}

        def some(items: Sequence[int]) -> Made:
            valid = [item for item in items if item not in invalid]
            return Made(make(valid).samples, [f"data: sample {item}" for item in items if item in invalid])

        assert job(tmp_path / "one", shards, some, max_left_out=0.2).samples == 5
        assert (tmp_path / "one" / "left_out.txt").read_text() == "data: sample 1\n"
        invalid.add(4)
        why = "2 of 6 samples are invalid, data.max_bad_fraction tolerates 0.2. .*left_out.txt has the reasons, for example: sample 1"
        with pytest.raises(UserError, match=why):
            for rank in range(world_size):
                job(tmp_path / "two", shards, some, max_left_out=0.2, rank=rank, world_size=world_size)
        assert (tmp_path / "two" / "left_out.txt").read_text() == "data: sample 1\ndata: sample 4\n"
        assert not (tmp_path / "two" / MANIFEST).exists()
        assert job(tmp_path / "two", shards, some, max_left_out=0.4).samples == 4

    def test_no_list_remains_once_all_are_mended(self, tmp_path):
        shards, valid = plan_shards([list(range(4))], 2), [False]

        def some(items: Sequence[int]) -> Made:
            return make(items) if valid[0] else Made(left_out=["data: invalid"])

        with pytest.raises(UserError, match="samples are invalid"):
            job(tmp_path, shards, some, mark=lambda items: str(valid))
        assert (tmp_path / "left_out.txt").exists()
        valid[0] = True
        assert job(tmp_path, shards, some, mark=lambda items: str(valid)).samples == 4
        assert not (tmp_path / "left_out.txt").exists()

    def test_goes_on_after_the_last_complete_batch(self, tmp_path):
        """Ended in the third batch of five: of the shard of eight the first four samples are kept."""
        shards, made = plan_shards([list(range(9))], 8), []

        def until_five(items: Sequence[int]) -> Made:
            made.extend(items)
            if 5 in items:
                sys.exit("killed")
            return Made(make(items).samples, counts=Counter(odd=1))

        with pytest.raises(SystemExit):
            job(tmp_path / "cut", shards, until_five)
        with pytest.raises(SystemExit):
            job(tmp_path / "cut", shards, until_five)
        assert made == [0, 1, 2, 3, 4, 5, 4, 5]
        again = Job(tmp_path / "cut", {"a": 1})
        manifest = again.run(shards, make, Manifest(), batch_size=2)
        assert again.counts == {"odd": 2}
        job(tmp_path / "whole", shards)
        for shard in manifest.shards:
            assert (tmp_path / "cut" / shard.name).read_bytes() == (tmp_path / "whole" / shard.name).read_bytes()
        assert not list((tmp_path / "cut").glob("*.tmp"))

    @pytest.mark.parametrize("spoil", ["zeros", "cut", "gone", "note"])
    def test_what_a_power_failure_leaves_is_written_again(self, tmp_path, spoil):
        """The samples of the unfinished shard were not yet on the disk, or the note was not."""
        shards, started = plan_shards([list(range(8))], 8), [True]

        def twice(items: Sequence[int]) -> Made:
            if items[0] == 4 and started:
                sys.exit("killed")
            return make(items)

        with pytest.raises(SystemExit):
            job(tmp_path, shards, twice)
        started.clear()
        part, note = tmp_path / "shard-000000.tar.tmp", tmp_path / ".job" / "shard-000000.tar.part"
        size = part.stat().st_size
        assert size > 4 * 512
        if spoil == "note":
            note.write_bytes(bytes(note.stat().st_size))
        elif spoil == "gone":
            part.unlink()
        else:
            part.write_bytes(bytes(size) if spoil == "zeros" else part.read_bytes()[: size // 2])
        assert job(tmp_path, shards, twice).samples == 8
        job(tmp_path / "whole", shards)
        assert (tmp_path / "shard-000000.tar").read_bytes() == (tmp_path / "whole" / "shard-000000.tar").read_bytes()

    def test_only_shards_of_changed_data_are_written_again(self, tmp_path):
        shards, content, made = plan_shards([list(range(6))], 2), dict.fromkeys(range(6), "a"), []

        def until(last: int) -> Callable[[Sequence[int]], Made]:
            def some(items: Sequence[int]) -> Made:
                if items[0] > last:
                    sys.exit("killed")
                made.extend(items)
                return make(items)

            return some

        def mark(items: Sequence[int]) -> str:
            return "".join(content[item] for item in items)

        with pytest.raises(SystemExit):
            job(tmp_path, shards, until(2), mark=mark)
        content[1], made[:] = "b", []
        assert job(tmp_path, shards[:2], until(9), mark=mark).samples == 4  # the data are fewer now, too
        assert made == [0, 1]

    def test_shards_of_another_tool_are_not_overwritten(self, tmp_path):
        (tmp_path / "shard-000000.tar").write_bytes(b"precious")
        with pytest.raises(UserError, match=r"holds shards of another tool, such as shard-000000.tar; choose another"):
            Job(tmp_path, {})
        assert [path.name for path in tmp_path.iterdir()] == ["shard-000000.tar"]

    def test_on_a_full_disk_keeps_what_is_finished(self, tmp_path):
        def full(items: Sequence[int]) -> Made:
            if items[0] >= 2:
                raise OSError(28, "No space left on device")
            return make(items)

        shards = plan_shards([list(range(4))], 2)
        with pytest.raises(
            UserError, match=f"could not be written to {tmp_path}: No space left.*what is finished is kept"
        ):
            job(tmp_path, shards, full)
        written: list[int] = []

        def log(items: Sequence[int]) -> Made:
            written.extend(items)
            return make(items)

        manifest = job(tmp_path, shards, log)
        assert written == [2, 3]
        assert manifest is not None
        assert manifest.samples == 4


class TestBadImages:
    @pytest.fixture
    def with_bad_images(self, images) -> Path:
        """Six files, of which 0001 and 0004 are not images."""
        for number in (1, 4):
            (images / f"000{number}.png").write_bytes(b"no image")
        return images

    def test_are_left_out_and_listed_if_tolerated(self, with_bad_images, tmp_path, family):
        corpus = images_of(with_bad_images, max_bad_fraction=0.5)
        manifest = run(corpus, tmp_path / "cache", family, samples_per_shard=4)
        assert [shard.samples for shard in manifest.shards] == [3, 1]
        lines = (tmp_path / "cache" / "left_out.txt").read_text().splitlines()
        assert len(lines) == 2
        for line, number in zip(lines, (1, 4), strict=True):
            assert line.startswith(f"data: {with_bad_images}/000{number}.png is not a readable image")
        cached = open_cache(tmp_path / "cache")
        assert [cached.record(at).key for at in range(4)] == ["00000000", "00000002", "00000003", "00000005"]
        good = [images_of(with_bad_images).caption(number) for number in (0, 2, 3, 5)]
        assert [cached.caption(at) for at in range(4)] == good

    def test_of_several_processes_are_all_listed(self, with_bad_images, tmp_path, family):
        corpus, config = (
            images_of(with_bad_images, max_bad_fraction=0.5),
            EncodeConfig(**{**OPTIONS, "samples_per_shard": 2}),
        )
        ends = [encode(corpus, tmp_path / "cache", family, config, rank=rank, world_size=2).manifest for rank in (1, 0)]
        assert ends[0] is None
        assert ends[1].samples == 4
        lines = (tmp_path / "cache" / "left_out.txt").read_text().splitlines()
        assert [f"000{number}.png" in line for line, number in zip(lines, (1, 4), strict=True)] == [True, True]

    def test_stop_the_job_if_not_tolerated(self, with_bad_images, tmp_path, family):
        with pytest.raises(
            UserError, match=r"0001\.png is not a readable image.*data\.max_bad_fraction=0\.17; what is encoded is kept"
        ):
            run(with_bad_images, tmp_path / "cache", family)

    def test_the_share_that_the_message_names_is_enough_for_one(self, images, tmp_path, family):
        (images / "0001.png").write_bytes(b"no image")
        with pytest.raises(UserError) as error:
            run(images, tmp_path / "cache", family)
        [share] = re.findall(r"data\.max_bad_fraction=([\d.]+);", str(error.value))
        assert run(images_of(images, max_bad_fraction=float(share)), tmp_path / "cache", family).samples == 5

    def test_no_list_if_all_are_valid(self, cache):
        assert not (cache / "left_out.txt").exists()

    def test_a_shard_without_a_valid_image_is_not_listed(self, images, tmp_path, family):
        for number in (2, 3):
            (images / f"000{number}.png").write_bytes(b"no image")
        manifest = run(images_of(images, max_bad_fraction=0.5), tmp_path / "cache", family, samples_per_shard=2)
        assert [(shard.name, shard.samples) for shard in manifest.shards] == [
            ("shard-000000.tar", 2),
            ("shard-000002.tar", 2),
        ]
        assert len(open_cache(tmp_path / "cache")) == 4


class TestRefusals:
    def test_finished_cache_is_not_made_again(self, cache, digits, family):
        """The same job returns the existing manifest."""
        before = contents(cache)
        config = EncodeConfig(**OPTIONS, trim_padding=True)
        assert encode(images_of(digits), cache, family, config) == (read_manifest(cache), None, {})
        assert contents(cache) == before

    def test_finished_cache_is_not_changed(self, cache, images, family):
        before = contents(cache)
        with pytest.raises(
            UserError,
            match=f"{cache} already holds a finished cache of other images or captions.*Choose another folder",
        ):
            run(images, cache, family, trim_padding=True)
        assert contents(cache) == before

    def test_cache_is_not_encoded_again(self, cache, tmp_path, family):
        with pytest.raises(UserError, match="the source is a cache already; only images can be encoded"):
            run(open_cache(cache), tmp_path / "cache", family)
        assert not (tmp_path / "cache").exists()

    @pytest.mark.parametrize(
        ("resolution", "nearest"), [((18, 30), "16 x 32"), ((16, 13), "16 x 12"), ((1, 16), "4 x 16")]
    )
    def test_resolution_that_cannot_be_packed(self, images, tmp_path, family, resolution, nearest):
        with pytest.raises(UserError, match=f"multiples of 4; the nearest is {nearest}"):
            run(images_of(images, resolution=resolution), tmp_path / "cache", family)
        assert not (tmp_path / "cache").exists()

    @pytest.mark.parametrize("below", ["", "sub", "sub/sub"])
    def test_output_that_cannot_be_written(self, images, tmp_path, family, below):
        """The output is a regular file, so not even root can write there."""
        (tmp_path / "file").write_text("precious")
        with pytest.raises(UserError, match=f"could not be written to {tmp_path / 'file' / below}"):
            run(images, tmp_path / "file" / below, family)
        assert (tmp_path / "file").read_text() == "precious"

    def test_text_is_kept_or_trimmed_or_left_out(self, capsys):
        with pytest.raises(SystemExit):
            main(["data", "encode", "images", "-o", "cache", "--model", "m", "--trim-padding", "--latents-only"])
        assert "argument --latents-only: not allowed with argument --trim-padding" in capsys.readouterr().err
        with pytest.raises(UserError, match="no text is stored that could be trimmed"):
            EncodeConfig(trim_padding=True, latents_only=True)

    @pytest.mark.parametrize(
        "change", [{"batch_size": 0}, {"samples_per_shard": 0}, {"text_length": 0}, {"text_length": 513}]
    )
    def test_invalid_numbers(self, change):
        with pytest.raises(UserError, match=r"at least 1 and the text length in 1\.\.512"):
            EncodeConfig(**change)


class TestNotFinite:
    @pytest.fixture
    def broken(self, images, monkeypatch) -> str:
        """The VAE's latents of one image have an infinite value."""
        encode_images = Autoencoder.encode
        target = unit_range(images_of(images).record(4).image)

        def encode(self: Autoencoder, batch: torch.Tensor) -> torch.Tensor:
            latents = encode_images(self, batch)
            for row, image in enumerate(batch):
                if torch.equal(image, target):
                    latents[row, 0, 1, 1] = float("inf")
            return latents

        monkeypatch.setattr(Autoencoder, "encode", encode)
        return "0004.png"

    def test_latents_stop_the_job_and_name_the_image(self, broken, images, tmp_path, family):
        with pytest.raises(
            UserError, match=rf"the latents of '{broken}' are not finite in torch.bfloat16. .*--dtype float32"
        ):
            run(images, tmp_path / "cache", family)
        assert not (tmp_path / "cache" / MANIFEST).exists()

    def test_latents_are_left_out_if_tolerated(self, broken, images, tmp_path, family):
        manifest = run(images_of(images, max_bad_fraction=0.2), tmp_path / "cache", family)
        assert manifest.samples == 5
        assert f"the latents of '{broken}'" in (tmp_path / "cache" / "left_out.txt").read_text()
        with pytest.raises(UserError, match=r"1 of 6 samples are invalid, data.max_bad_fraction tolerates 0\.1"):
            run(images_of(images, max_bad_fraction=0.1), tmp_path / "other", family)

    def test_embeddings(self, images, tmp_path, family, monkeypatch):
        monkeypatch.setattr(TextEncoders, "encode", _with_nan(TextEncoders.encode))
        with pytest.raises(UserError, match=r"the text and pooled of '0000.png' are not finite"):
            run(images, tmp_path / "cache", family)


def _with_nan(encode: Callable[..., Any]) -> Callable[..., Any]:
    def changed(self: TextEncoders, captions: Sequence[str], guidance: float | None = None) -> Any:
        cond = encode(self, captions, guidance)
        cond.fields["text"][0, 0, 0] = cond.fields["pooled"][0, 0] = float("nan")
        return cond

    return changed


class TestWithoutHardLinks:
    """exFAT, SMB and mounted buckets have none."""

    @pytest.fixture(autouse=True)
    def none(self, monkeypatch) -> None:
        def refuse(*_: Any, **__: Any) -> None:
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr(os, "link", refuse)
        monkeypatch.setattr(os, "symlink", refuse)

    def test_the_cache_is_the_same(self, digits, cache, tmp_path, family):
        run(digits, tmp_path / "cache", family, trim_padding=True)
        assert contents(tmp_path / "cache") == contents(cache)

    def test_the_padding_of_the_first_process_counts(self, cache, digits, tmp_path, family):
        """Another GPU may round differently: here the first one wrote zeros."""
        other = save({"text": torch.zeros_like(load_file(cache / PADDING)["text"])})
        (tmp_path / "cache").mkdir()
        (tmp_path / "cache" / PADDING).write_bytes(other)
        manifest = run(digits, tmp_path / "cache", family, trim_padding=True)
        assert manifest.padding == hashlib.sha256(other).hexdigest()
        assert (tmp_path / "cache" / PADDING).read_bytes() == other

    @pytest.mark.parametrize("left", [b"", b"half"])
    def test_a_padding_that_a_killed_process_left_is_replaced(self, cache, digits, tmp_path, family, monkeypatch, left):
        monkeypatch.setattr(encode_module, "_PADDING_WAIT", 0.1)
        (tmp_path / "cache").mkdir()
        (tmp_path / "cache" / PADDING).write_bytes(left)
        run(digits, tmp_path / "cache", family, trim_padding=True)
        assert contents(tmp_path / "cache") == contents(cache)


EXPECTED = {ENLARGED: 1, TRANSPARENT: 1, ANIMATED: 1, CUT: 1}


class TestWhatIsSaid:
    @pytest.fixture
    def mixed(self, tmp_path) -> Path:
        """Four images: a small one, a transparent one, two frames, one in order; and files that are left out."""
        folder = tmp_path / "mixed"
        folder.mkdir()
        colours = [Image.new("RGB", (16, 16), colour) for colour in ("red", "green", "blue")]
        colours[0].resize((15, 16)).save(folder / "small.png")
        Image.new("RGBA", (16, 16), (255, 0, 0, 0)).save(folder / "clear.png")
        colours[1].save(folder / "frames.gif", save_all=True, append_images=colours[2:])
        colours[2].save(folder / "good.png")
        for name in ("small", "clear", "frames", "good", "orphan"):
            (folder / f"{name}.txt").write_text("a digit")
        (folder / "good.txt").write_text("a handwritten digit " * 20)
        (folder / "._good.png").write_bytes(b"x")
        (folder / "photo.heic").write_bytes(b"x")
        return folder

    def test_changes_are_counted(self, mixed, tmp_path, family):
        config = EncodeConfig(**{**OPTIONS, "batch_size": 1})
        for _ in range(2):  # a finished job says the same
            assert dict(encode(images_of(mixed), tmp_path / "cache", family, config).counts) == EXPECTED

    def test_at_the_end_of_the_command(self, mixed, tmp_path, family, capsys):
        words = [
            "--model",
            str(family.folder),
            "--text-length",
            str(LENGTH),
            "--resolution",
            "16",
            "16",
            "--device",
            "cpu",
        ]
        assert main(["data", "encode", str(mixed), "-o", str(tmp_path / "cache"), *words]) == 0
        said = capsys.readouterr()
        for what in EXPECTED:
            assert f"{what}: 1 of 4\n" in said.out
        assert "left out: hidden names: 1, for example ._good.png\n" in said.out
        assert "left out: .heic files: 1, for example photo.heic\n" in said.out
        assert "left out: caption files without an image: 1, for example orphan.txt\n" in said.out
        assert "4 samples in 1 shard," in said.out
        assert "image 4/4" in said.err

    def test_before_by_inspect(self, mixed, tmp_path, family, capsys):
        words = ["--model", str(family.folder), "--text-length", str(LENGTH), "--resolution", "16", "16"]
        assert main(["data", "inspect", str(mixed), *words]) == 0
        said = capsys.readouterr().out
        for what in (ENLARGED, TRANSPARENT, ANIMATED):
            assert f"warning: {what}: 1 of the 4 images that were read\n" in said
        assert f"warning: captions of more than {LENGTH} tokens, which are cut: 1 of 4 that were read\n" in said
        assert "warning: left out: .heic files: 1, for example photo.heic\n" in said
        assert (
            main(
                ["data", "inspect", str(mixed), "--resolution", "64", "32", "--buckets", "auto", "data.bucket_step=16"]
            )
            == 0
        )
        assert f"{ENLARGED}: 4 of the 4" in capsys.readouterr().out

    def test_names_of_the_images_are_on_the_contact_sheet(self, mixed, tmp_path, family):
        run(images_of(mixed), tmp_path / "cache", family)
        words, page = (
            ["data", "inspect", str(tmp_path / "cache"), "--html", str(tmp_path / "x.html")],
            tmp_path / "x.html",
        )
        assert main(words) == 0
        assert all(f">{name}</p>" in page.read_text() for name in ("small.png", "clear.png", "frames.gif", "good.png"))
        assert main([*words, "--count", "2"]) == 0
        assert (
            sum(f">{name}</p>" in page.read_text() for name in ("small.png", "clear.png", "frames.gif", "good.png"))
            == 2
        )

    def test_small_folders_have_several_shards(self, digits, tmp_path, family):
        words = ["--model", str(family.folder), "--text-length", "8", "--resolution", "16", "16", "--batch-size", "2"]
        assert main(["data", "encode", str(digits), "-o", str(tmp_path / "cache"), "--device", "cpu", *words]) == 0
        assert [shard.samples for shard in read_manifest(tmp_path / "cache").shards] == [3] * 6 + [2]


class TestBackground:
    @pytest.fixture
    def clear(self, tmp_path) -> Path:
        (tmp_path / "images").mkdir()
        Image.new("RGBA", (16, 16), (255, 0, 0, 0)).save(tmp_path / "images" / "a.png")
        (tmp_path / "images" / "a.txt").write_text("a")
        return tmp_path / "images"

    def test_another_one_is_another_cache(self, clear, tmp_path, family):
        white = run(clear, tmp_path / "white", family)
        black = run(images_of(clear, background="#000000"), tmp_path / "black", family)
        assert (white.background, black.background) == ("white", "#000000")
        latents = [open_cache(tmp_path / name).record(0).latents for name in ("white", "black")]
        assert not torch.equal(*latents)
        with pytest.raises(
            UserError, match="already holds a finished cache:\n  background: 'white' before, 'black' now"
        ):
            run(images_of(clear, background="black"), tmp_path / "white", family)

    @pytest.mark.parametrize("value", ["purple", "#12345", "", "000000 "])
    def test_an_unknown_one_is_refused(self, clear, value):
        with pytest.raises(
            ValueError, match=r"data\.background must be white, black or a colour such as '#808080', got"
        ):
            images_of(clear, background=value)
