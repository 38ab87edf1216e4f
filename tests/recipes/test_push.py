"""Uploads to a stand-in for the hub, through huggingface_hub."""

import shutil
from pathlib import Path

import pytest
from hub_server import TOKEN, serve
from huggingface_hub import constants
from huggingface_hub.utils import reset_sessions
from test_export import train
from tiny_fixtures import smallest_tree

from recipes.cli import main
from scfm_core.train.parse import parse_config


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory) -> Path:
    tree = smallest_tree(tiny, tmp_path_factory.mktemp("push") / "run")
    tree["method"]["step_gain"], tree["train"]["steps"] = {"gamma": 0.5}, 1
    return train(parse_config(tree, "test"))


@pytest.fixture
def run(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The stand-in as the hub, with a token."""
    with serve() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(constants, "HF_XET_HIGH_PERFORMANCE", False, raising=False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        reset_sessions()
        yield hub
    reset_sessions()


def test_an_adapter_is_uploaded_with_what_its_card_names(hub, run, capsys):
    (run / "adapter").mkdir()
    (run / "adapter" / "scfm_flux-dev_2steps_fp32.safetensors").write_bytes(b"of an earlier checkpoint")
    (run / "adapter" / "notes.txt").write_text("my own")
    words = ["export", str(run), "--base", "black-forest-labs/FLUX.1-dev", "--push", "me/digits"]
    assert main([*words, "--steps", "1", "4", "--private"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"{hub.address}/me/digits"
    assert hub.private == {"me/digits": True}
    files = hub.files["me/digits"]
    names = {f"scfm_flux-dev_{n}_fp32.safetensors" for n in ("1step", "4steps")}
    assert set(files) == {"README.md", "comfyui_workflow.json", *names}
    for name, content in files.items():
        assert content == (run / "adapter" / name).read_bytes()
    card = files["README.md"].decode()
    assert 'pipe.load_lora_weights("me/digits", weight_name="scfm_flux-dev_1step_fp32.safetensors"' in card
    assert {data["base_model"] for data in hub.cards} == {"black-forest-labs/FLUX.1-dev"}
    assert main(words) == 0  # again, into the same repository
    assert set(hub.files["me/digits"]) == {
        "README.md",
        "comfyui_workflow.json",
        *names,
        "scfm_flux-dev_step-scaled_fp32.safetensors",
    }


def test_a_merged_pipeline_is_uploaded_whole(hub, run, tmp_path):
    words = ["--merged", str(tmp_path / "merged"), "--steps", "4", "--base", "none", "--push", "team/merged"]
    assert main(["export", str(run), *words]) == 0
    merged = tmp_path / "merged"
    written = {path.relative_to(merged).as_posix() for path in merged.rglob("*") if path.is_file()}
    assert set(hub.files["team/merged"]) == written and "transformer/config.json" in written
    assert hub.private == {"team/merged": False}


@pytest.mark.parametrize(
    ("path", "status", "message"),
    [
        ("/api/whoami-v2", 401, "the token is not valid"),
        ("/api/repos/create", 403, "the token has no right to write there"),
        ("/api/repos/create", 404, "there is no such user or organisation"),
        ("/commit/main", 409, "another upload changed the repository"),
        ("/commit/main", 403, "the token has no right to write there"),
        ("/preupload/", 500, "the hub answered 500"),
        (
            "/large/",
            403,
            "the upload failed (RuntimeError: Error while uploading 'scfm_flux_step-scaled_fp32.safetensors'",
        ),
        ("/whoami-v2", 404, "which is not the address of a hub"),
    ],
)
def test_refusals_of_the_hub(hub, run, capsys, monkeypatch, path, status, message):
    hub.answers[path] = status
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    assert main(["export", str(run), "--base", "none", "--push", "me/digits"]) == 2
    error = capsys.readouterr().err
    is_before = "whoami-v2" in path
    state = "nothing is written yet" if is_before else "the files are on this machine"
    assert "--push me/digits: " in error and message in error and error.rstrip().endswith(state)
    assert (run / "adapter").exists() != is_before or not list((run / "adapter").iterdir())


def test_without_token_or_network(hub, run, capsys, monkeypatch):
    words = ["export", str(run), "--base", "none", "--push", "me/digits"]
    for wrong in ("huggingface.co", "https://", "hub://huggingface.co"):
        monkeypatch.setattr(constants, "ENDPOINT", wrong)
        assert main(words) == 2
        assert f"HF_ENDPOINT is '{wrong}', which is not the address of a hub" in capsys.readouterr().err
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    assert main(words) == 2
    assert "the hub cannot be reached (ConnectionError" in capsys.readouterr().err
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    reset_sessions()
    assert main(words) == 2
    assert "the hub cannot be reached (OfflineModeIsEnabled" in capsys.readouterr().err
    monkeypatch.delenv("HF_TOKEN")
    assert main(words) == 2
    assert "there is no token of the hub. Log in with `hf auth login`, or set HF_TOKEN" in capsys.readouterr().err
