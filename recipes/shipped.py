"""`scfm recipes`: the recipes, data recipes and job scripts that are installed with scfm."""

import shutil
from pathlib import Path

from scfm_core.errors import UserError

_HERE = Path(__file__).parent
_FOLDERS = {"configs": "recipes", "configs/study": "studies", "data": "data recipes"}


def list_recipes() -> str:
    """All recipes, each with the first sentence of its header."""
    lines = []
    for folder, title in _FOLDERS.items():
        lines.append(f"{title}:")
        lines += [f"  {path.name:<28} {_summary(path)}" for path in sorted((_HERE / folder).glob("*.yaml"))]
    return "\n".join(lines)


def copy_files(folder: Path) -> list[Path]:
    """Copy the recipes to FOLDER/recipes and the job scripts to FOLDER/slurm, as in scfm's repository.

    Returns:
        the new files. A file that exists and differs is an error, and then nothing is copied.

    Raises:
        UserError: if files would be overwritten.
    """
    pairs = {
        path: folder / "recipes" / path.relative_to(_HERE)
        for name in _FOLDERS
        for path in (_HERE / name).glob("*.yaml")
    }
    pairs |= {
        path: folder / path.relative_to(_HERE)
        for path in (_HERE / "slurm").rglob("*")
        if path.suffix in (".sh", ".env")
    }
    changed = [target for path, target in pairs.items() if target.exists() and target.read_bytes() != path.read_bytes()]
    if changed:
        raise UserError(
            f"--copy {folder}: {len(changed)} files exist and differ, the first is {changed[0]}. Choose another folder"
        )
    for path, target in pairs.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    return sorted(pairs.values())


def _summary(path: Path) -> str:
    """The first sentence of the comment at the top of a file."""
    words: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("# "):
            break
        words.append(line[2:])
    return " ".join(words).partition(". ")[0].rstrip(".")
