"""Checkpoints: they are atomic and verified before use, and the last good one is never lost."""

import contextlib
import errno
import json
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from tiny_fixtures import mounted
from torch.distributed.checkpoint import state_dict_saver

from scfm_core.distributed.dcp import save_dcp
from scfm_core.distributed.engine import GROUPS
from scfm_core.distributed.reader import DCP_FOLDER
from scfm_core.distributed.world import World
from scfm_core.errors import UserError
from scfm_core.files import HashedFile
from scfm_core.train import checkpoint as module
from scfm_core.train.checkpoint import (
    CheckpointWriter,
    find_checkpoint,
    load_checkpoint,
    read_manifest,
    verify_checkpoint,
)
from scfm_core.train.run_dir import LATEST, MANIFEST, checkpoint_path, newest_complete, saved_step, step_of

Tensors = dict[str, torch.Tensor]


def make_tensors(seed: int = 0) -> Tensors:
    """Tensors of every group: contiguous, transposed, scalar, and with values that a conversion would change."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for group in GROUPS:
        weights = torch.randn(4, 6, generator=generator)
        tensors |= {
            f"{group}.block.0.lora_A.weight": weights,
            f"{group}.transposed": weights.clone().T,
            f"{group}.bias": torch.randn(5, generator=generator),
            f"{group}.scalar": torch.tensor(0.5 + seed),
            f"{group}.special": torch.tensor([float("nan"), float("inf"), -0.0, 1e-45]),
            f"{group}.bf16": weights.bfloat16(),
        }
    return tensors


def make_state(step: int, tensors: Tensors, **more: object) -> dict[str, object]:
    prefix = "student."
    shapes = {key.removeprefix(prefix): list(t.shape) for key, t in tensors.items() if key.startswith(prefix)}
    return {"step": step, "kind": "dcp", "shapes": shapes, **more}


def writer_of(tensors: Tensors, *, on_thread: bool = False) -> module.Write:
    return lambda folder, world: save_dcp(tensors, folder / DCP_FOLDER, world, on_thread=on_thread)


def save(run_dir: Path, step: int, keep: int = 5, *, seed: int | None = None, **more: object) -> Path:
    tensors = make_tensors(step if seed is None else seed)
    return CheckpointWriter(run_dir, keep).save(step, writer_of(tensors), make_state(step, tensors, **more))


def saved_steps(run_dir: Path) -> list[int]:
    """Steps of all folders under `checkpoints`, complete or not; any other file is an error."""
    inside = [path for path in (run_dir / "checkpoints").iterdir() if path.name != LATEST]
    return sorted(int(path.name.removeprefix("step_")) for path in inside)


def verified_latest(run_dir: Path) -> str:
    """The name in `latest`, whose checkpoint must be complete and undamaged."""
    name = (run_dir / "checkpoints" / LATEST).read_text()
    verify_checkpoint(run_dir / "checkpoints" / name)
    return name


def bits(tensor: torch.Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    return tensor.dtype, tensor.shape, tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def assert_tensors(path: Path, expected: Tensors) -> None:
    """The checkpoint has exactly these tensors, bit by bit."""
    reader = load_checkpoint(path).reader
    assert reader.shapes.keys() == expected.keys()
    for key, tensor in expected.items():
        assert bits(reader.tensor(key)) == bits(tensor), key


def assert_holds(run_dir: Path, step: int, *, seed: int | None = None) -> None:
    """The newest checkpoint is that of `step`; its tensors are equal bit by bit."""
    found = find_checkpoint(run_dir, warn=lambda _: None)
    assert found == checkpoint_path(run_dir, step)
    assert load_checkpoint(found).state == make_state(step, make_tensors())
    assert_tensors(found, make_tensors(step if seed is None else seed))


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run with the checkpoints of steps 1 and 2."""
    for step in (1, 2):
        save(tmp_path / "run", step)
    return tmp_path / "run"


