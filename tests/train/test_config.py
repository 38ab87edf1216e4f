"""Configurations: typed and validated; the error of a mistake says where it is and suggests the right key."""

import ast
import dataclasses
import json
import re
import types
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
import yaml
from pydantic import TypeAdapter, ValidationError

from scfm_core.data.recipe import CacheConfig, DataConfig, SourceConfig
from scfm_core.distributed.engine import EngineConfig
from scfm_core.errors import UserError
from scfm_core.models.adapters import LoRAConfig
from scfm_core.models.fused_base import FusedAdapter
from scfm_core.scfm.ema import EMAConfig
from scfm_core.scfm.method import PlanConfig, StepGain
from scfm_core.scfm.slices import FlowMap, FlowSigma, Matching
from scfm_core.train.config import (
    CheckpointConfig,
    EvaluateConfig,
    KernelConfig,
    ModelConfig,
    RunConfig,
    RunSection,
    SampleConfig,
    TrainConfig,
    WandbConfig,
)
from scfm_core.train.keys import all_keys, dataclass_in, hints_of
from scfm_core.train.parse import dump_config, find_recipe, load_config, parse_config, to_plain
from scfm_core.train.resume import check_same_recipe
from scfm_core.train.rules import MicroBatches, describe_micro_batches, micro_batches
from scfm_core.train.show import show_config

RECIPES = Path(__file__).parents[2] / "recipes" / "configs"
SHIPPED = sorted(path.name for path in RECIPES.glob("*.yaml"))


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """The shortest valid configuration."""
    path = tmp_path / "recipe.yaml"
    path.write_text("run: {dir: runs/x}\nmodel: {path: some/model}\ndata: {path: some/cache}\n")
    return path


