"""Caches of every kind of field, in both formats: read, batched, packed, indexed, validated and described."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from data_tools.index import index
from data_tools.inspect import summarise
from data_tools.pack import pack
from data_tools.tables import format_summary
from data_tools.validate import validate
from scfm_core.data.corpus import Corpus
from scfm_core.data.fields import PackedTokens
from scfm_core.data.recipe import DataConfig, SourceConfig
from scfm_core.data.schema import MANIFEST, BadData, Manifest, Record, collate
from scfm_core.data.webdataset import TarWriter

LENGTH, LAYERS, WIDTH = 6, 3, 2
KINDS: dict[str, Any] = {"hidden": "masked", "mask_free": "tokens", "pooled": "vector"}


def tensors(number: int, **changes: torch.Tensor) -> dict[str, torch.Tensor]:
    """`hidden` has 1, 2, ... tokens of several layers, as a text encoder whose layers are all used."""
    generator = torch.Generator().manual_seed(number)
    shapes = {
        "latents": (2, 8, 8),
        "hidden": (1 + number % LENGTH, LAYERS, WIDTH),
        "mask_free": (LENGTH, WIDTH),
        "pooled": (5,),
    }
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()} | changes


def write(folder: Path, samples: list[dict[str, torch.Tensor]], kinds: dict[str, Any] = KINDS) -> Path:
    folder.mkdir()
    with TarWriter(folder / "0.tar") as writer:
        for number, stored in enumerate(samples):
            files = {"safetensors": save(stored), "txt": f"caption {number}".encode()}
            writer.write(f"{number:04d}", {**files, "json": b'{"height": 16, "width": 16}'}, (16, 16))
    Manifest(encoder="e", fields=kinds, text_length=LENGTH, shards=(writer.entry,)).write(folder / MANIFEST)
    return folder


def open_(folder: Path, format: Any = "webdataset", **changes: Any) -> Corpus:
    source = SourceConfig(name="s", uri=str(folder), format=format)
    return Corpus(DataConfig(sources=(source,), resolution=(16, 16), **changes))


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return write(tmp_path / "cache", [tensors(number) for number in range(8)])


def reasons(corpus: Corpus) -> dict[str | None, str]:
    return {problem.key: problem.reason for problem in validate(corpus)}


@pytest.mark.parametrize("format", ["webdataset", "mds"])
def test_records_and_batches_are_what_was_stored(cache, tmp_path, format):
    folder = cache
    if format == "mds":
        folder = tmp_path / "mds"
        pack(open_(cache), folder, to="mds")
    corpus = open_(folder, format)
    assert corpus.fields == KINDS
    records = [corpus.record(item, padded=False) for item in range(8)]
    for number, record in enumerate(records):
        for name in KINDS:
            assert torch.equal(record.fields[name], tensors(number)[name])
    batch = collate(range(8), records)
    assert batch.lengths == tuple(1 + number % LENGTH for number in range(8))
    hidden, whole = batch.fields["hidden"], batch.fields["mask_free"]
    assert isinstance(hidden, PackedTokens) and isinstance(whole, PackedTokens)
    assert hidden.padded().shape == (8, LENGTH, LAYERS, WIDTH)
    assert torch.equal(hidden.padded()[3, :4], tensors(3)["hidden"])
    assert not hidden.padded()[3, 4:].any()
    assert torch.equal(whole.padded(), torch.stack([tensors(number)["mask_free"] for number in range(8)]))
    assert batch.nbytes == sum(tensor.nbytes for number in range(8) for tensor in tensors(number).values())
    assert validate(corpus) == []


def test_a_cache_of_latents_alone(tmp_path):
    """It also holds captions, which training encodes."""
    folder = write(tmp_path / "cache", [{"latents": tensors(number)["latents"]} for number in range(3)], kinds={})
    corpus = open_(folder)
    assert (corpus.is_cached, corpus.fields) == (True, {})
    batch = collate(range(3), [corpus.record(item, padded=False) for item in range(3)])
    assert (batch.fields, batch.lengths, batch.captions[2]) == ({}, None, "caption 2")
    assert validate(corpus) == []
    assert "cache e (webdataset), latents alone" in format_summary(summarise(corpus))


def test_the_index_keeps_the_fields(cache):
    before = (cache / MANIFEST).read_text()
    index(SourceConfig(name="s", uri=str(cache)), cache / MANIFEST, timeout=10.0)
    assert (cache / MANIFEST).read_text() == before


def test_inspect_names_fields_and_counts_their_tokens(cache):
    summary = summarise(open_(cache))
    assert (summary.sources[0].fields, summary.sources[0].padding) == (tuple(KINDS.items()), "stored")
    assert summary.stored is not None
    # Of eight texts of 1 to 6 tokens, then 1 and 2; one fills all.
    assert summary.stored.tokens == (("hidden", 2.5, 1),)
    mean = (21 + 3) / 8 * LAYERS * WIDTH * 4
    assert dict(summary.stored.bytes) == {"latents": 512, "hidden": mean, "mask_free": LENGTH * WIDTH * 4, "pooled": 20}


def test_validate_names_the_field(tmp_path):
    samples = [tensors(number) for number in range(8)]
    samples[1] = tensors(1, hidden=torch.zeros(LENGTH + 1, LAYERS, WIDTH))
    samples[2] = tensors(2, hidden=torch.zeros(2, LAYERS + 1, WIDTH), pooled=torch.zeros(6))
    samples[3] = tensors(3, mask_free=torch.zeros(LENGTH - 1, WIDTH))
    del samples[4]["hidden"]
    samples[5] = tensors(5, hidden=torch.full((1, LAYERS, WIDTH), float("nan")))
    assert reasons(open_(write(tmp_path / "cache", samples), max_bad_fraction=0.5)) == {
        "0001": "hidden has the shape [7, 3, 2], not [at most 6, ...]",
        "0002": "hidden has the shape [2, 4, 2], most of samples have [n, 3, 2]; pooled has the shape [6], most of samples have [5]",
        "0003": "has mask_free of the shape [5, 2], not [6, ...]. Encode it again",
        "0004": "has no hidden, but latents, mask_free, pooled. Encode it again",
        "0005": "hidden has 6 of 6 values that are not finite",
    }


def test_masked_fields_of_one_sample_have_one_length(tmp_path):
    kinds = {"hidden": "masked", "other": "masked"}
    folder = write(
        tmp_path / "cache",
        [{"latents": torch.zeros(2, 8, 8), "hidden": torch.zeros(3, 2), "other": torch.zeros(2, 2)}],
        kinds,
    )
    with pytest.raises(BadData, match=r"masked fields have different numbers of tokens: .*'hidden': 3, 'other': 2"):
        open_(folder).record(0)


def test_a_pinned_batch_has_all_tensors_in_pinned_memory(cache, monkeypatch):
    """Pinning itself needs a GPU: here it is a copy that is counted."""
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor.nbytes) or tensor.clone())
    batch = collate(range(8), [open_(cache).record(item, padded=False) for item in range(8)])
    copy = batch.pinned()
    assert sum(pinned) == batch.nbytes == copy.nbytes
    assert copy.lengths == batch.lengths
    for name, value in batch.fields.items():
        own, other = (getattr(field, "tokens", field) for field in (value, copy.fields[name]))
        assert torch.equal(own, other)
        assert own.data_ptr() != other.data_ptr()


def test_no_field_means_no_lengths():
    """Of images: their captions are encoded."""
    assert collate([0], [Record(key="a", caption="", image=torch.zeros(3, 2, 2))]).lengths is None
