"""The figures of an evaluation that has not ended, so that the same command goes on after the last one."""

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from scfm_core.errors import UserError
from scfm_core.files import written_whole
from scfm_core.models.weights import save_tensors


class UnfinishedEvaluation:
    """A folder with a file for each row of the table that is measured. A disk that is full only means that nothing is kept.

    Args:
        folder: made if missing.
        key: a hash of everything that the rows depend on; rows of another key are deleted.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.folder = folder
        mark = folder / key
        if not mark.is_file():
            shutil.rmtree(folder, ignore_errors=True)
            with contextlib.suppress(OSError):
                folder.mkdir()
                mark.touch()

    def load(self, name: str) -> tuple[dict[str, Any], Tensor] | None:
        """The row of this name and its first images; None if it is not there."""
        try:
            with safe_open(self._path(name), "pt") as file:
                return json.loads(file.metadata()["row"]), file.get_tensor("images")
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):  # missing, or cut off by a power failure
            return None

    def save(self, name: str, row: dict[str, Any], images: Tensor) -> None:
        """Keep a row and its first images."""
        with contextlib.suppress(UserError), written_whole(self._path(name), "evaluate", "") as partial:
            save_tensors(partial, {"images": images}, {"row": json.dumps(row)})

    def remove(self) -> None:
        """The evaluation has ended: delete the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name.replace(' ', '_')}.safetensors"
