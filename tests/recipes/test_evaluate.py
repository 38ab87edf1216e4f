"""`scfm evaluate` and `scfm report`."""

import itertools
import json
import re
import shutil

import pytest
from PIL import Image
from tiny_fixtures import smallest_tree, write_clip
from transformers import CLIPModel

from recipes import evaluate as evaluate_module
from recipes.cli import main
from recipes.evaluate import Evaluator, evaluate, spread
from recipes.image_files import read_settings
from scfm_core.data.corpus import Corpus
from scfm_core.errors import UserError
from scfm_core.train.features import Extractor
from scfm_core.train.fit import fit
from scfm_core.train.parse import dump_config, parse_config
from scfm_core.train.prompts import read_prompts
from scfm_core.train.trainer import Trainer
from scfm_core.wording import number


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    tree = smallest_tree(tiny, tmp_path_factory.mktemp("evaluate") / "run")
    tree["sample"] |= {"every": 2, "prompts": ["a handwritten digit two"], "steps": [2]}
    config = parse_config(tree, "test")
    trainer = Trainer(config)
    fit(trainer)
    (trainer.run_dir / "config.yaml").write_text(dump_config(config))
    return trainer.run_dir


@pytest.fixture
def run_dir(finished, tmp_path):
    """A copy of a finished run."""
    return shutil.copytree(finished, tmp_path / "run")


def test_an_untrained_student_equals_base_and_teacher(make_config):
    config = make_config({"evaluate.steps": [2, 4], "evaluate.teacher_steps": 4})
    trainer = Trainer(config)
    trainer.run_dir.mkdir()
    trainer.state.save()
    (trainer.run_dir / "config.yaml").write_text(dump_config(config))
    result = evaluate(trainer.run_dir, [])
    assert result.keys() == {"student", "base", "teacher"}
    for key in ("fid_teacher", "mse_teacher", "fid_data"):
        assert result["student"]["2"][key] == result["base"]["2"][key]
    assert result["base"]["4"]["mse_teacher"] == 0  # the same number of steps from the same noise
    assert result["base"]["4"]["fid_teacher"] == pytest.approx(0, abs=1e-6)
    assert result["base"]["2"]["fid_teacher"] > 0.001
    assert result["base"]["4"]["fid_data"] == result["teacher"]["4"]["fid_data"]


def test_evaluate_and_report_write_their_files(run_dir, capsys):
    assert main(["evaluate", str(run_dir)]) == 0
    table = capsys.readouterr().out
    assert re.search(r"^steps +1 +3 +4$", table, re.MULTILINE)
    assert re.search(r"^Fréchet distance to the teacher +student +\d\S+ +\d\S+\n +base +\d", table, re.MULTILINE)
    result = json.loads((run_dir / "evaluation.json").read_text())
    assert result["student"].keys() == result["base"].keys() == {"1", "3"}
    assert (run_dir / "samples" / "evaluation.png").is_file()
    assert main(["report", str(run_dir), "--compare", str(run_dir)]) == 0
    page = (run_dir / "report.html").read_text()
    assert page.count("data:image/png;base64,") >= 4
    assert "http" not in re.sub(r"base64,[^\"]*", "", page).replace("https://github.com", "")  # self-contained
    assert number(result["student"]["3"]["fid_teacher"]) in page


def test_report_names_arm_and_seed_of_runs_with_equal_names(run_dir, tmp_path):
    for arm in ("plain", "scaled"):
        shutil.copytree(run_dir, tmp_path / arm / "seed-0")
    assert main(["report", str(tmp_path / "plain" / "seed-0"), "--compare", str(tmp_path / "scaled" / "seed-0")]) == 0
    page = (tmp_path / "plain" / "seed-0" / "report.html").read_text()
    assert "<h1>plain/seed-0</h1>" in page