class TestRoundTrip:
    def test_every_bit_is_restored(self, tmp_path):
        more = {"samples": 24, "seconds": 1.25, "config": {"run": {"dir": "läufe"}, "steps": [1, 2], "none": None}}
        path = save(tmp_path, 3, **more)
        loaded = load_checkpoint(path)
        assert loaded.path == path == tmp_path / "checkpoints" / "step_00000003"
        assert loaded.state == make_state(3, make_tensors(), **more)
        assert_tensors(path, make_tensors(3))

    def test_groups_by_parameter_name(self, run_dir):
        reader = load_checkpoint(checkpoint_path(run_dir, 2)).reader
        for group in GROUPS:
            expected = {k.removeprefix(f"{group}."): t for k, t in make_tensors(2).items() if k.startswith(group + ".")}
            read = reader.group(group)
            assert read.keys() == expected.keys()
            assert all(bits(read[name]) == bits(expected[name]) for name in expected)

    def test_manifest_lists_every_other_file(self, run_dir):
        path = checkpoint_path(run_dir, 2)
        manifest = json.loads((path / MANIFEST).read_text())
        assert (manifest["step"], manifest["format"]) == (2, 3)
        files = {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()}
        assert {MANIFEST, *manifest["files"]} == files == {MANIFEST, *FILES}

    def test_same_step_again_replaces_it(self, run_dir):
        save(run_dir, 2, seed=9)
        assert_holds(run_dir, 2, seed=9)
        assert saved_steps(run_dir) == [1, 2]
        assert verified_latest(run_dir) == "step_00000002"

    def test_newest_is_by_number(self, tmp_path):
        for step in (9, 20, 100):
            save(tmp_path, step)
        assert_holds(tmp_path, 100)

    def test_a_run_that_went_back_drops_later_checkpoints(self, tmp_path):
        """The run was resumed from step 9: the next start must not resume from step 100 of the abandoned attempt."""
        for step in (9, 100, 20):
            save(tmp_path, step)
        assert_holds(tmp_path, 20)
        assert verified_latest(tmp_path) == "step_00000020"
        assert not checkpoint_path(tmp_path, 100).exists()

    def test_a_run_without_checkpoints(self, tmp_path):
        assert find_checkpoint(tmp_path) is None
        assert newest_complete(tmp_path) is None

    def test_newest_before_a_step(self, tmp_path):
        for step in (9, 20, 100):
            save(tmp_path, step)
        checkpoint_path(tmp_path, 50).mkdir()
        names = {before: newest_complete(tmp_path, before) for before in (9, 10, 20, 21, 99, 101, None)}
        steps = {before: path and int(path.name[-8:]) for before, path in names.items()}
        assert steps == {9: None, 10: 9, 20: 9, 21: 20, 99: 20, 101: 100, None: 100}


def flip(path: Path, offset: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1 << bit
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


FILES = (f"{DCP_FOLDER}/.metadata", f"{DCP_FOLDER}/__0_0.distcp", "state.json")
DAMAGE: dict[str, Callable[[Path], object]] = {}
for _name in (*FILES, MANIFEST):
    DAMAGE |= {
        f"missing {_name}": lambda folder, name=_name: (folder / name).unlink(),
        f"cut {_name}": lambda folder, name=_name: cut(folder / name),
        f"empty {_name}": lambda folder, name=_name: (folder / name).write_bytes(b""),
        f"first bit of {_name}": lambda folder, name=_name: flip(folder / name, 0, bit=7),  # no longer UTF-8
    }
for _name in FILES:
    DAMAGE |= {
        f"last bit of {_name}": lambda folder, name=_name: flip(folder / name, -1),
        f"middle bit of {_name}": lambda folder, name=_name: flip(
            folder / name, (folder / name).stat().st_size // 2, 3
        ),
        f"longer {_name}": lambda folder, name=_name: (folder / name).open("ab").write(b"\0"),
        f"folder for {_name}": lambda folder, name=_name: ((folder / name).unlink(), (folder / name).mkdir()),
    }
DAMAGE |= {
    "no tensors": lambda folder: shutil.rmtree(folder / DCP_FOLDER),
    "manifest that lists nothing": lambda folder: (folder / MANIFEST).write_text('{"format": 3, "files": {}}'),
    "manifest without the state": lambda folder: rewrite_manifest(folder, lambda m: m["files"].pop("state.json")),
    "manifest without sizes": lambda folder: rewrite_manifest(folder, lambda m: m["files"]["state.json"].pop("bytes")),
    "manifest without files": lambda folder: rewrite_manifest(folder, lambda m: m.pop("files")),
    "other JSON": lambda folder: (folder / MANIFEST).write_text("[]"),
    "empty folder": lambda folder: (shutil.rmtree(folder), folder.mkdir()),
}


def rewrite_manifest(folder: Path, change: Callable[[dict], object]) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))


