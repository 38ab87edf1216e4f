"""`encode_folder`: what the cache holds is what the pipeline's own encoders say, and a bad input is refused early."""

import json
import tarfile
from pathlib import Path

import pytest
import torch

from data_tools.encode import encode_folder
from recipes.tiny import write_digits, write_pipeline
from scfm_core.data.folder import ImageFolder
from scfm_core.data.schema import MANIFEST, Manifest
from scfm_core.data.webdataset import CachedDataset
from scfm_core.errors import UserError
from scfm_core.models.encoders import Autoencoder, TextEncoders
from scfm_core.models.flux import Flux
from scfm_core.models.weights import encoder_fingerprint

COUNT, BATCH = 20, 8


def encode(images: Path, output: Path, family: Flux, **changes: object) -> Manifest:
    options = {"resolution": (16, 16), "text_length": 8, "batch_size": BATCH, "samples_per_shard": 9}
    return encode_folder(images, output, family, **{**options, **changes})


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Flux:
    folder = tmp_path_factory.mktemp("pipeline")
    write_pipeline(folder, vae_steps=0)
    return Flux(str(folder))


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be changed by a test."""
    folder = tmp_path_factory.mktemp("digits")
    write_digits(folder, count=COUNT)
    return folder


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A few digits that a test may spoil."""
    write_digits(tmp_path / "images", count=6)
    return tmp_path / "images"


