"""What an export writes: folded strength, names, headers, modes, cards; and no folder of this machine."""

import json
import os
import re
import shutil
import stat
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers import FluxPipeline
from huggingface_hub import ModelCard
from PIL import Image
from runs import ALL_TARGETS
from safetensors import safe_open
from test_export import diffusers_images, largest_difference, our_images, train
from tiny_fixtures import smallest_tree

from recipes.base_model import find_base_model
from recipes.cli import main
from recipes.export import ExportOptions, export, rounding_error
from recipes.measured import is_evaluated
from scfm_core.errors import UserError
from scfm_core.files import permit_reading
from scfm_core.models.families import open_family
from scfm_core.models.weights import save_pipeline, save_tensors
from scfm_core.train.config import RunConfig
from scfm_core.train.parse import dump_config, parse_config, with_absolute_paths
from scfm_core.train.run_dir import newest_complete
from scfm_core.train.runs import open_run

FLUX = "black-forest-labs/FLUX.1-dev"


@pytest.fixture(scope="module")
def run_dir(tiny, tmp_path_factory) -> Path:
    """A finished step-scaled run with pictures and figures; tests copy it."""
    tree = smallest_tree(tiny, tmp_path_factory.mktemp("secret place") / "run", ALL_TARGETS)
    tree["method"]["step_gain"] = {"gamma": 0.5}
    run_dir = train(parse_config(tree, "test"))
    our_images(run_dir, run_dir / "samples" / "4_steps", "--steps", "4")
    figures = {"fid_teacher": 0.25, "mse_teacher": 0.01, "fid_data": 3.0, "samples": 16, "features": 64}
    result = {"student": {"4": figures}, "base": {"4": figures | {"fid_teacher": 2.5}}, "teacher": {"32": {}}}
    (run_dir / "evaluation.json").write_text(json.dumps(result))
    config = (run_dir / "config.yaml").read_text()
    (run_dir / "evaluation.yaml").write_text(f"# checkpoint {newest_complete(run_dir).name}\n{config}")
    return run_dir


@pytest.fixture
def run(run_dir, tmp_path) -> Path:
    """A copy of the run."""
    return Path(shutil.copytree(run_dir, tmp_path / "secret place" / "run"))


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_folded_strength_is_right_at_weight_one(run, tiny, tmp_path, capsys, dtype):
    assert main(["export", str(run), "--steps", "1,", "4", "sample.guidance=3.5", "--dtype", dtype]) == 0
    files = [Path(line) for line in capsys.readouterr().out.split("\n") if line]
    short = {"float32": "fp32", "bfloat16": "bf16"}[dtype]
    assert [path.name for path in files] == [f"scfm_flux_{n}_{short}.safetensors" for n in ("1step", "4steps")]
    for steps, path in zip((1, 4), files, strict=True):
        pipe = FluxPipeline.from_pretrained(tiny / "flux")
        pipe.load_lora_weights(path.parent, weight_name=path.name)
        ours = our_images(run, tmp_path / f"{steps}", "--steps", str(steps))
        assert largest_difference(ours, diffusers_images(pipe, steps)) <= 2
        own = json.loads(metadata_of(path)["scfm"])
        assert own["folded_steps"] == steps and own["strength_by_steps"][str(steps)] == 1.0
        assert own["strength_by_steps"]["16"] == pytest.approx((steps / 16) ** 0.5, abs=1e-6)
        assert (1e-4 < own["rounding_error"] < 4e-3) if dtype == "bfloat16" else own["rounding_error"] == 0


def test_the_rounding_error_is_that_of_the_products():
    generator = torch.Generator().manual_seed(0)
    factors, error, norm = {}, 0.0, 0.0
    for name, (outputs, inputs) in {"a": (30, 20), "b": (7, 40)}.items():
        down, up = torch.randn(4, inputs, generator=generator), torch.randn(outputs, 4, generator=generator)
        factors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
        exact = (0.3 * up).double() @ down.double()
        cast = (0.3 * up).bfloat16().double() @ down.bfloat16().double()
        error, norm = error + (cast - exact).square().sum(), norm + exact.square().sum()
    assert rounding_error(factors, 0.3, torch.bfloat16) == pytest.approx(float((error / norm).sqrt()), rel=1e-4)
    assert rounding_error(factors, 0.3, torch.float32) == 0


