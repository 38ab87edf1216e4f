"""The text that a run trains on: cached with its padding, trimmed, of an earlier release, or encoded in the run."""

import contextlib
import hashlib
import json
import shutil
import weakref
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from data_tools.encode import EncodeConfig, encode
from data_tools.generate import SamplerConfig, generate
from recipes.tiny import caption
from scfm_core.data.corpus import Corpus
from scfm_core.data.recipe import DataConfig
from scfm_core.data.schema import MANIFEST, Manifest
from scfm_core.errors import UserError
from scfm_core.models import families
from scfm_core.models.conditioning import Conditioning
from scfm_core.models.encoders import TextEncoders
from scfm_core.models.families import open_family
from scfm_core.models.flux import Flux
from scfm_core.models.protocol import FieldKind
from scfm_core.train import inputs
from scfm_core.train.device import free_unused
from scfm_core.train.estimate import estimate
from scfm_core.train.inputs import BatchEncoder
from scfm_core.train.trainer import Trainer

WAYS: dict[str, dict[str, Any]] = {
    "kept": {},
    "trimmed": {"trim_padding": True},
    "latents alone": {"latents_only": True},
}
STEPS, SHIFT, GUIDANCE = 4, 3.0, 2.0


def losses(config: Any) -> list[float]:
    return [row["loss"] for row in Trainer(config).train_steps()]


def encoded(tiny: Path, folder: Path, **options: Any) -> Path:
    corpus = Corpus(DataConfig(path=str(tiny / "digits"), format="folder", resolution=(16, 16)))
    config = EncodeConfig(text_length=8, dtype=torch.float32, samples_per_shard=20, **options)
    encode(corpus, folder, open_family(str(tiny / "flux")), config)
    return folder


def write_paths(tiny: Path, folder: Path, shift: Any = SHIFT, **options: Any) -> None:
    """Paths of the teacher, with captions of several lengths."""
    generate(
        [caption(1), "a lion", "digit", ""],
        folder,
        open_family(str(tiny / "flux")),
        EncodeConfig(text_length=8, dtype=torch.float32, samples_per_shard=20, **options),
        SamplerConfig(
            sizes=((16, 16),), per_prompt=4, num_steps=STEPS, shift=shift, guidance=GUIDANCE, seed=5, intervals=STEPS
        ),
    )  # fmt: skip


def on_paths(folder: Path) -> dict[str, Any]:
    return {
        "data.path": str(folder),
        "sample.guidance": GUIDANCE,
        "method.trajectory_fraction": 1.0,
        "method.teacher_fraction": 0.0,
        "method.trajectory_grids": [STEPS],
        "train.steps": 1,
        "train.global_batch_size": 16,
    }


def loss_on_paths(tiny: Path, folder: Path, make_config: Any, **options: Any) -> float:
    """Of an untouched student."""
    write_paths(tiny, folder, **options)
    [loss] = losses(make_config(on_paths(folder)))
    return loss


@pytest.mark.parametrize("way", WAYS)
def test_an_untouched_student_has_no_loss_on_stored_paths(tiny, make_config, tmp_path, way):
    """It follows the teacher's path only if it gets the text with which the teacher was sampled: otherwise the loss is 2e-6."""
    assert loss_on_paths(tiny, tmp_path / "paths", make_config, **WAYS[way]) < 1e-12


def test_a_shift_that_depends_on_the_steps_is_not_that_of_paths(tiny, make_config, tmp_path, monkeypatch):
    """In one step the student would be sampled at another shift than its paths."""
    monkeypatch.setattr(Flux, "shift", lambda self, tokens, steps: 2 + steps / 10)
    write_paths(tiny, tmp_path / "paths", shift="dynamic")
    config = {**on_paths(tmp_path / "paths"), "sample.shift": "dynamic"}
    assert losses(make_config(config)) == [pytest.approx(0, abs=1e-12)]
    message = r"sampled at shift 2\.4 and guidance 2, but sample\.shift is dynamic .* Set both .* depends on the number of steps"
    with pytest.raises(UserError, match=message):
        Trainer(make_config({**config, "method.trajectory_grids": [1, STEPS]}))


