"""`scfm data inspect`: correct statistics, and a page on which untrusted captions are only text."""

import base64
import hashlib
import io
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save

from data_tools import inspect as module
from data_tools.contact_sheet import write_contact_sheet
from data_tools.inspect import BucketSummary, summarise
from data_tools.tables import bytes_text, format_summary
from scfm_core.data.corpus import Corpus
from scfm_core.data.recipe import DataConfig, SourceConfig
from scfm_core.data.schema import MANIFEST, Manifest
from scfm_core.data.source import PADDING
from scfm_core.data.webdataset import TarWriter
from scfm_core.errors import UserError

SIZES = ((16, 16), (16, 24), (24, 16))


def picture(number: int, height: int, width: int) -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(noise).save(buffer, "PNG")
    return buffer.getvalue()


def write_images(folder: Path, captions: list[str], *, per_shard: int = 4, size: tuple[int, int] | None = None) -> Path:
    """Shards of images of all `SIZES` in turn, or of one size."""
    folder.mkdir(parents=True)
    entries = []
    for at in range(0, len(captions), per_shard):
        writer = TarWriter(folder / f"{at // per_shard:03d}.tar")
        with writer:
            for number in range(at, min(at + per_shard, len(captions))):
                here = size or SIZES[number % 3]
                writer.write(f"{number:04d}", {"png": picture(number, *here), "txt": captions[number].encode()}, here)
        entries.append(writer.entry)
    Manifest(shards=tuple(entries)).write(folder / MANIFEST)
    return folder


def write_cache(folder: Path, count: int = 6) -> Path:
    """Latents [2, 8, 8]; texts of 1, 2, ... tokens, with trimmed padding."""
    folder.mkdir(parents=True)
    padding = save({"text": torch.zeros(12, 3)})
    (folder / PADDING).write_bytes(padding)
    writer = TarWriter(folder / "0.tar")
    with writer:
        for number in range(count):
            latents = torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(number))
            tensors = {"latents": latents, "text": torch.zeros(number + 1, 3), "pooled": torch.zeros(5)}
            writer.write(f"{number:04d}", {"safetensors": save(tensors), "txt": b"a cat"}, (16, 16))
    draft: dict[str, Any] = {
        "encoder": "abcdef" * 10,
        "fields": {"text": "tokens", "pooled": "vector"},
        "text_length": 12,
        "padding": hashlib.sha256(padding).hexdigest(),
    }
    Manifest(shards=(writer.entry,), **draft).write(folder / MANIFEST)
    return folder


def open_(*folders: Path, weights: tuple[float | None, ...] = (), sizes: Any = SIZES, **changes: Any) -> Corpus:
    weights = weights or (None,) * len(folders)
    sources = tuple(
        SourceConfig(name=folder.name, uri=str(folder), weight=weight)
        for folder, weight in zip(folders, weights, strict=True)
    )
    return Corpus(DataConfig(sources=sources, resolution=(16, 16), buckets=sizes, max_bad_fraction=0.5, **changes))