@pytest.mark.parametrize(("umask", "file_mode", "folder_mode"), [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700)])
def test_modes_are_those_of_the_umask_and_no_local_path_is_written(run, tmp_path, umask, file_mode, folder_mode):
    target = tmp_path / "merged"
    before = os.umask(umask)
    try:
        assert main(["export", str(run)]) == 0
        assert main(["export", str(run), "--merged", str(target), "--steps", "4"]) == 0
        assert main(["export", str(run), "--merged", str(tmp_path / "one"), "--steps", "4", "--single-file"]) == 0
    finally:
        os.umask(before)
    for folder in (run / "adapter", target, tmp_path / "one"):
        entries = [folder, *folder.rglob("*")]
        assert (folder / "README.md") in entries and any(path.suffix == ".safetensors" for path in entries)
        for path in entries:
            assert stat.S_IMODE(path.stat().st_mode) == (folder_mode if path.is_dir() else file_mode), path
            if path.is_file():
                content = path.read_bytes()
                assert not any(word.encode() in content for word in ("secret place", str(tmp_path), "/tmp", "/home")), (
                    path
                )


def test_permitted_modes(tmp_path):
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    (tmp_path / "folder" / "inner" / "file").touch(0o600)
    before = os.umask(0o027)
    try:
        permit_reading(tmp_path / "folder")
    finally:
        os.umask(before)
    modes = [stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "folder", *(tmp_path / "folder").rglob("*"))]
    assert modes == [0o750, 0o750, 0o640]
    assert not list(tmp_path.glob(".*"))


def test_a_merged_pipeline_names_no_place_that_it_was_loaded_from(tiny, tmp_path):
    source = Path(shutil.copytree(tiny / "flux", tmp_path / "source"))
    places = {
        "model_index.json": {"_name_or_path": "runs/mine"},
        "text_encoder/config.json": {
            "_name_or_path": "/home/me/clip",
            "text_config": {"_name_or_path": "/home/me/clip"},
        },
        "tokenizer_2/tokenizer_config.json": {
            "name_or_path": "/home/me",
            "special_tokens_map_file": "/home/me/map.json",
        },
    }
    for name, keys in places.items():
        path = source / name
        path.write_text(json.dumps(json.loads(path.read_text()) | keys))
    (source / "README.md").write_text("a card of another model")
    save_pipeline(source, tmp_path / "new", [("x", torch.zeros(2))], torch.float32, None)
    for path in (tmp_path / "new").rglob("*.json"):
        assert "/home/me" not in path.read_text() and "runs/mine" not in path.read_text()
    before, after = (json.loads((tmp_path / name / "model_index.json").read_text()) for name in ("source", "new"))
    assert after == {key: value for key, value in before.items() if key != "_name_or_path"}
    assert not (tmp_path / "new" / "README.md").exists()