class TestDamage:
    @pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
    def test_a_damaged_checkpoint_is_skipped_with_a_warning(self, run_dir, damage):
        save(run_dir, 3)
        damage(checkpoint_path(run_dir, 3))
        warnings = []
        assert find_checkpoint(run_dir, warnings.append) == checkpoint_path(run_dir, 2)
        assert len(warnings) == 1
        assert str(checkpoint_path(run_dir, 3)) in warnings[0]
        assert "Falling back to an earlier checkpoint" in warnings[0]
        assert_holds(run_dir, 2)

    @pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
    def test_a_damaged_checkpoint_is_not_loaded(self, run_dir, damage):
        damage(checkpoint_path(run_dir, 2))
        with pytest.raises(UserError, match=r"step_00000002 is (damaged|not a complete checkpoint)"):
            load_checkpoint(checkpoint_path(run_dir, 2))

    @pytest.mark.parametrize("name", FILES)
    def test_the_damaged_file_is_named(self, run_dir, name):
        flip(checkpoint_path(run_dir, 2) / name, -1)
        with pytest.raises(UserError) as caught:
            verify_checkpoint(checkpoint_path(run_dir, 2))
        assert f"step_00000002 is damaged: {name} differs from the manifest's sha256" in str(caught.value)

    @pytest.mark.parametrize("name", FILES)
    def test_the_missing_file_is_named(self, run_dir, name):
        (checkpoint_path(run_dir, 2) / name).unlink()
        with pytest.raises(UserError) as caught:
            verify_checkpoint(checkpoint_path(run_dir, 2))
        assert str(caught.value).endswith(f"step_00000002 is damaged: {name} is missing")

    def test_a_state_that_the_manifest_does_not_list(self, run_dir):
        """Without an entry its hash could not be verified."""
        rewrite_manifest(checkpoint_path(run_dir, 2), lambda manifest: manifest["files"].pop("state.json"))
        with pytest.raises(UserError, match=r"is not a complete checkpoint \(manifest.json does not list state.json\)"):
            read_manifest(checkpoint_path(run_dir, 2))

    def test_several_damaged_checkpoints(self, run_dir):
        for step in (3, 4):
            flip(save(run_dir, step) / "state.json", 0)
        warnings = []
        assert find_checkpoint(run_dir, warnings.append) == checkpoint_path(run_dir, 2)
        assert ["step_00000004" in warnings[0], "step_00000003" in warnings[1]] == [True, True]

    def test_all_checkpoints_damaged(self, run_dir):
        for step in (1, 2):
            (checkpoint_path(run_dir, step) / MANIFEST).unlink()
        warnings = []
        with pytest.raises(UserError, match=r"none of the 2 checkpoints in .* is intact.*--resume never"):
            find_checkpoint(run_dir, warnings.append)
        assert len(warnings) == 2

    @pytest.mark.parametrize("path", ["nowhere", "run", "run/checkpoints"])
    def test_a_folder_that_is_not_a_checkpoint(self, run_dir, path):
        with pytest.raises(UserError, match="is not a complete checkpoint"):
            load_checkpoint(run_dir.parent / path)

    def test_a_flipped_bit_of_the_manifest_gives_no_other_exception(self, run_dir):
        folder = checkpoint_path(run_dir, 1)
        good = (folder / MANIFEST).read_bytes()
        for offset in range(len(good)):
            flip(folder / MANIFEST, offset, bit=7 if offset % 2 else offset % 7)  # bit 7 breaks the UTF-8
            with contextlib.suppress(UserError):
                verify_checkpoint(folder)
            (folder / MANIFEST).write_bytes(good)

    def test_a_file_that_the_manifest_does_not_list_is_not_loaded(self, run_dir):
        folder = checkpoint_path(run_dir, 2)
        shutil.copy(folder / DCP_FOLDER / "__0_0.distcp", folder / DCP_FOLDER / "__1_0.distcp")
        shutil.copy(folder / "state.json", folder / "stray.json")
        assert_holds(run_dir, 2)

    def test_latest_is_not_trusted(self, run_dir):
        (run_dir / "checkpoints" / LATEST).write_text("step_00000009")
        assert_holds(run_dir, 2)
        (run_dir / "checkpoints" / LATEST).unlink()
        assert_holds(run_dir, 2)