@pytest.fixture(scope="module")
def cache(digits: Path, family: Flux, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be changed by a test."""
    folder = tmp_path_factory.mktemp("encoded") / "cache"
    encode(digits, folder, family)
    return folder


class TestContent:
    def test_manifest(self, cache, family):
        manifest = Manifest.read(cache)
        assert manifest.encoder == encoder_fingerprint(family.folder)
        assert (manifest.text_length, manifest.resolution, manifest.samples) == (8, (16, 16), COUNT)
        assert [shard.samples for shard in manifest.shards] == [9, 9, 2]

    def test_returned_manifest_is_the_written_one(self, digits, tmp_path, family):
        assert encode(digits, tmp_path / "cache", family) == Manifest.read(tmp_path / "cache")

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    def test_tensors_are_the_encoders_own(self, digits, tmp_path, family, dtype):
        encode(digits, tmp_path / "cache", family, dtype=dtype)
        cached, folder = CachedDataset(tmp_path / "cache"), ImageFolder(digits, 16, 16)
        vae, text = Autoencoder(family.folder, dtype, "cpu"), TextEncoders(family.folder, 8, dtype, "cpu")
        assert len(cached) == len(folder)
        for start in range(0, COUNT, BATCH):  # in the same batches: then every bit agrees
            rows = range(start, min(start + BATCH, COUNT))
            latents = vae.encode(torch.stack([folder[row].image for row in rows]))
            cond = text.encode([folder.caption(row) for row in rows])
            for at, row in enumerate(rows):
                record = cached[row]
                assert record.latents.dtype == record.text.dtype == record.pooled.dtype == dtype
                assert torch.equal(record.latents, latents[at])
                assert torch.equal(record.text, cond.text[at])
                assert torch.equal(record.pooled, cond.pooled[at])
                assert record.caption == folder.caption(row)

    def test_shapes_are_the_models(self, cache, family):
        record = CachedDataset(cache)[0]
        assert record.latents.shape == family.latent_shape(16, 16)
        assert record.text.shape == (8, 32)
        assert record.pooled.shape == (32,)

    def test_records_differ(self, cache):
        """Random encoders that returned a constant would pass every comparison above."""
        dataset = CachedDataset(cache)
        assert not torch.equal(dataset[0].latents, dataset[1].latents)
        assert not torch.equal(dataset[0].text, dataset[1].text)
        assert not torch.equal(dataset[0].pooled, dataset[1].pooled)

    def test_non_square_resolution(self, images, tmp_path, family):
        encode(images, tmp_path / "cache", family, resolution=(8, 24))
        assert CachedDataset(tmp_path / "cache")[0].latents.shape == family.latent_shape(8, 24)
        assert Manifest.read(tmp_path / "cache").resolution == (8, 24)

    def test_each_sample_says_which_file_it_was(self, cache):
        sources = []
        for shard in Manifest.read(cache).shards:
            with tarfile.open(cache / shard.name) as tar:
                rows = [json.load(tar.extractfile(member)) for member in tar if member.name.endswith(".json")]
            assert all((row["height"], row["width"]) == (16, 16) for row in rows)
            sources += [row["source"] for row in rows]
        assert sources == [f"{number:04d}.png" for number in range(COUNT)]

    def test_names_with_dots_and_folders_do_not_reach_the_keys(self, images, tmp_path, family):
        """webdataset takes a key to end at the first dot, and a folder's name to be part of it."""
        (images / "v1.5").mkdir()
        (images / "0000.png").rename(images / "v1.5" / "a.b.png")
        (images / "v1.5" / "a.b.txt").write_text("moved")
        encode(images, tmp_path / "cache", family)
        dataset = CachedDataset(tmp_path / "cache")
        assert [dataset[row].key for row in range(6)] == [f"{row:08d}" for row in range(6)]
        assert dataset.caption(5) == "moved"

    def test_again_gives_the_same_bytes(self, cache, digits, tmp_path, family):
        assert encode(digits, tmp_path / "again", family) == Manifest.read(cache)

    def test_progress_is_told_of_every_batch(self, digits, tmp_path, family):
        seen = []

        def progress(batches, total):
            for batch in batches:
                seen.append(total)
                yield batch

        encode(digits, tmp_path / "cache", family, progress=progress)
        assert seen == [3, 3, 3]


class TestRefusals:
    def test_finished_cache_is_left_alone(self, cache, images, family):
        before = {path.name: path.read_bytes() for path in cache.iterdir()}
        with pytest.raises(UserError, match=f"{cache} already holds a finished cache; choose another folder"):
            encode(images, cache, family)
        assert {path.name: path.read_bytes() for path in cache.iterdir()} == before

    @pytest.mark.parametrize(
        ("resolution", "nearest"),
        [((18, 30), "16 x 32"), ((16, 13), "16 x 12"), ((1, 16), "4 x 16"), ((0, 16), "4 x 16")],
    )
    def test_resolution_that_cannot_be_packed(self, images, tmp_path, family, resolution, nearest):
        with pytest.raises(UserError, match=f"multiples of 4; the nearest is {nearest}"):
            encode(images, tmp_path / "cache", family, resolution=resolution)
        assert not (tmp_path / "cache").exists()

    @pytest.mark.parametrize("below", ["", "sub", "sub/sub"])
    def test_output_that_cannot_be_written(self, images, tmp_path, family, below):
        """A regular file stands in the way: not even root can write there."""
        (tmp_path / "file").write_text("precious")
        with pytest.raises(UserError, match=f"could not be written to {tmp_path / 'file' / below}"):
            encode(images, tmp_path / "file" / below, family)
        assert (tmp_path / "file").read_text() == "precious"

    def test_image_without_caption(self, images, tmp_path, family):
        (images / "new.png").write_bytes((images / "0000.png").read_bytes())
        with pytest.raises(UserError, match=r"1 of 7 images .*'new\.png'.*'new\.txt'"):
            encode(images, tmp_path / "cache", family)
        assert not (tmp_path / "cache").exists()

    @pytest.mark.parametrize(
        "spoil", [lambda folder: folder.rename(f"{folder}2"), lambda folder: None], ids=["gone", "empty"]
    )
    def test_no_images(self, tmp_path, family, spoil):
        (tmp_path / "images").mkdir()
        spoil(tmp_path / "images")
        with pytest.raises(UserError, match=str(tmp_path / "images")):
            encode(tmp_path / "images", tmp_path / "cache", family)

    def test_bad_image_in_the_middle_leaves_nothing_that_looks_finished(self, images, tmp_path, family):
        good = (images / "0004.png").read_bytes()
        (images / "0004.png").write_bytes(good[:60])
        with pytest.raises(UserError, match=r"0004\.png is not a readable image"):
            encode(images, tmp_path / "cache", family, batch_size=2, samples_per_shard=3)
        assert not (tmp_path / "cache" / MANIFEST).exists()
        assert not list((tmp_path / "cache").glob("*.tmp"))
        with pytest.raises(UserError, match="did not finish"):
            CachedDataset(tmp_path / "cache")

        (images / "0004.png").write_bytes(good)
        encode(images, tmp_path / "cache", family, batch_size=2, samples_per_shard=3)
        assert len(CachedDataset(tmp_path / "cache")) == 6
