"""One row of the kill matrix, which is run by hand: `python tests/kill_matrix.py`."""

import kill_matrix
import launch
import pytest

assert launch.run_distributed  # imported for the server's preloaded modules


@pytest.mark.processes
def test_a_row(tiny, tmp_path):
    matrix = kill_matrix.Matrix(tiny, tmp_path)
    rows = [matrix.row("pack", kind) for kind in ("SIGKILL", "closed pipe")]
    assert [(row.code in (0, -9), row.again, row.is_same, row.left) for row in rows] == [(True, 0, True, "")] * 2
    assert rows[1].code == 0, "it ends with the reader of its output"
