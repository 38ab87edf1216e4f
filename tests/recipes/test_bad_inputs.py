"""A user's mistake gives exit code 2, one message that says what, where and how to fix it, and no traceback.

`SCFM_SHOW_MESSAGES=1 pytest tests/recipes/test_bad_inputs.py` prints the messages.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from recipes.cli import main
from scfm_core.train.fit import fit
from scfm_core.train.parse import to_plain
from scfm_core.train.trainer import Trainer


@pytest.fixture
def recipe(make_config, tmp_path):
    """A valid recipe; each case makes one mistake."""
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(to_plain(make_config())))
    return path


def train(recipe, *overrides):
    return ["train", str(recipe), *overrides]


def copy(tiny, tmp_path, name):
    return Path(shutil.copytree(tiny / name, tmp_path / name))


def overwrite(path, offset, data):
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def unknown_key(recipe, tiny, tmp_path):
    return train(
        recipe, "train.micro_batchsize=4"
    ), "unknown key train.micro_batchsize; did you mean train.micro_batch_size?"


def unknown_section(recipe, tiny, tmp_path):
    return train(recipe, "trian.steps=4"), "unknown key trian; did you mean train?"


def wrong_type(recipe, tiny, tmp_path):
    return train(recipe, "train.steps=many"), "on the command line: train.steps: must be a valid integer"


def wrong_choice(recipe, tiny, tmp_path):
    return train(recipe, "train.weights=lorra"), "train.weights: must be 'lora' or 'full'"


def zero_steps(recipe, tiny, tmp_path):
    return train(recipe, "train.steps=0"), "train.steps must be at least 1, got 0"


def override_without_value(recipe, tiny, tmp_path):
    return train(recipe, "train.steps"), "override 'train.steps' is not of the form section.key=value"


def missing_recipe(recipe, tiny, tmp_path):
    return [
        "train",
        "flux_dev_lorra.yaml",
    ], "there is no configuration file 'flux_dev_lorra.yaml'. Shipped recipes: flux_dev_lora"


def broken_yaml(recipe, tiny, tmp_path):
    recipe.write_text("train: [1, 2")
    return train(recipe), "is not valid YAML"


def missing_model(recipe, tiny, tmp_path):
    return train(recipe, "model.path=./nowhere"), "model.path: there is no folder './nowhere'"


def missing_style(recipe, tiny, tmp_path):
    return train(recipe, "model.adapters=[{path: nowhere.safetensors}]"), "there is no adapter 'nowhere.safetensors'"


def style_of_another_model(recipe, tiny, tmp_path):
    path = tmp_path / "style.safetensors"
    save_file({f"transformer.blocks.0.to_q.lora_{side}.weight": torch.zeros(2, 2) for side in "AB"}, path)
    return train(recipe, f"model.adapters=[{{path: {path}, weight: 0.8}}]"), "there is no linear for 2 tensors of 2"


def hub_without_network(recipe, tiny, tmp_path):
    return train(
        recipe, "model.path=nobody/nothing"
    ), "'nobody/nothing' is not a local folder, and it could not be downloaded"


def wrong_model_folder(recipe, tiny, tmp_path):
    return train(recipe, f"model.path={tiny / 'digits'}"), "has no model_index.json"


def wrong_pipeline(recipe, tiny, tmp_path):
    folder = copy(tiny, tmp_path, "flux")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": "StableDiffusionXLPipeline"}))
    return train(recipe, f"model.path={folder}"), "holds a StableDiffusionXLPipeline; scfm supports FluxPipeline, "


def interrupted_download(recipe, tiny, tmp_path):
    folder = copy(tiny, tmp_path, "flux")
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    return train(recipe, f"model.path={folder}"), "damaged or incomplete: download them again"


def missing_weights(recipe, tiny, tmp_path):
    folder = copy(tiny, tmp_path, "flux")
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    return train(recipe, f"model.path={folder}"), "has no .safetensors weights; is the download complete?"


def missing_data(recipe, tiny, tmp_path):
    looked_in = Path("nowhere").absolute()  # an absolute path: a job may start in another folder
    return train(
        recipe, "data.path=nowhere"
    ), f"there is no folder '{looked_in}'. Correct the path. If it is to be a cache, `scfm data encode"


def images_instead_of_cache(recipe, tiny, tmp_path):
    return train(recipe, "data.format=webdataset", f"data.path={tiny / 'digits'}"), "there is no manifest.json in"


def empty_data(recipe, tiny, tmp_path):
    (tmp_path / "empty").mkdir()
    return train(recipe, f"data.path={tmp_path / 'empty'}"), "has no images (.png"


def image_without_caption(recipe, tiny, tmp_path):
    folder = copy(tiny, tmp_path, "digits")
    shutil.copy(folder / "0000.png", folder / "extra.png")
    return train(recipe, f"data.path={folder}"), "Put it into 'extra.txt'"


def corrupt_image(recipe, tiny, tmp_path):
    folder = copy(tiny, tmp_path, "digits")
    for path in folder.glob("*.png"):
        path.write_bytes(b"not a picture")
    return train(recipe, f"data.path={folder}"), ".png is not a readable image"


def corrupt_image_in_a_worker(recipe, tiny, tmp_path):
    command, message = corrupt_image(recipe, tiny, tmp_path)
    return [*command, "data.num_workers=1"], message


def cut_shard(recipe, tiny, tmp_path):
    folder = copy(tiny, tmp_path, "cache")
    os.truncate(folder / "shard-000001.tar", 5000)
    return train(recipe, f"data.path={folder}"), "shard-000001.tar has 5000 bytes, the manifest says"


def flipped_bit(recipe, tiny, tmp_path):
    folder = copy(tiny, tmp_path, "cache")
    overwrite(folder / "shard-000002.tar", 2000, b"\xff")
    return train(recipe, f"data.path={folder}"), "shard-000002.tar is corrupt: its sha256 is"


def cache_of_another_model(recipe, tiny, tmp_path):
    folder = copy(tiny, tmp_path, "flux")
    overwrite(
        folder / "vae" / "diffusion_pytorch_model.safetensors",
        -4 + (folder / "vae" / "diffusion_pytorch_model.safetensors").stat().st_size,
        b"\x00\x00\x80\x3f",
    )
    return train(recipe, f"model.path={folder}"), "was encoded by another model"


def cache_of_another_text_length(recipe, tiny, tmp_path):
    return train(recipe, "model.text_length=16"), "was encoded with model.text_length 8, this run asks for 16"


def resolution_not_divisible(recipe, tiny, tmp_path):
    return train(
        recipe, "data.resolution=[18,16]", f"data.path={tiny / 'digits'}"
    ), "sides that are multiples of 4; the nearest is 16 x 16"


def no_permission(recipe, tiny, tmp_path):
    (tmp_path / "file").write_text("")  # even root cannot write below a file
    return train(recipe, f"run.dir={tmp_path / 'file' / 'run'}"), "cannot be written (Not a directory)"


def prompts_of_another_json(recipe, tiny, tmp_path):
    (tmp_path / "prompts.json").write_text('["a cat"]')
    return train(
        recipe, "sample.every=1", f"sample.prompts={tmp_path / 'prompts.json'}"
    ), "is not JSON of COCO's format"


def unknown_prompt_file(recipe, tiny, tmp_path):
    return train(
        recipe, "sample.every=2", "sample.prompts=prompts.txt"
    ), "sample.prompts: the prompt file 'prompts.txt' cannot be read"


def checkpoint_of_another_recipe(recipe, tiny, tmp_path):
    assert main(train(recipe)) == 0
    return train(recipe, "lora.rank=2", "train.steps=9"), "lora.rank: 4 in the checkpoint, 2 now"


def unknown_checkpoint(recipe, tiny, tmp_path):
    return [*train(recipe), "--resume", "nowhere"], "there is no such checkpoint folder. Use auto, never, or a path"


def lora_without_targets(recipe, tiny, tmp_path):
    return train(recipe, "lora.targets=attention"), "lora.targets 'attention' matches none of the network's linears"


def no_gpu(recipe, tiny, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    return train(recipe, "run.device=cuda"), "torch finds no GPU. Set run.device=cpu"


def not_a_run(recipe, tiny, tmp_path):
    return ["sample", str(tmp_path), "--prompt", "x"], "is not a run: it has no config.yaml"


def sample_without_prompt(recipe, tiny, tmp_path):
    assert main(train(recipe)) == 0
    return ["sample", str(tmp_path / "run")], "there is no prompt: give --prompt TEXT or --prompts FILE"


def inception_without_weights(recipe, tiny, tmp_path):
    assert main(train(recipe)) == 0
    return ["evaluate", str(tmp_path / "run"), "evaluate.features=inception"], "must name Inception's weights"


def untrained(recipe, tmp_path):
    """The folder of a run that has its configuration and nothing else."""
    (tmp_path / "run").mkdir()
    shutil.copy(recipe, tmp_path / "run" / "config.yaml")


def unknown_features(recipe, tiny, tmp_path):
    return train(
        recipe, "evaluate.features=inceptoin"
    ), "must be classifier, inception or MODULE:FUNCTION of a benchmark"


def benchmark_that_is_not_installed(recipe, tiny, tmp_path):
    untrained(recipe, tmp_path)
    words = ["evaluate", str(tmp_path / "run"), "evaluate.features=my.benchmark:load"]
    return words, "'my.benchmark:load' cannot be imported (No module named 'my')"


def hub_id_for_a_clip_folder(recipe, tiny, tmp_path):
    untrained(recipe, tmp_path)
    words = ["evaluate", str(tmp_path / "run"), "evaluate.clip_path=openai/clip-vit-large-patch14"]
    return words, "hf download openai/clip-vit-large-patch14 --local-dir"


def no_image_of_a_prompt(recipe, tiny, tmp_path):
    untrained(recipe, tmp_path)
    words = ["sample", str(tmp_path / "run"), "--prompt", "x", "--per-prompt", "0", "--layout", "flat"]
    return words, "--per-prompt must be at least 1, got 0"


def grids_without_prompts(recipe, tiny, tmp_path):
    return train(recipe, "sample.every=2"), "sample.every asks for grids, but sample.prompts is empty"


def missing_section_file(recipe, tiny, tmp_path):
    return train(recipe, "data=other.yaml"), "data: there is no file 'other.yaml'"


def number_for_a_section(recipe, tiny, tmp_path):
    return train(recipe, "method.step_gain=0.5"), "is a section: set its keys, such as method.step_gain.gamma=0.5"


def near_student_with_strengths(recipe, tiny, tmp_path):
    return train(
        recipe, "method.near=student", "method.step_gain.gamma=0.5"
    ), "and needs a pass of its own. Set method.near=ema"


def run_dir_is_a_file(recipe, tiny, tmp_path):
    (tmp_path / "file").write_text("")
    return train(recipe, f"run.dir={tmp_path / 'file'}"), "cannot be written (it is a file)"


def unknown_device(recipe, tiny, tmp_path):
    return train(recipe, "run.device=gpu"), "run.device must be auto, cpu, cuda or cuda:N, got 'gpu'"


def strength_without_number(recipe, tiny, tmp_path):
    assert main(train(recipe)) == 0
    return ["sample", str(tmp_path / "run"), "--prompt", "x", "--strength", "nan"], "--strength must be a finite number"


def export_into_existing_folder(recipe, tiny, tmp_path):
    assert main(train(recipe)) == 0
    return [
        "export",
        str(tmp_path / "run"),
        "--merged",
        str(tiny / "flux"),
    ], "flux exists already; choose another folder"


def encode_with_zero_batch_size(recipe, tiny, tmp_path):
    words = ["data", "encode", str(tiny / "digits"), "--output", str(tmp_path / "out"), "--model", str(tiny / "flux")]
    return [*words, "--batch-size", "0"], "batch size and samples per shard must be at least 1"


def zero_shards(recipe, tiny, tmp_path):
    return train(recipe, "engine.shard=0"), "engine.shard must be -1 (all processes) or at least 1, got 0"


def more_shards_than_processes(recipe, tiny, tmp_path):
    return train(recipe, "engine.shard=2"), "engine.shard=2 does not divide the 1 processes"


def offload_of_one_process(recipe, tiny, tmp_path):
    return train(recipe, "engine.cpu_offload=true"), "engine.cpu_offload needs several processes"


def deepspeed_json_for_fsdp2(recipe, tiny, tmp_path):
    return train(
        recipe, "engine.deepspeed_config=ds.json"
    ), "engine.deepspeed_config needs engine.name=deepspeed; set that"


def shard_option_with_deepspeed(recipe, tiny, tmp_path):
    return train(recipe, "engine.name=deepspeed", "engine.shard=2"), "engine.shard=2 needs engine.name=fsdp2"


def asynchronous_deepspeed(recipe, tiny, tmp_path):
    words = train(recipe, "engine.name=deepspeed", "checkpoint.asynchronous=true")
    return words, "checkpoint.asynchronous works only with fsdp2. Set it to false"


def compiled_zero_3(recipe, tiny, tmp_path):
    words = train(recipe, "engine.name=deepspeed", "engine.zero_stage=3", "train.compile=true")
    return words, "train.compile=true does not work with engine.zero_stage=3"


def triton_without_a_gpu(recipe, tiny, tmp_path):
    return train(recipe, "kernels.fused=triton"), "kernels.fused=triton cannot run here: Triton kernels need a GPU"


def unavailable_attention(recipe, tiny, tmp_path):
    return train(recipe, "kernels.attention=xformers"), "xformers has no kernel for a CPU. Choose among flash"


def guidance_distillation_of_one_pass_model(recipe, tiny, tmp_path):
    method = "method={distil_guidance: true, teacher_fraction: 0, flow_fraction: 1, guidance: [4, 4]}"
    return train(
        recipe, method, "sample.guidance=4"
    ), "method.distil_guidance is for models with classifier-free guidance in two passes"


def fp8_without_pairs(recipe, tiny, tmp_path):
    return train(recipe, "kernels.fp8=true", "method={flow_fraction: 1, teacher_fraction: 0}"), "no row is a pair"


def fp8_of_full_weights(recipe, tiny, tmp_path):
    return train(recipe, "kernels.fp8=true", "train.weights=full"), "train.weights=full has no frozen base"


def fp8_of_a_sharded_base(recipe, tiny, tmp_path):
    words = train(recipe, "kernels.fp8=true", "engine.name=deepspeed", "engine.zero_stage=3")
    return words, "kernels.fp8=true cannot run here: ZeRO-3 shards the base"


def cuda_graphs_without_a_gpu(recipe, tiny, tmp_path):
    return train(
        recipe, "kernels.cuda_graphs=true"
    ), "CUDA graphs need a GPU, this is a CPU. Or set kernels.cuda_graphs=f"


def unknown_zero_stage(recipe, tiny, tmp_path):
    return train(recipe, "engine.name=deepspeed", "engine.zero_stage=4"), "engine.zero_stage: must be 1, 2 or 3"


def zero_timeout(recipe, tiny, tmp_path):
    return train(recipe, "engine.timeout=0"), "engine.timeout must be positive, got 0.0"


def spike_factor_below_one(recipe, tiny, tmp_path):
    return train(recipe, "train.spike_factor=0.5"), "train.spike_factor must be above 1 or none, got 0.5"


def negative_skips(recipe, tiny, tmp_path):
    return train(recipe, "train.max_skips=-1"), "train.max_skips must be at least 0, got -1"


def with_json(recipe, tmp_path, content, *overrides):
    """The command for a run under DeepSpeed with the user's own JSON."""
    path = tmp_path / "ds.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return train(recipe, "engine.name=deepspeed", f"engine.deepspeed_config={path}", *overrides)


