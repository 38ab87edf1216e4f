"""Numbers that a change must not worsen: launches, waits, copies, memory, collectives and compiled graphs of each case.

python tests/null_device/ratchets.py [CASE ...]            measure, and compare with ratchets.json
python tests/null_device/ratchets.py --accept [CASE ...]   and write the new numbers into it
"""

import argparse
import json
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import null_cases
import null_driver

FILE = Path(__file__).with_suffix(".json")
PACKAGES = ("torch", "triton", "diffusers")
"""Their versions decide how many kernels a step launches."""
_COUNTS = ("launches", "waits", "pageable", "graphs", "graph_breaks")
_BYTES = ("peak", "reserved")
TOLERANCE = {"peak": 0.005, "reserved": 0.02}
"""Of bytes: when tensors are freed depends a little on Python's garbage collector."""
_STATUS = 1000
"""Bytes by which a step's collectives may grow: the all-reduce of losses and status has 64 for each slice of a batch."""


def versions() -> dict[str, str]:
    return {package: version(package) for package in PACKAGES}


def read() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    return content


def numbers(result: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a result."""
    kept = {name: result[name] for name in (*_BYTES, *_COUNTS) if name in result}
    return (
        kept
        | ({"collectives": result["collectives"]} if result["collectives"] else {})
        | {"kernels": result["kernels"]}
    )


def worse(result: dict[str, Any], kept: dict[str, Any]) -> list[str]:
    """What grew, in words."""
    found = []
    for name in _BYTES:
        now, before = result[name], kept[name]
        if now > before * (1 + TOLERANCE[name]):
            found.append(f"{name}: {before / 2**30:.2f} -> {now / 2**30:.2f} GiB")
    for name in _COUNTS:
        now, before = result.get(name, 0), kept.get(name, 0)
        if now > before:
            found.append(f"{name}: {before} -> {now}")
            found += list(_reasons(name, result, kept))
    for kind, (calls, size) in result["collectives"].items():
        calls_before, size_before = kept.get("collectives", {}).get(kind, (0, 0))
        if calls > calls_before or size > size_before + _STATUS:
            found.append(f"{kind}: {calls_before} of {size_before / 1e9:.3f} GB -> {calls} of {size / 1e9:.3f} GB")
    return found


def _reasons(name: str, result: dict[str, Any], kept: dict[str, Any]) -> Iterator[str]:
    """The kernels that are launched more often, the largest change first; the lines that wait or copy."""
    if name == "launches":
        more = {kernel: count - kept["kernels"].get(kernel, 0) for kernel, count in result["kernels"].items()}
        for kernel, count in sorted(more.items(), key=lambda item: -item[1])[:8]:
            if count > 0:
                yield f"    {count:+} {kernel}"
    if name in ("waits", "pageable"):
        for line, count in result["lines"].items():
            if ("pageable" in line) == (name == "pageable"):
                yield f"    {count} x {line}"


def report(name: str, found: list[str]) -> str:
    lines = "\n  ".join(found)
    return (
        f"{name} is worse than tests/null_device/ratchets.json:\n  {lines}\n"
        f"If this is intended: python tests/null_device/ratchets.py --accept '{name}'"
    )


def write(cases: dict[str, Any]) -> None:
    """One line for each number, and one for all kernels of a case."""
    lines = []
    for name in null_cases.CASES:
        if name in cases:
            entries = ",\n".join(f"      {json.dumps(key)}: {json.dumps(value)}" for key, value in cases[name].items())
            lines.append(f"    {json.dumps(name)}: {{\n{entries}\n    }}")
    text = ",\n".join(lines)
    FILE.write_text(f'{{\n  "versions": {json.dumps(versions())},\n  "cases": {{\n{text}\n  }}\n}}\n', encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--accept", action="store_true", help="write the new numbers")
    parser.add_argument("cases", nargs="*", metavar="CASE", help="by default all")
    options = parser.parse_args()
    names = options.cases or list(null_cases.CASES)
    if unknown := set(names) - set(null_cases.CASES):
        sys.exit(f"unknown: {', '.join(sorted(unknown))}. The cases are: {', '.join(null_cases.CASES)}")
    reason = null_driver.why_unavailable() or null_driver.why_no_triton()
    if reason is not None:
        sys.exit(reason)
    kept = read()["cases"] if FILE.exists() else {}
    is_worse = False
    for group in null_cases.GROUPS.values():
        chosen = {name: case for name, case in group.items() if name in names}
        for name, result in null_cases.measure_in_process(chosen):
            found = worse(result, kept[name]) if name in kept else ["new"]
            is_worse |= bool(found)
            print("\n  ".join([f"{name}: {'no worse' if not found else ''}", *found]), flush=True)
            kept[name] = numbers(result)
            if options.accept:
                write(kept)
    sys.exit(is_worse and not options.accept)


if __name__ == "__main__":
    main()
