"""The tables of the benchmarks: text for people, and a JSON file that is whole at every moment."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Rows = Sequence[dict[str, Any]]


def text(rows: Rows, columns: dict[str, str]) -> str:
    """`columns` (key -> format) of the rows as a table. A key's underscores become spaces; None is an empty cell."""
    if not rows:
        return "(no rows)"
    cells = [[key.replace("_", " ") for key in columns]]
    cells += [["" if row.get(key) is None else format(row[key], form) for key, form in columns.items()] for row in rows]
    widths = [max(len(line[number]) for line in cells) for number in range(len(columns))]
    texts = {
        number for number, key in enumerate(columns) if any(isinstance(row.get(key), str) for row in rows)
    }  # words start at the left, numbers end at the right
    lines = (
        "  ".join(c.ljust(w) if n in texts else c.rjust(w) for n, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in cells
    )
    return "\n".join(line.rstrip() for line in lines)


def save(path: Path, content: dict[str, Any]) -> None:
    """Write JSON in one step, so that a process that is killed leaves the previous file or the new one."""
    write(path, json.dumps(content, indent=1) + "\n")


def write(path: Path, content: str) -> None:
    """As `save`, any text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(content, encoding="utf-8")
    temporary.replace(path)


def load(path: Path) -> dict[str, Any]:
    """What `save` wrote."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found
