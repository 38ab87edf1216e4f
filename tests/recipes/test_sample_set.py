"""`scfm sample --layout`: places, seeds, several processes, resuming."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image
from tiny_fixtures import smallest_tree

from recipes.cli import main
from recipes.image_files import read_settings
from recipes.sample_set import ImageSet
from scfm_core.train.parse import dump_config, parse_config
from scfm_core.train.trainer import Trainer

RECORDS = [
    {"tag": "single_object", "include": [{"class": "two", "count": 1}], "prompt": "a handwritten digit two"},
    {"tag": "colors", "include": [], "prompt": "Ü: a red one"},
    {"tag": "colors", "include": [], "prompt": "one", "file_name": "of another folder.png"},
]


@pytest.fixture(scope="module")
def run_dir(tiny, tmp_path_factory):
    """A run that has not learned anything, sampled four images at a time."""
    tree = smallest_tree(tiny, tmp_path_factory.mktemp("sets") / "run")
    tree["evaluate"]["batch_size"] = 4
    config = parse_config(tree, "test")
    trainer = Trainer(config)
    trainer.run_dir.mkdir()
    trainer.state.save()
    (trainer.run_dir / "config.yaml").write_text(dump_config(config))
    return trainer.run_dir


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS), encoding="utf-8")
    return str(path)


def images(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.png")}


@pytest.fixture
def make(run_dir, prompts, tmp_path, capsys):
    """Runs the command with the output folder NAME; returns the images there, or the message of an error."""

    def run(name, *words):
        words = ("--steps", "2", "--prompts", prompts, "-o", str(tmp_path / name), *words)
        code = main(["sample", str(run_dir), *words])
        printed = capsys.readouterr()
        return images(tmp_path / name) if code == 0 else printed.err

    return run


def test_a_set_for_geneval_of_two_processes_and_resumed(make, tmp_path, monkeypatch):
    words = ("--per-prompt", "2", "--layout", "geneval")
    whole = make("one", *words)
    assert sorted(whole) == [f"{prompt:05d}/samples/{number:04d}.png" for prompt in range(3) for number in range(2)]
    for prompt, record in enumerate(RECORDS):
        assert json.load((tmp_path / "one" / f"{prompt:05d}" / "metadata.jsonl").open(encoding="utf-8")) == record
        for number in range(2):
            settings = read_settings(tmp_path / "one" / f"{prompt:05d}" / "samples" / f"{number:04d}.png")
            assert (settings["prompt"], settings["seed"]) == (record["prompt"], 1234 + 2 * prompt + number)
    assert len(set(whole.values())) == 6

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert sorted(make("two", *words)) == ["00002/samples/0000.png", "00002/samples/0001.png"]
    monkeypatch.setenv("RANK", "0")
    assert make("two", *words) == whole
    monkeypatch.delenv("WORLD_SIZE")

    kept = tmp_path / "two" / "00000" / "samples" / "0000.png"
    (tmp_path / "two" / "00000" / "samples" / "0001.png").unlink()
    (tmp_path / "two" / "00000" / "samples" / ".0003.host-1-0.tmp.png").touch()  # another process writes it
    before = kept.stat().st_mtime_ns
    made = []
    make_block = ImageSet._make_block
    monkeypatch.setattr(ImageSet, "_make_block", lambda *a: (made.append(a[-1]), make_block(*a)))
    assert whole.items() <= make("two", *words, "evaluate.batch_size=2").items()  # no setting of an image
    assert made == [{1}] and kept.stat().st_mtime_ns == before


def test_a_flat_set_has_the_images_of_single_calls(make, tmp_path):
    flat = make("flat", "--layout", "flat")
    assert sorted(flat) == ["00000_0000.png", "00001_0000.png", "00002_0000.png"]
    rows = [
        json.loads(line) for line in (tmp_path / "flat" / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert rows == [{**record, "file_name": name} for name, record in zip(sorted(flat), RECORDS, strict=True)]
    make("plain", "--per-prompt", "1")
    names = ["a-handwritten-digit-two_seed1234.png", "one_seed1236.png", "Ü-a-red-one_seed1235.png"]
    assert sorted(path.name for path in (tmp_path / "plain").iterdir()) == names
    with Image.open(tmp_path / "plain" / names[1]) as one, Image.open(tmp_path / "flat" / "00002_0000.png") as other:
        assert one.tobytes() == other.tobytes()

    assert re.search(
        "00000_0000.png was made with other settings \\(steps, .*strength",
        make("flat", "--layout", "flat", "--steps", "3", "--strength", "0.5"),
    )
    assert "has 2 images that 1 prompts with --per-prompt 1 do not have, such as 00001_0000.png" in make(
        "flat", "--layout", "flat", "--prompt", "one"
    )
    (tmp_path / "flat" / "metadata.jsonl").write_text("{}\n")
    assert "metadata.jsonl is of other prompts" in make("flat", "--layout", "flat")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"text": "one"}\n', "is not JSON lines, .*'prompt'"),
        ("a digit\n", "is not JSON lines"),
        ("\n", "has no prompt"),
        (
            '{"tag": "colors", "prompt": "one"}\n{"prompt": "two"}\n',
            "record 2 of the prompts has no tag, which the tool needs",
        ),
    ],
)
def test_a_file_that_is_no_list_of_prompts(make, prompts, text, message):
    Path(prompts).write_text(text)
    assert re.search(message, make("none", "--layout", "geneval"))