def first_format(folder: Path) -> None:
    """A checkpoint as scfm 0.1 wrote it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    save_file({"w": torch.zeros(2)}, folder / "student.safetensors")
    (folder / "state.json").write_text('{"step": 2}')
    files = {file.name: {"bytes": file.stat().st_size, "sha256": module.file_sha256(file)} for file in folder.iterdir()}
    (folder / MANIFEST).write_text(json.dumps({"step": step_of(folder), "files": files}))


class TestOtherFormats:
    def test_the_first_format_is_an_error_with_its_number(self, run_dir):
        first_format(checkpoint_path(run_dir, 2))
        with pytest.raises(UserError) as caught:
            load_checkpoint(checkpoint_path(run_dir, 2))
        message = str(caught.value)
        assert "step_00000002 has checkpoint format 1; this version of scfm reads 3" in message
        assert "damaged" not in message
        assert "not a complete" not in message

    @pytest.mark.parametrize("number", [4, "3", None, [3]])
    def test_a_later_format_is_an_error(self, run_dir, number):
        rewrite_manifest(checkpoint_path(run_dir, 2), lambda manifest: manifest.update(format=number))
        with pytest.raises(UserError, match=r"has checkpoint format .*; this version of scfm reads 3"):
            load_checkpoint(checkpoint_path(run_dir, 2))

    def test_a_run_with_the_first_format_does_not_start_over(self, tmp_path):
        for step in (1, 2):
            first_format(checkpoint_path(tmp_path, step))
        warnings = []
        with pytest.raises(UserError, match=r"none of the 2 checkpoints .*--resume never"):
            find_checkpoint(tmp_path, warnings.append)
        assert all("has checkpoint format 1; this version of scfm reads 3" in warning for warning in warnings)
        assert len(warnings) == 2


class TestLeftovers:
    """Files of a save that was killed after writing all files, but before the rename."""

    def leave(self, run_dir: Path, step: int) -> None:
        before = set((run_dir / "checkpoints").iterdir())
        rename = Path.rename

        def interrupted(path: Path, target: Path) -> Path:
            if Path(target).name == checkpoint_path(run_dir, step).name:
                raise KeyboardInterrupt
            return rename(path, target)

        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Path, "rename", interrupted)
            save(run_dir, step)
        (leftover,) = set((run_dir / "checkpoints").iterdir()) - before
        assert (leftover / MANIFEST).exists()

    def test_are_ignored(self, run_dir):
        self.leave(run_dir, 3)
        warnings = []
        assert find_checkpoint(run_dir, warnings.append) == checkpoint_path(run_dir, 2)
        assert warnings == []
        assert verified_latest(run_dir) == "step_00000002"

    def test_are_replaced_when_the_same_step_is_saved(self, run_dir):
        self.leave(run_dir, 3)
        save(run_dir, 3)
        assert saved_steps(run_dir) == [1, 2, 3]
        assert_holds(run_dir, 3)

    def test_are_deleted_by_any_later_save(self, run_dir):
        """A run that a signal stops saves at a step that is never saved again: gigabytes would remain forever."""
        self.leave(run_dir, 3)
        save(run_dir, 4)
        assert saved_steps(run_dir) == [1, 2, 4]


class TestCopies:
    """People keep checkpoints under names of their own, beside the run's."""

    NAMES = ("step_00000002_best", "step_00000009 (copy)", "step_best", "backup_00000009", "step_00000099", "step_9")

    @pytest.fixture
    def copied(self, run_dir):
        for name in self.NAMES:
            shutil.copytree(checkpoint_path(run_dir, 1), run_dir / "checkpoints" / name)
        return run_dir

    def names(self, run_dir):
        return {path.name for path in (run_dir / "checkpoints").iterdir()} - {LATEST}

    def test_are_not_resumed_from(self, copied):
        said = []
        assert find_checkpoint(copied, said.append) == newest_complete(copied) == checkpoint_path(copied, 2)
        assert newest_complete(copied, before=2) == checkpoint_path(copied, 1)
        assert said == [
            f"not used: {', '.join(sorted(self.NAMES))} (copies of checkpoints: runs neither resume from them nor delete them)"
        ]

    def test_are_not_deleted_and_do_not_count(self, copied):
        save(copied, 3, keep=2)
        assert self.names(copied) == {*self.NAMES, "step_00000002", "step_00000003"}

    def test_under_the_name_of_the_next_step_are_renamed(self, copied):
        save(copied, 99)
        assert_holds(copied, 99)
        assert "step_00000099_copy1" in self.names(copied)
        assert saved_step(copied / "checkpoints" / "step_00000099_copy1") == 1

    def test_a_link_under_the_name_of_the_next_step_is_renamed(self, run_dir, tmp_path):
        """Also one that leads nowhere."""
        for step in (3, 4):
            checkpoint_path(run_dir, step).symlink_to(tmp_path / "gone" if step == 3 else checkpoint_path(run_dir, 1))
            save(run_dir, step)
            assert_holds(run_dir, step)
            assert (run_dir / "checkpoints" / f"step_{step:08d}_copy1").is_symlink()
        assert checkpoint_path(run_dir, 1).is_dir()

    def test_alone_are_no_start_and_no_reason_to_start_over(self, copied):
        for step in (1, 2):
            shutil.rmtree(checkpoint_path(copied, step))
        with pytest.raises(UserError, match=r"only copies of checkpoints \(backup_00000009, .*--resume PATH"):
            find_checkpoint(copied, lambda _: None)

    def test_unfinished_saves_of_others_are_left_alone(self, run_dir):
        for name in (".step_mine.tmp", ".step_00000007.tmp", ".step_00000007.old.tmp"):
            (run_dir / "checkpoints" / name).mkdir()
        save(run_dir, 3)
        assert self.names(run_dir) == {".step_mine.tmp", *(f"step_{step:08d}" for step in (1, 2, 3))}