def json_with_other_clipping(recipe, tiny, tmp_path):
    words = with_json(recipe, tmp_path, {"gradient_clipping": 0.5}, "train.clip_norm=2")
    return words, "gradient_clipping is 0.5 there, train.clip_norm asks for 2.0"


def json_with_other_batch(recipe, tiny, tmp_path):
    words = with_json(recipe, tmp_path, {"train_batch_size": 64, "gradient_accumulation_steps": "auto"})
    return words, "train_batch_size is 64 there, train.global_batch_size asks for 8"


def json_with_other_stage(recipe, tiny, tmp_path):
    words = with_json(recipe, tmp_path, {"zero_optimization": {"stage": 3}}, "engine.zero_stage=1")
    return words, "zero_optimization.stage is 3 there, engine.zero_stage asks for 1"


def json_with_other_rate(recipe, tiny, tmp_path):
    optimizer = {"type": "AdamW", "params": {"lr": 1.0, "betas": "auto", "weight_decay": "auto"}}
    return with_json(
        recipe, tmp_path, {"optimizer": optimizer}
    ), "optimizer.params.lr is 1.0 there, train.lr asks for 0.001"


def json_with_other_optimizer(recipe, tiny, tmp_path):
    words = with_json(recipe, tmp_path, {"optimizer": {"type": "Lamb"}})
    return words, "optimizer.type is 'Lamb' there, the optimizer asks for 'AdamW'"


