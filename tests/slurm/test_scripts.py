"""slurm/*.sh without a Slurm: what they take for a recipe, a site, a secret; and that they run on one machine."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from runs import make_tree

from recipes.cli import main
from scfm_core.train.history import read_history

pytestmark = pytest.mark.processes
ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "slurm").glob("*_flux.sh"))


def bash(command, *arguments, **environment):
    """A script, or a line of bash after sourcing lib.sh."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SCFM"))}
    words = (
        ["bash", *command] if isinstance(command, list) else ["bash", "-euc", f"source slurm/lib.sh; {command}", "bash"]
    )
    return subprocess.run(
        [*words, *arguments], env=clean | {"SCFM_PYTHON": sys.executable} | environment, cwd=ROOT, capture_output=True,
        text=True, timeout=120,
    )  # fmt: skip


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_are_clean(script):
    result = subprocess.run(
        [Path(sys.executable).with_name("shellcheck"), "-x", script], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout
    assert "eval" not in script.read_text().split()


def test_defaults_are_recipes_that_work():
    """On the nodes that the #SBATCH lines ask for."""
    for script, nodes in zip(SCRIPTS, (2, 4), strict=True):
        (line,) = [line for line in script.read_text().splitlines() if line.startswith("main ")]
        words = line.removeprefix("main ").removesuffix(' -- "$@"').split()
        assert main(["train", *words, "--dry-run", f"--gpus={8 * nodes}"]) == 0


class TestRecipes:
    show = 'choose_recipe "$@"; printf "[%s]" "${arguments[@]}"'

    def test_come_first_and_overrides_behind(self):
        assert bash(self.show, "a.yaml", "b=$(touch x)", "c=1 2").stdout == "[a.yaml][b=$(touch x)][c=1 2]"

    def test_by_the_arrays_task(self):
        found = [
            bash(self.show, "a", "b", "c=1", SLURM_ARRAY_TASK_ID=task, SLURM_ARRAY_TASK_MIN="7").stdout for task in "78"
        ]
        assert found == ["[a][c=1]", "[b][c=1]"]

    @pytest.mark.parametrize(
        ("words", "environment", "message"),
        [
            (["a", "b"], {}, "2 recipes need a job array: sbatch --array=0-1"),
            (["a", "b"], {"SLURM_ARRAY_TASK_ID": "2"}, "task 2: there are only 2 recipes"),
            (["a", "--resume", "never"], {}, "--resume: only section.key=value may follow the recipe"),
        ],
    )
    def test_refused(self, words, environment, message):
        result = bash(self.show, *words, **environment)
        assert result.returncode == 2
        assert message in result.stderr


ARRAY = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "4"}


@pytest.mark.parametrize(
    ("job", "name", "state"), [("7", "7_4", "CANCELLED"), ("8", "8", "RUNNING"), ("9", "9", "COMPLETED")]
)
def test_what_slurm_says_of_one_task_of_an_array(job, name, state):
    """For the number that the last task shares with the array, scontrol shows all of its tasks. Job 9 was submitted from within it."""
    lines = (
        "JobId=7 ArrayJobId=7 ArrayTaskId=4 JobName=x JobState=CANCELLED",
        "JobId=8 ArrayJobId=7 ArrayTaskId=3 JobName=x JobState=RUNNING",
        "JobId=9 JobName=ArrayTaskId=5 JobState=COMPLETED",
    )
    show = f"scontrol() {{ printf '%s\\n' {shlex.join(lines)}; }}; ask_slurm {job}; echo \"$alone ${{shown##*=}}\""
    assert bash(show, **ARRAY).stdout == f"{name} {state}\n"


@pytest.mark.parametrize(("variables", "name"), [({}, "7"), (ARRAY, "7_4")])
def test_a_slurm_that_does_not_answer(variables, name):
    assert bash('scontrol() { return 1; }; ask_slurm 7; echo "$alone:$shown"', **variables).stdout == f"{name}:\n"