class TestRetention:
    def test_newest_are_kept(self, tmp_path):
        for step in range(1, 6):
            save(tmp_path, step, keep=2)
            assert verified_latest(tmp_path) == f"step_{step:08d}"
        assert saved_steps(tmp_path) == [4, 5]

    def test_incomplete_checkpoints_do_not_count(self, run_dir):
        """If they counted, only one good checkpoint of two would be kept."""
        checkpoint_path(run_dir, 3).mkdir()
        (checkpoint_path(run_dir, 3) / "state.json").write_bytes(b"partial")
        save(run_dir, 4, keep=2)
        assert {2, 4} <= set(saved_steps(run_dir))
        assert 1 not in saved_steps(run_dir)

    def test_a_new_checkpoint_is_kept_beside_a_damaged_one_of_a_later_step(self, run_dir):
        """A run resumes from before the damaged checkpoint, and a signal stops it before it reaches that step again."""
        flip(save(run_dir, 300) / DCP_FOLDER / "__0_0.distcp", -1)
        save(run_dir, 250, keep=1)
        assert_holds(run_dir, 250)

    def test_nothing_is_deleted_before_the_new_checkpoint_is_complete(self, run_dir):
        with pytest.raises(UserError):
            CheckpointWriter(run_dir, 1).save(3, raising(OSError(errno.EIO, "Input/output error")), {"step": 3})
        assert saved_steps(run_dir) == [1, 2]


def raising(error: BaseException) -> Callable[..., object]:
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    return fail


CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.link", "os.symlink", "shutil.rmtree"}
SAVED, REFUSED, WRONG = 0, 2, 99


def in_child(action: Callable[[], object], at: int | None, then: Callable[[], object]) -> int:
    """Run `action` in a forked process, and call `then` before the change number `at` to a file or folder.

    Returns:
        its exit code; without `at` the number of changes.
    """
    sys.stdout.flush()
    process = os.fork()
    if not process:
        code, count = WRONG, 0

        def hook(event: str, arguments: tuple) -> None:
            nonlocal count
            writing = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if writing and not hidden(arguments[0]):  # a kill would leave an incomplete file with its final name
                print(f"{arguments[0]} is written in place", file=sys.stderr)
                os._exit(WRONG)
            if writing or event in CHANGES:
                count += 1
                if count - 1 == at:
                    then()

        try:
            sys.addaudithook(hook)  # it cannot be removed
            action()
            code = SAVED if at is not None else count
        except UserError as error:
            text = str(error)
            if "could not be written to " in text and text.endswith("and run the same command again"):
                code = REFUSED
            else:
                traceback.print_exc()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def hidden(path: object) -> bool:
    """Whether readers ignore the file: it is not under `checkpoints`, or in a hidden folder there."""
    parts = Path(os.fsdecode(path)).parts
    return "checkpoints" not in parts or parts[parts.index("checkpoints") + 1].startswith(".")


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def broken() -> None:
    raise OSError(errno.EIO, "Input/output error")


def next_step(run_dir: Path) -> None:
    """Save a new step; the oldest checkpoint is deleted."""
    save(run_dir, 3, keep=2)


def before_an_abandoned_one(run_dir: Path) -> None:
    """Save a step before that of an abandoned attempt; steps 100 and 1 are deleted."""
    save(run_dir, 3, keep=2)


def same_step(run_dir: Path) -> None:
    """Save the same step again, after a rollback."""
    save(run_dir, 2, keep=1, seed=9)


