"""Checkpoints on several processes under real faults: killed ranks, full disks, damaged files, leftovers.

Rows 13, 14, 15 and 19 of RELIABILITY.md. Each run saves after every step, so step 1 is the checkpoint before the fault and
step 2 the one that the fault hits; then the same command resumes to step 3, and must end where a run without faults ends.
"""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import ENGINES, at_student_passes, make_tree, run_distributed, tensors, train_all, train_cli

from recipes.cli import main
from scfm_core.errors import UserError
from scfm_core.train.checkpoint import find_checkpoint, load_checkpoint, read_manifest, verify_checkpoint
from scfm_core.train.run_dir import LATEST, MANIFEST, checkpoint_path, newest_complete

STEPS, HIT = 3, 2
# `engine.timeout` must not run out: a rank whose peer is gone notices the lost connection. The limit is how long a test waits
# for the end of all ranks before it fails.
TIMEOUT, HARD_LIMIT = 300.0, 100.0
ALL = ("fsdp2", "fsdp2 async", "zero1", "zero2", "zero3")


def make_run(tiny: Path, run_dir: Path, name: str, world_size: int = 2, **changes: Any) -> dict[str, Any]:
    """A run of three steps with a checkpoint after each, of which only the newest is kept."""
    tree = make_tree(tiny, run_dir, engine=ENGINES[name.removesuffix(" async")], **changes)
    tree["engine"]["timeout"] = TIMEOUT
    tree["lora"]["rank"] = 16  # a checkpoint of some 300 kB, larger than what a run writes besides
    tree["train"] |= {"steps": STEPS, "micro_batch_size": 8 // world_size}
    tree["checkpoint"] = {"every": 1, "keep": 1, "asynchronous": name.endswith("async"), **tree["checkpoint"]} | {
        "every": 1
    }
    return tree


@pytest.fixture(scope="module")
def without_fault(tiny, tmp_path_factory):
    """(engine, processes) -> a run of three steps without a fault, with its three checkpoints; not to be changed."""
    known: dict[tuple[str, int], Path] = {}

    def get(name: str, world_size: int = 2) -> Path:
        if (name, world_size) not in known:
            run_dir = tmp_path_factory.mktemp("whole") / "run"
            tree = make_run(tiny, run_dir, name, world_size, checkpoint__keep=STEPS)
            run_distributed(train_all, world_size, tree, *range(1, STEPS))
            known[name, world_size] = run_dir
        return known[name, world_size]

    return get


@pytest.fixture(scope="module")
def whole(without_fault):
    """(engine, processes) -> the tensors after three steps without a fault."""
    known: dict[tuple[str, int], dict[str, torch.Tensor]] = {}

    def get(name: str, world_size: int = 2) -> dict[str, torch.Tensor]:
        if (name, world_size) not in known:
            known[name, world_size] = tensors(without_fault(name, world_size), STEPS)
        return known[name, world_size]

    return get


@pytest.fixture
def first_step(without_fault):
    """(tree, engine, processes) -> the bytes of the checkpoint of step 1, which the run then has."""

    def make(tree: dict[str, Any], name: str, world_size: int = 2) -> int:
        run_dir = Path(tree["run"]["dir"])
        shutil.copytree(checkpoint_path(without_fault(name, world_size), 1), checkpoint_path(run_dir, 1))
        (run_dir / "checkpoints" / LATEST).write_text("step_00000001")
        return size_of(checkpoint_path(run_dir, 1))

    return make


def assert_same(run_dir: Path, expected: dict[str, torch.Tensor], name: str) -> None:
    """Bitwise with FSDP2; with ZeRO to 1e-6."""
    actual = tensors(run_dir, STEPS)
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        if name.startswith("fsdp2"):
            assert torch.equal(actual[key], value), key
        else:
            torch.testing.assert_close(
                actual[key], value, rtol=1e-6, atol=1e-9, msg=lambda text, key=key: f"{key}: {text}"
            )


def assert_pointer_is_good(run_dir: Path) -> None:
    """`latest`, if it is there, names a complete and undamaged checkpoint."""
    pointer = run_dir / "checkpoints" / LATEST
    if pointer.is_file():
        verify_checkpoint(pointer.parent / pointer.read_text())


def assert_goes_on(
    tree: dict[str, Any], found: int, expected: dict[str, torch.Tensor], name: str, world_size: int = 2
) -> None:
    """The same command takes up after step `found`, ends as the run without a fault, and leaves nothing lying about."""
    run_dir = Path(tree["run"]["dir"])
    by_rank = run_distributed(train_all, world_size, tree)
    assert all([row["step"] for row in rows] == list(range(found + 1, STEPS + 1)) for rows in by_rank)
    assert_same(run_dir, expected, name)
    assert (run_dir / "checkpoints" / LATEST).read_text() == f"step_{STEPS:08d}"
    assert_pointer_is_good(run_dir)
    assert not list((run_dir / "checkpoints").glob(".*"))


# Row 13: SIGKILL of any rank in any phase of a save.

# Of each phase in which a rank can be killed: which step's checkpoint must then be found.
BEFORE, AFTER = HIT - 1, HIT
PHASES = {
    "in the first tensors": BEFORE,  # a part of a file lies on the disk
    "in the EMAs": BEFORE,  # DeepSpeed's own files are there, the DCP beside them is not
    "before state.json": BEFORE,
    "before the manifest": BEFORE,
    "in the manifest": BEFORE,
    "before the rename": BEFORE,
    "before the pointer": AFTER,
    "in the pointer": AFTER,
    "in retention": AFTER,
    "while rank 0 commits": AFTER,
}


def arm(phase: str) -> None:
    """In the victim: death in a phase of the save of step 2."""
    import torch.distributed.checkpoint.filesystem as filesystem

    from scfm_core.distributed.fsdp2 import Fsdp2Engine
    from scfm_core.distributed.world import World
    from scfm_core.train import checkpoint as module

    hit = f"step_{HIT:08d}"

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def wrap(owner: Any, name: str, make: Any) -> None:
        setattr(owner, name, make(getattr(owner, name)))

    def is_hit(path: Any) -> bool:
        return hit in str(path)

    if phase == "in the first tensors":

        def torch_save(original: Any) -> Any:
            def save(state: Any, target: Any, *arguments: Any, **options: Any) -> None:
                original(state, target, *arguments, **options)
                name = getattr(target, "name", None)
                if name is not None and is_hit(name):
                    target.flush()
                    os.truncate(name, Path(name).stat().st_size // 2)
                    die()

            return save

        wrap(torch, "save", torch_save)
    if phase in ("in the first tensors", "in the EMAs"):

        def write_item(original: Any) -> Any:
            seen = []

            def write(transforms: Any, stream: Any, *arguments: Any) -> Any:
                result = original(transforms, stream, *arguments)
                seen.append(is_hit(stream.name))
                if sum(seen) == 3:
                    stream.flush()
                    die()
                return result

            return write

        wrap(filesystem, "_write_item", write_item)
    if phase == "before state.json":
        from scfm_core.distributed.deepspeed import ZeroEngine

        def engine_save(original: Any) -> Any:
            def save(self: Any, folder: Path, *arguments: Any, **options: Any) -> Any:
                written = original(self, folder, *arguments, **options)

                def end() -> Any:
                    files = written()
                    if is_hit(folder):
                        die()
                    return files

                return end

            return save

        wrap(Fsdp2Engine, "save", engine_save)
        wrap(ZeroEngine, "save", engine_save)
    if phase in ("before the manifest", "in the manifest", "in the pointer"):

        def write_text(original: Any) -> Any:
            def write(path: Path, text: str, *arguments: Any, **options: Any) -> int:
                in_manifest = path.name == MANIFEST and is_hit(path)
                if in_manifest and phase == "before the manifest":
                    die()
                in_manifest = phase == "in the manifest" and in_manifest
                in_pointer = phase == "in the pointer" and path.name.startswith((LATEST, f".{LATEST}")) and is_hit(text)
                if in_manifest or in_pointer:
                    original(path, text[: len(text) // 2], *arguments, **options)
                    die()
                return original(path, text, *arguments, **options)

            return write

        wrap(Path, "write_text", write_text)
    if phase in ("before the rename", "before the pointer"):

        def rename(original: Any) -> Any:
            def move(path: Path, target: Path) -> Path:
                if path.name != f".{hit}.tmp":
                    return original(path, target)
                if phase == "before the pointer":
                    original(path, target)
                return die()  # type: ignore[func-returns-value]

            return move

        wrap(Path, "rename", rename)
    if phase == "in retention":

        def rmtree(original: Any) -> Any:
            def remove(path: Path, *arguments: Any, **options: Any) -> None:
                if path.name == f"step_{BEFORE:08d}":
                    (path / "state.json").unlink()
                    die()
                original(path, *arguments, **options)

            return remove

        wrap(module.shutil, "rmtree", rmtree)
    if phase == "while rank 0 commits":

        def gather(original: Any) -> Any:
            def collect(self: World, value: Any) -> Any:
                values = original(self, value)
                if isinstance(value, dict) and value and all(isinstance(key, Path) for key in value):
                    # Rank 0 may have done it all before this rank looks.
                    checkpoints = Path(os.environ["SCFM_TEST_RUN"]) / "checkpoints"
                    deadline = time.monotonic() + 20
                    while (checkpoints / f".{hit}.tmp").exists():
                        assert time.monotonic() < deadline
                        time.sleep(0.01)
                    if (checkpoints / hit).exists():
                        die()
                return values

            return collect

        wrap(World, "gather", gather)


def killed_in_a_save(tree: dict[str, Any], phase: str, victim: int) -> int:
    """In a rank: `scfm train`, in which the victim dies."""
    os.environ["SCFM_TEST_RUN"] = tree["run"]["dir"]
    if int(os.environ["RANK"]) == victim:
        arm(phase)
    return train_cli(tree)


def by_rank_0(phase: str) -> bool:
    """Whether it is rank 0's work alone."""
    return phase in (
        "before the manifest",
        "in the manifest",
        "before the rename",
        "before the pointer",
        "in the pointer",
        "in retention",
    )


def everywhere(name: str) -> list[tuple[str, int, str, int]]:
    """All phases of a save on an engine, and each rank that has a part in them."""
    cases = []
    for phase in PHASES:
        if phase != "in the EMAs" or name.startswith("zero"):
            ranks = [0] if by_rank_0(phase) else [1] if phase == "while rank 0 commits" else [0, 1]
            cases += [(name, 2, phase, rank) for rank in ranks]
    return cases


def combinations() -> list[tuple[str, int, str, int]]:
    """All for fsdp2, and of the others what is not the same code; SCFM_EVERY_PHASE=1 runs all on every engine."""
    if os.environ.get("SCFM_EVERY_PHASE"):
        return [case for name in ALL for case in everywhere(name)]
    return [
        *everywhere("fsdp2"),
        ("fsdp2 async", 2, "in the first tensors", 1),
        ("fsdp2 async", 2, "while rank 0 commits", 1),
        ("fsdp2 async", 1, "before the rename", 0),
        ("zero2", 1, "in the EMAs", 0),
        ("zero1", 2, "in the first tensors", 1),
        ("zero2", 2, "in the EMAs", 1),
        ("zero2", 2, "before state.json", 1),
        ("zero3", 2, "in the first tensors", 1),
    ]


@pytest.mark.parametrize(("name", "world_size", "phase", "victim"), combinations())
def test_a_rank_killed_in_a_save(name, world_size, phase, victim, tiny, tmp_path, whole):
    tree = make_run(tiny, tmp_path / "run", name, world_size)
    began = time.monotonic()
    outcomes = run_distributed(
        killed_in_a_save, world_size, tree, phase, victim, timeout=HARD_LIMIT, expect_failure=True
    )
    assert all(outcomes), f"a rank did not end within {time.monotonic() - began:.0f} s: {outcomes}"
    assert outcomes[victim].exit_code == -signal.SIGKILL, outcomes[victim]
    for survivor in (outcomes[rank] for rank in range(world_size) if rank != victim):
        assert survivor.value == 70, survivor.traceback or survivor.output
        assert f"rank {victim}" in survivor.output and "gone" in survivor.output, survivor.output

    found = PHASES[phase]
    assert_pointer_is_good(tmp_path / "run")
    warnings: list[str] = []
    assert find_checkpoint(tmp_path / "run", warnings.append) == checkpoint_path(tmp_path / "run", found)
    assert not warnings, "a partial checkpoint has a complete one's name"
    verify_checkpoint(checkpoint_path(tmp_path / "run", found))
    assert_goes_on(tree, found, whole(name, world_size), name, world_size)


# Slow is not lost, and what another machine wrote need not be visible yet.


def saves_slowly(tree: dict[str, Any]) -> int:
    """In a rank: `scfm train`; rank 1's disk takes several times `engine.timeout` for a checkpoint."""
    from scfm_core import files

    write, left = files._HashedBytes.write, [12]

    def slow(self: Any, data: Any) -> int:
        if os.environ["RANK"] == "1" and left[0]:
            left[0] -= 1
            time.sleep(0.3)
        return write(self, data)

    files._HashedBytes.write = slow  # type: ignore[method-assign]
    files._BUFFER_BYTES = 4096  # many writes for a small checkpoint
    return train_cli(tree)


@pytest.mark.timed
@pytest.mark.parametrize("name", ["fsdp2", "fsdp2 async", "zero2"])
def test_a_slow_save_that_makes_progress_is_not_ended(name, tiny, tmp_path):
    tree = make_run(tiny, tmp_path / "run", name)
    tree["engine"]["timeout"] = 1.2
    tree["train"]["steps"] = 1
    outcomes = run_distributed(saves_slowly, 2, tree, timeout=HARD_LIMIT, expect_failure=True)
    assert [outcome.value for outcome in outcomes] == [0, 0], [o.traceback or o.output for o in outcomes]
    assert find_checkpoint(tmp_path / "run") == checkpoint_path(tmp_path / "run", 1)


def sees_only_its_own_files(tree: dict[str, Any]) -> None:
    """In a rank: a run; no folder shows the tensor files of another rank, as on NFS for some seconds."""
    own = int(os.environ["RANK"])

    def is_visible(path: Path) -> bool:
        return path.suffix not in (".distcp", ".pt") or path.name.startswith((f"__{own}_", f"zero_pp_rank_{own}_"))

    def hiding(original: Any) -> Any:
        return lambda *arguments: filter(is_visible, original(*arguments))

    for name in ("iterdir", "glob", "rglob"):
        setattr(Path, name, hiding(getattr(Path, name)))
    train_all(tree)


@pytest.mark.parametrize("name", ["fsdp2", "zero3"])
def test_a_manifest_has_the_files_that_rank_0_does_not_see(name, tiny, tmp_path):
    tree = make_run(tiny, tmp_path / "run", name)
    tree["train"]["steps"] = 1
    run_distributed(sees_only_its_own_files, 2, tree)
    folder = checkpoint_path(tmp_path / "run", 1)
    written = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {*read_manifest(folder)} == written - {MANIFEST}
    verify_checkpoint(folder)


# Row 14: a disk that is really full.


@pytest.fixture
def disk(tmp_path):
    """A file system of eight megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if not mounted or mounted.returncode:
        pytest.skip("a file system can only be mounted by root, on Linux")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path, left: int) -> None:
    """Leave so many bytes on the disk."""
    ballast = disk / "ballast"
    size = shutil.disk_usage(disk).free - left
    with ballast.open("wb") as file:
        file.write(b"\1" * size)
    assert shutil.disk_usage(disk).free <= left


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    ("name", "world_size", "share"),  # of a checkpoint that still fits
    [("fsdp2", 2, 0.1), ("fsdp2", 2, 0.6), ("fsdp2 async", 2, 0.6), ("zero2", 2, 0.6), ("fsdp2 async", 1, 0.1)],
)
def test_a_full_disk(name, world_size, share, tiny, disk, whole, first_step):
    tree = make_run(tiny, disk / "run", name, world_size)
    checkpoint = first_step(tree, name, world_size)
    fill(disk, int(share * checkpoint))
    outcomes = run_distributed(train_cli, world_size, tree, timeout=HARD_LIMIT, expect_failure=True)
    assert all(outcomes), "a rank did not end"
    assert [outcome.value for outcome in outcomes] == [2] * world_size, [o.traceback or o.output for o in outcomes]
    printed = [outcome.output.count("scfm: error: ") for outcome in outcomes]
    assert printed == [1] + [0] * (world_size - 1), "one of them speaks for all"
    message = outcomes[0].output[outcomes[0].output.index("scfm: error: ") :]
    assert "Traceback" not in message
    assert f"the checkpoint step_{HIT:08d} could not be written to {disk / 'run' / 'checkpoints'}" in message
    assert "the disk is full" in message
    assert f"The last one, step_{HIT - 1:08d}, is intact" in message

    assert find_checkpoint(disk / "run") == checkpoint_path(disk / "run", HIT - 1)
    verify_checkpoint(checkpoint_path(disk / "run", HIT - 1))
    assert_pointer_is_good(disk / "run")
    assert not list((disk / "run" / "checkpoints").glob(".step_*")), "the failed one still takes up room"
    (disk / "ballast").unlink()
    assert_goes_on(tree, HIT - 1, whole(name, world_size), name, world_size)


def failing_save(tree: dict[str, Any]) -> tuple[str, bool]:
    """In a rank: step 2, whose save fails; the error."""
    from runs import joined_trainer

    with joined_trainer(tree) as trainer:
        next(trainer.train_steps())
        with pytest.raises(UserError) as caught:
            trainer.state.save()
            trainer.state.wait()
        return str(caught.value), caught.value.agreed


@pytest.mark.parametrize("name", ALL)
def test_a_full_disk_is_the_same_error_on_all_ranks(name, tiny, disk, first_step):
    tree = make_run(tiny, disk / "run", name)
    fill(disk, first_step(tree, name) // 2)
    one, other = run_distributed(failing_save, 2, tree, timeout=HARD_LIMIT)
    assert one == other
    assert one[1], "marked as every rank's"
    assert "the disk is full" in one[0] and "step_00000001, is intact" in one[0]


@pytest.mark.parametrize(
    ("name", "moment"), [("fsdp2", "at the start"), ("fsdp2", "in a step"), ("zero2", "in a step")]
)
def test_a_disk_without_a_single_byte(name, moment, tiny, disk, whole, first_step):
    """Not even the configuration or the metrics can be written: rank 0 says so, and nobody hangs or shows a traceback."""
    tree = make_run(tiny, disk / "run", name)
    first_step(tree, name)
    if moment == "at the start":
        fill(disk, 0)
    function = cli_beside_the_disk if moment == "at the start" else cli_that_fills_the_disk
    outcomes = run_distributed(function, 2, tree, timeout=HARD_LIMIT, expect_failure=True)
    (disk / "ballast").unlink()
    assert all(outcomes), "a rank did not end"
    assert outcomes[0].value == 2, outcomes[0].traceback or outcomes[0].output
    assert "scfm: error: " in outcomes[0].output
    assert "the disk is full" in outcomes[0].output or "No space left on device" in outcomes[0].output
    assert outcomes[1].value in (2, 70), outcomes[1].traceback or outcomes[1].output
    assert_goes_on(tree, HIT - 1, whole(name), name)


@pytest.mark.parametrize(("name", "victim"), [("fsdp2", 0), ("fsdp2 async", 1), ("zero2", 0), ("zero3", 1)])
def test_a_write_that_fails_on_one_rank_only(name, victim, tiny, tmp_path, whole, first_step):
    """Its files may not grow as they should (the kernel says EFBIG). The others must not wait in a collective for it."""
    tree = make_run(tiny, tmp_path / "run", name)
    longest = first_step(tree, name) // 8
    outcomes = run_distributed(cli_with_short_files, 2, tree, victim, longest, timeout=HARD_LIMIT, expect_failure=True)
    assert all(outcomes), "a rank waits for the one that failed"
    assert [outcome.value for outcome in outcomes] == [2, 2], [o.traceback or o.output for o in outcomes]
    assert [outcome.output.count("scfm: error: ") for outcome in outcomes] == [1, 0]
    message = outcomes[0].output[outcomes[0].output.index("scfm: error: ") :]
    assert f"the checkpoint step_{HIT:08d} could not be written" in message
    assert f"The last one, step_{HIT - 1:08d}, is intact" in message
    assert not list((tmp_path / "run" / "checkpoints").glob(".step_*"))
    assert_goes_on(tree, HIT - 1, whole(name), name)


def cli_without_memory_for_the_copy(tree: dict[str, Any]) -> int:
    """In a rank: `scfm train`, in which rank 1 cannot copy its tensors for the thread that writes them."""
    import torch.distributed.checkpoint as dcp

    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no memory for the copy")

    if os.environ["RANK"] == "1":
        dcp.async_save = fail
    return train_cli(tree)


def test_a_copy_that_fails_on_one_rank_only(tiny, tmp_path):
    """The thread of the other rank already waits in a collective, but no step does."""
    tree = make_run(tiny, tmp_path / "run", "fsdp2 async")
    outcomes = run_distributed(cli_without_memory_for_the_copy, 2, tree, timeout=HARD_LIMIT, expect_failure=True)
    assert all(outcomes), "a rank waits for the one that failed"
    assert [outcome.value for outcome in outcomes] == [2, 2], [o.traceback or o.output for o in outcomes]
    assert "could not be written" in outcomes[0].output and "no memory for the copy" in outcomes[0].output


def cli_with_short_files(tree: dict[str, Any], victim: int, longest: int) -> int:
    """In a rank: `scfm train`, in which one rank cannot write files longer than so many bytes."""
    import resource

    if int(os.environ["RANK"]) == victim:
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (longest, hard))
    return train_cli(tree)


def cli_that_fills_the_disk(tree: dict[str, Any]) -> int:
    """In a rank: `scfm train`, during whose first step the disk becomes full to the last byte."""
    at_student_passes(tree, 0, lambda attempt: fill(Path(tree["run"]["dir"]).parent, 0))
    return cli_beside_the_disk(tree)


def cli_beside_the_disk(tree: dict[str, Any]) -> int:
    """In a rank: `scfm train`, its recipe beside the full disk and not on it."""
    import yaml

    path = Path(tree["run"]["dir"]).parents[1] / f"recipe.rank{os.environ['RANK']}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return main(["train", str(path)])


# Row 15: missing, cut and flipped.


@pytest.fixture(scope="module")
def two_checkpoints(without_fault, tmp_path_factory):
    """Engine -> a run with the checkpoints of steps 1 and 2; not to be changed."""
    known: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in known:
            run_dir = tmp_path_factory.mktemp("two") / "run"
            shutil.copytree(without_fault(name), run_dir)
            shutil.rmtree(checkpoint_path(run_dir, STEPS))
            (run_dir / "checkpoints" / LATEST).write_text("step_00000002")
            known[name] = run_dir
        return known[name]

    return get


def flip(path: Path, where: float, bit: int = 3) -> None:
    """Turn one bit over, at a fraction of the file's length."""
    content = bytearray(path.read_bytes())
    content[min(len(content) - 1, int(where * len(content)))] ^= 1 << bit
    path.write_bytes(content)


DAMAGES = {
    "missing": lambda path: path.unlink(),
    "cut by a byte": lambda path: os.truncate(path, path.stat().st_size - 1),
    "cut in half": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: os.truncate(path, 0),
    "a bit at the start": lambda path: flip(path, 0),
    "a bit in the middle": lambda path: flip(path, 0.5),
    "a bit at the end": lambda path: flip(path, 1, bit=0),
}
EXPECTED = {
    "fsdp2": {"dcp/.metadata", "dcp/__0_0.distcp", "dcp/__1_0.distcp"},
    "zero1": {"mp_rank_00_model_states.pt", "zero_pp_rank_1_mp_rank_00_optim_states.pt", "dcp/.metadata"},
    "zero3": {
        "zero_pp_rank_0_mp_rank_00_model_states.pt",
        "zero_pp_rank_1_mp_rank_00_optim_states.pt",
        "dcp/.metadata",
    },
}


def files_of(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("name", ALL)
def test_every_file_is_in_the_manifest(name, two_checkpoints):
    folder = checkpoint_path(two_checkpoints(name), 2)
    assert {*read_manifest(folder), MANIFEST} == {*files_of(folder)}
    assert {"state.json"} | EXPECTED.get(name, set()) <= {*read_manifest(folder)}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ALL)
def test_damage_of_any_file_is_seen(name, damage, two_checkpoints, tmp_path, capsys):
    """Resuming falls back to step 1 and says from where and why; `scfm checkpoint verify` names the file."""
    good = two_checkpoints(name)
    for file in files_of(checkpoint_path(good, 2)):
        run_dir = tmp_path / file.replace("/", "_") / "run"
        shutil.copytree(good, run_dir)
        newest = checkpoint_path(run_dir, 2)
        DAMAGES[damage](newest / file)

        warnings: list[str] = []
        assert find_checkpoint(run_dir, warnings.append) == checkpoint_path(run_dir, 1), file
        assert len(warnings) == 1
        assert str(newest) in warnings[0] and file in warnings[0] and "Falling back" in warnings[0]
        with pytest.raises(UserError, match=r"is damaged|is not a complete checkpoint"):
            load_checkpoint(newest)

        capsys.readouterr()
        for path in (run_dir, newest):
            assert main(["checkpoint", "verify", str(path)]) == 2, file
            error = capsys.readouterr().err
            assert str(newest) in error and file in error and "Traceback" not in error
        assert main(["checkpoint", "verify", str(checkpoint_path(run_dir, 1))]) == 0
        assert "intact" in capsys.readouterr().out
        shutil.rmtree(run_dir)
    assert main(["checkpoint", "verify", str(good)]) == 0


def test_no_flipped_bit_of_the_manifest_ends_in_a_traceback(two_checkpoints, tmp_path):
    """Each byte in turn; one that goes unnoticed has not changed which files are listed."""
    folder = tmp_path / "run" / "step_00000002"
    shutil.copytree(checkpoint_path(two_checkpoints("fsdp2"), 2), folder)
    good, entries = (folder / MANIFEST).read_bytes(), read_manifest(folder)
    seen = 0
    for offset in range(len(good)):
        flip(folder / MANIFEST, offset / len(good) + 1e-9, bit=7 if offset % 2 else offset % 7)
        try:
            verify_checkpoint(folder)
            assert read_manifest(folder).keys() == entries.keys(), offset
        except UserError:
            seen += 1
        (folder / MANIFEST).write_bytes(good)
    assert seen > len(good) * 0.7


@pytest.mark.parametrize("name", ["fsdp2", "zero2", "zero3"])
def test_a_damaged_run_goes_on_from_the_one_before(name, tiny, two_checkpoints, tmp_path, whole):
    """Two ranks share the hashing: one of them finds the damage, both go back, rank 0 says so."""
    run_dir = tmp_path / "run"
    shutil.copytree(two_checkpoints(name), run_dir)
    tree = make_run(tiny, run_dir, name)
    names = sorted(read_manifest(checkpoint_path(run_dir, 2)))
    file = next(names[i] for i in range(1, len(names), 2) if names[i].endswith((".pt", ".distcp")))  # rank 1's share
    flip(checkpoint_path(run_dir, 2) / file, 0.7)
    (run_dir / "checkpoints" / LATEST).write_text("step_00000002")
    outcomes = run_distributed(train_cli, 2, tree, expect_failure=True)
    assert [outcome.value for outcome in outcomes] == [0, 0], [o.traceback or o.output for o in outcomes]
    first = outcomes[0].output
    assert f"checkpoint {checkpoint_path(run_dir, 2)} is damaged: {file} differs" in first
    assert "Falling back to an earlier checkpoint" in first
    assert f"resuming from {checkpoint_path(run_dir, 1)} at step 1" in first
    assert "damaged" not in outcomes[1].output and "resuming" not in outcomes[1].output
    assert_same(run_dir, whole(name), name)
    verify_checkpoint(checkpoint_path(run_dir, STEPS))


def test_nothing_is_intact(tiny, two_checkpoints, tmp_path):
    """Then the run does not start over unless asked to."""
    run_dir = tmp_path / "run"
    shutil.copytree(two_checkpoints("fsdp2"), run_dir)
    (checkpoint_path(run_dir, 1) / "dcp" / "__1_0.distcp").unlink()
    flip(checkpoint_path(run_dir, 2) / "state.json", 0.5)
    outcomes = run_distributed(train_cli, 2, make_run(tiny, run_dir, "fsdp2"), expect_failure=True)
    assert [outcome.value for outcome in outcomes] == [2, 2], [o.traceback or o.output for o in outcomes]
    assert outcomes[0].output.count("Falling back") == 2
    assert "scfm: error: none of the 2 checkpoints in" in outcomes[0].output and "--resume never" in outcomes[0].output
    assert "scfm: error" not in outcomes[1].output


# Row 19: retention beside what a kill, a copy or a failing disk leaves.


def copy_as_step(good: Path, step: int) -> None:
    """Put the checkpoint of an abandoned attempt beside `good`: of a later step, by its name and its manifest."""
    target = good.with_name(f"step_{step:08d}")
    shutil.copytree(good, target)
    manifest = json.loads((target / MANIFEST).read_text())
    (target / MANIFEST).write_text(json.dumps(manifest | {"step": step}))


def leave_partial_folders(run_dir: Path) -> None:
    """Folders that a killed save left: of the step that comes next, of later ones, and of one before."""
    folder, good = run_dir / "checkpoints", checkpoint_path(run_dir, 1)
    shutil.copytree(good, folder / ".step_00000002.tmp")  # everything but the name
    (folder / ".step_00000009.tmp" / "dcp").mkdir(parents=True)
    shutil.copytree(good, folder / "step_00000000")  # an old one without its manifest
    (folder / "step_00000000" / MANIFEST).unlink()
    shutil.copytree(good, folder / "step_00000002", ignore=shutil.ignore_patterns(MANIFEST, "*.distcp"))
    (folder / "step_00000003").mkdir()
    copy_as_step(good, 7)  # a later one, damaged; it has a manifest
    flip(folder / "step_00000007" / "state.json", 0.5)
    (folder / f".{LATEST}.tmp").write_text("step_0000")
    (folder / LATEST).write_text("step_00000007")


def saves_and_what_is_there(tree: dict[str, Any]) -> list[list[str]]:
    """In a rank: after each save, and before it begins to delete, which checkpoints are complete and undamaged."""
    from runs import joined_trainer

    from scfm_core.train import checkpoint as module

    there: list[list[str]] = []
    run_dir = Path(tree["run"]["dir"])

    def look() -> None:
        intact = []
        for path in sorted((run_dir / "checkpoints").glob("step_*")):
            try:
                verify_checkpoint(path)
                intact.append(path.name)
            except UserError:
                pass
        there.append(intact)

    remove = module.shutil.rmtree

    def watched(path: Path, *arguments: Any, **options: Any) -> None:
        look()
        remove(path, *arguments, **options)
        look()

    with joined_trainer(tree) as trainer:
        if trainer.world.is_main:
            module.shutil.rmtree = watched  # type: ignore[assignment]
        for _ in trainer.train_steps():
            trainer.state.save()
            trainer.state.wait()
            if trainer.world.is_main:
                look()
    return there


@pytest.mark.parametrize("name", ["fsdp2", "fsdp2 async", "zero2"])
def test_retention_beside_partial_folders(name, tiny, tmp_path, whole, first_step):
    """`keep=1`: at every moment there is a good checkpoint, and at the end only the newest."""
    tree = make_run(tiny, tmp_path / "run", name)
    first_step(tree, name)
    leave_partial_folders(tmp_path / "run")
    warnings: list[str] = []
    assert find_checkpoint(tmp_path / "run", warnings.append) == checkpoint_path(tmp_path / "run", 1)
    assert len(warnings) == 3  # 7, 3 and 2
    there, _ = run_distributed(saves_and_what_is_there, 2, tree)
    assert len(there) > 6, "it deleted nothing"
    assert all(there), f"no good checkpoint at some moment: {there}"
    assert there[-1] == [f"step_{STEPS:08d}"]
    assert_same(tmp_path / "run", whole(name), name)
    folder = tmp_path / "run" / "checkpoints"
    left = {path.name for path in folder.iterdir() if path.is_dir()}
    assert f"step_{STEPS:08d}" in left and "step_00000001" not in left
    assert not [name for name in left if name.startswith(".")] and not [
        name for name in left if name > f"step_{STEPS:08d}"
    ]
    assert (folder / LATEST).read_text() == f"step_{STEPS:08d}"


def test_a_failed_save_deletes_nothing_and_calls_no_damaged_one_intact(tiny, disk, first_step):
    """A full disk with `keep=1`, beside a later checkpoint that is damaged and one without a manifest."""
    tree = make_run(tiny, disk / "run", "fsdp2")
    size = first_step(tree, "fsdp2")
    later, without = checkpoint_path(disk / "run", 7), checkpoint_path(disk / "run", 8)
    for step in (7, 8):
        copy_as_step(checkpoint_path(disk / "run", 1), step)
    flip(later / "dcp" / "__0_0.distcp", 0.5)
    (without / MANIFEST).unlink()
    fill(disk, size // 2)
    outcomes = run_distributed(train_cli, 2, tree, timeout=HARD_LIMIT, expect_failure=True)
    assert [outcome.value for outcome in outcomes] == [2, 2], [o.traceback or o.output for o in outcomes]
    verify_checkpoint(checkpoint_path(disk / "run", 1))
    assert later.is_dir() and without.is_dir()
    message = outcomes[0].output[outcomes[0].output.index("scfm: error: ") :]
    assert "the disk is full" in message
    assert "step_00000007, is intact" not in message and "step_00000008, is intact" not in message


def test_newest_complete_passes_over_partial_folders(two_checkpoints, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(two_checkpoints("zero2"), run_dir)
    leave_partial = checkpoint_path(run_dir, 5)
    leave_partial.mkdir()
    (leave_partial / "state.json").write_text(json.dumps({"step": 5}))
    assert newest_complete(run_dir) == checkpoint_path(run_dir, 2)
    assert newest_complete(run_dir, before=2) == checkpoint_path(run_dir, 1)