class TestSecrets:
    show = 'read_secrets "$1"; env'

    def file(self, folder, text, mode=0o600):
        path = folder / "secrets"
        path.write_text(text)
        path.chmod(mode)
        return str(path)

    def test_are_taken_as_they_are(self, tmp_path):
        text = "# mine\n\nAWS_SECRET_ACCESS_KEY=a$(touch x)`b`'\"c d\nexport HF_TOKEN=hf\nLAST=1"
        result = bash(self.show, self.file(tmp_path, text))
        lines = result.stdout.splitlines()
        assert {"AWS_SECRET_ACCESS_KEY=a$(touch x)`b`'\"c d", "HF_TOKEN=hf", "LAST=1"} <= set(lines)

    @pytest.mark.parametrize(
        ("text", "mode", "message"),
        [("A=1", 0o640, "can be read by others (mode 640)"), ("rm -rf x", 0o600, "has a line that is not NAME=value")],
    )
    def test_refused(self, tmp_path, text, mode, message):
        result = bash(self.show, self.file(tmp_path, text, mode))
        assert result.returncode == 2
        assert message in result.stderr
        assert text not in result.stderr

    def test_missing(self, tmp_path):
        assert f"SCFM_SECRETS={tmp_path}/none cannot be read" in bash(self.show, f"{tmp_path}/none").stderr


class TestSettings:
    def test_site_is_sourced(self):
        site = ROOT / "slurm" / "clusters" / "test-site.env"
        try:
            site.write_text('export NCCL_SOCKET_IFNAME=ib7\nlauncher=(env WITH="a b")\n')
            result = bash(
                'load_settings slurm; "${python[@]}" -c "import os; print(os.environ)"', SCFM_CLUSTER="test-site"
            )
        finally:
            site.unlink()
        assert "'NCCL_SOCKET_IFNAME': 'ib7'" in result.stdout
        assert "'WITH': 'a b'" in result.stdout

    @pytest.mark.parametrize("name", ["nowhere", "../clusters/example", "$(touch x)"])
    def test_unknown_site(self, name):
        result = bash("load_settings slurm", SCFM_CLUSTER=name)
        assert result.returncode == 2
        assert f"SCFM_CLUSTER={name}: there is no slurm/clusters/{name}.env" in result.stderr

    def test_interpreter_without_scfm(self):
        result = bash("load_settings slurm", SCFM_PYTHON="/bin/false")
        assert result.returncode == 2
        assert "'/bin/false' cannot import scfm" in result.stderr

    def test_script_far_from_the_project(self, tmp_path):
        """As in Slurm's spool, submitted from elsewhere."""
        copy = tmp_path / "slurm_script"
        copy.write_bytes(SCRIPTS[0].read_bytes())
        result = bash([str(copy)], "a.yaml", SLURM_SUBMIT_DIR=str(tmp_path))
        assert result.returncode == 2
        assert "Submit from scfm's folder, or set SCFM_ROOT to it" in result.stderr
        result = bash([str(copy)], "a.yaml", SLURM_SUBMIT_DIR=str(tmp_path), SCFM_ROOT=str(ROOT))
        assert "there is no configuration file 'a.yaml'" in result.stderr


