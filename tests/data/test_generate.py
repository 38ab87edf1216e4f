"""`generate`: the latents equal a reference computation, for any number of processes and any batch size."""

import json
import math
import multiprocessing
import os
import shutil
import signal
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from data_tools.encode import EncodeConfig
from data_tools.generate import FIRST_ID, SamplerConfig, generate
from data_tools.pack import pack
from recipes.cli import main
from recipes.tiny import caption
from scfm_core.data.corpus import Corpus
from scfm_core.data.recipe import DataConfig, SourceConfig
from scfm_core.data.schema import MANIFEST, Manifest, collate
from scfm_core.errors import UserError
from scfm_core.flow.random import sample_noise
from scfm_core.flow.schedule import sigma_grid
from scfm_core.models.conditioning import Conditioning
from scfm_core.models.families import open_family
from scfm_core.models.fingerprint import encoder_fingerprint, network_fingerprint
from scfm_core.models.flux import Flux
from scfm_core.models.protocol import ModelFamily

# Seconds faster than a new interpreter with torch, and killed in the same way.
FORK = multiprocessing.get_context("fork")

PROMPTS = [*map(caption, (1, 3, 5)), "a lion", ""]
SIZES = ((16, 16), (8, 24))
PER_PROMPT, LENGTH, SEED, GUIDANCE = 3, 48, 11, 2.5
TOTAL = len(PROMPTS) * PER_PROMPT  # six shards of at most 3: 8 samples of (16, 16) and 7 of (8, 24)


def make(output: Path, family: ModelFamily, prompts: list[str] = PROMPTS, **changes: Any) -> Manifest | None:
    """`generate` with small arguments; `changes` of the `EncodeConfig`, the `SamplerConfig` or the other arguments."""
    config = {"text_length": LENGTH, "dtype": torch.float32, "batch_size": 2, "samples_per_shard": 3}
    sampler = {
        "sizes": SIZES,
        "per_prompt": PER_PROMPT,
        "num_steps": 3,
        "shift": 2.0,
        "guidance": GUIDANCE,
        "seed": SEED,
    }
    config |= {name: changes.pop(name) for name in EncodeConfig.__dataclass_fields__ if name in changes}
    sampler |= {name: changes.pop(name) for name in SamplerConfig.__dataclass_fields__ if name in changes}
    return generate(prompts, output, family, EncodeConfig(**config), SamplerConfig(**sampler), **changes)[0]


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def opened(folder: Path) -> Corpus:
    return Corpus(DataConfig(path=str(folder), resolution=SIZES[0], buckets=SIZES))


def by_number(folder: Path) -> dict[int, Tensor]:
    corpus = opened(folder)
    return {int(record.key): record.latents for record in map(corpus.record, range(len(corpus)))}


@pytest.fixture(scope="module")
def family(tiny: Path) -> ModelFamily:
    return open_family(str(tiny / "flux"))