@pytest.fixture(scope="module")
def kept(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tests must not change it."""
    return encoded(tiny, tmp_path_factory.mktemp("kept") / "cache", batch_size=8)


# In the order of the cache, a batch of the run has the samples of a batch of the encoders: rounding is the same.
IN_ORDER = {"data.shuffle": False, "method.caption_dropout": 0.2}


def test_captions_encoded_in_the_run_give_the_losses_of_cached_text(tiny, kept, make_config, tmp_path):
    latents = encoded(tiny, tmp_path / "latents", batch_size=8, latents_only=True)
    manifest = Manifest.parse((latents / MANIFEST).read_bytes(), "")
    assert (manifest.fields, manifest.text_length, "model.text_length" in manifest.settings) == ({}, None, False)
    assert sum(shard.bytes for shard in manifest.shards) < sum(path.stat().st_size for path in kept.glob("*.tar"))
    expected = losses(make_config({**IN_ORDER, "data.path": str(kept)}))
    assert losses(make_config({**IN_ORDER, "data.path": str(latents), "run.dir": str(tmp_path / "other")})) == expected
    # Another text length is another text, so the losses tell the captions apart.
    changes = {"data.path": str(latents), "model.text_length": 4, "run.dir": str(tmp_path / "short")}
    assert losses(make_config({**IN_ORDER, **changes})) != expected


def test_every_rank_encodes_the_captions_of_a_cache_without_text(tiny, make_config, tmp_path):
    config = make_config({"data.path": str(encoded(tiny, tmp_path / "latents", latents_only=True))})
    world: Any = SimpleNamespace(is_main=False, together=contextlib.nullcontext)
    family = open_family(str(tiny / "flux"))
    encoder = BatchEncoder(config, family, Corpus(config.data), torch.device("cpu"), (), world)
    assert (encoder.text is not None, encoder.vae) == (True, None)
    part = "encoders (on the fly)"
    assert estimate(config, family).memory[part] == family.encoder_bytes > 0
    assert estimate(make_config({"data.path": str(tiny / "cache")}), family).memory[part] == 0


@pytest.mark.parametrize("trim", [False, True])
def test_a_cache_of_version_2_trains_to_the_same_loss(tiny, kept, make_config, tmp_path, trim):
    """Its manifest does not name the fields; the shards are the same."""
    now = encoded(tiny, tmp_path / "now", trim_padding=True) if trim else kept
    before = shutil.copytree(now, tmp_path / "before")
    manifest = Manifest.parse((now / MANIFEST).read_bytes(), "")
    shards = [
        {
            "name": shard.name,
            "samples": shard.samples,
            "bytes": shard.bytes,
            "sha256": shard.sha256,
            "sizes": [[16, 16, shard.samples]],
        }
        for shard in manifest.shards
    ]
    written = {
        "manifest": "scfm-manifest",
        "version": 2,
        "format": "webdataset",
        "encoder": manifest.encoder,
        "text_length": 8,
        "padding": hashlib.sha256((now / "padding.safetensors").read_bytes()).hexdigest() if trim else None,
        "network": None,
        "background": "white",
        "settings": {"model.text_length": 8, "data.resolution": [16, 16], "data.buckets": "none"},
        "samples": 48,
        "shards": shards,
    }
    (before / MANIFEST).write_text(json.dumps(written))
    expected = losses(make_config({"data.path": str(now), "train.steps": 2}))
    assert losses(make_config({"data.path": str(before), "run.dir": str(tmp_path / "other")})) == expected


def test_a_cache_with_other_fields_than_the_model_takes_is_refused(tiny, make_config, tmp_path):
    folder = shutil.copytree(tiny / "cache", tmp_path / "cache")
    text = (folder / MANIFEST).read_text().replace('"text": "tokens"', '"text": "masked"')
    (folder / MANIFEST).write_text(text)
    message = (
        r"the cache has the fields text \(masked\), pooled \(vector\), but Flux, .* takes text \(tokens\), pooled \(vector\)\. "
        r"Encode it again with `scfm data encode --model"
    )
    with pytest.raises(UserError, match=message):
        Trainer(make_config({"data.path": str(folder)}))


class Masked(Flux):
    """A family whose network does not see the padding: it takes the mean of the caption's tokens, which have two layers."""

    fields: ClassVar[dict[str, FieldKind]] = {"hidden": "masked", "pooled": "vector"}
    static_shapes = False

    def shapes(self, text_length: int) -> dict[str, tuple[int, ...]]:
        text, pooled = super().shapes(text_length).values()
        return {"hidden": (text_length, 2, text[1]), "pooled": pooled}

    def encode_prompt(self, pipeline: Any, captions: Sequence[str], device: Any, text_length: int) -> Any:
        """A caption of n tokens has n + 1."""
        fields, _ = super().encode_prompt(pipeline, captions, device, text_length)
        counts = self.count_tokens(pipeline.tokenizer_2, captions)
        lengths = tuple(min(count + 1, text_length) for count in counts)
        mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        text = fields["text"][:, : max(lengths)] * mask[..., None]
        return {"hidden": torch.stack([text, text.cos() * mask[..., None]], 2), "pooled": fields["pooled"]}, lengths

    def predict(self, network: Any, x: Any, sigma: Any, cond: Conditioning) -> Any:
        seen = cond.fields["hidden"] * cond.mask[:, :, None, None]
        text = seen.sum(1) / cond.mask.sum(1)[:, None, None]
        fields = {"text": text, "pooled": cond.fields["pooled"]}
        return super().predict(network, x, sigma, Conditioning(fields=fields, guidance=cond.guidance))


class TestMaskedText:
    @pytest.fixture(autouse=True)
    def family(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(families, "FAMILIES", (Masked,))

    def test_is_stored_without_padding_and_trains_as_if_encoded_in_the_run(self, tiny, make_config, tmp_path):
        cached = encoded(tiny, tmp_path / "cached")
        corpus = Corpus(DataConfig(path=str(cached), resolution=(16, 16)))
        assert corpus.fields == Masked.fields
        text = TextEncoders(open_family(str(tiny / "flux")), 8, torch.float32, "cpu")
        for item in range(3):
            record = corpus.record(item)
            cond = text.encode([record.caption])
            assert record.fields["hidden"].shape == (*cond.lengths, 2, 32)
            torch.testing.assert_close(record.fields["hidden"], cond.fields["hidden"][0])
        latents = encoded(tiny, tmp_path / "latents", latents_only=True)
        changes = {"method.caption_dropout": 0.2, "train.steps": 2}
        expected = losses(make_config({**changes, "data.path": str(cached)}))
        run_in = {"data.path": str(latents), "run.dir": str(tmp_path / "other")}
        assert losses(make_config({**changes, **run_in})) == pytest.approx(expected, rel=1e-5)

    def test_an_untouched_student_has_no_loss_on_stored_paths(self, tiny, make_config, tmp_path):
        assert loss_on_paths(tiny, tmp_path / "paths", make_config) < 1e-12

    def test_has_no_padding_to_trim(self, tiny, tmp_path):
        with pytest.raises(
            UserError, match="--trim-padding has no effect on Masked: its text is stored without padding"
        ):
            encoded(tiny, tmp_path / "cache", trim_padding=True)
        assert not (tmp_path / "cache").exists()


def test_the_encoders_memory_is_free_before_the_network_is_made(make_config, monkeypatch):
    """Neither they nor what they encoded on the device are left when the allocator returns what is unused."""
    made, left = [], []

    class Watched(TextEncoders):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            made.extend((weakref.ref(self), weakref.ref(self.family.unconditional)))

    def freeing(device: torch.device) -> None:
        free_unused(device)
        left.append([reference() for reference in made])

    monkeypatch.setattr(inputs, "TextEncoders", Watched)
    monkeypatch.setattr(inputs, "free_unused", freeing)
    trainer = Trainer(make_config({"method.caption_dropout": 0.5}))
    assert left == [[None, None]]
    assert trainer.encoder.text is None and trainer.family.unconditional is not None


def test_unused_memory_goes_back_to_a_gpu(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("empty"))
    free_unused(torch.device("cpu"))
    assert calls == []
    free_unused(torch.device("cuda", 0))
    assert calls == ["empty"]
