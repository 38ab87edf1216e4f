"""`scfm study`: each arm and seed runs once; the results are in a table and a plot."""

import json
import os
import shutil
import statistics

import pytest
import torch
import yaml

from recipes.cli import main
from recipes.evaluate import planned
from recipes.measurable import check_ready
from recipes.study import _done, run_study
from recipes.study_cost import cost, equal_steps
from recipes.study_docs import page, section
from recipes.study_file import load_study, runs_of
from recipes.train import train
from scfm_core.errors import UserError
from scfm_core.scfm.method import PlanConfig
from scfm_core.train.parse import dump_config, load_config

LITTLE = ["train.steps=1", "train.warmup_steps=0", "train.global_batch_size=4", "train.micro_batch_size=4"]


@pytest.fixture
def study(make_config, tmp_path, monkeypatch):
    """A study of two arms and two seeds."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("recipes.study_origin.commit", lambda: "abc")  # asks git
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
        [row] = [line for line in table.splitlines() if line.startswith(f"| `{arm}` |")]
        # One update of four samples: three passes of the student for each, and two for its target.
        assert row.split(" | ")[2] == cell and row.endswith("| 2 | 1 | 2.00 | 20 |")
    measured = [json.loads(path.read_text()) for path in (tmp_path / "out").rglob("evaluation.json")]
    assert len(measured) == 4 and sum("base" in each for each in measured) == 1  # it is the same for all
    assert sum("fid_floor" in row for each in measured for row in each["teacher"].values()) == 1
    assert "- `scaled`: strength by steps" in table
    assert "Two independent sets of the teacher's samples: Fréchet distance to the teacher " in table
    assert (tmp_path / "out" / "study.png").read_bytes().startswith(b"\x89PNG")
    strengths = load_config(tmp_path / "out" / "scaled" / "seed-5" / "config.yaml")
    assert strengths.run.seed == 5 and strengths.method.step_gain is not None

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("evaluation.json")}
    assert main(["study", "small.yaml", "-o", "out"]) == 0
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("evaluation.json")}
    assert (tmp_path / "out" / "study.md").read_text() == table


def test_figures_that_an_earlier_evaluation_lacks(study, tmp_path, capsys, monkeypatch):
    """A trained run is evaluated again with the settings that the new figures need, and is not trained again."""
    arms = {"plain": {"about": "as it comes"}}
    (tmp_path / "each.txt").write_text("".join(f"digit {number}\n" for number in range(6)))
    little = [*LITTLE, "evaluate.prompts=each.txt", "evaluate.samples=6", "evaluate.steps=[1, 3]"]
    study(metric="fid_data", seeds=[0], arms=arms, set=little)
    assert main(["study", "small.yaml", "-o", "out"]) == 0
    other = {"about": "x", "set": ["evaluate.data=elsewhere"]}  # it would be in one table with what is done
    study(metric="fid_data", seeds=[0], arms={**arms, "other": other}, set=little)
    assert main(["study", "small.yaml", "-o", "out", "--arms", "other"]) == 2
    assert "fid_data would compare other with elsewhere, and plain with" in capsys.readouterr().err
    [plain] = [run for run in runs_of(load_study("small.yaml"), tmp_path / "out", []) if run.arm == "plain"]
    compared = [len(list(_done([plain], [], figures))) for figures in (["fid_data"], ["cmmd_data"], [])]
    assert compared == [1, 0, 0], "a figure that it lacks is no reason to compare its data"
    path = tmp_path / "out" / "plain" / "seed-0" / "evaluation.json"
    origin = json.loads((path.parent / "origin.json").read_text())
    assert set(origin) == {"trained", "evaluated"} and "CPU core" in origin["trained"]["machine"]
    monkeypatch.setattr("recipes.study.train", None)
    metrics = ["fid_data", "recall_data", "diversity"]
    study(metric=metrics, seeds=[0], arms=arms, set=[*little, "evaluate.per_prompt=2", "sample.seed=7"])
    capsys.readouterr()
    assert main(["study", "small.yaml", "-o", "out"]) == 0
    table = (tmp_path / "out" / "study.md").read_text()
    heads = [line for line in table.splitlines() if " at steps | " in line]
    titles = ["Fréchet distance to the data", "recall against the data", "diversity, relative to the teacher's"]
    assert [head.partition(" at steps")[0] for head in heads] == [f"| {title}" for title in titles]
    student = json.loads(path.read_text())["student"]
    record = json.loads((tmp_path / "out" / "study.json").read_text())
    for metric in metrics:
        assert record["values"][metric]["plain"] == {steps: [row[metric]] for steps, row in student.items()}
    how = load_config(path.with_name("evaluation.yaml"), stored=True)
    assert (how.evaluate.per_prompt, how.sample.seed) == (2, 7)

    shutil.rmtree(path.parent / "checkpoints")
    assert main(["study", "small.yaml", "-o", "out"]) == 0  # no figure is missing
    study(metric="prompt_following", seeds=[0], arms=arms, set=little)
    del student["3"]["prompt_following"]
    path.write_text(json.dumps({"student": student}))
    assert main(["study", "small.yaml", "-o", "out"]) == 2
    assert "plain/seed-0 has no prompt_following, and no checkpoint any more" in capsys.readouterr().err


def test_what_only_data_and_networks_tell_is_checked_before_the_training(make_config, tmp_path):
    captions = tmp_path / "prompts.txt"
    captions.write_text("one\ntwo\n")
    config = make_config({"evaluate.prompts": str(captions), "evaluate.samples": 2})
    with pytest.raises(UserError, match="diversity compares images of the same prompt; the evaluation has one"):
        check_ready(["diversity"], config)
    check_ready(["fid_data", "prompt_following"], config)
    with pytest.raises(UserError, match=r"there is no classifier\.safetensors"):
        check_ready(["fid_data"], make_config({"evaluate.features_path": str(tmp_path)}))


def test_a_second_stage_starts_from_a_run_of_the_same_seed(study, tmp_path, capsys):
    """Which is made first, also if it is not asked for. Updates and passes of both count."""
    arms = {"second": {"about": "x", "start": "first", "set": ["train.steps=2"]}, "first": {"about": "x"}}
    study(arms=arms, seeds=[5], set=[*LITTLE, "evaluate.steps=[1]", "evaluate.noise_floor=false"])
    assert main(["study", "small.yaml", "-o", "out", "--arms", "second"]) == 0
    printed = capsys.readouterr().out
    assert [line for line in printed.splitlines() if line.startswith("[")] == [
        "[1/2] first, seed 5",
        "[2/2] second, seed 5",
    ]
    start = load_config(tmp_path / "out" / "second" / "seed-5" / "config.yaml", stored=True).lora.start
    assert start == str(tmp_path / "out" / "first" / "seed-5")
    assert "| 1 | 3 | 2.00 | 60 |" in printed and "- `second`: x; starts from first" in printed


def test_one_run_of_an_array(study, tmp_path, capsys):
    assert main(["study", "small.yaml", "-o", "out", "--only", "3"]) == 0
    assert [path.parent.name for path in (tmp_path / "out").rglob("evaluation.json")] == ["seed-5"]
    assert "| 1 | 1 | 2.00 | 20 |" in capsys.readouterr().out
    assert main(["study", "small.yaml", "-o", "out", "--arms", "plain", "--only", "2"]) == 0
    assert (tmp_path / "out" / "plain" / "seed-5" / "evaluation.json").is_file()
    assert (
        main(["study", "small.yaml", "-o", "out", "--arms", "plain", "--only", "1"]) == 2
    )  # a task of an array that would do nothing
    message = "--only 1 is a run of scaled, which is not in --arms. The runs of these arms: 0, 2"
    assert message in capsys.readouterr().err


def test_settings_that_only_some_arms_take(study, tmp_path, capsys):
    """The other arms are not checked, and a run that is done is counted with its own settings."""
    assert main(["study", "small.yaml", "-o", "out", "--arms", "plain", "--only", "0"]) == 0
    override = "method.step_gain.gamma=1"
    study(arms={"plain": {"about": "x", "set": ["method.step_gain=none"]}, "scaled": {"about": "x"}})
    assert main(["study", "small.yaml", "-o", "out", "--only", "1", override, "train.steps=2"]) == 0
    table = (tmp_path / "out" / "study.md").read_text()
    rows = [line.split(" | ")[-4:] for line in table.splitlines() if line.startswith(("| `plain`", "| `scaled`"))]
    assert [(row[1], row[3]) for row in rows[:2]] == [("1", "20 |"), ("2", "40 |")]


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
    with pytest.raises(SystemExit, match="130"):  # Ctrl-C
        run_study("small.yaml", tmp_path / "out", [], arms=["plain"], only=None, execute=lambda words: 130)


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
        (
            {"metric": "recall_data", "set": ["evaluate.samples=3"]},
            [],
            "needs more than 3 images; arm plain has evaluate",
        ),
        (
            {"metric": "prompt_following", "set": ["evaluate.features=inception"]},
            [],
            "Set evaluate.features=classifier",
        ),
        ({"metric": "diversity", "set": ["evaluate.prompts=few.txt", "evaluate.samples=2"]}, [], "one image of each"),
        ({"arms": {"a": {"about": "x", "start": "b"}}}, [], "arms.a.start: there is no arm 'b'; the arms are a"),
        (
            {"arms": {"a": {"about": "x", "start": "b"}, "b": {"about": "x", "start": "a"}}},
            [],
            "a circle of starts: a starts from b starts from a",
        ),
        (
            {"arms": {"a": {"about": "x"}, "b": {"about": "x", "start": "a", "set": ["lora.start=x"]}}},
            [],
            "arm b has start, which sets lora.start",
        ),
        (
            {"arms": {"a": {"about": "x"}, "b": {"about": "x", "equal_passes": "a", "set": ["train.steps=2"]}}},
            [],
            "arm b has equal_passes, which sets train.steps",
        ),
        ({"arms": {"a": {"about": "x", "equal_passes": "a"}}}, [], "those of a are computed too"),
        ({}, ["--equal-passes", "plane"], "--equal-passes: there is no arm 'plane'; the arms are plain, scaled"),
        ({"arms": {"a": {"about": "x", "set": ["run.seed=3"]}}}, [], "run.seed=3 has no effect in a study"),
        ({}, ["run.dir=elsewhere"], "run.dir=elsewhere has no effect in a study"),
        (
            {"first": {"runs/teacher": "make teacher"}},
            [],
            "runs/teacher, which does not exist. First run: make teacher",
        ),
        (
            {
                "metric": "fid_data",
                "set": ["data.path=a"],
                "arms": {"own": {"about": "x"}, "paths": {"about": "x", "set": ["data.path=b"]}},
            },
            [],
            "fid_data would compare own with a, and paths with b. Give all arms the same data: evaluate.data=FOLDER",
        ),
    ],
)
def test_mistakes_are_found_before_the_first_run(study, tmp_path, capsys, changes, words, message):
    (tmp_path / "few.txt").write_text("one\ntwo\n")
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

    assert main(["study", "small.yaml", "-o", "out", "sample.seed=7"]) == 2  # what is trained need not be trained again
    assert "Delete out/plain/seed-0/evaluation.json to measure it again" in capsys.readouterr().err.replace(
        f"{tmp_path}/", ""
    )

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
    broken = {"about": "x", "set": ["data.path=nowhere"]}
    study(arms={"broken": broken, "plain": {"about": "x"}, "after": {"about": "x", "start": "broken"}}, seeds=[0])
    assert main(["study", "small.yaml", "-o", "out"]) == 2
    error = capsys.readouterr().err
    assert "2 runs failed; the same command tries them again:\n  broken, seed 0: " in error
    assert "after, seed 0: it starts from broken, seed 0, which is not done" in error
    assert "| `plain` |" in (tmp_path / "out" / "study.md").read_text()


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
    assert "| `plain` |" in (tmp_path / "out" / "study.md").read_text()


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
    assert cost(config).for_target == passes


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
    config = make_config({**changes, **train, "data.path": folder})
    assert cost(config).for_target == 6 * 4 / (8 * 4) and cost(config).passes == 6 * 4 + 3 * 8 * 4
    notes: list[str] = []
    planned(config, notes.append)
    assert "paths of the teacher, so fid_data compares with its images" in notes[0]
    planned(make_config({"evaluate.data": str(tiny / "cache")}), notes.append)
    assert sum("paths of the teacher" in note for note in notes) == 1, notes


def test_updates_of_equal_passes(study, tmp_path, capsys):
    """Pairs need 3 + 2 passes of a sample, paths taken during the training 3 + 4."""
    taken = ["method.teacher_fraction=0", "method.trajectory_fraction=1", "method.trajectory_steps=4"]
    taken.append("method.trajectory_grids=[1, 2]")
    arms = {"pairs": {"about": "x"}, "paths": {"about": "x", "set": taken}}
    study(arms=arms, set=[*LITTLE, "train.steps=70"])
    chosen = load_study("small.yaml", "pairs")
    assert [arm.equal_passes for arm in chosen.arms.values()] == [None, "pairs"]
    runs = runs_of(chosen, tmp_path, [])
    assert equal_steps(chosen, runs[:2], {"pairs"}) == {}
    steps = equal_steps(chosen, runs[:2], {"pairs", "paths"})
    assert steps == {"paths": 50}
    costs = [cost(load_config("recipe.yaml", run.overrides)) for run in runs_of(chosen, tmp_path, [], steps)[:2]]
    assert costs[0].passes == costs[1].passes == 70 * 4 * 5
    runs[0].folder.mkdir(parents=True)  # the reference in the table counts, not what its settings would be now
    made = load_config("recipe.yaml", [*runs[0].overrides, "train.steps=140"])
    (runs[0].folder / "config.yaml").write_text(dump_config(made))
    assert equal_steps(chosen, runs[:2], {"paths"}) == {"paths": 100}
    taken[2] = "method.trajectory_steps=24"  # an update of pairs is a fifth of an update of these
    study(arms={**arms, "paths": {"about": "x", "set": taken, "equal_passes": "pairs"}})
    assert main(["study", "small.yaml", "-o", "out"]) == 2
    assert "arm paths has no pass left for an update" in capsys.readouterr().err


RECORD = {
    "values": {"fid_data": {"undistilled": {"4": [2.0]}, "plain": {"4": [1.0, 3.0]}}},
    "floors": {},
    "arms": {"plain": "as it comes"},
    "updates": {"plain": 900},
    "passes_for_target": {"plain": 2.0},
    "passes": {"plain": 576000.0},
    "command": "scfm study small.yaml",
    "origins": {"date": ["2026-01-02", "2026-01-03"], "commit": ["abc"], "machine": ["2 CPU cores"]},
}


def test_sections_of_the_page_of_results():
    content = section("small", RECORD)
    assert "`scfm study small.yaml`: measured 2026-01-02 to 2026-01-03, on 2 CPU cores, at commit `abc`." in content
    assert "| `plain` | 2 ± 1.4 | 2 | 900 | 2.00 | 576,000 |" in content
    other = section("other", RECORD)
    first = page("# Results\n\n## Earlier results\n\nold\n", "small", content)
    both = page(first, "other", other)
    assert [line for line in both.splitlines() if line.startswith("## ")] == [
        "## small",
        "## other",
        "## Earlier results",
    ]
    again = page(both, "small", content.replace("900", "1,000"))
    assert again == both.replace("900", "1,000", 1) and again.endswith("\n\nold\n")
    assert page("# Results\n", "small", content) == f"# Results\n\n{content}"