@pytest.fixture(scope="module")
def whole(family: ModelFamily, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All samples, made by one process. Tests must not change it."""
    folder = tmp_path_factory.mktemp("generated") / "whole"
    assert make(folder, family) == Manifest.parse((folder / MANIFEST).read_text(), "")
    return folder


class Interrupted(Exception):
    pass


def interrupt_after(count: int) -> Any:
    def progress(items: Iterable[Any], total: int) -> Iterator[Any]:
        for number, item in enumerate(items):
            if number == count:
                raise Interrupted
            yield item

    return progress


class Texts:
    """T5 and CLIP of transformers, without this project's code."""

    def __init__(self, folder: Path) -> None:
        from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

        self.clip = CLIPTextModel.from_pretrained(folder / "text_encoder")
        self.t5 = T5EncoderModel.from_pretrained(folder / "text_encoder_2")
        self.clip_tokens = CLIPTokenizer.from_pretrained(folder / "tokenizer")
        self.t5_tokens = T5TokenizerFast.from_pretrained(folder / "tokenizer_2")

    @torch.no_grad()
    def __call__(self, prompt: str) -> tuple[Tensor, Tensor, int]:
        """T5's output, CLIP's pooled output, and the number of tokens without padding."""
        short = self.clip_tokens([prompt], padding="max_length", truncation=True, max_length=77, return_tensors="pt")
        long = self.t5_tokens([prompt], padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt")
        text = self.t5(long.input_ids)[0]
        return text, self.clip(short.input_ids).pooler_output, int(long.attention_mask.sum())


@torch.no_grad()
def reference(
    network: nn.Module, text: Tensor, pooled: Tensor, number: int, size: tuple[int, int], shift: Any
) -> Tensor:
    """The latents of one sample, [1, h, w], by a separate loop: packing, shift, Euler steps."""
    height, width = size[0] // 2, size[1] // 2
    rows, columns = height // 2, width // 2
    if shift == "dynamic":
        shift = math.exp(0.5 + (rows * columns - 256) * (1.15 - 0.5) / (4096 - 256))
    x = sample_noise(torch.empty(1, 1, height, width), torch.tensor([2**62 + number]), SEED)
    places = torch.tensor([[0.0, row, column] for row in range(rows) for column in range(columns)])
    us = [1 - step / 3 for step in range(4)]
    sigmas = [shift * u / (1 + (shift - 1) * u) for u in us]
    for now, then in pairwise(sigmas):
        tokens = torch.stack(
            [x[0, 0, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].flatten() for i in range(rows) for j in range(columns)]
        )
        out = network(
            hidden_states=tokens[None],
            encoder_hidden_states=text,
            pooled_projections=pooled,
            timestep=torch.tensor([now]),
            guidance=torch.tensor([GUIDANCE]),
            img_ids=places,
            txt_ids=torch.zeros(LENGTH, 3),
        ).sample[0]
        velocity = torch.zeros_like(x)
        for token, values in enumerate(out):
            i, j = divmod(token, columns)
            velocity[0, 0, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2] = values.reshape(2, 2)
        x = x + (then - now) * velocity
    return x[0]


class TestContent:
    @pytest.mark.parametrize("shift", [2.0, "dynamic"])
    def test_latents_and_texts_equal_a_reference_computation(self, family, whole, tmp_path, shift):
        folder = whole
        if shift == "dynamic":
            folder, family = tmp_path / "dynamic", open_family(str(family.folder))
            family.scheduler_config = {"use_dynamic_shifting": True}
            make(folder, family, shift="dynamic", batch_size=8, trim_padding=True)
        network = family.load_network(torch.float32, "cpu")
        texts, corpus, seen = Texts(family.folder), opened(folder), []
        filler = texts("")[0][0]
        for item in range(len(corpus)):
            record = corpus.record(item)
            number = int(record.key)
            prompt, size = PROMPTS[number // PER_PROMPT], SIZES[number % 2]
            text, pooled, length = texts(prompt)
            assert record.caption == prompt
            assert 0 < length < LENGTH  # otherwise nothing would be trimmed
            if folder != whole:  # the shared padding, with which the teacher is sampled too
                text = torch.cat([text[:, :length], filler[None, length:]], 1)
            torch.testing.assert_close(record.fields["text"], text[0], atol=1e-5, rtol=0)
            torch.testing.assert_close(record.fields["pooled"], pooled[0], atol=1e-5, rtol=0)
            latents = reference(network, text, pooled, number, size, shift)
            torch.testing.assert_close(record.latents, latents, atol=2e-5, rtol=0)
            seen.append(number)
        assert sorted(seen) == list(range(TOTAL))

    def test_each_shard_has_one_size_and_says_how_samples_were_made(self, whole):
        manifest = Manifest.parse((whole / MANIFEST).read_text(), "")
        assert [shard.sizes for shard in manifest.shards] == [
            *(((16, 16, n),) for n in (3, 3, 2)),
            *(((8, 24, n),) for n in (3, 3, 1)),
        ]
        corpus, numbers = opened(whole), []
        for item in range(TOTAL):
            shard, at, _ = corpus.raw(item)
            details = json.loads(shard.read(at, "json"))
            number, size = details["sample"], (details["height"], details["width"])
            assert details == {
                "height": size[0],
                "width": size[1],
                "sample": number,
                "prompt": number // PER_PROMPT,
                "seed": SEED,
                "steps": 3,
                "solver": "euler",
                "guidance": GUIDANCE,
            }
            assert (shard.key(at), size) == (f"{number:08d}", corpus.sizes[corpus.buckets[item]])
            numbers.append(number)
        assert numbers == [*range(0, TOTAL, 2), *range(1, TOTAL, 2)]

    def test_the_result_opens_as_a_cache_of_the_model(self, family, whole):
        corpus = opened(whole)
        assert (corpus.is_cached, corpus.encoder, corpus.text_length) == (
            True,
            encoder_fingerprint(family.folder),
            LENGTH,
        )
        network = family.load_network(torch.float32, "cpu")
        for size in SIZES:
            items = corpus.items_of(size).tolist()
            batch = collate(items, [corpus.record(item) for item in items])
            assert batch.latents.shape == (len(items), *family.latent_shape(*size))
            cond = Conditioning(
                fields={"text": batch.fields["text"].padded(), "pooled": batch.fields["pooled"]},
                guidance=torch.full((len(items),), 1.0),
            )
            velocity = family.velocity(network, batch.latents, torch.full((len(items),), 0.5), cond)
            assert velocity.shape == batch.latents.shape
            assert velocity.isfinite().all()

    def test_the_batch_size_changes_only_rounding(self, family, whole, tmp_path):
        make(tmp_path / "other", family, batch_size=1)
        one, other = by_number(whole), by_number(tmp_path / "other")
        assert one.keys() == other.keys()
        for number, latents in one.items():
            torch.testing.assert_close(latents, other[number], atol=2e-5, rtol=0)
        assert min((one[i] - one[j]).abs().max() for i in range(0, 8, 2) for j in range(i + 2, 9, 2)) > 0.1

    def test_bfloat16(self, family, tmp_path, whole):
        make(tmp_path / "half", family, prompts=PROMPTS[:1], dtype=torch.bfloat16)
        exact = by_number(whole)
        for number, latents in by_number(tmp_path / "half").items():
            assert latents.dtype == torch.bfloat16
            assert (latents.float() - exact[number]).norm() < 0.1 * exact[number].norm()


class TestProcesses:
    @pytest.mark.parametrize("order", [(0, 1), (1, 0)])
    def test_two_processes_write_the_same_files_as_one(self, family, whole, tmp_path, order):
        first = make(tmp_path / "two", family, rank=order[0], world_size=2)
        half = {path.name for path in (tmp_path / "two").glob("*.tar")}
        last = make(tmp_path / "two", family, rank=order[1], world_size=2)
        assert (first, len(half)) == (None, 3)
        assert last == Manifest.parse((whole / MANIFEST).read_text(), "")
        assert files(tmp_path / "two") == files(whole)

    def test_an_interrupted_job_resumes(self, family, whole, tmp_path):
        with pytest.raises(Interrupted):
            make(tmp_path / "new", family, progress=interrupt_after(6))
        assert not (tmp_path / "new" / MANIFEST).exists()
        kept = {path: path.stat().st_ino for path in (tmp_path / "new").glob("*.tar")}
        assert len(kept) == 2
        calls = []
        make(tmp_path / "new", family, progress=lambda items, total: calls.append(total) or items)
        assert calls == [TOTAL - 6]
        assert {path: path.stat().st_ino for path in kept} == kept  # not written again
        assert files(tmp_path / "new") == files(whole)

    @pytest.mark.processes
    def test_kill_nine_in_the_middle_of_a_shard(self, family, whole, tmp_path):
        class Deadly(Flux):
            calls = 0

            def velocity(self, *arguments: Any) -> Tensor:
                self.calls += 1
                if self.calls == 10:  # with 6 calls for a shard: in the second batch of the second shard
                    os.kill(os.getpid(), signal.SIGKILL)
                return super().velocity(*arguments)

        process = FORK.Process(target=make, args=(tmp_path / "new", Deadly(family.folder)))
        process.start()
        process.join(120)
        assert process.exitcode == -signal.SIGKILL
        left = files(tmp_path / "new")
        assert {"shard-000000.tar", "shard-000001.tar.tmp"} <= left.keys()
        assert not {"shard-000001.tar", MANIFEST} & left.keys()
        make(tmp_path / "new", family)
        assert files(tmp_path / "new") == files(whole)


@pytest.fixture(scope="module")
def unfinished(family: ModelFamily, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One finished shard of two. Tests must not change it."""
    folder = tmp_path_factory.mktemp("unfinished") / "cache"
    with pytest.raises(Interrupted):
        make(folder, family, prompts=PROMPTS[:2], num_steps=1, progress=interrupt_after(3))
    return folder


class TestOtherJobs:
    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("prompts", [PROMPTS[0], "another"]),
            ("prompts", PROMPTS[1::-1]),
            ("sizes", SIZES[::-1]),
            ("per_prompt", 2),
            ("num_steps", 2),
            ("shift", 3.0),
            ("shift", "dynamic"),
            ("guidance", 1.0),
            ("seed", 12),
            ("text_length", 40),
            ("keep_padding", False),
            ("latents_only", True),
            ("dtype", torch.bfloat16),
            ("samples_per_shard", 4),
        ],
    )
    def test_does_not_resume_with_other_arguments(self, family, unfinished, name, value):
        before = files(unfinished)
        change = {"trim_padding": True} if name == "keep_padding" else {name: value}
        arguments = {"prompts": PROMPTS[:2], "num_steps": 1} | change
        with pytest.raises(UserError, match=rf"another job:\n  {name}: .* before, .* now\nStart with the same"):
            make(unfinished, family, **arguments)
        assert files(unfinished) == before

    @pytest.mark.parametrize(("component", "name"), [("transformer", "network"), ("text_encoder_2", "encoder")])
    def test_does_not_resume_with_another_model(self, family, unfinished, tmp_path, component, name):
        shutil.copytree(family.folder, tmp_path / "flux")
        [weights] = (tmp_path / "flux" / component).glob("*.safetensors")
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
        with pytest.raises(UserError, match=rf"another job:\n  {name}: "):
            make(unfinished, open_family(str(tmp_path / "flux")), prompts=PROMPTS[:2], num_steps=1)

    def test_resumes_with_another_batch_size(self, family, unfinished, tmp_path):
        shutil.copytree(unfinished, tmp_path / "cache")
        manifest = make(tmp_path / "cache", family, prompts=PROMPTS[:2], num_steps=1, batch_size=5)
        assert manifest is not None
        assert manifest.samples == 6

    def test_a_finished_cache_is_not_changed(self, family, whole):
        """The same job is finished already; another job is refused."""
        before = files(whole)
        assert make(whole, family) == Manifest.parse((whole / "manifest.json").read_bytes(), "test")
        with pytest.raises(UserError, match="already holds a finished cache"):
            make(whole, family, seed=99)
        assert files(whole) == before

    def test_a_lost_shard_is_made_again(self, family, unfinished, tmp_path):
        shutil.copytree(unfinished, tmp_path / "cache")
        lost = min((tmp_path / "cache").glob("*.tar"))
        content = lost.read_bytes()
        lost.unlink()
        assert make(tmp_path / "cache", family, prompts=PROMPTS[:2], num_steps=1) is not None
        assert lost.read_bytes() == content


class TestRefusals:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"prompts": []}, "no prompts"),
            ({"per_prompt": 0}, "number of samples of a prompt must be at least 1, got 0"),
            ({"num_steps": 0}, "number of steps must be at least 1, got 0"),
            ({"sizes": ()}, "number of sizes must be at least 1"),
            ({"sizes": ((16, 16), (18, 30))}, "18 x 30 pixels cannot be packed.*nearest is 16 x 32"),
            ({"shift": 0.0}, "shift must be positive"),
            ({"shift": math.inf}, "shift must be positive and finite"),
            ({"shift": math.nan}, "shift must be positive and finite"),
            ({"shift": "fast"}, "'dynamic', got 'fast'"),
        ],
    )
    def test_invalid_arguments(self, family, tmp_path, changes, message):
        with pytest.raises(UserError, match=message):
            make(tmp_path / "cache", family, **changes)
        assert not (tmp_path / "cache").exists()

    def test_an_output_that_is_a_file(self, family, tmp_path):
        (tmp_path / "file").write_text("precious")
        with pytest.raises(UserError, match="could not be written"):
            make(tmp_path / "file", family)
        assert (tmp_path / "file").read_text() == "precious"

    def test_samples_that_are_not_finite(self, family, tmp_path):
        class Wild(Flux):
            calls = 0

            def velocity(self, *arguments: Any) -> Tensor:
                velocity = super().velocity(*arguments)
                self.calls += 1
                if self.calls == 9:  # the last step of the third batch, which has samples 6 and 8
                    velocity[1, 0, 0, 0] = math.inf
                return velocity

        with pytest.raises(UserError, match=rf"1 of 2 .* not finite .* sample 8, of the prompt '{PROMPTS[2]}'\. Check"):
            make(tmp_path / "cache", Wild(family.folder))
        assert not (tmp_path / "cache" / MANIFEST).exists()
        assert [path.name for path in (tmp_path / "cache").glob("*.tar*")] == ["shard-000000.tar"]


STEPS, SHIFT, INTERVALS = 8, 2.0, 4


@pytest.fixture(scope="module")
def paths(family: ModelFamily, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with the teacher's paths. Tests must not change it."""
    folder = tmp_path_factory.mktemp("paths") / "cache"
    make(folder, family, num_steps=STEPS, intervals=INTERVALS, shift=SHIFT, sizes=SIZES[:1])
    return folder


class TestTrajectories:
    """Paths are stored with the latents at which they end, and read if requested."""

    def test_a_path_leads_from_the_noise_to_the_latents(self, family: ModelFamily, paths: Path) -> None:
        corpus = Corpus(DataConfig(path=str(paths), resolution=SIZES[0]), with_paths=True)
        assert len(corpus) == TOTAL
        for item in range(0, TOTAL, 4):
            record = corpus.record(item)
            assert record.path is not None and record.latents is not None
            assert torch.equal(record.path["sigmas"], sigma_grid(STEPS, SHIFT)[::2])
            torch.testing.assert_close(record.path["sigmas"], sigma_grid(INTERVALS, SHIFT))
            assert record.path["guidance"].item() == GUIDANCE
            assert record.path["velocities"].shape == (INTERVALS, *record.latents.shape)
            ids = torch.tensor([int(record.key)]) + FIRST_ID
            noise = sample_noise(record.latents[None], ids, SEED)[0]
            lengths = -record.path["sigmas"].diff()
            end = noise - torch.einsum("k,kchw->chw", lengths, record.path["velocities"])
            torch.testing.assert_close(end, record.latents, rtol=0, atol=1e-5)

    def test_the_network_is_in_the_manifest_also_after_packing(
        self, paths: Path, family: ModelFamily, tmp_path: Path
    ) -> None:
        for shards in (paths, tmp_path / "mds"):
            if not shards.exists():
                assert main(["data", "pack", str(paths), "-o", str(shards), "--to", "mds"]) == 0
            manifest = Manifest.parse((shards / MANIFEST).read_text(), "")
            assert manifest.network == network_fingerprint(family.folder)

    def test_paths_of_two_networks_are_not_packed_together(self, paths: Path, tmp_path: Path) -> None:
        other = shutil.copytree(paths, tmp_path / "other")
        manifest = Manifest.parse((paths / MANIFEST).read_text(), "")
        replace(manifest, network="another").write(other / MANIFEST)
        sources = tuple(SourceConfig(name=folder.name, uri=str(folder)) for folder in (paths, other))
        with pytest.raises(UserError, match=r"made by different networks, .*pack each source separately"):
            pack(Corpus(DataConfig(sources=sources, resolution=SIZES[0])), tmp_path / "packed", to="webdataset")

    @pytest.mark.parametrize("second_order", [False, True])
    def test_velocities_are_those_of_the_teacher(self, family: ModelFamily, tmp_path: Path, second_order: bool) -> None:
        """Two intervals of two steps each, computed here: by Euler's method, or by the Adams-Bashforth formula."""
        settings = {"num_steps": 4, "intervals": 2, "second_order": second_order, "shift": SHIFT, "sizes": SIZES[:1]}
        make(tmp_path / "cache", family, PROMPTS[:1], per_prompt=1, **settings)
        corpus = Corpus(DataConfig(path=str(tmp_path / "cache"), resolution=SIZES[0]), with_paths=True)
        record = corpus.record(0)
        assert record.path is not None
        network = family.load_network(torch.float32, "cpu")
        fields = {name: tensor[None] for name, tensor in record.fields.items()}
        cond = Conditioning(fields=fields, guidance=torch.tensor([GUIDANCE]))
        sigmas, means = sigma_grid(4, SHIFT), record.path["velocities"]
        states = [sample_noise(means[:1], torch.tensor([int(record.key)]) + FIRST_ID, SEED)]
        seen: list[Tensor] = []
        with torch.no_grad():
            for number in range(4):
                seen.append(family.velocity(network, states[-1], sigmas[number : number + 1], cond))
                mean = seen[-1]
                if second_order and number > 0:
                    last, length = sigmas[number - 1] - sigmas[number], sigmas[number] - sigmas[number + 1]
                    mean = mean + length / (2 * last) * (seen[-1] - seen[-2])
                states.append(states[-1] - (sigmas[number] - sigmas[number + 1]) * mean)
        for interval, (first, last) in enumerate(((0, 2), (2, 4))):
            expected = (states[first] - states[last]) / (sigmas[first] - sigmas[last])
            torch.testing.assert_close(means[interval][None], expected, rtol=1e-4, atol=1e-5)
        shard, at, _ = corpus.raw(0)
        assert shard is not None
        details = json.loads(shard.read(at, "json") or b"")
        assert (details["steps"], details["solver"]) == (4, "adams-bashforth" if second_order else "euler")

    @pytest.mark.parametrize(("steps", "intervals"), [(8, 12), (8, 3), (8, 0)])
    def test_intervals_that_do_not_divide_the_steps_are_refused(
        self, family: ModelFamily, tmp_path: Path, steps: int, intervals: int
    ) -> None:
        with pytest.raises(UserError, match=f"the {steps} steps of a path cannot be stored as {intervals} intervals"):
            make(tmp_path / "cache", family, num_steps=steps, intervals=intervals)
        assert not (tmp_path / "cache").exists()

    @pytest.mark.parametrize("word", [["--intervals", "6"], ["--solver", "euler"]])
    def test_options_of_paths_need_trajectories(self, tmp_path: Path, word: list[str], capsys: Any) -> None:
        words = ["data", "generate", "prompts.txt", "-o", str(tmp_path / "x"), "--model", "m", *word]
        assert main(words) == 2
        assert f"{word[0]} is for stored paths: add --trajectories" in capsys.readouterr().err

    def test_paths_are_not_read_unless_requested(self, paths: Path) -> None:
        corpus = Corpus(DataConfig(path=str(paths), resolution=SIZES[0]))
        assert corpus.record(0).path is None
        assert collate([0], [corpus.record(0)]).path is None

    def test_a_cache_without_paths_names_the_command_that_makes_them(self, whole: Path) -> None:
        corpus = Corpus(DataConfig(path=str(whole), resolution=SIZES[0], buckets=SIZES), with_paths=True)
        with pytest.raises(UserError, match="scfm data generate --trajectories"):
            corpus.record(0)

    def test_samples_without_paths_are_not_mixed_with_paths(self, family: ModelFamily, paths: Path) -> None:
        with pytest.raises(UserError):
            make(paths, family, num_steps=STEPS, shift=SHIFT, sizes=SIZES[:1])
