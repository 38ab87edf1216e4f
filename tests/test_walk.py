"""The walk of a newcomer, `python tests/walk.py`: its commands are those of the pages, and its page is that of its commands."""

import re

import pytest
import walk

STEPS = [step for part in walk.PARTS.values() for step in part.steps if isinstance(step, walk.Step)]
SHOWN = [
    step
    for part in walk.PARTS.values()
    if f"\n| {part.title} | not walked |" not in walk.PAGE.read_text(encoding="utf-8")
    for step in part.steps
    if isinstance(step, walk.Step)
]


@pytest.mark.parametrize("step", STEPS, ids=[step.command[:50] for step in STEPS])
def test_a_command_is_copied_from_its_page(step):
    page = " ".join((walk.ROOT / step.page).read_text(encoding="utf-8").split())
    assert re.search(rf"(?<![\w-]){re.escape(step.command)}(?![\w-])", page), "the page has no such command"


@pytest.mark.parametrize("step", SHOWN, ids=[step.command[:50] for step in SHOWN])
def test_the_page_shows_what_is_walked_now(step):
    typed = step.typed.replace(str(walk.ROOT), "<this repository>")
    assert f"\n$ {typed}\n" in walk.PAGE.read_text(encoding="utf-8"), "run `python tests/walk.py`"


def test_an_output_is_shortened_and_names_no_folder_of_this_machine(tmp_path):
    walked = walk.Walk(tmp_path)
    lines = [
        f"{walked.clone}/runs",
        str(walked.home),
        str(walk.ROOT),
        *(f"line {number}" for number in range(20)),
        "1\r2\r3",
    ]
    assert walk.shortened(walked.without_paths("\n".join(lines))).splitlines() == [
        "~/scfm/runs", "~", "<this repository>", "...", *(f"line {number}" for number in range(15, 20)), "3",
    ]  # fmt: skip


@pytest.mark.processes
def test_a_command_ends_as_the_step_says(tmp_path, capsys):
    walked = walk.Walk(tmp_path)
    assert walked.run(walk.Step("README.md", "echo $HOME; exit 3", code=3, says="home", where=".")) == 3
    assert walked.output == f"{walked.home}\n"
    with pytest.raises(SystemExit, match="exit code 0, expected 2"):
        walked.run(walk.Step("README.md", "true", code=2, where="."))
    with pytest.raises(SystemExit, match="'word' in the output"):
        walked.run(walk.Step("README.md", "true", says="word", where="."))
