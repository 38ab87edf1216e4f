"""Messages that nobody can read any more."""

import io
import os
import pty
import subprocess
import sys

import pytest

from scfm_core.output import prepare_streams, surviving_output


class Lost(io.TextIOWrapper):
    """The write end of a pipe without a reader, line-buffered."""

    def __init__(self) -> None:
        reader, writer = os.pipe()
        os.close(reader)
        super().__init__(os.fdopen(writer, "wb"), line_buffering=True)


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_pipe_without_a_reader_ends_nothing(monkeypatch, name):
    lost = Lost()
    monkeypatch.setattr(sys, name, lost)
    with surviving_output("stdout", "stderr"):
        for _ in range(3):
            print("x" * 10_000, file=getattr(sys, name))
    assert getattr(sys, name) is lost
    lost.close()  # what was in the buffer went to /dev/null: without this, the interpreter would fail at its exit


def test_a_terminal_that_is_gone_ends_nothing(monkeypatch):
    from scfm_core.train.metrics import progress_bar

    main, terminal = pty.openpty()  # its size is 0 x 0
    stream = os.fdopen(terminal, "w")
    monkeypatch.setattr(sys, "stderr", stream)
    with surviving_output("stderr"), progress_bar("run", 3) as bar:
        assert bar.fp.isatty()
        bar.update()
        os.close(main)
        bar.refresh()
        bar.write("message", file=sys.stderr)
    stream.close()


def test_a_terminal_that_does_not_tell_its_size_shows_the_bar(monkeypatch):
    from scfm_core.train.metrics import progress_bar

    main, terminal = pty.openpty()  # its size is 0 x 0
    with os.fdopen(terminal, "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        with progress_bar("run", 3) as bar:
            bar.update()
    assert "run: " in os.read(main, 1000).decode()
    os.close(main)


def test_other_streams_keep_their_errors(monkeypatch):
    """`scfm data inspect | head` ends with the reader."""
    lost = Lost()
    monkeypatch.setattr(sys, "stdout", lost)
    with surviving_output("stderr"), pytest.raises(BrokenPipeError):
        print("x" * 10_000)
    os.dup2(os.open(os.devnull, os.O_WRONLY), lost.fileno())
    lost.close()


def test_a_locale_without_utf8(monkeypatch):
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", ascii_only)
    prepare_streams()
    print("step 3: caf\xe9 \u2603", flush=True)
    assert ascii_only.buffer.getvalue() == b"step 3: caf\\xe9 \\u2603\n"


@pytest.mark.processes
def test_streams_that_are_closed_are_no_files_of_the_run(tmp_path):
    """`command >&- 2>&-`: without this the next file that is opened is the standard output."""
    script = (
        "from scfm_core.output import prepare_streams; prepare_streams()\n"
        "file = open('file', 'w'); print('lost'); import sys, os; sys.stderr.write('lost'); os.write(1, b'lost')\n"
        "file.write('kept')"
    )
    code = subprocess.run(
        f'{sys.executable} -c "{script}" <&- >&- 2>&-', shell=True, cwd=tmp_path, check=False
    ).returncode
    assert (code, (tmp_path / "file").read_text()) == (0, "kept")
