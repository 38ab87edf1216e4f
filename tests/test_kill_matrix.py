"""One row of the kill matrix, which is run by hand: `python tests/kill_matrix.py`."""

import kill_matrix
import launch
import pytest

assert launch.run_distributed  # imported for the server's preloaded modules


@pytest.mark.processes
def test_a_row(tiny, tmp_path):
    matrix = kill_matrix.Matrix(tiny, tmp_path)
    killed, unread = (matrix.row("pack", kind) for kind in ("SIGKILL", "closed pipe"))
    assert killed.is_right, killed
    assert unread.is_right, unread
    assert unread.code == 0, "it ends with the reader of its output"
