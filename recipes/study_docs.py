"""`python -m recipes.study_docs FOLDER...`: write the tables of finished studies into docs/study_results.md.

Each FOLDER is that of a study, such as runs/study/whole. The section of that name is replaced; those of other studies stay.
"""

import argparse
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recipes.study_tables import markdown
from scfm_core.errors import UserError

PAGE = Path(__file__).parents[1] / "docs" / "study_results.md"
_EARLIER = "## Earlier results"
"""The sections from here on are not made by this command."""


def section(name: str, record: Mapping[str, Any]) -> str:
    """The section of one study.

    Args:
        name: of the study's folder, which becomes the heading.
        record: its `study.json`.
    """
    origins = record["origins"]
    dates, machines = origins["date"], ", ".join(origins["machine"]) or "an unknown machine"
    when = "on an unknown day" if not dates else " to ".join(dict.fromkeys((dates[0], dates[-1])))
    commits = ", ".join(f"`{commit}`" for commit in origins["commit"]) or "an unknown commit"
    head = f"`{record['command']}`: measured {when}, on {machines}, at commit {commits}."
    return f"## {name}\n\n{head}\n\n{markdown(record)}"


def page(text: str, name: str, content: str) -> str:
    """The page with a section: in the place of the former one of this name, else before the earlier results or at the end."""
    own = re.compile(rf"^## {re.escape(name)}\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
    if own.search(text):
        found = own.sub(lambda _: f"{content}\n", text, count=1)
    else:
        before, mark, after = text.partition(f"\n{_EARLIER}\n")
        found = f"{before.rstrip()}\n\n{content}\n" + (f"{mark[1:]}{after}" if mark else "")
    return f"{found.rstrip()}\n"


def write(folders: list[Path], file: Path = PAGE) -> None:
    """Write the sections of these studies.

    Raises:
        UserError: if a folder is not that of a study with a finished run.
    """
    text = file.read_text(encoding="utf-8") if file.is_file() else "# Results of studies\n"
    for folder in folders:
        try:
            record = json.loads((folder / "study.json").read_text(encoding="utf-8"))
            text = page(text, folder.resolve().name, section(folder.resolve().name, record))
        except (OSError, ValueError, KeyError) as error:
            raise UserError(
                f"{folder} has no study.json of this version ({error!r}). Run `scfm study NAME -o {folder}` again, which writes it"
            ) from error
    file.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    parser.add_argument("--file", type=Path, default=PAGE, help="default docs/study_results.md")
    arguments = parser.parse_args()
    try:
        write(arguments.folders, arguments.file)
    except UserError as error:
        raise SystemExit(str(error)) from None