def test_the_card_shows_what_was_made_with_its_weights_alone(run, tmp_path):
    """Not the figures and pictures of a run without the style or with another shift, nor pictures of a strength that was set by hand,
    nor the training's own grid if the weights are others."""
    our_images(run, run / "samples" / "weak", "--steps", "3", "--strength", "0.1")
    Image.new("RGB", (16, 16)).save(run / "samples" / f"{newest_complete(run).name}.png")

    def card(*words: str) -> str:
        assert main(["export", str(run), *words]) == 0
        return (run / "adapter" / "README.md").read_text()

    found = card()
    assert "## Measured" in found and "(4 steps)" in found and "(3 steps)" not in found
    name = "single_transformer_blocks.0.proj_mlp.lora"
    factors = {f"{name}_A.weight": torch.ones(1, 64), f"{name}_B.weight": torch.ones(256, 1)}
    save_tensors(tmp_path / "style.safetensors", factors)
    found = card(f"model.adapters=[{{path: {tmp_path / 'style.safetensors'}, weight: 0.5}}]")
    assert "`style.safetensors` (weight 0.5)" in found
    assert "## Measured" not in found and "(4 steps)" not in found
    for words in ("sample.weights=ema_slow", "sample.shift=2", "sample.guidance=2"):
        found = card(words)
        assert "## Measured" not in found and "(4 steps)" not in found and "samples.png" not in found, words
    (run / "evaluation.yaml").unlink()
    assert "(4 steps)" in card() and "samples.png" in card()


def test_the_card_names_what_the_evaluation_measured_with(run):
    """`scfm evaluate RUN evaluate.features=... data.resolution=...` is not what the run's own file says."""
    path = run / "evaluation.yaml"
    changed = path.read_text().replace("features: classifier", "features: my_bench:clip")
    path.write_text(re.sub(r"(\n  resolution:)[^\n]*(\n  - \d+)*", r"\1 [32, 48]", changed))
    assert main(["export", str(run)]) == 0
    assert (
        "of 32 x 48 pixels from the same noise, 64 features (my_bench:clip)"
        in (run / "adapter" / "README.md").read_text()
    )


@pytest.mark.parametrize("header", ["[]", '{"weights": "ema_fast"}', None], ids=["a list", "few keys", "another style"])
def test_the_card_leaves_out_files_that_are_not_of_these_weights(run, header):
    """Of another release, or of another style; the weights are written before the folder is looked at."""
    assert main(["export", str(run)]) == 0
    [path] = (run / "adapter").glob("*.safetensors")
    settings = json.loads(metadata_of(path)["scfm"])
    other = header or json.dumps(settings | {"adapters": {"other.safetensors": 0.5}})
    save_tensors(run / "adapter" / "scfm_other.safetensors", {"x": torch.zeros(1)}, {"scfm": other})
    assert main(["export", str(run), "--steps", "4"]) == 0
    card = (run / "adapter" / "README.md").read_text()
    assert f"`{path.name}`" in card and "scfm_other" not in card


def test_figures_are_of_a_run_wherever_its_style_is(run):
    """The content of a file of the same name is compared when the run is opened. Another style's file counts with its folder."""
    checkpoint = newest_complete(run)
    assert checkpoint is not None

    def with_style(path: str, weight: float) -> RunConfig:
        return open_run(run, [f"model.adapters=[{{path: {path}, weight: {weight}}}]"])

    def is_same(left: RunConfig, right: RunConfig) -> bool:
        (run / "evaluation.yaml").write_text(
            f"# checkpoint {checkpoint.name}\n{dump_config(with_absolute_paths(left))}"
        )
        return is_evaluated(right, run, checkpoint)

    own, moved = with_style("/a/own.safetensors", 0.5), with_style("/b/own.safetensors", 0.5)
    other, elsewhere = with_style("/a/other.safetensors", 0.5), with_style("/b/other.safetensors", 0.5)
    (run / "config.yaml").write_text(dump_config(own))
    assert is_same(own, own) and is_same(own, moved) and is_same(other, other)
    assert not is_same(other, elsewhere) and not is_same(own, other)
    assert not is_same(own, with_style("/a/own.safetensors", 0.6))