class Page(HTMLParser):
    """The page as a browser parses it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        self.texts.append((self.tags[-1][0] if self.tags else "", data))

    def text(self) -> str:
        return " ".join(data for tag, data in self.texts if tag != "style")

    def images(self) -> list[np.ndarray]:
        sources = [attributes["src"] or "" for tag, attributes in self.tags if tag == "img"]
        assert all(re.match(r"data:image/(png|jpeg);base64,", source) for source in sources)
        return [np.asarray(Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2])))) for source in sources]


def pixels(image: torch.Tensor | None) -> np.ndarray:
    """uint8 [3, H, W] -> [H, W, 3]."""
    assert image is not None
    return image.permute(1, 2, 0).numpy()


class TestNumbers:
    def test_of_a_mixture(self, tmp_path):
        one, two = write_images(tmp_path / "one", ["x"] * 30), write_images(tmp_path / "two", ["x"] * 7, size=(16, 16))
        corpus = open_(one, two, weights=(3.0, 1.0), sizes=(*SIZES, (8, 32)), epoch_size=40)
        summary = summarise(corpus, global_batch_size=8)
        assert [(s.name, s.shards, s.samples, s.draws) for s in summary.sources] == [
            ("one", 8, 30, 30),
            ("two", 2, 7, 10),
        ]
        for source, folder in zip(summary.sources, (one, two), strict=True):
            assert source.bytes == sum(path.stat().st_size for path in folder.glob("*.tar"))
            assert (source.address, source.encoder, source.padding) == (str(folder), None, None)
        assert (summary.samples, summary.epoch) == (37, 40)
        assert summary.unused_sizes == 1
        assert re.search(r"^one .* 75\.0%\n", format_summary(summary), re.MULTILINE)
        epoch = corpus.order(8, 0).epoch(0)
        for bucket in summary.buckets:
            number = corpus.sizes.index(bucket.size)
            assert bucket.samples == len(corpus.items_of(bucket.size))
            assert bucket.batches == int((epoch.buckets == number).sum())
        assert summary.buckets == (
            BucketSummary(size=(16, 16), samples=17, draws=20, batches=2, waiting=4),
            BucketSummary(size=(16, 24), samples=10, draws=10, batches=1, waiting=2),
            BucketSummary(size=(24, 16), samples=10, draws=10, batches=1, waiting=2),
        )
        assert summary.warnings == []
        [warning] = summarise(corpus, global_batch_size=16).warnings[:1]
        assert warning.startswith("16 x 24 has 10 samples, fewer than the 16 of a global batch")
        tens = summarise(corpus, global_batch_size=10)
        assert (tens.warnings, tens.buckets[0].batches, tens.buckets[0].waiting) == ([], 2, 0)
        assert "16 x 16 has 17 samples" in summarise(corpus, global_batch_size=18).warnings[0]

    def test_of_a_folder(self, tiny):
        config = SourceConfig(name="digits", uri=str(tiny / "digits"), format="folder")
        summary = summarise(Corpus(DataConfig(sources=(config,), resolution=(16, 16))))
        [source] = summary.sources
        assert (source.shards, source.samples, source.format) == (None, 48, "folder")
        assert source.bytes == sum(path.stat().st_size for path in (tiny / "digits").glob("*.png"))
        assert summary.captions.words[0] == ("digit", 48)

    def test_of_captions(self, tmp_path):
        captions = ["The cat and the dog", "the cat", "", "", "  ", "the cat", "Élan d\u2019été cat's", "one " * 100]
        found = summarise(open_(write_images(tmp_path / "i", captions))).captions
        assert (found.count, found.empty, found.repeated) == (8, 3, 1)
        assert (found.shortest, found.median, found.longest) == (0, 2, 100)
        assert found.percentile_95 == round(float(np.percentile([5, 2, 0, 0, 0, 2, 3, 100], 95)), 1)
        # A word counts once for each caption; words in only one caption are left out.
        assert found.words == (("cat", 3),)
        assert "empty captions: 3 of 8" in " ".join(summarise(open_(tmp_path / "i")).warnings)
        rare = summarise(open_(write_images(tmp_path / "j", ["Élan d\u2019été", "the"]))).captions
        assert rare.words == (("d\u2019été", 1), ("élan", 1))

    def test_of_what_a_cache_stores(self, tmp_path):
        summary = summarise(open_(write_cache(tmp_path / "c"), sizes="none"))
        [source] = summary.sources
        assert (source.encoder, source.text_length, source.padding) == ("abcdef" * 10, 12, "trimmed")
        stored = summary.stored
        assert stored is not None
        assert dict(stored.bytes) == {"latents": 2 * 8 * 8 * 4, "text": 3.5 * 3 * 4, "pooled": 5 * 4}
        assert (stored.count, stored.tokens, stored.text_length) == (6, (("text", 3.5, 0),), 12)
        assert summarise(open_(write_images(tmp_path / "i", ["x"]))).stored is None

    def test_stored_and_trimmed_padding(self, tiny):
        corpus = Corpus(DataConfig(path=str(tiny / "cache"), resolution=(16, 16)))
        summary = summarise(corpus)
        assert summary.sources[0].padding == "stored"
        assert summary.stored is not None and summary.stored.tokens == ()

    @pytest.mark.parametrize(
        ("count", "text"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (999_600, "1 MB"), (2.5e12, "2.5 TB")]
    )
    def test_bytes(self, count, text):
        assert bytes_text(count) == text


class TestSampling:
    def test_is_spread_and_repeatable(self, tmp_path):
        corpus = open_(write_images(tmp_path / "i", ["x"] * 40))
        [sampled] = summarise(corpus, sample=10, seed=1).sampled
        assert [item // 4 for item in sampled] == list(range(10))
        assert summarise(corpus, sample=10, seed=1).sampled == (sampled,)
        assert summarise(corpus, sample=10, seed=2).sampled != (sampled,)
        assert summarise(corpus, sample=1000).sampled == (tuple(range(40)),)

    @pytest.mark.parametrize("remote", [False, True])
    def test_opens_few_shards_of_many(self, tmp_path, monkeypatch, remote):
        corpus = open_(write_images(tmp_path / "i", ["x"] * 40))
        monkeypatch.setattr(module, "_MAX_SHARDS", 5)
        monkeypatch.setattr(module, "_MAX_DOWNLOADS", 2)
        monkeypatch.setattr(module, "is_remote", lambda uri: remote)
        [sampled] = summarise(corpus, sample=30).sampled
        shards = {corpus.shard_of(item) for item in sampled}
        assert len(shards) == (2 if remote else 5)
        assert len(sampled) == 4 * len(shards)
        assert min(shards) <= 4
        assert max(shards) >= 5

    def test_every_source_is_sampled(self, tmp_path):
        big, small = write_images(tmp_path / "big", ["x"] * 40), write_images(tmp_path / "small", ["y"])
        summary = summarise(open_(big, small), sample=10)
        assert [len(items) for items in summary.sampled] == [10, 1]
        assert summary.sampled[1] == (40,)

    def test_unreadable_samples_are_counted(self, tmp_path):
        folder = write_images(tmp_path / "i", ["x"] * 12)
        (folder / "001.tar").unlink()
        summary = summarise(open_(folder))
        assert len(summary.unreadable) == 4
        assert summary.captions.count == 8
        assert "unreadable samples: 4, the first: shard" in summary.warnings[-1]


class TestText:
    def test_has_the_numbers(self, tmp_path):
        corpus = open_(write_images(tmp_path / "photos", ["a tabby cat"] * 20))
        text = format_summary(summarise(corpus, global_batch_size=4))
        assert re.search(r"^photos +images \(webdataset\) +\S+/photos +5 +20 .* 100\.0%$", text, re.MULTILINE)
        assert re.search(r"^16 x 24 +7 +35\.0% +1 +3$", text, re.MULTILINE)
        assert re.search(r"^repeat an earlier one +19 \(95\.0%\)$", text, re.MULTILINE)
        assert "cat 20, tabby 20" in text

    def test_of_a_cache(self, tmp_path):
        text = format_summary(summarise(open_(write_cache(tmp_path / "c"), sizes="none"), global_batch_size=4))
        assert "cache abcdefabcdef (webdataset), text (tokens), pooled (vector), 12 tokens, padding trimmed" in text
        assert "text, median of tokens  3.5 of 12" in text

    def test_untrusted_text_does_not_control_the_terminal(self, tmp_path):
        folder = write_images(tmp_path / "i", ["x"] * 3)
        shard = (folder / "000.tar").read_bytes()
        (folder / "000.tar").write_bytes(shard[:-1])
        summary = summarise(open_(folder))
        hostile = type(summary)(**{**summary.__dict__, "unreadable": ("\x1b[2J gone",)})
        assert "\x1b" not in format_summary(hostile)
        assert "\\x1b[2J gone" in format_summary(hostile)


HOSTILE = [
    "<script>alert(1)</script>",
    "' onmouseover='alert(1)",
    '" onerror="alert(1)',
    "</p></figure><img src=x onerror=alert(1)>",
    "</title><iframe src=http://evil.example>",
    "&lt;b&gt; &amp; 猫",
    "</style><link rel=stylesheet href=//evil.example>",
]


class TestContactSheet:
    def test_hostile_captions_are_only_text(self, tmp_path):
        corpus = open_(write_images(tmp_path / "i", HOSTILE))
        page = Page(write_contact_sheet(corpus, summarise(corpus), tmp_path / "x.html", decode=None))
        names = [tag for tag, _ in page.tags]
        assert not {"script", "iframe", "link", "object", "embed", "base", "form"} & set(names)
        assert names.count("img") == len(HOSTILE)
        for _, attributes in page.tags:
            assert not [name for name in attributes if name.startswith("on") or name in ("href", "srcset")]
        titles = [attributes.get("title") for tag, attributes in page.tags if attributes.get("class") == "said"]
        assert sorted(map(str, titles)) == sorted(HOSTILE)
        for caption in HOSTILE:
            assert ("p", caption) in page.texts
        [policy] = [a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
        assert "default-src 'none'" in str(policy)
        assert len(page.images()) == len(HOSTILE)

    def test_hostile_words_keys_and_errors_are_only_text(self, tmp_path, monkeypatch):
        folder = tmp_path / "i"
        folder.mkdir()
        writer = TarWriter(folder / "0.tar")
        with writer:
            for number in range(2):
                key = f"'><b>{number}<i>"
                writer.write(key, {"png": picture(1, 16, 16) if number else b"", "txt": b"x"}, (16, 16))
        Manifest(shards=(writer.entry,)).write(folder / MANIFEST)
        corpus = open_(folder)
        summary = summarise(corpus)
        page = Page(write_contact_sheet(corpus, summary, tmp_path / "x.html", decode=None))
        assert [tag for tag, _ in page.tags].count("b") == 6  # of the tiles
        assert ("p", "'><b>1<i>") in page.texts
        [broken] = [data for tag, data in page.texts if tag == "em"]
        assert "<b>0<i>" in broken
        assert "not a readable image" in broken
        assert len(page.images()) == 1

    def test_images_are_cropped_as_in_training(self, tmp_path):
        corpus = open_(write_images(tmp_path / "i", ["x"] * 6), sizes=((16, 16), (16, 24)))
        page = Page(write_contact_sheet(corpus, summarise(corpus), tmp_path / "x.html", decode=None))
        expected = [pixels(corpus.record(int(i)).image) for size in corpus.sizes for i in corpus.items_of(size)]
        shown = page.images()
        assert len(shown) == 6
        for image, right in zip(shown, expected, strict=True):
            factor = image.shape[0] // right.shape[0]
            assert factor > 5
            assert np.array_equal(image[::factor, ::factor], right)
        assert "16 \u00d7 24" in page.text()
        assert "first latent channel" not in page.text()

    def test_large_images_become_small_jpegs(self, tmp_path):
        corpus = open_(write_images(tmp_path / "i", ["x"], size=(512, 1024)), sizes=((512, 1024),))
        path = write_contact_sheet(corpus, summarise(corpus), tmp_path / "x.html", decode=None)
        [image] = Page(path).images()
        assert image.shape == (160, 320, 3)
        assert path.stat().st_size < 100_000

    def test_latents_are_decoded(self, tmp_path):
        corpus = open_(write_cache(tmp_path / "c"), sizes="none")
        seen = []

        def decode(latents):
            seen.append(latents)
            return latents[:, :1].sigmoid().repeat(1, 3, 2, 2)

        page = Page(write_contact_sheet(corpus, summarise(corpus), tmp_path / "x.html", decode=decode))
        assert [tuple(latents.shape) for latents in seen] == [(1, 2, 8, 8)] * 6
        first = corpus.record(0).latents
        assert first is not None
        right = (first[0].sigmoid().repeat(2, 2) * 255).round().byte().numpy()
        assert np.array_equal(page.images()[0][::20, ::20, 1], right)
        assert "cached latents, decoded" in page.text()
        assert "first latent channel" not in page.text()

    def test_latents_without_decoder_are_grey_and_labelled(self, tmp_path):
        corpus = open_(write_cache(tmp_path / "c"), sizes="none")
        page = Page(write_contact_sheet(corpus, summarise(corpus), tmp_path / "x.html", decode=None))
        image = page.images()[0]
        assert np.array_equal(image[..., 0], image[..., 2])
        first = corpus.record(0).latents
        assert first is not None
        shown = image[::40, ::40, 0].astype(float)
        assert shown.min() == 0
        assert shown.max() == 255
        assert np.corrcoef(shown.ravel(), first[0].numpy().ravel())[0, 1] > 0.97
        assert page.text().count("c, first latent channel") == 6
        assert "not images" in page.text()

    def test_samples_are_taken_in_turn_from_sources_and_sizes(self, tmp_path):
        big, small = (
            write_images(tmp_path / "big", ["x"] * 60),
            write_images(tmp_path / "small", ["y"] * 2, size=(16, 16)),
        )
        corpus = open_(big, small)
        page = Page(write_contact_sheet(corpus, summarise(corpus), tmp_path / "x.html", decode=None, count=8))
        cards = [data for tag, data in page.texts if tag == "span" and data in ("big", "small")]
        assert (cards.count("big"), cards.count("small")) == (6, 2)
        shapes = [image.shape[:2] for image in page.images()]
        assert {h > w for h, w in shapes} == {True, False}
        assert sum(h < w for h, w in shapes) == sum(h > w for h, w in shapes) == 2
        again = write_contact_sheet(corpus, summarise(corpus), tmp_path / "y.html", decode=None, count=8)
        assert again.read_bytes() == (tmp_path / "x.html").read_bytes()
        other = write_contact_sheet(corpus, summarise(corpus), tmp_path / "z.html", decode=None, count=8, seed=1)
        assert other.read_bytes() != again.read_bytes()

    def test_has_numbers_and_warnings(self, tmp_path):
        corpus = open_(write_images(tmp_path / "photos", ["a tabby cat"] * 19 + [""]))
        summary = summarise(corpus, global_batch_size=8)
        page = Page(write_contact_sheet(corpus, summary, tmp_path / "x.html", decode=None))
        text = page.text()
        for part in (
            str(tmp_path / "photos"),
            "35.0%",
            "batches of 8",
            "16 x 24 has 7 samples",
            "empty captions: 1",
            "tabby",
            "no caption",
        ):
            assert part in text, part
        assert ("span", "tabby ") in page.texts
        assert ("small", "19") in page.texts
        widths = re.findall(r"class=bar><span style='width:([\d.]+)%'", (tmp_path / "x.html").read_text())
        assert widths == ["100.0", "100.0", "85.7"]

    def test_a_path_that_cannot_be_written(self, tmp_path):
        corpus = open_(write_images(tmp_path / "i", ["x"]))
        with pytest.raises(UserError, match="cannot be written"):
            write_contact_sheet(corpus, summarise(corpus), tmp_path / "nowhere" / "x.html", decode=None)

    def test_half_a_surrogate_is_not_an_error(self, tmp_path):
        folder = tmp_path / "i"
        folder.mkdir()
        writer = TarWriter(folder / "0.tar")
        with writer:
            writer.write("a", {"png": picture(1, 16, 16), "json": b'{"said": "half \\ud83d of it"}'}, (16, 16))
        Manifest(shards=(writer.entry,)).write(folder / MANIFEST)
        of = SourceConfig(name="i", uri=str(folder), captions={"json.said": 1.0})
        corpus = Corpus(DataConfig(sources=(of,), resolution=(16, 16)))
        page = Page(write_contact_sheet(corpus, summarise(corpus), tmp_path / "x.html", decode=None))
        assert any(tag == "em" and "half of a character, '\\ud83d'" in text for tag, text in page.texts)
