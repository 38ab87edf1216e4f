"""A stand-in for the hub: a folder as a repository, in place of the functions that diffusers and this project call."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub.utils import filter_repo_objects


def serve(monkeypatch: pytest.MonkeyPatch, repository: Path, cache: Path) -> Path:
    """Serve the files of `repository` under any id; returns the folder in which the downloaded files will be."""
    snapshot = cache / "snapshots" / ("0" * 40)
    files = [path.relative_to(repository).as_posix() for path in repository.rglob("*") if path.is_file()]

    def model_info(*_: Any, **__: Any) -> Any:
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in files])

    def copy(name: str) -> str:
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        return str(shutil.copyfile(repository / name, snapshot / name))

    def snapshot_download(
        _: str, *, allow_patterns: Any = None, ignore_patterns: Any = None, revision: Any = None, **__: Any
    ) -> str:
        assert revision in (None, snapshot.name)
        for name in filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            copy(name)
        return str(snapshot)

    monkeypatch.setattr("diffusers.pipelines.pipeline_utils.model_info", model_info)
    monkeypatch.setattr("diffusers.pipelines.pipeline_utils.hf_hub_download", lambda _, name, **__: copy(name))
    monkeypatch.setattr("diffusers.pipelines.pipeline_utils.snapshot_download", snapshot_download)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    return snapshot
