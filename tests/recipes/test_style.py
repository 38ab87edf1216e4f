"""`python -m recipes.style`: both ways to use a style LoRA are compared with the same styled teacher, from the same noise."""

import json
import sys

import numpy as np
import pytest
from PIL import Image

from recipes.cli import main as scfm
from recipes.style import main, slant
from scfm_core.train.parse import dump_config

SMALL = (
    "train.steps=2", "train.warmup_steps=0", "train.global_batch_size=4", "train.micro_batch_size=4", "evaluate.samples=8",
    "evaluate.batch_size=8", "evaluate.teacher_steps=2", "lora.rank=4", "lora.alpha=4",
)  # fmt: skip


def test_style(tiny, make_config, tmp_path, monkeypatch, capsys):
    demo, root = tmp_path / "a demo", tmp_path / "style"
    demo.mkdir()
    for name, source in (("digits", "digits"), ("classifier", "classifier"), ("short_teacher", "flux")):
        (demo / name).symlink_to(tiny / source)
    config = make_config({"run.dir": str(demo / "distill"), "method.step_gain": {"gamma": 0.5}, "train.steps": 1})
    (tmp_path / "recipe.yaml").write_text(dump_config(config))
    assert scfm(["train", str(tmp_path / "recipe.yaml")]) == 0
    words = ["style", "--demo", str(demo), "--dir", str(root), *SMALL]
    monkeypatch.setattr(sys, "argv", words)
    main()
    results = {name: json.loads((root / name / "evaluation.json").read_text()) for name in ("apart", "styled")}
    # The same base in both, hence the style is in the base of the first too; and not the base of the demo.
    for steps, row in results["styled"]["base"].items():
        assert results["apart"]["base"][steps]["fid_teacher"] == row["fid_teacher"]
    assert scfm(["evaluate", str(demo / "distill")]) == 0
    plain = json.loads((demo / "distill" / "evaluation.json").read_text())
    assert plain["base"]["1"]["fid_teacher"] != pytest.approx(results["apart"]["base"]["1"]["fid_teacher"])
    assert (root / "style.md").read_text() in capsys.readouterr().out
    rows = (root / "style.md").read_text().splitlines()
    assert [row.split(" |")[0] for row in rows[2:6]] == ["| 1", "| 2", "| 4", "| 8"]


def test_the_top_of_a_slanted_digit_is_further_right(tmp_path):
    (tmp_path / "upright").mkdir()
    line = np.zeros((16, 16, 3), dtype=np.uint8)
    line[:, 7:9] = 255
    Image.fromarray(line).save(tmp_path / "upright" / "0000.png")
    (tmp_path / "upright" / "metadata.jsonl").write_text("{}\n")
    slant(tmp_path / "upright", tmp_path / "slanted")
    pixels = np.asarray(Image.open(tmp_path / "slanted" / "0000.png"), dtype=float)[..., 0]
    columns = (pixels * np.arange(16)).sum(1) / pixels.sum(1)
    assert columns[0] - columns[-1] == pytest.approx(0.35 * 15, abs=0.5)
    assert columns.mean() == pytest.approx(7.5, abs=0.3)