def test_a_merged_pipeline_has_only_what_diffusers_loads(tiny, tmp_path):
    """It may be published. Licences stay; what else is in the folder of the base does not."""
    source = Path(shutil.copytree(tiny / "flux", tmp_path / "source"))
    save_pipeline(source, tmp_path / "before", [("x", torch.zeros(2))], torch.float32, None)
    for name in (
        "notes.txt", "flux.safetensors", "samples/1.png", "vae/pytorch_model.bin", "vae/diffusion_pytorch_model.fp16.safetensors",
        "vae/.secret.json", "text_encoder/checkpoint-3/model.safetensors", "text_encoder/optimizer.pt", "unet/config.json",
    ):  # fmt: skip
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text("x")
    (source / "LICENSE.md").write_text("terms")
    save_pipeline(source, tmp_path / "after", [("x", torch.zeros(2))], torch.float32, None)

    def files(folder):
        return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}

    assert files(tmp_path / "after") == files(tmp_path / "before") | {"LICENSE.md"}
    assert files(tmp_path / "before") == files(tiny / "flux")


def test_two_exports_of_one_file_do_not_mix(tmp_path, monkeypatch):
    path, save_file, first = tmp_path / "adapter.safetensors", safetensors.torch.save_file, torch.zeros(3)

    def slow(tensors, place, **named):
        save_file(tensors, place, **named)
        if tensors["x"] is first:  # another process writes the whole file meanwhile
            save_tensors(path, {"x": torch.ones(5)})

    monkeypatch.setattr(safetensors.torch, "save_file", slow)
    save_tensors(path, {"x": first})
    assert safetensors.torch.load_file(path)["x"].tolist() == [0, 0, 0]
    assert [entry.name for entry in tmp_path.iterdir()] == ["adapter.safetensors"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("evaluation.json", '{"student": {"4": {"fid_te'),
        ("evaluation.json", '{"base": {"4": {"fid_teacher": 0.5}}}'),
        ("evaluation.json", "[]"),
        ("evaluation.json", '{"student": {}}'),
        ("evaluation.json", '{"student": {"4": {"fid_teacher": "small"}}}'),
        ("evaluation.json", "\udcff"),
        ("evaluation.yaml", "sample: {weights: ["),
        ("evaluation.yaml", "# checkpoint \udcff"),
    ],
)
def test_a_damaged_evaluation_is_found_before_the_weights_are_written(run, capsys, name, content):
    (run / name).write_text(content, errors="surrogateescape")
    if name == "evaluation.json":
        assert main(["report", str(run)]) == 2
        assert "evaluation.json is damaged" in capsys.readouterr().err
    assert main(["export", str(run)]) == 2
    assert re.search(
        rf"{name} is damaged .*Run `scfm evaluate` again, or delete it", capsys.readouterr().err, re.DOTALL
    )
    assert not list((run / "adapter").iterdir())


def test_a_fixed_shift_replaces_a_scheduler_of_another_class(tiny, tmp_path):
    """Sana's pipeline has DPM-Solver."""
    source = Path(shutil.copytree(tiny / "flux", tmp_path / "source"))
    path, own = source / "model_index.json", source / "scheduler" / "scheduler_config.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps(index | {"scheduler": ["diffusers", "DPMSolverMultistepScheduler"]}))
    own.write_text(json.dumps({"_class_name": "DPMSolverMultistepScheduler", "flow_shift": 3.0}))
    network = open_family(str(source)).load_network(torch.float32, "cpu")
    save_pipeline(source, tmp_path / "new", network.state_dict().items(), torch.float32, 2.5)
    scheduler = FluxPipeline.from_pretrained(tmp_path / "new").scheduler
    assert (type(scheduler).__name__, scheduler.config.shift) == ("FlowMatchEulerDiscreteScheduler", 2.5)