class TestEveryMoment:
    """A save is killed, or fails, before each of its changes to the file system."""

    @pytest.fixture
    def moments(self, tmp_path) -> Callable[..., Iterator[tuple[Path, int]]]:
        def run(action: Callable[[Path], None], then: Callable[[], object]) -> Iterator[tuple[Path, int]]:
            template = tmp_path / "template"
            # With leftovers of a killed save.
            for step in (1, 100, 2) if action is before_an_abandoned_one else (1, 2):
                save(template, step)
            if action is before_an_abandoned_one:
                shutil.copytree(checkpoint_path(template, 2), checkpoint_path(template, 100))
                rewrite_manifest(checkpoint_path(template, 100), lambda manifest: manifest.update(step=100))
                (template / "checkpoints" / LATEST).write_text("step_00000100")
            (template / "checkpoints" / ".step_00000001.tmp" / DCP_FOLDER).mkdir(parents=True)

            def fresh(name: str) -> Path:
                return Path(shutil.copytree(template, tmp_path / name))

            counting = fresh("counting")
            total = in_child(lambda: action(counting), None, then)
            assert 15 <= total < WRONG, "the hook sees nothing"
            for at in range(total):
                copy = fresh(f"at_{at}")
                code = in_child(lambda copy=copy: action(copy), at, then)
                assert code in ((-signal.SIGKILL,) if then is killed else (SAVED, REFUSED)), at
                yield copy, code
                shutil.rmtree(copy)

        return run

    @pytest.mark.processes
    @pytest.mark.parametrize("then", [killed, broken], ids=["killed", "failing"])
    @pytest.mark.parametrize("action", [next_step, before_an_abandoned_one])
    def test_saving_a_new_step(self, moments, action, then):
        ends, codes = set(), set()
        for run_dir, code in moments(action, then):
            name = verified_latest(run_dir)
            found = find_checkpoint(run_dir, warn=lambda _: None)
            step = int(found.name[-8:])
            assert step in ((2, 3) if action is next_step else (2, 3, 100))
            assert_tensors(found, make_tensors(2 if step == 100 else step))
            if action is next_step:
                assert name in ("step_00000002", found.name)
            if code == SAVED:
                assert (name, step) == ("step_00000003", 3)
            assert newest_complete(run_dir) is not None
            save(run_dir, 4, keep=2)
            assert_holds(run_dir, 4)
            assert not [path for path in (run_dir / "checkpoints").iterdir() if path.name.startswith(".step")]
            assert verified_latest(run_dir) == "step_00000004"
            ends.add(step)
            codes.add(code)
        assert {2 if action is next_step else 100, 3} <= ends
        assert codes == ({-signal.SIGKILL} if then is killed else {SAVED, REFUSED})

    @pytest.mark.processes
    @pytest.mark.parametrize("then", [killed, broken], ids=["killed", "failing"])
    def test_saving_an_existing_step(self, moments, then):
        """There is always a good checkpoint. `latest` may be missing, but never names a bad one."""
        outcomes = set()
        for run_dir, code in moments(same_step, then):
            found = find_checkpoint(run_dir, warn=lambda _: None)
            assert found is not None
            has_latest = (run_dir / "checkpoints" / LATEST).exists()
            assert not has_latest or verified_latest(run_dir) == found.name
            reader = load_checkpoint(found).reader
            bias = bits(reader.tensor("student.bias"))
            (seed,) = [seed for seed in (1, 2, 9) if bits(make_tensors(seed)["student.bias"]) == bias]
            assert_tensors(found, make_tensors(seed))
            assert found.name == f"step_{1 if seed == 1 else 2:08d}"
            assert code != SAVED or seed == 9
            outcomes.add((code, seed == 9, has_latest))
            save(run_dir, 2, seed=9)
            assert_holds(run_dir, 2, seed=9)
            assert verified_latest(run_dir) == "step_00000002"
        codes = {-signal.SIGKILL} if then is killed else {SAVED, REFUSED}
        assert {code for code, _, _ in outcomes} == codes
        assert {(is_new, has_latest) for _, is_new, has_latest in outcomes} >= {
            (False, True),
            (True, True),
            (True, False),
        }

    def test_everything_is_on_disk_before_the_rename(self, run_dir, monkeypatch):
        order, fsync, rename = [], os.fsync, Path.rename

        def recorded_fsync(descriptor: int) -> None:
            order.append(("fsync", str(Path(f"/proc/self/fd/{descriptor}").readlink())))
            fsync(descriptor)

        def recorded_rename(path: Path, target: Path) -> Path:
            order.append(("rename", str(target)))
            return rename(path, target)

        monkeypatch.setattr(os, "fsync", recorded_fsync)
        monkeypatch.setattr(Path, "rename", recorded_rename)
        final = save(run_dir, 3)
        named = order.index(("rename", str(final)))
        before = {Path(path) for kind, path in order[:named] if kind == "fsync"}
        before |= {path.with_name(".metadata") for path in before if path.name == ".metadata.tmp"}  # DCP renames it
        partial = final.with_name(f".{final.name}.tmp")
        expected = [partial, *(partial / path.relative_to(final) for path in final.rglob("*"))]
        assert before >= set(expected)
        assert ("fsync", str(final.parent)) in order[named:]
        assert ("fsync", str(final.with_name(f".{LATEST}.tmp"))) in order[named:]


