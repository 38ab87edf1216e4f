"""`scfm study`: each arm and seed runs once; the results are in a table and a plot."""

import json
import os
import shutil
import statistics

import pytest
import torch
import yaml

from recipes.cli import main
from recipes.study import run_study, target_passes
from recipes.train import train
from scfm_core.scfm.method import PlanConfig
from scfm_core.train.parse import dump_config, load_config

LITTLE = ["train.steps=1", "train.warmup_steps=0", "train.global_batch_size=4", "train.micro_batch_size=4"]


@pytest.fixture
def study(make_config, tmp_path, monkeypatch):
    """A study of two arms and two seeds."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(dump_config(make_config({"evaluate.noise_floor": True})))
    content = {
        "recipe": "recipe.yaml",
        "seeds": [0, 5],
        "set": LITTLE,
        "arms": {
            "plain": {"about": "as it comes"},
            "scaled": {"about": "strength by steps", "set": ["method.step_gain.gamma=0.5"]},
        },
    }

    def write(**changes):
        (tmp_path / "small.yaml").write_text(yaml.safe_dump(content | changes))

    write()
    return write


def results(tmp_path, arm, steps):
    folders = [tmp_path / "out" / arm / f"seed-{seed}" for seed in (0, 5)]
    return [json.loads((each / "evaluation.json").read_text())["student"][steps]["fid_teacher"] for each in folders]


def test_every_arm_and_seed_in_one_table(study, tmp_path, capsys):
    assert main(["study", "small.yaml", "-o", "out"]) == 0
    printed = capsys.readouterr().out
    assert [line for line in printed.splitlines() if line.startswith("[")] == [
        "[1/4] plain, seed 0", "[2/4] scaled, seed 0", "[3/4] plain, seed 5", "[4/4] scaled, seed 5",
    ]  # fmt: skip
    table = (tmp_path / "out" / "study.md").read_text()
    assert table in printed
    for arm in ("plain", "scaled"):
        found = results(tmp_path, arm, "3")
        assert found[0] != found[1]
        cell = f"{statistics.fmean(found):.3g} ± {statistics.stdev(found):.2g}"
        [row] = [line for line in table.splitlines() if line.startswith(f"| {arm} |")]
        assert row.split(" | ")[2] == cell and row.endswith("| 2 | 2.00 |")
    assert "- scaled: strength by steps" in table
    assert "Two independent sets of the teacher's samples: Fréchet distance to the teacher " in table
    assert (tmp_path / "out" / "study.png").read_bytes().startswith(b"\x89PNG")
    strengths = load_config(tmp_path / "out" / "scaled" / "seed-5" / "config.yaml")
    assert strengths.run.seed == 5 and strengths.method.step_gain is not None

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("evaluation.json")}
    assert main(["study", "small.yaml", "-o", "out"]) == 0
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("evaluation.json")}
    assert (tmp_path / "out" / "study.md").read_text() == table


def test_several_metrics_and_those_that_an_earlier_evaluation_lacks(study, tmp_path, capsys, monkeypatch):
    """An evaluated run is not trained again."""
    study(metric="fid_data", seeds=[0], arms={"plain": {"about": "as it comes"}})
    assert main(["study", "small.yaml", "-o", "out"]) == 0
    path = tmp_path / "out" / "plain" / "seed-0" / "evaluation.json"
    result = json.loads(path.read_text())
    for row in result["student"].values():
        del row["recall_data"]
    path.write_text(json.dumps(result))
    study(metric=["fid_data", "recall_data", "prompt_following"], seeds=[0], arms={"plain": {"about": "as it comes"}})
    monkeypatch.setattr("recipes.study.train", None)
    capsys.readouterr()
    assert main(["study", "small.yaml", "-o", "out"]) == 0
    table = (tmp_path / "out" / "study.md").read_text()
    heads = [line for line in table.splitlines() if "passes for a target" in line]
    titles = ["Fréchet distance to the data", "recall against the data", "prompt following"]
    assert [head.partition(" at steps")[0] for head in heads] == [f"| {title}" for title in titles]
    student = json.loads(path.read_text())["student"]
    record = json.loads((tmp_path / "out" / "study.json").read_text())
    for metric in ("fid_data", "recall_data", "prompt_following"):
        assert record["values"][metric]["plain"] == {steps: [row[metric]] for steps, row in student.items()}


def test_one_run_of_an_array(study, tmp_path, capsys):
    assert main(["study", "small.yaml", "-o", "out", "--only", "3"]) == 0
    assert [path.parent.name for path in (tmp_path / "out").rglob("evaluation.json")] == ["seed-5"]
    assert "| 1 | 2.00 |" in capsys.readouterr().out
    assert main(["study", "small.yaml", "-o", "out", "--arms", "plain", "--only", "2"]) == 0
    assert (tmp_path / "out" / "plain" / "seed-5" / "evaluation.json").is_file()


def test_prepare_runs_before_the_first_run(study, tmp_path, monkeypatch, capsys):
    """Outside of the Slurm array, and at every start: the command itself knows what it has made."""
    study(prepare={"made/manifest.json": "data encode images -o made --model nowhere"}, seeds=[0])
    assert main(["study", "small.yaml", "-o", "out"]) == 2
    assert "the command that makes made/manifest.json failed: scfm data encode images" in capsys.readouterr().err
    calls = []

    def execute(words):
        calls.append((words, [name for name in os.environ if name.startswith("SLURM_ARRAY")]))
        (tmp_path / "made").mkdir(exist_ok=True)
        (tmp_path / "made" / "manifest.json").touch()
        return 0

    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "0")
    for _ in range(2):
        run_study("small.yaml", tmp_path / "out", [], arms=["plain"], only=None, execute=execute)
    assert calls == [(["data", "encode", "images", "-o", "made", "--model", "nowhere"], [])] * 2
    assert os.environ["SLURM_ARRAY_TASK_ID"] == "0"


@pytest.mark.parametrize(
    ("changes", "words", "message"),
    [
        ({"arm": {}}, [], "arm: Unexpected keyword argument"),
        ({"arms": {"a": {"abuot": "x"}}}, [], "arms.a.about: Field required"),
        ({"seeds": []}, [], "needs at least one arm, one seed and one metric"),
        ({"arms": {"a": {"about": "x", "set": ["train.stepz=3"]}}}, [], "did you mean train.steps?"),
        (
            {"arms": {"a": {"about": "x", "set": ["train.weights=full", "method.teacher_fraction=0"]}}},
            [],
            "has no teacher",
        ),
        ({}, ["--arms", "plane"], "has no arm plane; it has plain, scaled"),
        ({}, ["--only", "4"], "--only must be in 0..3: small.yaml has 4 runs"),
        ({"seeds": [0, 5, 0]}, [], "seeds [0, 5, 0] contains a seed twice"),
        ({"arms": {"undistilled": {"about": "x"}}}, [], "Use another name for the arm"),
        ({"metric": ["fid_teacher", "fid_date"]}, [], "'fid_date' is not a metric; did you mean fid_data?"),
        ({"metric": []}, [], "needs at least one arm, one seed and one metric"),
        ({"metric": "pick_score"}, [], "metric pick_score needs evaluate.pick_score_path; arm plain has none"),
        ({"arms": {"a": {"about": "x", "set": ["run.seed=3"]}}}, [], "run.seed=3 has no effect in a study"),
        ({}, ["run.dir=elsewhere"], "run.dir=elsewhere has no effect in a study"),
    ],
)
def test_mistakes_are_found_before_the_first_run(study, tmp_path, capsys, changes, words, message):
    study(**changes)
    assert main(["study", "small.yaml", "-o", "out", *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["digitz", "no/such/folder/digits.yaml", "tiny_distill.yaml"])
def test_a_missing_study(name, capsys):
    assert main(["study", name]) == 2
    shipped = capsys.readouterr().err.partition("Shipped")[2]
    assert "digits.yaml" in shipped and "distill" not in shipped


def test_runs_with_other_settings_are_an_error(study, tmp_path, capsys):
    study(seeds=[0], arms={"plain": {"about": "as it comes"}})
    assert main(["study", "small.yaml", "-o", "out"]) == 0
    before = (tmp_path / "out" / "study.md").read_text()
    assert main(["study", "small.yaml", "-o", "out", "train.lr=1e-4"]) == 2
    assert "plain/seed-0 was made with other settings (train.lr). Delete it" in capsys.readouterr().err
    assert (tmp_path / "out" / "study.md").read_text() == before

    run_dir = tmp_path / "out" / "plain" / "seed-0"
    shutil.rmtree(run_dir / "checkpoints")  # a finished run does not need them
    assert main(["study", "small.yaml", "-o", "out"]) == 0
    how = (run_dir / "evaluation.yaml").read_text()  # as if made by `scfm evaluate RUN sample.seed=7`
    (run_dir / "evaluation.yaml").write_text(how.replace("seed: 1234", "seed: 7"))
    assert main(["study", "small.yaml", "-o", "out"]) == 2
    assert "plain/seed-0 was made with other settings (sample.seed)" in capsys.readouterr().err
    (run_dir / "evaluation.json").unlink()  # not evaluated yet: settings of the evaluation may change, others may not
    assert main(["study", "small.yaml", "-o", "out", "train.lr=1e-4"]) == 2
    assert "plain/seed-0 was made with other settings (train.lr)" in capsys.readouterr().err


def test_a_run_that_fails_does_not_stop_the_others(study, tmp_path, capsys):
    study(arms={"broken": {"about": "x", "set": ["data.path=nowhere"]}, "plain": {"about": "as it comes"}}, seeds=[0])
    assert main(["study", "small.yaml", "-o", "out"]) == 2
    assert "1 runs failed; the same command tries them again:\n  broken, seed 0: " in capsys.readouterr().err
    assert "| plain |" in (tmp_path / "out" / "study.md").read_text()


def test_an_unexpected_exception_does_not_stop_the_others(study, tmp_path, capsys, monkeypatch):
    def out_of_memory(recipe, overrides):
        if "method.step_gain.gamma=0.5" in overrides:
            raise torch.OutOfMemoryError("8 GiB too many")
        return train(recipe, overrides)

    monkeypatch.setattr("recipes.study.train", out_of_memory)
    study(seeds=[0], arms={"scaled": {"about": "x", "set": ["method.step_gain.gamma=0.5"]}, "plain": {"about": "x"}})
    assert main(["study", "small.yaml", "-o", "out"]) == 2
    error = capsys.readouterr().err
    assert "Traceback" in error and "1 runs failed" in error and "scaled, seed 0: 8 GiB too many" in error
    assert "| plain |" in (tmp_path / "out" / "study.md").read_text()


def test_a_deleted_output_of_prepare_is_made_again(study, tiny, tmp_path):
    (tmp_path / "prompts.txt").write_text("a handwritten digit one\na handwritten digit two\n")
    words = f"data generate prompts.txt -o made --model {tiny / 'flux'} --per-prompt 4 --steps 1 --text-length 8"
    study(
        prepare={"made/manifest.json": f"{words} --resolution 16 16 --dtype float32"},
        arms={"generated": {"about": "x", "set": ["data.path=made"]}},
        seeds=[0],
    )
    assert main(["study", "small.yaml", "-o", "out"]) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "made").rglob("*.tar")}
    shutil.rmtree(tmp_path / "made")
    assert main(["study", "small.yaml", "-o", "out"]) == 0
    assert {path: path.read_bytes() for path in (tmp_path / "made").rglob("*.tar")} == before != {}


def test_a_launcher_is_an_error(study, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["study", "small.yaml"]) == 2
    assert "without a launcher" in capsys.readouterr().err


@pytest.mark.parametrize(("flow", "passes"), [(0.0, 2.0), (0.75, 0.5), (1.0, 0.0)])
def test_passes_for_a_target(make_config, flow, passes):
    config = make_config({"method.flow_fraction": flow, "method.teacher_fraction": 0.0})
    assert config.method == PlanConfig(flow_fraction=flow, teacher_fraction=0.0, self_grids=(16, 8, 4, 2))
    assert target_passes(config) == passes


def test_passes_for_stored_paths_are_divided_by_their_uses(make_config, tiny, tmp_path):
    """Six paths of four passes each, used in eight steps of four samples."""
    (tmp_path / "prompts.txt").write_text("a handwritten digit one\na handwritten digit two\n")
    words = ["--trajectories", "--steps", "4", "--intervals", "2", "--per-prompt", "3", "--text-length", "8"]
    words += ["--resolution", "16", "16", "--dtype", "float32"]
    folder = str(tmp_path / "paths")
    prompts = str(tmp_path / "prompts.txt")
    assert main(["data", "generate", prompts, "-o", folder, "--model", str(tiny / "flux"), *words]) == 0
    changes = {"method.trajectory_fraction": 1.0, "method.teacher_fraction": 0.0, "method.trajectory_grids": [1, 2]}
    train = {"train.steps": 8, "train.global_batch_size": 4, "train.micro_batch_size": 4}
    assert target_passes(make_config({**changes, **train, "data.path": folder})) == 6 * 4 / (8 * 4)