def test_the_card_of_an_adapter(run):
    assert main(["export", str(run), "--base", FLUX, "--dtype", "bfloat16"]) == 0
    assert main(["export", str(run), "--base", FLUX, "--dtype", "bfloat16", "--steps", "4"]) == 0
    (run / "adapter" / "scfm_flux-dev_8steps_bf16.safetensors").write_bytes(b"of another program")
    card = ModelCard.load(run / "adapter" / "README.md")
    data = card.data.to_dict()
    assert data["license"] == "other" and data["license_name"] == "flux-1-dev-non-commercial-license"
    assert data["license_link"] == f"https://huggingface.co/{FLUX}"
    assert (data["base_model"], data["base_model_relation"]) == (FLUX, "adapter")
    assert (data["library_name"], data["pipeline_tag"]) == ("diffusers", "text-to-image")
    assert {"lora", "few-step", "scfm"} <= set(data["tags"])
    assert [image["text"] for image in data["widget"]] == ["a handwritten digit eight", "a handwritten digit three"]
    for image in data["widget"]:
        assert f"]({image['output']['url']})" in card.text
        with Image.open(run / "adapter" / image["output"]["url"]) as picture:
            assert picture.size == (16, 16)
    rows = [line for line in card.text.splitlines() if line.startswith("|")]
    assert "| 4 | 0.500 | 1.000 |" in rows and "| 1 | 1.000 | 2.000 |" in rows
    assert "| figure | model | 4 steps |" in rows and "| MSE to the teacher's images | distilled | 0.01 |" in rows
    distances = [row for row in rows if row.startswith("| Fréchet distance to the teacher |")]
    assert [row.split(" | ")[1:] for row in distances] == [["undistilled", "2.5 |"], ["distilled", "0.25 |"]]
    assert "`ModelSamplingFlux` after it, with `max_shift` 1.099 and `base_shift` 1.099." in card.text  # log 3
    nodes = json.loads((run / "adapter" / "comfyui_workflow.json").read_text()).values()
    [lora] = [node["inputs"] for node in nodes if node["class_type"] == "LoraLoaderModelOnly"]
    assert (lora["lora_name"], lora["strength_model"]) == ("scfm_flux-dev_4steps_bf16.safetensors", 1.0)
    assert re.search(
        r"`scfm_flux-dev_4steps_bf16.safetensors` .* relative rounding error of B A: \d\.\de-03", card.text
    )
    assert "8steps" not in card.text and "LoRA of rank 4" in card.text
    found = metadata_of(run / "adapter" / "scfm_flux-dev_4steps_bf16.safetensors")
    assert found["modelspec.architecture"] == "flux-1-dev/lora" and found["modelspec.resolution"] == "16x16"
    assert found["modelspec.license"] == "flux-1-dev-non-commercial-license"
    assert found["modelspec.usage_hint"].startswith("Use weight 1.0 at 4 steps")
    assert (found["ss_network_dim"], found["ss_network_alpha"], found["ss_base_model_version"]) == ("4", "4", "flux1")
    assert found["format"] == "pt" and json.loads(found["scfm"])["base_model"] == FLUX


@pytest.mark.parametrize(("format", "prefix"), [("comfyui", "diffusion_model."), ("kohya", "lora_unet_")])
def test_names_of_other_tools(run, capsys, format, prefix):
    for words in ([], ["--steps", "4", "--format", format]):
        assert main(["export", str(run), *words]) == 0
    path = run / "adapter" / f"scfm_flux_4steps_{format}_fp32.safetensors"
    assert capsys.readouterr().out.splitlines()[-1] == str(path)
    with safe_open(path, framework="pt") as file:
        assert all(name.startswith(prefix) for name in file.keys())  # noqa: SIM118  (not a dict)
    card = ModelCard.load(run / "adapter" / "README.md").text
    assert f"| `{path.name}` | {format} | 4 steps, at weight 1.0 | float32 |" in card
    nodes = json.loads((run / "adapter" / "comfyui_workflow.json").read_text()).values()
    [lora] = [node["inputs"] for node in nodes if node["class_type"] == "LoraLoaderModelOnly"]
    steps = [node["inputs"]["steps"] for node in nodes if "steps" in node["inputs"]]
    assert (lora["lora_name"], lora["strength_model"], steps) == (path.name, 1.0, [4])


