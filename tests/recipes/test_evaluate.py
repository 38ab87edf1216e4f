import json
import re

import pytest
import torch

from recipes.cli import main
from recipes.evaluate import evaluate
from scfm_core.train.parse import dump_config
from scfm_core.train.trainer import Trainer, fit


@pytest.fixture
def run_dir(make_config):
    config = make_config({"sample.every": 2, "sample.prompts": ["a handwritten digit two"], "sample.steps": [2]})
    trainer = Trainer(config)
    fit(trainer)
    (trainer.run_dir / "config.yaml").write_text(dump_config(config))
    return trainer.run_dir


def test_an_untrained_student_is_its_base_and_many_steps_are_the_teacher(make_config):
    config = make_config({"evaluate.steps": [2, 4], "evaluate.teacher_steps": 4})
    trainer = Trainer(config)
    trainer.run_dir.mkdir()
    trainer.save()
    (trainer.run_dir / "config.yaml").write_text(dump_config(config))
    result = evaluate(trainer.run_dir, [])
    assert result.keys() == {"student", "base", "teacher"}
    for key in ("fid_teacher", "mse_teacher", "fid_data"):
        assert result["student"]["2"][key] == result["base"]["2"][key]
    assert result["base"]["4"]["mse_teacher"] == 0  # the same steps from the same noise
    assert result["base"]["4"]["fid_teacher"] == pytest.approx(0, abs=1e-6)
    assert result["base"]["2"]["fid_teacher"] > 0.001
    assert result["base"]["4"]["fid_data"] == result["teacher"]["4"]["fid_data"]


def test_evaluate_and_report_write_their_files(run_dir, capsys):
    assert main(["evaluate", str(run_dir)]) == 0
    table = capsys.readouterr().out
    assert "FID to teacher" in table
    assert re.search(r"student 3 +\d", table)
    result = json.loads((run_dir / "evaluation.json").read_text())
    assert result["student"].keys() == result["base"].keys() == {"1", "3"}
    assert (run_dir / "samples" / "evaluation.png").is_file()
    assert main(["report", str(run_dir), "--compare", str(run_dir)]) == 0
    page = (run_dir / "report.html").read_text()
    assert page.count("data:image/png;base64,") >= 4
    assert "http" not in re.sub(r"base64,[^\"]*", "", page).replace("https://github.com", "")  # self-contained
    assert f"{result['student']['3']['fid_teacher']:.3f}" in page


def test_report_of_a_run_with_skipped_steps(run_dir, capsys):
    """Their losses are null: the curve has a gap there, and the page is made all the same."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    for key in [key for key in lines[1] if key.startswith("loss") or key == "grad_norm"]:
        lines[1][key] = None
    lines[1] |= {"skipped": "loss is nan", "sample_ids": list(range(8, 16)), "suspects": [11]}
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["report", str(run_dir)]) == 0
    assert (run_dir / "report.html").read_text().count("data:image/png;base64,") >= 1


def test_a_run_without_a_teacher_has_nothing_to_compare(make_config, capsys):
    config = make_config({"train.weights": "full", "method.flow_fraction": 1.0, "method.teacher_fraction": 0.0})
    trainer = Trainer(config)
    fit(trainer)
    (trainer.run_dir / "config.yaml").write_text(dump_config(config))
    assert main(["evaluate", str(trainer.run_dir)]) == 2
    assert "has no teacher" in capsys.readouterr().err


def test_clip_score_of_a_local_clip(run_dir, tmp_path):
    """Random weights: the score means nothing, but the path from folder to figure is the real one."""
    from transformers import (
        CLIPConfig,
        CLIPImageProcessor,
        CLIPModel,
        CLIPProcessor,
        CLIPTextConfig,
        CLIPTokenizer,
        CLIPVisionConfig,
    )

    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(_model_folder(run_dir), subfolder="tokenizer")
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8
    )
    CLIPModel(CLIPConfig.from_text_vision_configs(text, vision, projection_dim=8)).save_pretrained(tmp_path / "clip")
    size = {"height": 32, "width": 32}
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size)
    CLIPProcessor(processor, tokenizer).save_pretrained(tmp_path / "clip")
    result = evaluate(run_dir, [f"evaluate.clip_path={tmp_path / 'clip'}"])
    assert all(-100 <= row["clip_score"] <= 100 for rows in result.values() for row in rows.values())


def _model_folder(run_dir):
    import yaml

    return yaml.safe_load((run_dir / "config.yaml").read_text())["model"]["path"]
