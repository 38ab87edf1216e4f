"""Run tests, and write a table of their files after each test, so that a killed run keeps what it found.

python tests/benchmarks/gpu_tests.py TABLE.json [OPTION OF PYTEST ...] FILE ...
"""

import datetime
import platform
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import tables

COLUMNS = {
    "file": "", "collected": "d", "passed": "d", "failed": "d", "skipped": "d", "seconds": ".0f", "failures": "",
}  # fmt: skip


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--gpu-tests", type=Path, help="where the table goes")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--gpu-tests")
    if path is not None and not hasattr(config, "workerinput"):  # the controller hears of all workers' tests
        config.pluginmanager.register(Counter(path))


class Counter:
    """Counts by file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, dict[str, Any]] = defaultdict(
            lambda: {"collected": None, "passed": 0, "failed": 0, "skipped": 0, "seconds": 0.0, "failures": ""}
        )

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        for item in session.items:
            row = self.rows[item.nodeid.partition("::")[0]]
            row["collected"] = (row["collected"] or 0) + 1
        self.save()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name, _, test = report.nodeid.partition("::")
        row = self.rows[name]
        row["seconds"] += report.duration
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            row["failures"] += f"; {test}: {crash.message.splitlines()[0][:100] if crash else report.when}"
            row["failures"] = row["failures"].removeprefix("; ")
        if report.when == "call" or report.outcome != "passed":
            row[report.outcome] += 1
        self.save()

    def save(self) -> None:
        rows = [{"file": name, **row} for name, row in self.rows.items()]
        machine = f"{datetime.date.today()}, python {platform.python_version()}"
        tables.save(self.path, {"title": "CUDA tests", "machine": machine, "columns": COLUMNS, "rows": rows})


if __name__ == "__main__":
    table, *words = sys.argv[1:]
    sys.exit(
        pytest.main(["-p", "gpu_tests", f"--gpu-tests={table}", "-p", "no:cacheprovider", "-q", "--tb=short", *words])
    )