def refusal(recipe: Path | str, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(recipe, overrides)
    return str(caught.value)


class TestReading:
    @pytest.mark.parametrize("name", SHIPPED)
    def test_shipped_recipes_load(self, name):
        assert isinstance(load_config(RECIPES / name), RunConfig)

    def test_shipped_recipes_exist(self):
        assert {"tiny_pretrain.yaml", "tiny_distill.yaml"} <= set(SHIPPED)

    @pytest.mark.parametrize("name", ["tiny_distill.yaml", "tiny_distill"])
    def test_shipped_recipes_are_found_by_bare_name(self, name, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert load_config(name) == load_config(RECIPES / "tiny_distill.yaml")

    def test_a_local_file_has_priority_over_a_shipped_one(self, recipe, monkeypatch):
        recipe.rename(recipe.with_name("tiny_distill.yaml"))
        monkeypatch.chdir(recipe.parent)
        assert load_config("tiny_distill.yaml").run.dir == "runs/x"

    def test_defaults_are_those_of_the_paper(self, recipe):
        config = load_config(recipe)
        assert (config.method.teacher_fraction, config.method.teacher_grid) == (0.4, 32)
        assert (config.method.self_grids, config.method.shift) == ((16, 8, 4), (2.5, 4.5))
        assert (config.ema.fast, config.ema.slow, config.ema.restart_every) == (0.99, 0.999, None)
        assert (config.lora.rank, config.lora.alpha) == (64, 64.0)
        assert (config.train.lr, config.train.lr_schedule, config.train.global_batch_size) == (2e-5, "constant", 16)
        assert config.train.clip_norm == 10
        assert config.model.text_length == 256
        assert config.data.resolution == (512, 512)

    def test_numbers_become_the_fields_types(self, recipe):
        """YAML 1.1 reads 2e-5 as a string and 1 as an integer."""
        config = load_config(recipe, ["train.lr=2e-5", "train.clip_norm=1", "train.steps=100.0"])
        assert (config.train.lr, config.train.clip_norm, config.train.steps) == (2e-5, 1.0, 100)
        assert [type(x) for x in (config.train.lr, config.train.clip_norm, config.train.steps)] == [float, float, int]

    def test_lists_become_tuples(self, recipe):
        recipe.write_text(recipe.read_text() + "method: {self_grids: [16, 2]}\nsample: {prompts: [a, b]}\n")
        config = load_config(recipe)
        assert config.method.self_grids == (16, 2)
        assert config.sample.prompts == ("a", "b")

    def test_prompts_may_be_a_file(self, recipe):
        assert load_config(recipe, ["sample.prompts=prompts.yaml"]).sample.prompts == "prompts.yaml"

    def test_section_from_a_file(self, recipe, tmp_path):
        (tmp_path / "other.yaml").write_text("path: other/cache\nresolution: [64, 32]\n")
        recipe.write_text(recipe.read_text().replace("{path: some/cache}", str(tmp_path / "other.yaml")))
        assert load_config(recipe).data == DataConfig(path="other/cache", resolution=(64, 32))


class TestDumping:
    @pytest.mark.parametrize("name", SHIPPED)
    def test_shipped_recipes_are_restored(self, name, tmp_path):
        config = load_config(RECIPES / name)
        (tmp_path / "config.yaml").write_text(dump_config(config))
        assert load_config(tmp_path / "config.yaml") == config

    def test_every_field_is_restored(self, tmp_path):
        """Every field differs from its default, and the strings resemble other YAML types."""
        config = RunConfig(
            run=RunSection(dir="123", seed=7, device="cuda:3"),
            model=ModelConfig(
                path="~", adapters=(FusedAdapter(path="0x10", weight=0.1 + 0.2),), text_length=77, base="float8",
                encoders="int8",
            ),
            data=DataConfig(
                sources=(
                    SourceConfig(
                        name="1e3", uri="s3://b/{0..9}.tar", format="mds", manifest="0x1", split="no", weight=0.1 + 0.2,
                        image=("null", "1_0"), captions={"json.yes": 1e-5, "~": 2},
                    ),
                ),
                resolution=(64, 48), buckets=((64, 48), (32, 96)), bucket_step=16, shuffle=False, shuffle_block=7,
                partitions=2, epoch_size=5, seed=3, max_bad_fraction=1e-5, num_workers=0, verify=False,
                background="#010203",
                cache=CacheConfig(dir="010", limit_gb=0.5, timeout=1e-3),
            ),
            method=PlanConfig(
                teacher_fraction=1 / 3,
                flow_fraction=0.1,
                flow_sigma=FlowSigma(density="logit_normal", location=-0.5, scale=0.1 + 0.2),
                trajectory_fraction=0.2,
                trajectory_grids=(1, 5),
                trajectory_steps=10,
                flow_map_fraction=0.05,
                flow_map=FlowMap(form="eulerian", difference="central", epsilon=0.2, shortest=0.1 + 0.2, weight=0.02),
                matching_fraction=0.01,
                matching=Matching(weight=0.1 + 0.2, whole_fraction=0.5, shortest=1e-3, guidance_share=0.5, fake_lr=3.0, every=2, warmup=5),
                teacher_grid=64,
                self_grids=(2,),
                shift=(1e-5, 3.0),
                dynamic_shift_fraction=0.1,
                guidance=(3.5, 5.0),
                step_gain=StepGain(gamma=0.1 + 0.2),
                caption_dropout=0.1,
                sigma_max=1.0,
            ),
            ema=EMAConfig(fast=0.9, slow=0.95, restart_every=1000),
            lora=LoRAConfig(rank=4, alpha=1e-7, targets=r"blocks\.\d+: #.*", init="gaussian", start="~/a: #run"),
            train=TrainConfig(
                weights="lora",
                steps=9,
                global_batch_size=6,
                micro_batch_size=3,
                lr=3e-5,
                lr_schedule="cosine",
                warmup_steps=1,
                betas=(0.8, 0.9),
                weight_decay=1e-2,
                clip_norm=float("inf"),
                compute_dtype="float32",
                activation_checkpointing="selective",
                compile=True,
                spike_factor=4.5,
                max_skips=0,
                max_rollbacks=3,
            ),
            engine=EngineConfig(
                name="deepspeed", cpu_offload=True, zero_stage=1, deepspeed_config="0777", timeout=1e-3
            ),
            kernels=KernelConfig(fused="reference", attention="math", lora="auto", fp8=True, cuda_graphs=True),
            checkpoint=CheckpointConfig(every=1, keep=1),
            sample=SampleConfig(
                every=0, prompts=("none", "yes", "猫: 🐈", "a\nb"), steps=(5,), seed=0, shift="dynamic", guidance=0.0,
                weights="ema_fast", base="float8", teacher_steps=5,
            ),
            evaluate=EvaluateConfig(
                steps=(2,), teacher_steps=50, samples=2, prompts="null", data="0o7", batch_size=1, features="classifier",
                features_path="0x10", clip_path="2001-01-01", cmmd_path="1", pick_score_path="no", keep="1e1", noise_floor=True,
                per_prompt=2,
            ),
            wandb=WandbConfig(mode="disabled", project="1_000"),
        )  # fmt: skip
        unchanged = [
            f"{section.name}.{field.name}"
            for section in dataclasses.fields(config)
            for field in dataclasses.fields(getattr(config, section.name))
            if getattr(getattr(config, section.name), field.name) == field.default
        ]
        # Two need a single path; four exclude step_gain and one LoRA; three are for fsdp2 only.
        expected = [
            "model.offload_blocks", "model.init", "data.path", "data.format", "method.near", "method.distil_guidance", "method.step_embedding", "train.weights", "engine.shard",
            "checkpoint.asynchronous",
        ]  # fmt: skip
        assert unchanged == expected, "a field is missing above"
        fsdp2 = dataclasses.replace(
            config,
            data=DataConfig(path="1e3", format="folder", buckets="auto"),
            method=PlanConfig(step_embedding=True, teacher_fraction=0.0),
            train=TrainConfig(weights="full"),
            lora=LoRAConfig(),
            sample=SampleConfig(),
            ema=EMAConfig(restart_every="auto"),
            engine=EngineConfig(shard=4),
            checkpoint=CheckpointConfig(asynchronous=True),
        )
        distil = PlanConfig(distil_guidance=True, teacher_fraction=0, flow_fraction=1, guidance=(4.5, 4.5))
        fsdp2 = dataclasses.replace(fsdp2, model=ModelConfig(path="~", init="random"))
        for each in (config, fsdp2, dataclasses.replace(fsdp2, method=distil, sample=SampleConfig(guidance=4.5))):
            (tmp_path / "config.yaml").write_text(dump_config(each))
            assert load_config(tmp_path / "config.yaml") == each

    def test_optional_fields_are_restored_as_none(self, recipe, tmp_path):
        config = load_config(recipe)
        (tmp_path / "config.yaml").write_text(dump_config(config))
        assert load_config(tmp_path / "config.yaml") == config
        assert config.method.step_gain is config.ema.restart_every is config.evaluate.clip_path is None


class TestOverrides:
    def test_change_only_their_field(self, recipe):
        changed = load_config(recipe, ["train.steps=7", "run.dir=elsewhere"])
        plain = load_config(recipe)
        assert changed == dataclasses.replace(
            plain, train=dataclasses.replace(plain.train, steps=7), run=dataclasses.replace(plain.run, dir="elsewhere")
        )

    def test_the_last_override_of_a_key_counts(self, recipe):
        assert load_config(recipe, ["train.steps=7", "train.steps=8"]).train.steps == 8

    def test_nested(self, recipe):
        assert load_config(recipe, ["method.step_gain.gamma=0.25"]).method.step_gain == StepGain(gamma=0.25)
        assert load_config(recipe, ["method.step_gain={}"]).method.step_gain == StepGain()

    def test_nested_over_none(self, recipe):
        overrides = ["method.step_gain=null", "method.step_gain.gamma=0.25"]
        assert load_config(recipe, overrides).method.step_gain == StepGain(gamma=0.25)

    def test_lists(self, recipe):
        config = load_config(
            recipe, ["method.self_grids=[4, 2]", "sample.prompts=[a cat, 'a, b']", "data.resolution=[8,16]"]
        )
        assert config.method.self_grids == (4, 2)
        assert config.sample.prompts == ("a cat", "a, b")
        assert config.data.resolution == (8, 16)

    @pytest.mark.parametrize("word", ["none", "null", "~", ""])
    def test_none_where_a_field_may_be_none(self, recipe, word):
        recipe.write_text(recipe.read_text() + "ema: {restart_every: 5}\nmethod: {step_gain: {gamma: 1}}\n")
        config = load_config(recipe, [f"ema.restart_every={word}", f"method.step_gain={word}"])
        assert config.ema.restart_every is None
        assert config.method.step_gain is None

    def test_none_remains_a_string_where_it_is_a_choice(self, recipe):
        assert load_config(recipe, ["train.activation_checkpointing=none"]).train.activation_checkpointing == "none"
        assert load_config(recipe, ["run.dir=none"]).run.dir == "none"

    def test_a_value_may_contain_an_equals_sign(self, recipe):
        assert load_config(recipe, ["run.dir=lr=2e-5"]).run.dir == "lr=2e-5"

    def test_section_from_a_file_and_then_a_key_of_it(self, recipe, tmp_path):
        other = tmp_path / "other.yaml"
        other.write_text("path: other/cache\nnum_workers: 4\nshuffle: false\n")
        config = load_config(recipe, ["data.verify=false", f"data={other}", "data.num_workers=0"])
        assert config.data == DataConfig(path="other/cache", num_workers=0, shuffle=False)

    @pytest.mark.parametrize("override", ["train.lr", "=1", "--train.lr 1", ""])
    def test_an_invalid_form(self, recipe, override):
        assert refusal(recipe, override) == (
            f"on the command line: override {override!r} is not of the form section.key=value, without spaces around '='"
        )

    def test_a_value_that_is_not_yaml(self, recipe):
        assert refusal(recipe, "run.dir='x").startswith(
            'on the command line: the value of override "run.dir=\'x" is not valid YAML'
        )

    def test_a_list_that_the_shell_has_cut_at_its_spaces(self, recipe):
        message = refusal(recipe, "train.betas=[0.9,", "0.99]")
        assert "the value of override 'train.betas=[0.9,' has no closing bracket. Write it without spaces" in message
        assert "or in quotes: 'train.betas=[1, 2]'" in message

    def test_spaces_around_the_equals_sign_in_quotes(self, recipe):
        assert load_config(recipe, ["train.steps = 7"]).train.steps == 7

    @pytest.mark.parametrize(("text", "steps"), [("3", (3,)), ("1,2,4", (1, 2, 4)), ("[1, 2]", (1, 2)), ("'5'", (5,))])
    def test_a_list_needs_no_brackets(self, recipe, text, steps):
        assert load_config(recipe, [f"sample.steps={text}"]).sample.steps == steps

    def test_a_pair_needs_no_brackets(self, recipe):
        assert load_config(recipe, ["data.resolution=512,768"]).data.resolution == (512, 768)
        assert "data.resolution: needs two values, such as 512,512 (got [512])" in refusal(
            recipe, "data.resolution=512"
        )

    def test_prompts_keep_their_commas(self, recipe):
        assert load_config(recipe, ["sample.prompts=a cat, a dog"]).sample.prompts == "a cat, a dog"

    def test_a_key_below_a_value(self, recipe):
        assert "override 'run.dir.x=1': dir is not a section" in refusal(recipe, "run.dir.x=1")


class TestUnknownKeys:
    @pytest.mark.parametrize(
        ("override", "wrong", "meant"),
        [
            ("dta.path=x", "dta", "data"),
            ("train.step=5", "train.step", "train.steps"),
            ("train.learning_rat=5", "train.learning_rat", "train.lr"),
            ("train.learning_rate=5", "train.learning_rate", "train.lr"),
            ("lr=5", "lr", "train.lr"),
            ("train.rank=5", "train.rank", "lora.rank"),
            ("train.seed=5", "train.seed", "run.seed or data.seed or sample.seed"),
            ("batch_size=5", "batch_size", "train.global_batch_size or evaluate.batch_size"),
            ("train.nothing=5", "train.nothing", None),
            ("method.step_gain.gama=1", "method.step_gain.gama", "method.step_gain.gamma"),
            ("checkpoint.evry=1", "checkpoint.evry", "checkpoint.every"),
        ],
    )
    def test_the_nearest_key_is_named(self, recipe, override, wrong, meant):
        message = refusal(recipe, override)
        assert message.startswith(f"on the command line: unknown key {wrong}; ")
        assert f"did you mean {meant}?" in message if meant else "known here: weights, steps," in message

    @pytest.mark.parametrize("key", ["zzz", "1"])
    def test_without_a_similar_key_all_keys_are_listed(self, recipe, key):
        message = refusal(recipe, f"{key}=1")
        assert f"unknown key {key}; known here: run, model, data, method" in message

    def test_in_a_section_from_a_file(self, recipe, tmp_path):
        (tmp_path / "other.yaml").write_text("path: x\nworkers: 4\n")
        other = tmp_path / "other.yaml"
        assert refusal(recipe, f"data={other}") == (
            f"in {other}, line 2: unknown key data.workers; did you mean data.num_workers?"
        )


class TestWrongTypes:
    @pytest.mark.parametrize(
        ("override", "where", "got"),
        [
            ("train.steps=many", "train.steps", "'many'"),
            ("train.steps=1.5", "train.steps", "1.5"),
            ("train.steps=", "train.steps", "None"),
            ("train.lr=fast", "train.lr", "'fast'"),
            ("train.lr.x=1", "train.lr", "{'x': 1}"),
            ("train.compile=maybe", "train.compile", "'maybe'"),
            ("train.weights=loar", "train.weights", "'loar'"),
            ("train=5", "train", "5"),
            ("run.dir=5", "run.dir", "5"),
            ("data.resolution=[512, wide]", "data.resolution.1", "'wide'"),
            ("method.step_gain=0.5", "method.step_gain", "0.5"),
            ("sample.shift=dynamics", "sample.shift", "'dynamics'"),
            ("sample.prompts=[1, b]", "sample.prompts.0", "1"),
            ("ema.restart_every=never", "ema.restart_every", "'never'"),
        ],
    )
    def test_key_and_value_are_named(self, recipe, override, where, got):
        message = refusal(recipe, override)
        assert message.startswith(f"on the command line: {where}: ") and message.endswith(f"(got {got})")

    def test_choices_are_listed(self, recipe):
        assert "'student', 'ema_fast' or 'ema_slow'" in refusal(recipe, "sample.weights=slow")

    def test_missing_keys_are_named(self):
        with pytest.raises(UserError) as caught:
            parse_config({"run": {}, "model": {"path": "x"}}, source="here")
        assert str(caught.value).splitlines()[1:] == ["  in here: run.dir: is required", "  in here: data: is required"]

    @pytest.mark.parametrize(
        ("override", "advice"),
        [
            ("model=some/model", "set its keys, such as model.path=some/model"),
            ("data=my_images", "set its keys, such as data.path=my_images"),
            ("method.step_gain=0.5", "set its keys, such as method.step_gain.gamma=0.5"),
            ("method.shift=3", "needs two values, such as 3,3 (got [3])"),
            ("data.buckets=512", "needs a list, such as [[512,512],[448,576]]"),
            (
                "data.sources=[{name: a, uri: b}]",
                "data needs either data.path or data.sources, not both: set data.path=none",
            ),
            ("data.sources.0.weight=1", "there is no list with a member 0 to change; give the whole list"),
        ],
    )
    def test_the_advice_works(self, recipe, override, advice):
        assert advice in refusal(recipe, override)
        for advised in re.findall(r"[a-z_.]+=\S+$", advice):
            load_config(recipe, [*([override] if "none" in advised else []), advised])


class TestAllMistakesAtOnce:
    def test_each_has_its_place(self, recipe):
        recipe.write_text(recipe.read_text() + "train:\n  learning_rate: 1\n  steps: many\nlora: {rank: 0}\n")
        overrides = ["train.lr=0", "data=gone.yaml", "sample.seed", "engine.zero_stage=7", "train.weights=full"]
        lines = refusal(recipe, *overrides, "method.step_gain={}").splitlines()
        assert lines[0] == "8 mistakes in the configuration:"
        found = [line.strip() for line in lines[1:]]
        for place, message in [
            (f"in {recipe}, line 5", "unknown key train.learning_rate; did you mean train.lr?"),
            (f"in {recipe}, line 6", "train.steps: must be a valid integer (got 'many')"),
            (f"in {recipe}, line 7", "lora.rank and lora.alpha must be positive, got 0 and 64.0"),
            ("on the command line", "train.lr and train.clip_norm must be positive, got 0.0 and 10.0"),
            ("on the command line", "data: there is no file 'gone.yaml'"),
            ("on the command line", "override 'sample.seed' is not of the form"),
            ("on the command line", "engine.zero_stage: must be 1, 2 or 3 (got 7)"),
        ]:
            assert any(line.startswith(f"{place}: {message}") for line in found), (place, message, found)

    def test_several_of_one_section(self, recipe):
        """A section's own check ends at its first mistake."""
        lines = refusal(recipe, "train.steps=0", "train.betas=[2,2]", "train.max_skips=-1").splitlines()
        assert [line.partition(" must")[0] for line in lines[1:]] == [
            f"  on the command line: train.{key}" for key in ("steps", "betas", "max_skips")
        ]

    def test_rules_between_sections_too(self, recipe):
        message = refusal(recipe, "lora.rank=0", "train.weights=full", "method.step_gain.gamma=1")
        assert message.startswith("2 mistakes")
        assert "on the command line: method.step_gain needs adapters" in message

    def test_a_removed_value_causes_no_further_mistake(self, recipe):
        """The default in its place may contradict the others."""
        assert "1 mistake" not in (message := refusal(recipe, "train.global_batch_size=x", "train.micro_batch_size=7"))
        assert message.startswith("on the command line: train.global_batch_size: must be a valid integer")

    def test_a_misspelled_key_causes_no_further_mistake(self, recipe):
        """Neither the default of the key that was meant, nor its absence."""
        message = refusal(recipe, "method.teacher_fractoin=0", "method.flow_fraction=1")
        assert message == (
            "on the command line: unknown key method.teacher_fractoin; did you mean method.teacher_fraction?"
        )
        recipe.write_text(recipe.read_text().replace("path: some/model", "pth: some/model"))
        assert refusal(recipe) == f"in {recipe}, line 2: unknown key model.pth; did you mean model.path?"

    def test_overrides_of_another_place(self, recipe):
        with pytest.raises(UserError, match=r"^in the settings of arm x: train\.lr and"):
            load_config(recipe, ["train.lr=0"], place="in the settings of arm x")

    def test_a_key_that_is_given_twice(self, recipe):
        recipe.write_text(recipe.read_text() + "train: {steps: 3}\ntrain:\n  lr: 1\n  lr: 2\n")
        assert [line.strip() for line in refusal(recipe).splitlines()[1:]] == [
            f"in {recipe}, line 5: train is given twice",
            f"in {recipe}, line 7: train.lr is given twice",
        ]

    def test_addresses_are_not_printed(self, recipe):
        assert "secret" not in refusal(recipe, "data.sources=s3://user:secret@host/x")


INVALID = [
    ("model.text_length=0", "model.text_length must be in 1..512, got 0"),
    ("model.text_length=513", "model.text_length must be in 1..512, got 513"),
    ("data.resolution=[0, 16]", "data.resolution must be positive, got (0, 16)"),
    ("data.resolution=[16, -16]", "data.resolution must be positive, got (16, -16)"),
    ("data.num_workers=-1", "data.num_workers must be at least 0, got -1"),
    (
        "method.trajectory_steps=24",
        "method.trajectory_steps=24 has no effect without trajectory rows: set method.trajectory_fraction",
    ),
    (
        "method={trajectory_fraction: 0.5, trajectory_steps: 8}",
        "method.trajectory_steps=8 must be a common multiple of",
    ),
    ("method={trajectory_fraction: 0.5, trajectory_steps: 0}", "method.trajectory_grids=[1, 2, 3, 4, 6, 12], e.g. 12"),
    (
        "method={trajectory_fraction: 1, teacher_fraction: 0, trajectory_steps: 12, step_embedding: true}",
        "there is no teacher for method.trajectory_steps",
    ),
    ("data.path=''", "data.path is empty; name a folder"),
    ("method.teacher_fraction=-0.1", "method.teacher_fraction must be in [0, 1], got -0.1"),
    ("method.teacher_fraction=.nan", "method.teacher_fraction must be in [0, 1], got nan"),
    ("method.flow_fraction=1.1", "method.flow_fraction must be in [0, 1], got 1.1"),
    ("method.dynamic_shift_fraction=2", "method.dynamic_shift_fraction must be in [0, 1], got 2.0"),
    ("method.flow_fraction=0.7", "method.teacher_fraction + method.flow_fraction must be at most 1, got 0.4 + 0.7"),
    ("method.teacher_grid=31", "method.teacher_grid needs even step counts of at least 2 (jumps are pairs), got (31,)"),
    ("method.teacher_grid=0", "method.teacher_grid needs even"),
    ("method.self_grids=[]", "method.self_grids needs even"),
    ("method.self_grids=[8, 3]", "method.self_grids needs even"),
    ("method.caption_dropout=1.5", "method.caption_dropout must be in [0, 1], got 1.5"),
    ("method.shift=[3, 2]", "method.shift must be [low, high] with 1e-06 <= low <= high, finite, got [3.0, 2.0]"),
    ("method.shift=[0, 1]", "method.shift must be [low, high]"),
    ("method.guidance=[-1, 1]", "method.guidance must be [low, high] with 0 <= low <= high, finite, got [-1.0, 1.0]"),
    ("method.shift=[1, .inf]", "method.shift must be [low, high]"),
    (
        "method.shift=[2, 1.0e+7]",
        "method: at shift 1e+07 the finest grid's second point, 1.000000, reaches sigma_max 0.99999",
    ),
    ("method.sigma_max=0.9", "method.sigma_max must be in (0.9, 1], got 0.9"),
    ("method.sigma_max=1.01", "method.sigma_max must be in (0.9, 1], got 1.01"),
    ("method.step_gain.gamma=0", "step_gain.gamma must be in (0, 4], got 0.0"),
    ("method.step_gain.gamma=4.1", "step_gain.gamma must be in (0, 4], got 4.1"),
    ("ema.fast=0.9995", "ema needs 0 <= fast <= slow < 1, got fast 0.9995, slow 0.999"),
    ("ema.fast=-0.1", "ema needs 0 <= fast"),
    ("ema.slow=1", "ema needs 0 <= fast"),
    ("ema.restart_every=0", "ema.restart_every must be at least 1, auto or none, got 0"),
    ("ema={fast: 0.9, slow: 0.9, restart_every: auto}", "compares a fast and a slow average: their decays must differ"),
    ("method={step_embedding: true, teacher_fraction: 0}", "method.step_embedding teaches the network a new input"),
    (
        "method.distil_guidance=true",
        "method.distil_guidance together with pairs, flow-map or matching rows would learn guidance and shortcuts at once",
    ),
    (
        "method={distil_guidance: true, teacher_fraction: 0, flow_fraction: 1, step_gain: {}}",
        "method.distil_guidance and method.step_gain are two stages",
    ),
    (
        "method={distil_guidance: true, teacher_fraction: 0, flow_fraction: 1}",
        "method.distil_guidance teaches one scale, because the network has no input for the scale: give method.guidance "
        "equal ends, e.g. [4.5, 4.5], got [0.0, 8.0]",
    ),
    (
        "method={distil_guidance: true, teacher_fraction: 0, flow_fraction: 1, guidance: [4.5, 4.5]}",
        "sample.guidance=3.5 is the teacher's scale in grids and evaluation, but the student learns scale 4.5",
    ),
    (
        "method={flow_map_fraction: 1, teacher_fraction: 0, step_gain: {}, flow_map: {epsilon: 0.2}}",
        "method.flow_map.epsilon has no effect with method.flow_map.difference=teacher_step",
    ),
    ("model.init=random", "model.init=random leaves nothing for adapters to adapt"),
    ("method.step_embedding=true", "method.step_embedding is for training from scratch"),
    (
        "method={step_embedding: true, step_gain: {}, teacher_fraction: 0}",
        "both condition on the step size: use only one of them",
    ),
    ("lora.rank=0", "lora.rank and lora.alpha must be positive, got 0 and 64.0"),
    ("lora.alpha=0", "lora.rank and lora.alpha must be positive, got 64 and 0.0"),
    ("lora.targets='('", "lora.targets is not a regular expression: missing )"),
    ("train.steps=0", "train.steps must be at least 1, got 0"),
    ("train.global_batch_size=0", "train.global_batch_size must be at least 1, got 0"),
    ("train.micro_batch_size=-8", "train.micro_batch_size must be at least 1, got -8"),
    ("train.lr=0", "train.lr and train.clip_norm must be positive, got 0.0 and 10.0"),
    ("train.lr=.nan", "train.lr and train.clip_norm must be positive, got nan and 10.0"),
    ("train.clip_norm=-1", "train.lr and train.clip_norm must be positive, got 2e-05 and -1.0"),
    ("train.warmup_steps=-1", "train.warmup_steps must be in 0..train.steps, got -1"),
    (
        "train.warmup_steps=3001",
        "train.warmup_steps must be in 0..train.steps, got 3001 of 3000 steps. A run with fewer steps",
    ),
    ("train.spike_factor=1", "train.spike_factor must be above 1 or none, got 1.0"),
    ("train.spike_factor=.nan", "train.spike_factor must be above 1 or none, got nan"),
    ("train.max_skips=-1", "train.max_skips must be at least 0, got -1"),
    ("train.max_rollbacks=-1", "train.max_rollbacks must be at least 0, got -1"),
    ("engine.shard=0", "engine.shard must be -1 (all processes) or at least 1, got 0"),
    ("engine.shard=-2", "engine.shard must be -1 (all processes) or at least 1, got -2"),
    ("engine.timeout=0", "engine.timeout must be positive, got 0.0"),
    ("engine.timeout=.nan", "engine.timeout must be positive, got nan"),
    ("engine.deepspeed_config=x.json", "engine.deepspeed_config needs engine.name=deepspeed; set that"),
    ("engine.zero_stage=0", "engine.zero_stage"),
    ("engine.zero_stage=4", "engine.zero_stage"),
    ("engine.name=fsdp", "engine.name"),
    ("checkpoint.every=0", "checkpoint.every and checkpoint.keep must be at least 1, got 0, 2"),
    ("checkpoint.keep=0", "checkpoint.every and checkpoint.keep must be at least 1, got 250, 0"),
    ("sample.every=-1", "sample.every must be >= 0 and sample.steps positive, got -1"),
    ("sample.steps=[]", "sample.every must be >= 0 and sample.steps positive, got 250, ()"),
    ("sample.steps=[4, 0]", "sample.every must be >= 0 and sample.steps positive, got 250, (4, 0)"),
    ("sample.teacher_steps=-1", "sample.teacher_steps must be at least 0, got -1"),
    ("sample.shift=0", "sample.shift must be positive or 'dynamic', got 0"),
    ("evaluate.steps=[0]", "evaluate.steps, teacher_steps, batch_size and per_prompt must be >= 1"),
    ("evaluate.teacher_steps=0", "evaluate.steps, teacher_steps, batch_size and per_prompt must be >= 1"),
    ("evaluate.batch_size=0", "evaluate.steps, teacher_steps, batch_size and per_prompt must be >= 1"),
    ("evaluate.per_prompt=0", "evaluate.steps, teacher_steps, batch_size and per_prompt must be >= 1"),
    ("evaluate.samples=1", "evaluate.samples >= 2"),
]


class TestValidation:
    @pytest.mark.parametrize(("override", "message"), INVALID, ids=[override for override, _ in INVALID])
    def test_values_out_of_range(self, recipe, override, message):
        assert message in refusal(recipe, override)

    def test_step_gain_needs_adapters(self, recipe):
        message = refusal(recipe, "train.weights=full", "method.step_gain.gamma=0.5")
        assert "method.step_gain needs adapters: full weights have no strength" in message
        assert "train.weights=lora" in message

    def test_full_weights_start_from_no_adapter(self, recipe):
        message = refusal(recipe, "train.weights=full", "lora.start=runs/a")
        assert "lora.start has weights of adapters, but train.weights=full trains none. Set lora.start=none" in message

    @pytest.mark.parametrize(
        "override",
        [
            "model.text_length=512",
            "method.flow_fraction=0.6",
            "method.shift=[3, 3]",
            "method.sigma_max=1",
            "method.step_gain.gamma=4",
            "ema.slow=0.99",
            "train.micro_batch_size=16",
            "train.micro_batch_size=32",
            "train.micro_batch_size=3",
            "train.warmup_steps=3000",
            "train.spike_factor=1.01",
            "train.spike_factor=none",
            "train.max_skips=0",
            "train.max_rollbacks=0",
            "engine.shard=1",
            "engine.name=deepspeed",
            "checkpoint.asynchronous=true",
            "train.weights=full",
            "sample.every=0",
            "sample.shift=dynamic",
            "evaluate.samples=2",
        ],
    )
    def test_limits_are_valid(self, recipe, override):
        load_config(recipe, [override])

    @pytest.mark.parametrize(
        ("overrides", "message"),
        [
            (["engine.name=deepspeed", "engine.shard=2"], "zero_stage decides what is sharded: add engine.shard=-1"),
            (["engine.shard=1", "engine.cpu_offload=true"], "engine.cpu_offload needs sharded weights"),
            (
                ["engine.name=deepspeed", "checkpoint.asynchronous=true"],
                "checkpoint.asynchronous works only with fsdp2",
            ),
        ],
        ids=lambda value: None if isinstance(value, str) else " ".join(value),
    )
    def test_options_of_another_engine_are_errors(self, recipe, overrides, message):
        assert message in refusal(recipe, *overrides)

    @pytest.mark.parametrize(
        "override",
        [
            "train.betas=[0.9, 1.0]",
            "train.betas=[-0.1, 0.9]",
            "train.weight_decay=-1",
            "evaluate.steps=[]",
            "train.steps=true",
        ],
    )
    def test_invalid_values_are_errors(self, recipe, override):
        assert override.split("=")[0] in refusal(recipe, override)


class TestFiles:
    def test_a_missing_file_names_similar_recipes(self):
        message = refusal("recipes/configs/tiny_distil.yaml")
        assert "there is no configuration file 'recipes/configs/tiny_distil.yaml'" in message
        assert "tiny_distill.yaml" in message

    def test_a_missing_file_without_similar_recipes_lists_all(self):
        message = refusal("zzz")
        assert all(Path(name).name in message for name in SHIPPED)

    def test_missing_section_file(self, recipe):
        assert "data: there is no file 'nowhere.yaml'" in refusal(recipe, "data=nowhere.yaml")

    def test_a_folder_is_not_a_file(self, tmp_path):
        with pytest.raises(UserError, match="no configuration file"):
            find_recipe(tmp_path)

    @pytest.mark.parametrize(("content", "kind"), [("", "NoneType"), ("[a, b]", "list"), ("just text", "str")])
    def test_no_sections(self, recipe, content, kind):
        recipe.write_text(content)
        assert refusal(recipe) == f"{recipe} must hold sections of keys, but holds {kind}"

    def test_invalid_yaml_is_reported_with_its_line(self, recipe):
        recipe.write_text("run:\n  dir: x\n\tseed: 1\n")
        message = refusal(recipe)
        assert f"{recipe} is not valid YAML" in message
        assert "line 3" in message

    def test_a_file_that_is_not_utf8(self, recipe):
        recipe.write_bytes("run: {dir: Läufe}\n".encode("latin-1"))
        assert f"{recipe} is not valid YAML" in refusal(recipe)


def test_a_stored_configuration_of_an_earlier_version_is_valid(recipe):
    recipe.write_text(recipe.read_text().replace("path: some/model", "path: some/model, family: flux"))
    assert "unknown key model.family" in refusal(recipe)
    assert load_config(recipe, stored=True).model.path == "some/model"


def test_a_run_of_a_version_without_a_key_resumes_with_the_current_recipe():
    """Its factors were drawn with the default of `lora.init`; they come from the checkpoint, so the recipe's value is accepted."""
    current = to_plain(load_config("flux_dev_lora"))
    stored = json.loads(json.dumps(current))
    assert stored["lora"].pop("init") == "gaussian" and stored["method"].pop("flow_sigma")["density"] == "uniform"
    saved = to_plain(parse_config(stored, "checkpoint"))  # as `TrainState` reads it
    assert saved["lora"]["init"] == "kaiming"
    assert check_same_recipe(saved, current, Path("checkpoint")) == []


@pytest.mark.parametrize(
    ("batch", "maximum", "processes", "size", "number"),
    [(16, 4, 1, 4, 4), (16, 4, 16, 1, 1), (16, 32, 2, 8, 1), (16, 3, 1, 2, 8), (30, 4, 2, 3, 5), (7, 4, 1, 1, 7)],
)
def test_the_micro_batch_is_the_largest_that_divides_a_processs_share(batch, maximum, processes, size, number):
    config = load_config(
        "flux_dev_lora.yaml", [f"train.global_batch_size={batch}", f"train.micro_batch_size={maximum}"]
    )
    assert micro_batches(config, processes) == MicroBatches(size, number)
    words = describe_micro_batches(config, processes)
    assert (f"train.micro_batch_size allows {maximum}" in words) == (size < maximum)


def test_processes_share_the_global_batch_equally():
    config = load_config("flux_dev_lora.yaml")
    with pytest.raises(
        UserError, match=r"16 is not a multiple of the 3 processes, which share it equally. Set it to 15 or 18"
    ):
        micro_batches(config, 3)
    with pytest.raises(
        UserError, match=r"16 is not a multiple of the 64 processes, which share it equally. Set it to 64,"
    ):
        micro_batches(config, 64)


class TestSettingsOfACache:
    """A run takes size and text length from its cache, unless something sets them."""

    def cache(self, folder, **settings):
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text(json.dumps({"settings": settings}))
        return str(folder)

    def test_they_are_taken_from_the_manifest(self, tmp_path):
        path = self.cache(
            tmp_path / "a", **{"data.resolution": [768, 768], "model.text_length": 77, "data.buckets": "auto"}
        )
        config = load_config("flux_dev_lora.yaml", [f"data.path={path}"])
        assert (config.data.resolution, config.data.buckets, config.model.text_length) == ((768, 768), "auto", 77)
        assert f"77  # {path}/manifest.json" in re.sub(
            " +#", "  #", show_config("flux_dev_lora.yaml", [f"data.path={path}"])
        )

    def test_what_is_set_stays(self, tmp_path):
        path = self.cache(tmp_path / "a", **{"data.resolution": [768, 768], "model.text_length": 77})
        config = load_config("flux_dev_lora.yaml", [f"data.path={path}", "data.resolution=[256,256]"])
        assert (config.data.resolution, config.model.text_length) == ((256, 256), 77)

    def test_of_a_split(self, tmp_path):
        self.cache(tmp_path / "a" / "train", **{"data.resolution": [768, 768]})
        sources = json.dumps({"sources": [{"name": "a", "uri": str(tmp_path / "a"), "split": "train"}]})
        assert load_config("flux_dev_lora.yaml", [f"data={sources}"]).data.resolution == (768, 768)

    def test_sources_that_disagree_set_nothing(self, tmp_path):
        words = []
        for name, size in (("a", 768), ("b", 640)):
            path = self.cache(tmp_path / name, **{"data.resolution": [size, size], "model.text_length": 77})
            words.append({"name": name, "uri": path})
        config = load_config("flux_dev_lora.yaml", [f"data={json.dumps({'sources': words})}"])
        assert (config.data.resolution, config.model.text_length) == ((512, 512), 77)

    @pytest.mark.parametrize("text", ["", "[]", '{"settings": 3}', '{"settings": {"data.resolution": null}}', "{"])
    def test_a_damaged_manifest_is_not_judged_here(self, tmp_path, text):
        (tmp_path / "manifest.json").write_text(text)
        assert load_config("flux_dev_lora.yaml", [f"data.path={tmp_path}"]).data.resolution == (512, 512)


def test_messages_and_docs_name_settings_that_exist():
    """Also with the value that they advise: `set train.weights=lora`."""
    root = Path(__file__).parents[2]
    files = [path for folder in ("scfm_core", "recipes", "data_tools") for path in (root / folder).rglob("*.py")]
    texts = [
        (path.name, node.value)
        for path in files
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    pages = [*(root / "docs").glob("*.md"), root / "README.md", root / "slurm" / "distill_flux.sh"]
    texts += [(path.name, path.read_text(encoding="utf-8")) for path in pages]
    sections = "|".join(key for key in all_keys() if "." not in key)
    named = {
        (file, key, value)
        for file, text in texts
        for key, value in re.findall(
            rf"(?<![\w./])((?:{sections})\.[a-z_0-9]+(?:\.[a-z_]+)*)(?:=([\w+-][\w.+-]*))?", text
        )
        if file != "configuration.md" and not key.endswith((".py", ".yaml", ".md", ".json", ".tar", ".txt"))
    }
    assert len(named) > 150
    assert sorted({each[1] for each in named} - set(all_keys())) == ["data.key"]  # a placeholder
    wrong = []
    for file, key, value in sorted(each for each in named if each[1] != "data.key"):
        hint: Any = RunConfig
        for part in key.split("."):
            hint = hints_of(dataclass_in(hint) or hint)[part]
        is_plain = not value.isupper() and get_origin(hint) is not tuple and dataclass_in(hint) is None
        if value and is_plain and not (value == "none" and types.NoneType in get_args(hint)):
            try:
                TypeAdapter(hint).validate_python(yaml.safe_load(value.rstrip(".")))
            except ValidationError:
                wrong.append((file, key, value))
    assert wrong == []