class TestFailedWrites:
    def assert_intact(self, run_dir: Path) -> None:
        assert saved_steps(run_dir) == [1, 2]
        assert_holds(run_dir, 2)
        assert verified_latest(run_dir) == "step_00000002"

    @pytest.mark.parametrize(
        ("tensors", "more"),
        [
            ({"student.big": torch.zeros(1 << 19)}, {}),
            ({f"student.{n:04d}{'x' * 3500}": torch.zeros(1) for n in range(300)}, {}),
            ({"student.small": torch.zeros(4)}, {"big": "x" * (2 << 20)}),
        ],
        ids=["tensors", "metadata", "state"],
    )
    def test_full_disk(self, tiny_disk, tensors, more):
        for step in (1, 2):
            save(tiny_disk, step)
        with pytest.raises(UserError) as caught:
            CheckpointWriter(tiny_disk, 1).save(3, writer_of(tensors), make_state(3, {}, **more))
        message = str(caught.value)
        folder = tiny_disk / "checkpoints"
        assert f"the checkpoint step_00000003 could not be written to {folder}: the disk is full (" in message
        assert "make room. The last one, step_00000002, is intact. " in message
        assert message.endswith("run the same command again")
        assert "\n" not in message
        self.assert_intact(tiny_disk)

        save(tiny_disk, 3)  # there is room for a small one: the failed save left no files
        assert_holds(tiny_disk, 3)

    def test_full_disk_before_the_first_checkpoint(self, tiny_disk):
        with pytest.raises(UserError, match=r"the disk is full \(.*\); make room\. Fix this") as caught:
            CheckpointWriter(tiny_disk, 1).save(1, writer_of({"student.big": torch.zeros(1 << 19)}), make_state(1, {}))
        assert "intact" not in str(caught.value)
        assert saved_steps(tiny_disk) == []
        assert not (tiny_disk / "checkpoints" / LATEST).exists()

    @pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
    @pytest.mark.parametrize("late", [False, True], ids=["immediately", "while waiting"])
    def test_full_disk_or_quota(self, run_dir, number, late):
        fail = raising(OSError(number, os.strerror(number)))
        with pytest.raises(
            UserError, match=r"the disk is full \(.*\); make room\. The last one, step_00000002, is intact"
        ):
            CheckpointWriter(run_dir, 5).save(3, (lambda folder, world: fail) if late else fail, make_state(3, {}))
        self.assert_intact(run_dir)

    @pytest.mark.parametrize("place", [(HashedFile, "write"), (Path, "write_text")])
    @pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
    def test_full_disk_or_quota_at_any_place(self, run_dir, monkeypatch, place, number):
        with monkeypatch.context() as patch:
            patch.setattr(*place, raising(OSError(number, os.strerror(number))))
            with pytest.raises(UserError, match=r"the disk is full .*The last one, step_00000002, is intact"):
                save(run_dir, 3)
        self.assert_intact(run_dir)

    @pytest.mark.parametrize("place", [(os, "fsync"), (module, "fsync_path")])
    def test_failing_device(self, run_dir, monkeypatch, place):
        """A disk may fail only in fsync; then nothing may be renamed."""
        with monkeypatch.context() as patch:
            patch.setattr(*place, raising(OSError(errno.EIO, "Input/output error")))
            with pytest.raises(UserError, match=r"step_00000003 could not be written .*Input/output error") as caught:
                save(run_dir, 3)
        assert "disk is full" not in str(caught.value)
        assert "make room" not in str(caught.value)
        self.assert_intact(run_dir)

    @pytest.mark.parametrize("damaged", [False, True], ids=["empty", "damaged"])
    def test_the_message_calls_only_intact_checkpoints_intact(self, run_dir, damaged):
        if damaged:
            flip(save(run_dir, 9) / DCP_FOLDER / "__0_0.distcp", -1)
        else:
            checkpoint_path(run_dir, 9).mkdir()
        with pytest.raises(UserError) as caught:
            CheckpointWriter(run_dir, 5).save(3, raising(OSError(errno.ENOSPC, "No space left")), make_state(3, {}))
        assert "step_00000009, is intact" not in str(caught.value)

    def test_the_advice_depends_on_the_reason(self, tmp_path):
        (tmp_path / "run").write_text("a file where the run's folder should be")
        with pytest.raises(UserError, match=r"Not a directory.*Fix this and run the same command again") as caught:
            save(tmp_path / "run", 1)
        assert "room" not in str(caught.value)
        assert "full" not in str(caught.value)

    @pytest.mark.processes
    def test_read_only_file_system(self, tmp_path):
        for disk in mounted(tmp_path / "disk", "ro"):
            with pytest.raises(UserError, match=r"step_00000001 could not be written to .*Read-only file system"):
                save(disk, 1)

    def test_a_second_ctrl_c_is_not_a_failed_write(self, run_dir, monkeypatch):
        """It interrupts the run at any place; DCP would turn it into an error of its own."""
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(HashedFile, "write", raising(KeyboardInterrupt()))
            save(run_dir, 3)
        assert_holds(run_dir, 2)


