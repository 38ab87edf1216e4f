"""What comes from the hub: every file that the pipeline needs, and no second copy of the weights."""

import json
from pathlib import Path

import pytest
import requests
from huggingface_hub import constants
from local_hub import serve

from scfm_core.errors import UserError
from scfm_core.models.weights import GUIDANCE_MARK, resolve_folder

NEEDED = (
    "model_index.json",
    "scheduler/scheduler_config.json",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/config.json",
    "text_encoder/model.safetensors.index.json",
    "text_encoder/model-00001-of-00002.safetensors",
    "text_encoder/model-00002-of-00002.safetensors",
    "tokenizer/tokenizer.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/tokenizer.model",
    "tokenizer/merges.txt",
    "tokenizer/chat_template.jinja",
    "tokenizer/additional_chat_templates/edit.jinja",
    "tokenizer/preprocessor_config.json",
    "tokenizer/processor_config.json",
    "transformer/config.json",
    "transformer/diffusion_pytorch_model.safetensors",
)
NOT_NEEDED = (
    "flux-2-klein-4b.safetensors",
    "split_files/text_encoders/qwen.safetensors",
    "text_encoders/t5xxl_fp16.safetensors",
    "vae/diffusion_pytorch_model.fp16.safetensors",
    "text_encoder/model.fp16-00001-of-00002.safetensors",
    "text_encoder/pytorch_model.bin",
    "transformer/diffusion_pytorch_model.bin",
    "README.md",
    "sample.png",
)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A pipeline of the layout of FLUX.2 and SD3.5, with everything that repositories also hold."""
    folder = tmp_path / "repository"
    for name in (*NEEDED, *NOT_NEEDED):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    components = {
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "Qwen3ForCausalLM"],
        "tokenizer": ["transformers", "Qwen2TokenizerFast"],
        "transformer": ["diffusers", "Flux2Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKLFlux2"],
    }
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "Flux2KleinPipeline", **components}))
    return folder


@pytest.mark.parametrize("is_marked", [False, True])
def test_what_a_pipeline_needs_is_downloaded_and_nothing_else(repository, tmp_path, monkeypatch, is_marked):
    if is_marked:
        (repository / GUIDANCE_MARK).touch()
    folder = resolve_folder_of(repository, tmp_path, monkeypatch)
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert found == {*NEEDED, *([GUIDANCE_MARK] if is_marked else [])}


def resolve_folder_of(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    snapshot = serve(monkeypatch, repository, tmp_path / "cache")
    assert resolve_folder("somebody/model") == snapshot
    return snapshot


def test_weights_that_are_only_pickles_are_refused(repository, tmp_path, monkeypatch):
    (repository / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    (repository / "vae" / "diffusion_pytorch_model.bin").write_text("{}")
    with pytest.raises(
        UserError, match=r"'somebody/model' .* could not be downloaded .*necessary `safetensors` weights"
    ):
        resolve_folder_of(repository, tmp_path, monkeypatch)


def test_a_pipeline_with_code_of_its_own_is_refused(repository, tmp_path, monkeypatch):
    path = repository / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_class_name": ["pipeline", "Mine"]}))
    (repository / "pipeline.py").write_text("raise SystemExit")
    with pytest.raises(
        UserError, match=r"could not be downloaded from the hub \(ValueError: .*trust_remote_code|custom code"
    ):
        resolve_folder_of(repository, tmp_path, monkeypatch)


def test_without_the_hub_the_reason_and_the_settings_are_named(repository, tmp_path, monkeypatch):
    """diffusers says that the reason is above, in a traceback."""

    def unreachable(*_, **__):
        raise requests.ConnectionError("Failed to resolve 'hub.example'")

    monkeypatch.setattr("diffusers.pipelines.pipeline_utils.model_info", unreachable)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(
        UserError, match=r"ConnectionError: Failed to resolve .*Check the name, the network and, for gated"
    ):
        resolve_folder("somebody/model")
    monkeypatch.setattr(constants, "ENDPOINT", "https://me:secret@hub.example")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        UserError, match=r"HF_ENDPOINT \(it is 'https://hub.example'\), HF_HUB_OFFLINE \(it is '1'\) and"
    ):
        resolve_folder("somebody/model")