def json_with_other_dtype(recipe, tiny, tmp_path):
    words = with_json(recipe, tmp_path, {"bf16": {"enabled": True}})
    return words, "bf16.enabled is True there, train.compute_dtype=float32 asks for False"


def json_with_a_schedule(recipe, tiny, tmp_path):
    words = with_json(recipe, tmp_path, {"scheduler": {"type": "WarmupLR"}})
    return words, "scheduler is the recipe's train.lr_schedule and train.warmup_steps"


def json_with_offloaded_weights(recipe, tiny, tmp_path):
    words = with_json(recipe, tmp_path, {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}})
    return words, "zero_optimization.offload_param would take the EMAs' shards with it"


def json_with_an_unknown_key(recipe, tiny, tmp_path):
    words = with_json(recipe, tmp_path, {"gradient_cliping": 10.0})
    return words, "gradient_cliping is unknown here; did you mean gradient_clipping?"


def json_with_an_unknown_optimizer_key(recipe, tiny, tmp_path):
    words = with_json(recipe, tmp_path, {"optimizer": {"params": {"learning_rate": 1.0}}})
    return words, "optimizer.params.learning_rate is unknown here"


def broken_json(recipe, tiny, tmp_path):
    return with_json(recipe, tmp_path, '{"gradient_clipping": 1.0,'), "ds.json cannot be read as JSON"