class TestStep:
    """The arguments and the environment that srun gets; a program of that name writes them down."""

    @pytest.fixture
    def step(self, tmp_path, monkeypatch):
        """Call it with the site's lines: `step` of slurm/lib.sh, as a job calls it; srun's arguments and environment."""
        fake = tmp_path / "bin" / "srun"
        fake.parent.mkdir()
        fake.write_text(
            f'#!/bin/bash\nprintf "%s\\0" "$@" > {tmp_path}/arguments; env -0 > {tmp_path}/environment; exit 7\n'
        )
        fake.chmod(0o755)
        monkeypatch.setenv("PATH", f"{fake.parent}:{os.environ['PATH']}")

        def call(site="", **environment):
            line = f'load_settings slurm; {site}\nstep slurm 29500 train "a b.yaml" "c=\'d\'"'
            result = bash(line, SLURM_JOB_NUM_NODES="4", **environment)
            assert result.returncode == 7, result.stderr  # srun's own
            texts = ((tmp_path / name).read_text().rstrip("\0").split("\0") for name in ("arguments", "environment"))
            arguments, variables = texts
            return arguments, dict(variable.split("=", 1) for variable in variables)

        return call

    def test_is_one_task_a_node(self, step):
        arguments, environment = step()
        options, command = arguments[: arguments.index("bash")], arguments[arguments.index("bash") :]
        assert {"--ntasks=4", "--ntasks-per-node=1", "--kill-on-bad-exit=1"} <= set(options)
        assert command == ["bash", "slurm/node.sh", sys.executable, "--", "train", "a b.yaml", "c='d'"]
        assert environment["MASTER_PORT"] == "29500"

    @pytest.mark.parametrize(
        "of_the_job",
        [
            {},  # without --cpus-per-task
            {"SLURM_CPUS_PER_TASK": "8", "SLURM_NTASKS_PER_NODE": "8", "SLURM_TRES_PER_TASK": "cpu=8"},
            {"SRUN_CPUS_PER_TASK": "1", "SLURM_MEM_PER_CPU": "100", "SLURM_MEM_PER_NODE": "0"},
            {f"SLURM_CPU_BIND{end}": "mask_cpu:0x2" for end in ("", "_LIST", "_TYPE", "_VERBOSE")},
        ],
        ids=["nothing", "several tasks", "interactive job", "its binding"],
    )
    def test_gets_all_of_the_jobs_cpus_and_memory(self, step, of_the_job):
        """Whatever the variables of this or another job say of one task."""
        arguments, environment = step(**of_the_job)
        limits = ("CPUS_PER_TASK", "TRES_PER_TASK", "MEM_PER_", "CPU_BIND")
        assert not [name for name in environment if any(limit in name for limit in limits)]
        assert "--cpu-bind=none" in arguments
        assert not [word for word in arguments if word.startswith(("--cpus-per-task", "-c"))]

    def test_takes_the_sites_flags_as_they_are(self, step):
        """Between our defaults, which they replace, and what a job needs, which they cannot replace."""
        flags = [
            "--container-image=/c/scfm 1.sqsh", "--container-mounts=/scratch:/scratch,/data:/data:ro", "--mpi=pmix",
            "--comment=$(touch x) `y` \"z\"", "--cpu-bind=cores", "--ntasks-per-node=8",
        ]  # fmt: skip
        site = f"srun_flags=({' '.join(map(shlex.quote, flags))})\nnode_python=(/opt/scfm/bin/python -u)"
        arguments, _ = step(site)
        first = arguments.index(flags[0])
        assert arguments[first : first + len(flags)] == flags
        assert arguments.index("--cpu-bind=none") < first
        assert arguments.index("--ntasks-per-node=1") > first + len(flags) - 1
        at = arguments.index("bash")
        assert arguments[at + 2 : at + 6] == ["/opt/scfm/bin/python", "-u", "--", "train"]


class TestOwnJob:
    """Only the batch script itself may requeue the job: a notebook's shell has the variables of a job too."""

    show = "if is_own_job; then echo own; else echo other; fi"

    def test_by_the_process(self):
        assert bash(self.show).stdout == "other\n"
        assert bash(self.show, SLURM_JOB_ID="77").stdout == "other\n"
        assert bash(self.show, SLURM_JOB_ID="77", SLURM_TASK_PID="1").stdout == "other\n"
        assert bash(f"export SLURM_TASK_PID=$$; {self.show}", SLURM_JOB_ID="77").stdout == "own\n"

    def test_by_the_name_of_slurms_copy(self, tmp_path):
        (tmp_path / "slurm_script").write_text(f"source slurm/lib.sh; {self.show}")
        assert bash([str(tmp_path / "slurm_script")], SLURM_JOB_ID="77").stdout == "own\n"


def test_runs_on_this_machine(tiny, tmp_path):
    """Also in the shell of somebody's job, which has Slurm's variables."""
    tree = make_tree(tiny, tmp_path / "run", train__steps=2, train__micro_batch_size=4)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    result = bash(
        [str(SCRIPTS[0])],
        str(tmp_path / "recipe.yaml"),
        "train.steps=3",
        SCFM_PROCESSES="2",
        SLURM_JOB_ID="77",
        SLURM_SUBMIT_DIR="/",
    )
    assert result.returncode == 0, result.stderr
    assert "this is not the batch script of job 77: training on this machine only" in result.stderr
    assert "Traceback" not in result.stderr
    start, end = read_history(tmp_path / "run")
    assert (start["processes"], end["how"], end["step"]) == (2, "finished", 3)