@pytest.mark.parametrize("words", [[], ["--single-file"]], ids=["pipeline", "single file"])
def test_the_code_on_a_merged_models_card(run, tiny, tmp_path, monkeypatch, words):
    ours = our_images(run, tmp_path / "images", "--steps", "4")[0]
    assert (
        main(["export", str(run), "--merged", str(tmp_path / "merged"), "--steps", "4", "--base", "me/digits", *words])
        == 0
    )
    card = ModelCard.load(tmp_path / "merged" / "README.md")
    assert card.data.base_model_relation == "finetune" and "# A 4-step model of [me/digits]" in card.text
    assert [path.suffix for path in (tmp_path / "merged").glob("*.safetensors")] == [".safetensors"] * len(words)
    code = re.search(r"```python\n(.*?)```", card.text, re.S)
    monkeypatch.chdir(tmp_path)
    found = {}
    exec(
        code[1]
        .replace("me/digits", str(tiny / "flux"))
        .replace("your prompt", "a handwritten digit three")
        .replace("seed(0)", "seed(77)"),
        found,
    )
    assert np.abs(ours - np.asarray(found["image"], dtype=int)).max() <= 2


def test_linears_that_are_left_out(run, capsys):
    [path] = export(run, [], ExportOptions(leave_out="top-level")).files
    with safe_open(path, framework="pt") as file:
        names = set(file.keys())
    assert path.name == "scfm_flux_step-scaled_blocks_fp32.safetensors"
    assert names and all(re.match(r"transformer\.(single_)?transformer_blocks\.\d+\.", name) for name in names)
    [whole] = export(run, []).files
    with safe_open(whole, framework="pt") as file:
        others = {name.partition(".lora_")[0].removeprefix("transformer.") for name in set(file.keys()) - names}
    embedders = {f"{part}_embedder.linear_{n}" for part in ("timestep", "guidance", "text") for n in (1, 2)}
    assert others == {f"time_text_embed.{name}" for name in embedders} | {
        "x_embedder",
        "context_embedder",
        "norm_out.linear",
        "proj_out",
    }
    for word, message in (("(", "is neither top-level nor a regular expression"), ("nothing", "matches none or all")):
        assert main(["export", str(run), "--leave-out", word]) == 2
        assert message in capsys.readouterr().err


def test_the_base_model(tiny, tmp_path):
    family = open_family(str(tiny / "flux"))
    base = find_base_model(family, str(tiny / "flux"), None)
    assert (base.id, base.name, base.license) == (None, "flux", None)
    assert find_base_model(family, str(tiny / "flux"), "none") == base
    named = find_base_model(family, str(tiny / "flux"), "Me/My_Fine-Tune.v2")
    assert (named.id, named.name) == ("Me/My_Fine-Tune.v2", "my-fine-tune.v2")
    for name in ("no-owner", "a/b/c", "a/b c", ""):
        with pytest.raises(UserError, match=r"--base: .* is not"):
            find_base_model(family, str(tiny / "flux"), name)

    snapshot = tmp_path / "models--me--tuned" / "snapshots" / "0123"
    shutil.copytree(tiny / "flux", snapshot)
    (snapshot / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    found = find_base_model(open_family(str(snapshot)), str(snapshot), None)
    assert (found.id, found.license) == ("me/tuned", "apache-2.0")
    known = find_base_model(open_family(FLUX, offline=True), FLUX, None)
    assert (known.id, known.name, known.license) == (FLUX, "flux-dev", "other")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", "four"], "--steps: 'four' is not a number of steps"),
        (["--merged", "x", "--steps", "1", "4"], "--merged has one step count"),
        (["--merged", "x", "--steps", "1", "--format", "kohya"], "--format and --leave-out are for adapters"),
        (["--single-file"], "--single-file is for --merged"),
        (["--private"], "--private is for --push"),
        (["--push", "me"], "--push: 'me' is not of the form OWNER/NAME"),
        (["--push", "me/it"], "--push: model.path is a folder of this machine"),
    ],
)
def test_options_that_do_not_fit(run, capsys, words, message):
    assert main(["export", str(run), *words]) == 2
    assert message in capsys.readouterr().err