def binary_json(recipe, tiny, tmp_path):
    words = with_json(recipe, tmp_path, "")
    (tmp_path / "ds.json").write_bytes(b"\xff\xfe{}")
    return words, "ds.json cannot be read as JSON"


def json_that_is_a_list(recipe, tiny, tmp_path):
    return with_json(recipe, tmp_path, "[1]"), "ds.json must hold an object, but holds list"


def missing_json(recipe, tiny, tmp_path):
    words = train(recipe, "engine.name=deepspeed", "engine.deepspeed_config=nowhere.json")
    return words, "nowhere.json cannot be read as JSON ("


CASES = [
    unknown_key, unknown_section, wrong_type, wrong_choice, zero_steps, override_without_value,
    missing_recipe, broken_yaml, missing_model, missing_style, style_of_another_model, hub_without_network, wrong_model_folder, wrong_pipeline,
    interrupted_download, missing_weights, missing_data, images_instead_of_cache, empty_data, image_without_caption,
    corrupt_image, pytest.param(corrupt_image_in_a_worker, marks=pytest.mark.processes), cut_shard, flipped_bit,
    cache_of_another_model, cache_of_another_text_length, resolution_not_divisible, no_permission, unknown_prompt_file,
    prompts_of_another_json,
    checkpoint_of_another_recipe, unknown_checkpoint, lora_without_targets, no_gpu, not_a_run, sample_without_prompt,
    unknown_features, benchmark_that_is_not_installed, hub_id_for_a_clip_folder, no_image_of_a_prompt,
    inception_without_weights, grids_without_prompts, missing_section_file, number_for_a_section, near_student_with_strengths,
    run_dir_is_a_file, unknown_device, strength_without_number, export_into_existing_folder, encode_with_zero_batch_size,
    zero_shards, more_shards_than_processes, offload_of_one_process, deepspeed_json_for_fsdp2, shard_option_with_deepspeed,
    asynchronous_deepspeed, compiled_zero_3, triton_without_a_gpu, unavailable_attention, guidance_distillation_of_one_pass_model,
    fp8_without_pairs, fp8_of_full_weights,
    fp8_of_a_sharded_base, cuda_graphs_without_a_gpu, unknown_zero_stage, zero_timeout, spike_factor_below_one, negative_skips,
    json_with_other_clipping, json_with_other_batch, json_with_other_stage, json_with_other_rate,
    json_with_other_optimizer, json_with_other_dtype, json_with_a_schedule, json_with_offloaded_weights,
    json_with_an_unknown_key, json_with_an_unknown_optimizer_key, broken_json, binary_json, json_that_is_a_list,
    missing_json,
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_bad_input(case, recipe, tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    command, message = case(recipe, tiny, tmp_path)
    capsys.readouterr()
    assert main(command) == 2
    output = capsys.readouterr().err
    error = output[output.index("scfm: error: ") :]
    assert message in error
    assert "Traceback" not in output
    with capsys.disabled():
        if os.environ.get("SCFM_SHOW_MESSAGES"):
            print(f"\n{case.__name__}: {' '.join(error.split())}")


def test_all_contradictions_of_a_json_are_listed(recipe, tmp_path, capsys):
    content = {"gradient_clipping": 0.5, "fp16": {"enabled": True}, "amp": {"enabled": True}, "zero_optimisation": {}}
    assert main(with_json(recipe, tmp_path, content)) == 2
    error = capsys.readouterr().err
    for part in ("gradient_clipping is 0.5", "fp16.enabled is True", "amp casts", "mean zero_optimization?", "ds.json"):
        assert part in error
    assert "Change one of the two" in error


@pytest.mark.parametrize("number", ["2", "8"])
def test_incomplete_launcher_variables(recipe, capsys, monkeypatch, number):
    """Several processes, but no address of their rendezvous."""
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", number)
    assert main(train(recipe)) == 2
    error = capsys.readouterr().err
    assert f"WORLD_SIZE is {number}, but without RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT" in error
    assert "Start several processes with torchrun" in error


@pytest.mark.processes
def test_disk_full(make_config, tmp_path):
    """A real full disk: a tmpfs of four megabytes, with room for a few checkpoints."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.strip()}")
    try:
        config = make_config(
            {"run.dir": str(disk / "run"), "checkpoint.every": 1, "checkpoint.keep": 50, "train.steps": 50}
        )
        trainer = Trainer(config)
        with pytest.raises(ValueError, match=r"the disk is full.*The last one, step_\d+, is intact"):
            fit(trainer)
        checkpoints = sorted(path for path in (disk / "run" / "checkpoints").iterdir() if path.name != "latest")
        assert all(path.name.startswith("step_") for path in checkpoints)  # no partial checkpoint is left
        saved = len(checkpoints)
        assert saved >= 1
        assert Trainer(config, resume=checkpoints[-1]).progress.step == saved
    finally:
        subprocess.run(["umount", str(disk)], check=True)