def test_report_of_a_run_with_skipped_steps(run_dir, capsys):
    """Their losses are null: the curve has a gap, and the page is written."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    for key in [key for key in lines[1] if key.startswith("loss") or key == "grad_norm"]:
        lines[1][key] = None
    lines[1] |= {"skipped": "loss is nan", "sample_ids": list(range(8, 16)), "suspects": [11]}
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["report", str(run_dir)]) == 0
    assert (run_dir / "report.html").read_text().count("data:image/png;base64,") >= 1


def test_a_run_from_scratch_is_compared_with_the_data(make_config, capsys):
    config = make_config({"train.weights": "full", "method.flow_fraction": 1.0, "method.teacher_fraction": 0.0})
    trainer = Trainer(config)
    fit(trainer)
    (trainer.run_dir / "config.yaml").write_text(dump_config(config))
    assert main(["evaluate", str(trainer.run_dir)]) == 0
    result = json.loads((trainer.run_dir / "evaluation.json").read_text())
    assert result.keys() == {"student"}
    assert all(row["fid_data"] > 0 and "fid_teacher" not in row for row in result["student"].values())
    assert main(["report", str(trainer.run_dir)]) == 0
    assert "distance to the data" in (trainer.run_dir / "report.html").read_text()


def test_the_step_size_reaches_the_network(make_config, tmp_path):
    """With another step size the same weights give other images; the guidance has no effect."""
    changes = {"train.weights": "full", "method.flow_fraction": 0.5, "method.teacher_fraction": 0.0}
    config = make_config({**changes, "method.step_embedding": True})
    trainer = Trainer(config)
    trainer.run_dir.mkdir()
    trainer.state.save()

    def images(name, **settings):
        changed = make_config({**changes, **settings})
        (trainer.run_dir / "config.yaml").write_text(dump_config(changed))
        words = ["--prompt", "a handwritten digit two", "--steps", "2", "--output", str(tmp_path / name)]
        assert main(["sample", str(trainer.run_dir), *words]) == 0
        [path] = (tmp_path / name).iterdir()
        with Image.open(path) as image:
            return image.tobytes()  # the settings in the file differ

    with_step_size = images("with step size", **{"method.step_embedding": True})
    assert with_step_size == images("other guidance", **{"method.step_embedding": True, "sample.guidance": 7.0})
    assert with_step_size == images("step size as guidance", **{"method.step_embedding": False, "sample.guidance": 0.5})
    assert with_step_size != images("guidance", **{"method.step_embedding": False, "sample.guidance": 7.0})


def test_the_teachers_samples_are_kept_for_other_runs(run_dir, tmp_path, monkeypatch):
    plain = evaluate(run_dir, [])
    keep = [f"evaluate.keep={tmp_path / 'kept'}"]
    assert figures(evaluate(run_dir, keep)) == figures(plain)
    files = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "kept").iterdir()}
    assert len(files) == 3  # the teacher at 4 steps, the base at 1 and 3
    roles = []
    generate = evaluate_module.generate

    def recorded(config, model, role, *arguments):
        roles.append(role)
        return generate(config, model, role, *arguments)

    monkeypatch.setattr(evaluate_module, "generate", recorded)
    assert figures(evaluate(run_dir, keep)) == figures(plain)
    assert roles == ["student"] * 5  # the warm-up, two timed batches, and one batch each at 1 and 3 steps
    assert files == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "kept").iterdir()}
    evaluate(run_dir, [*keep, "sample.seed=5"])
    assert len(list((tmp_path / "kept").iterdir())) == 6
    evaluate(run_dir, [*keep, "sample.base=int8"])  # other images of the same model
    assert len(list((tmp_path / "kept").iterdir())) == 9
    next((tmp_path / "kept").glob(min(files))).write_bytes(b"no images")
    with pytest.raises(UserError, match=r"evaluate.keep: .*is damaged .*Delete it; it will be made again"):
        evaluate(run_dir, keep)


def figures(result):
    """All numbers but the times."""
    return {
        (kind, steps, name): value
        for kind, rows in result.items()
        for steps, row in rows.items()
        for name, value in row.items()
        if name != "seconds_per_image"
    }


def test_an_interrupted_evaluation_goes_on_after_its_last_figure(run_dir, monkeypatch):
    """The rows and the teacher's images are kept until the end; another setting starts over."""

    def without_times(result):
        return {k: {n: {f: v for f, v in row.items() if f != "seconds_per_image"} for n, row in rows.items()} for k, rows in result.items()}  # fmt: skip

    settings = ["evaluate.noise_floor=true"]
    whole = evaluate(run_dir, settings)
    assert not (run_dir / ".evaluation").exists()
    measure, make, measured, made = Evaluator.measure, Evaluator._make, [], []

    def interrupted(self, role, steps):
        if len(measured) == 3:
            raise KeyboardInterrupt
        measured.append((role, steps))
        return measure(self, role, steps)

    def counting(self, role, *arguments):
        made.append(role)
        return make(self, role, *arguments)

    monkeypatch.setattr(Evaluator, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(run_dir, settings)
    assert measured == [("teacher", 4), ("student", 1), ("teacher", 1)]
    monkeypatch.setattr(Evaluator, "_make", counting)
    monkeypatch.setattr(Evaluator, "measure", measure)
    assert without_times(evaluate(run_dir, settings)) == without_times(whole)
    assert made == ["student", "teacher"], "it made again what it had"
    assert not (run_dir / ".evaluation").exists()
    monkeypatch.setattr(Evaluator, "measure", interrupted)
    measured.clear()
    with pytest.raises(KeyboardInterrupt):
        evaluate(run_dir, settings)
    monkeypatch.setattr(Evaluator, "measure", measure)
    made.clear()
    evaluate(run_dir, [*settings, "sample.seed=5"])
    assert len(made) == 6, "figures of another seed were taken"


def test_the_noise_floor_is_the_distance_between_two_sets_of_the_teacher(run_dir):
    result = evaluate(run_dir, ["evaluate.noise_floor=true"])
    other = evaluate(run_dir, ["sample.seed=1250"])  # the default 1234, and 16 samples on
    assert result["teacher"]["4"]["fid_floor"] > 0.01
    assert other["teacher"]["4"]["fid_data"] != result["teacher"]["4"]["fid_data"]
    assert "fid_floor" not in other["teacher"]["4"]


def test_scores_and_distances_of_local_clip_models(run_dir, tiny, tmp_path):
    """Random weights: the figures have no meaning, but the code from folders to figures is the real one."""
    clip = write_clip(tmp_path / "clip", tiny / "flux" / "tokenizer")
    settings = [f"evaluate.{name}={clip}" for name in ("clip_path", "pick_score_path", "cmmd_path")]
    result = evaluate(
        run_dir, [*settings, "evaluate.noise_floor=true", "evaluate.steps=[4]", "evaluate.teacher_steps=4"]
    )
    scale = CLIPModel.from_pretrained(clip).logit_scale.exp().item()
    for rows in result.values():
        row = rows["4"]
        assert -100 <= row["clip_score"] <= 100
        assert row["pick_score"] == pytest.approx(row["clip_score"] * scale / 100)
        assert row["cmmd_data"] > 0
    base, student, teacher = (result[kind]["4"] for kind in ("base", "student", "teacher"))
    assert base["cmmd_data"] == teacher["cmmd_data"] != student["cmmd_data"]
    # The same images: an unbiased estimate is below 0 then, by the kernel of a pair of an image with itself.
    assert -1 < base["cmmd_teacher"] < 0 < teacher["cmmd_floor"] + 1


def test_precision_recall_diversity_and_prompt_following(run_dir):
    """The base at the teacher's step count makes the teacher's images."""
    settings = ["evaluate.per_prompt=4", "evaluate.steps=[4]", "evaluate.noise_floor=true"]
    result = evaluate(run_dir, settings)
    base, teacher = result["base"]["4"], result["teacher"]["4"]
    assert base["precision_teacher"] == base["recall_teacher"] == base["diversity"] == 1
    assert 0 < result["student"]["4"]["diversity"] != 1
    for name in ("precision_data", "recall_data", "prompt_following"):
        assert 0 <= base[name] == teacher[name] <= 1
    assert 0 <= teacher["precision_floor"] <= 1 and "diversity" not in teacher
    figures = evaluate(run_dir, ["evaluate.steps=[4]", f"evaluate.features={__name__}:always_right"])["base"]["4"]
    assert figures["prompt_following"] == 1 and figures["features"] == 3


def always_right(path, device):
    """A benchmark of its own: mean colours as features, and every image shows what its prompt says."""
    return Extractor(features=lambda images: images.mean((2, 3)), accuracy=lambda images, prompts: 1.0)


def test_prompts_are_spread_over_the_data_and_repeated(make_config):
    config = make_config({"evaluate.samples": 10, "evaluate.per_prompt": 4})
    corpus, items, prompts = evaluate_module.planned(config)
    assert items == spread(Corpus(config.data).items_of((16, 16)).tolist(), 10)
    expected = [corpus.caption(item) for item in spread(items, 3) for _ in range(4)]
    assert prompts == expected[:10]


def test_prompts_in_cocos_format(run_dir, tmp_path):
    """One caption for each image, that with the lowest id, in the order of the images."""
    rows = [(7, 2, "two of seven"), (3, 5, "b of three"), (7, 1, "one of seven"), (3, 4, "a of three")]
    content = {"images": [], "annotations": [{"image_id": i, "id": n, "caption": text} for i, n, text in rows]}
    (tmp_path / "captions_val2014.json").write_text(json.dumps(content))
    path = str(tmp_path / "captions_val2014.json")
    assert read_prompts(path, "evaluate.prompts") == ["a of three", "one of seven"]
    assert main(["evaluate", str(run_dir), f"evaluate.prompts={path}", "evaluate.steps=[2]"]) == 0


def test_samples_are_taken_from_all_of_the_data(make_config, tiny, tmp_path):
    """If the data are ordered by prompt, the first samples would all have the first prompt."""
    (tmp_path / "prompts.txt").write_text("one\ntwo\nthree\n")
    words = [
        "data",
        "generate",
        str(tmp_path / "prompts.txt"),
        "-o",
        str(tmp_path / "own"),
        "--model",
        str(tiny / "flux"),
    ]
    words += ["--resolution", "16", "16", "--text-length", "8", "--dtype", "float32"]
    assert main([*words, "--per-prompt", "4", "--steps", "1"]) == 0
    trainer = Trainer(config := make_config({"data.path": str(tmp_path / "own"), "evaluate.samples": 6}))
    trainer.state.save()
    evaluator = Evaluator(trainer.run_dir, config)
    assert evaluator.prompts == ["one", "one", "two", "two", "three", "three"]
    assert len(evaluator.real) == 6


@pytest.mark.parametrize("total", [1, 63, 64, 65, 101, 7200])
@pytest.mark.parametrize("count", [1, 3, 64, 100, 1797])
def test_spread_samples_are_distinct_and_from_few_parts(total, count):
    chosen = spread(list(range(total)), count)
    assert len(chosen) == len(set(chosen)) == min(total, count)
    assert chosen == sorted(chosen)
    assert sum(b - a > 1 for a, b in itertools.pairwise(chosen)) < 64
    assert total < 2 * count or chosen[-1] >= total * (1 - 2 / min(64, count))


def test_images_keep_their_settings_and_are_never_overwritten(run_dir, tmp_path):
    def names(*words):
        assert main(["sample", str(run_dir), "--output", str(tmp_path / "images"), "--steps", "2", *words]) == 0
        return sorted(path.name for path in (tmp_path / "images").iterdir())

    two = "a digit: two / zweite Ü"
    assert names("--prompt", two) == ["a-digit-two-zweite-Ü_seed1234.png"]
    before = (tmp_path / "images" / "a-digit-two-zweite-Ü_seed1234.png").read_bytes()
    assert names("--prompt", two) == ["a-digit-two-zweite-Ü_seed1234.png"]  # the same image
    assert len(names("--prompt", two, "--seed", "5")) == 2
    assert names("--prompt", two, "sample.guidance=7")[1:] == [
        "a-digit-two-zweite-Ü_seed1234_2.png",
        "a-digit-two-zweite-Ü_seed5.png",
    ]
    first = tmp_path / "images" / "a-digit-two-zweite-Ü_seed1234.png"
    assert first.read_bytes() == before
    settings = read_settings(first)
    assert (settings["prompt"], settings["seed"], settings["steps"], settings["guidance"]) == (two, 1234, 2, 3.5)
    assert settings["checkpoint"].startswith("step_") and settings["run"] == run_dir.name
    with Image.open(first) as image:
        assert image.info["parameters"].startswith(f"{two}\nSteps: 2, Sampler: Euler, CFG scale: 3.5, Seed: 1234")


def test_evaluate_says_what_it_will_do_and_where_samples_are_few(run_dir, capsys):
    assert (
        main(["evaluate", str(run_dir), "evaluate.samples=70", "evaluate.steps=[1]", "evaluate.noise_floor=true"]) == 0
    )
    text = capsys.readouterr().out
    assert "evaluate: 4 sets of 70 images, " in text
    assert "they are repeated for evaluate.samples=70" in text
    assert "note: fid_data compares 70 images with " in text
    row = json.loads((run_dir / "evaluation.json").read_text())["student"]["1"]
    assert row["samples"] == 70 and row["data_samples"] < 70 and row["features"] > 1


def test_the_report_says_what_is_missing_and_shows_restarts(run_dir):
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert main(["report", str(run_dir)]) == 0
    page = (run_dir / "report.html").read_text()
    assert "Not evaluated yet" in page and "<h3>step 2</h3>" in page and "<h2>Averages</h2>" not in page
    rows[1] |= {"ema_lag_ratio": 0.4, "ema_restart": True}
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["evaluate", str(run_dir), "evaluate.steps=[1]"]) == 0
    assert main(["report", str(run_dir)]) == 0
    page = (run_dir / "report.html").read_text()
    assert "Not evaluated yet" not in page and "<h2>Averages</h2>" in page
    assert (
        "Fréchet distance to the teacher</td><td>student</td><td>" in page
        and "16 images in each set; 16 images of the data" in page
    )
    assert "covariance is singular" in page