class Gate:
    """Blocks DCP's own thread until the test opens it."""

    def __init__(self) -> None:
        self.opened = threading.Event()
        self.error: BaseException | None = None
        self._save = state_dict_saver.save

    def __call__(self, *args: object, **kwargs: object) -> object:
        assert threading.current_thread() is not threading.main_thread()
        assert self.opened.wait(30)
        if self.error is not None:
            raise self.error
        return self._save(*args, **kwargs)


class TestOnThread:
    @pytest.fixture
    def world(self):
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        yield World(group=dist.group.WORLD)
        dist.destroy_process_group()

    @pytest.fixture
    def gate(self, monkeypatch):
        gate = Gate()
        monkeypatch.setattr(state_dict_saver, "save", gate)
        return gate

    @pytest.fixture
    def writer(self, run_dir, world):
        writer = CheckpointWriter(run_dir, 2, world, on_thread=True)
        yield writer
        with contextlib.suppress(UserError):
            writer.wait()

    def begin(self, writer: CheckpointWriter, step: int, tensors: Tensors | None = None) -> Path:
        tensors = tensors or make_tensors(step)
        return writer.save(step, writer_of(tensors, on_thread=True), make_state(step, tensors))

    def test_values_are_from_the_time_of_the_save(self, writer, gate, run_dir):
        tensors = make_tensors(3)
        path = self.begin(writer, 3, tensors)
        for tensor in tensors.values():  # what the next optimizer step does
            tensor.fill_(7)
        gate.opened.set()
        writer.wait()
        assert path == checkpoint_path(run_dir, 3)
        assert_holds(run_dir, 3)

    def test_a_folder_has_no_final_name_before_it_is_complete(self, writer, gate, run_dir):
        path = self.begin(writer, 3)
        time.sleep(0.1)
        assert not path.exists()
        assert verified_latest(run_dir) == "step_00000002"
        assert_holds(run_dir, 2)
        gate.opened.set()
        writer.wait()
        assert verified_latest(run_dir) == path.name
        assert_holds(run_dir, 3)

    def test_the_next_save_waits_for_the_previous_one(self, writer, gate, run_dir):
        self.begin(writer, 3)
        threading.Timer(0.2, gate.opened.set).start()
        self.begin(writer, 4)
        assert checkpoint_path(run_dir, 3).is_dir()
        writer.wait()
        assert_holds(run_dir, 4)

    def test_newest_are_kept(self, writer, run_dir):
        for step in range(3, 8):
            self.begin(writer, step)
        writer.wait()
        assert saved_steps(run_dir) == [6, 7]
        assert verified_latest(run_dir) == "step_00000007"
        assert_holds(run_dir, 7)

    @pytest.mark.parametrize("raised_at", ["wait", "next save"])
    def test_an_error_is_raised_later(self, writer, gate, run_dir, raised_at):
        gate.error = OSError(errno.ENOSPC, "No space left on device")
        gate.opened.set()
        self.begin(writer, 3)
        message = r"step_00000003 could not be written to .*the disk is full.*The last one, step_00000002, is intact"
        with pytest.raises(UserError, match=message):
            writer.wait() if raised_at == "wait" else self.begin(writer, 4)
        assert saved_steps(run_dir) == [1, 2]
        assert_holds(run_dir, 2)
        assert verified_latest(run_dir) == "step_00000002"
        writer.wait()  # it is raised only once
        gate.error = None
        self.begin(writer, 5)
        writer.wait()
        assert_holds(run_dir, 5)

    def test_an_error_after_writing(self, writer, run_dir, monkeypatch):
        with monkeypatch.context() as patch:
            patch.setattr(module, "fsync_path", raising(OSError(errno.EIO, "Input/output error")))
            self.begin(writer, 3)
            with pytest.raises(UserError, match=r"step_00000003 could not be written .*Input/output error"):
                writer.wait()
        assert saved_steps(run_dir) == [1, 2]

    def test_an_error_before_writing(self, writer, run_dir):
        """Copying to host memory may fail."""
        with pytest.raises(UserError, match=r"step_00000003 could not be written .*out of memory"):
            writer.save(3, raising(RuntimeError("out of memory")), make_state(3, {}))
            writer.wait()
        assert saved_steps(run_dir) == [1, 2]

    def test_wait_without_a_save(self, writer):
        writer.wait()

    def test_both_kinds_of_writer_write_the_same_files(self, writer, run_dir):
        """With and without a thread."""
        self.begin(writer, 3)
        writer.wait()
        threaded = read_manifest(checkpoint_path(run_dir, 3))
        assert threaded.keys() == read_manifest(checkpoint_path(run_dir, 2)).keys()
