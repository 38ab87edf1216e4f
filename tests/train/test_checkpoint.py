"""Checkpoints: complete or not there, never trusted unread, and never the last good one lost."""

import contextlib
import errno
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from scfm_core.errors import UserError
from scfm_core.train import checkpoint as module
from scfm_core.train.checkpoint import (
    MANIFEST,
    checkpoint_path,
    find_checkpoint,
    load_checkpoint,
    save_checkpoint,
    verify_checkpoint,
)

STATE = {"step": 3, "samples": 24, "seconds": 1.25, "config": {"run": {"dir": "läufe"}, "steps": [1, 2], "none": None}}


def make_tensors(seed: int = 0) -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(4, 6, generator=generator)
    return {
        "student": {"block.0.lora_A.weight": weights, "transposed": weights.clone().T, "scalar": torch.tensor(0.5)},
        "ema_fast": {"special": torch.tensor([float("nan"), float("inf"), -0.0, 1e-45])},
        "optimizer": {"bf16": weights.bfloat16(), "count": torch.tensor(2**53 + 1), "flags": torch.tensor([True])},
        "empty": {},
    }


def save(run_dir: Path, step: int, keep: int = 5) -> Path:
    return save_checkpoint(run_dir, step, make_tensors(step), {"step": step}, keep)


def saved_steps(run_dir: Path) -> list[int]:
    """Every folder under `checkpoints`, complete or not; a leftover fails."""
    return sorted(int(path.name.removeprefix("step_")) for path in (run_dir / "checkpoints").iterdir())


def bits(tensor: torch.Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    return tensor.dtype, tensor.shape, tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def assert_holds(run_dir: Path, step: int) -> None:
    """The newest checkpoint is that of `step`, bit by bit."""
    found = find_checkpoint(run_dir, warn=lambda _: None)
    assert found == checkpoint_path(run_dir, step)
    loaded = load_checkpoint(found)
    assert loaded.state == {"step": step}
    for group, members in make_tensors(step).items():
        assert loaded.tensors[group].keys() == members.keys()
        for name, tensor in members.items():
            assert bits(loaded.tensors[group][name]) == bits(tensor), (group, name)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run with the checkpoints of steps 1 and 2."""
    for step in (1, 2):
        save(tmp_path / "run", step)
    return tmp_path / "run"


class TestRoundTrip:
    def test_every_bit_comes_back(self, tmp_path):
        path = save_checkpoint(tmp_path, 3, make_tensors(), STATE, keep=1)
        loaded = load_checkpoint(path)
        assert loaded.path == path == tmp_path / "checkpoints" / "step_00000003"
        assert loaded.state == STATE
        assert loaded.tensors.keys() == make_tensors().keys()
        for group, members in make_tensors().items():
            assert {name: bits(t) for name, t in loaded.tensors[group].items()} == {
                n: bits(t) for n, t in members.items()
            }

    def test_parameters_are_saved_as_tensors(self, tmp_path):
        parameter = torch.nn.Parameter(torch.ones(2))
        loaded = load_checkpoint(save_checkpoint(tmp_path, 1, {"student": {"w": parameter}}, {}, 1))
        assert torch.equal(loaded.tensors["student"]["w"], parameter)

    def test_manifest_lists_every_other_file(self, run_dir):
        path = checkpoint_path(run_dir, 2)
        manifest = json.loads((path / MANIFEST).read_text())
        assert manifest["step"] == 2
        assert {MANIFEST, *manifest["files"]} == {file.name for file in path.iterdir()}

    def test_no_file_is_a_pickle(self, run_dir):
        for file in checkpoint_path(run_dir, 2).iterdir():
            if file.suffix == ".json":
                json.loads(file.read_text())
            else:
                assert file.suffix == ".safetensors"
                with safe_open(file, framework="pt") as opened:
                    assert opened.metadata() is None

    def test_same_step_again_replaces_it(self, run_dir):
        save_checkpoint(run_dir, 2, make_tensors(9), {"step": 9}, keep=5)
        assert load_checkpoint(checkpoint_path(run_dir, 2)).state == {"step": 9}
        assert saved_steps(run_dir) == [1, 2]

    def test_newest_is_by_number(self, tmp_path):
        for step in (9, 20, 100):
            save(tmp_path, step)
        assert_holds(tmp_path, 100)

    def test_a_run_that_went_back_forgets_what_it_went_behind(self, tmp_path):
        """Resumed from step 9 by hand: the next start must not jump to step 100 of the abandoned run."""
        for step in (9, 100, 20):
            save(tmp_path, step)
        assert_holds(tmp_path, 20)
        assert not checkpoint_path(tmp_path, 100).exists()

    def test_run_without_checkpoints(self, tmp_path):
        assert find_checkpoint(tmp_path) is None


def flip(path: Path, offset: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1 << bit
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


DAMAGE = {
    "flipped bit": lambda folder: flip(folder / "student.safetensors", -3),
    "flipped bit in the state": lambda folder: flip(folder / "state.json", 4),
    "cut file": lambda folder: cut(folder / "optimizer.safetensors"),
    "missing tensors": lambda folder: (folder / "ema_fast.safetensors").unlink(),
    "missing state": lambda folder: (folder / "state.json").unlink(),
    "missing manifest": lambda folder: (folder / MANIFEST).unlink(),
    "cut manifest": lambda folder: cut(folder / MANIFEST),
    "empty manifest": lambda folder: (folder / MANIFEST).write_text(""),
    "manifest that lists nothing": lambda folder: (folder / MANIFEST).write_text('{"files": {}}'),
    "other JSON": lambda folder: (folder / MANIFEST).write_text("[]"),
    "empty folder": lambda folder: [file.unlink() for file in folder.iterdir()],
}


class TestDamage:
    @pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
    def test_falls_back_and_says_what_it_passed_over(self, run_dir, damage):
        save(run_dir, 3)
        damage(checkpoint_path(run_dir, 3))
        warnings = []
        assert find_checkpoint(run_dir, warnings.append) == checkpoint_path(run_dir, 2)
        assert len(warnings) == 1
        assert str(checkpoint_path(run_dir, 3)) in warnings[0]
        assert "Falling back to an earlier checkpoint" in warnings[0]
        assert_holds(run_dir, 2)

    @pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
    def test_is_not_loaded_when_asked_for_by_name(self, run_dir, damage):
        damage(checkpoint_path(run_dir, 2))
        with pytest.raises(UserError, match=r"step_00000002 is (damaged|not a complete checkpoint)"):
            load_checkpoint(checkpoint_path(run_dir, 2))

    def test_damaged_file_is_named(self, run_dir):
        flip(checkpoint_path(run_dir, 2) / "optimizer.safetensors", -1)
        with pytest.raises(UserError, match=r"optimizer\.safetensors differs from the manifest's sha256"):
            verify_checkpoint(checkpoint_path(run_dir, 2))

    def test_several_in_a_row(self, run_dir):
        for step in (3, 4):
            flip(save(run_dir, step) / "state.json", 0)
        warnings = []
        assert find_checkpoint(run_dir, warnings.append) == checkpoint_path(run_dir, 2)
        assert ["step_00000004" in warnings[0], "step_00000003" in warnings[1]] == [True, True]

    def test_all_of_them(self, run_dir):
        for step in (1, 2):
            (checkpoint_path(run_dir, step) / MANIFEST).unlink()
        warnings = []
        with pytest.raises(UserError, match=r"none of the 2 checkpoints in .* is intact.*--resume never"):
            find_checkpoint(run_dir, warnings.append)
        assert len(warnings) == 2

    @pytest.mark.parametrize("path", ["nowhere", "run", "run/checkpoints"])
    def test_what_is_no_checkpoint_at_all(self, run_dir, path):
        with pytest.raises(UserError, match="is not a complete checkpoint"):
            load_checkpoint(run_dir.parent / path)

    def test_no_flipped_bit_of_the_manifest_ends_in_a_traceback(self, tmp_path):
        folder = save_checkpoint(tmp_path, 1, {"student": {"w": torch.ones(1)}}, {}, 1)
        good = (folder / MANIFEST).read_bytes()
        for offset in range(len(good)):
            flip(folder / MANIFEST, offset, bit=7 if offset % 2 else offset % 7)  # bit 7 breaks the UTF-8
            with contextlib.suppress(UserError):
                verify_checkpoint(folder)
            (folder / MANIFEST).write_bytes(good)

    def test_file_that_the_manifest_does_not_list_is_not_loaded(self, run_dir):
        folder = checkpoint_path(run_dir, 2)
        shutil.copy(folder / "student.safetensors", folder / "stray.safetensors")
        assert load_checkpoint(folder).tensors.keys() == make_tensors().keys()


class TestLeftovers:
    """What a `kill -9` leaves at the worst moment: every file is written, and the folder not yet renamed."""

    def leave(self, run_dir: Path, step: int) -> None:
        before = set((run_dir / "checkpoints").iterdir())
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Path, "rename", raising(KeyboardInterrupt()))
            save(run_dir, step)
        (leftover,) = set((run_dir / "checkpoints").iterdir()) - before
        assert (leftover / MANIFEST).exists()

    def test_are_ignored(self, run_dir):
        self.leave(run_dir, 3)
        warnings = []
        assert find_checkpoint(run_dir, warnings.append) == checkpoint_path(run_dir, 2)
        assert warnings == []

    def test_are_replaced_when_the_same_step_is_saved(self, run_dir):
        self.leave(run_dir, 3)
        save(run_dir, 3)
        assert saved_steps(run_dir) == [1, 2, 3]
        assert_holds(run_dir, 3)

    def test_are_cleaned_up_by_any_later_save(self, run_dir):
        """A run stopped by a signal saves at an odd step, which never comes again: gigabytes would stay for ever."""
        self.leave(run_dir, 3)
        save(run_dir, 4)
        assert saved_steps(run_dir) == [1, 2, 4]


class TestRetention:
    def test_newest_are_kept(self, tmp_path):
        for step in range(1, 6):
            save(tmp_path, step, keep=2)
        assert saved_steps(tmp_path) == [4, 5]

    def test_incomplete_ones_do_not_count(self, run_dir):
        """Counting them would leave one good checkpoint where two were asked for."""
        checkpoint_path(run_dir, 3).mkdir()
        (checkpoint_path(run_dir, 3) / "student.safetensors").write_bytes(b"partial")
        save(run_dir, 4, keep=2)
        assert {2, 4} <= set(saved_steps(run_dir))
        assert 1 not in saved_steps(run_dir)

    def test_new_one_outlives_a_damaged_one_of_a_later_step(self, run_dir):
        """A resumed run falls back behind the damaged one, and a signal stops it before it gets there again."""
        flip(save(run_dir, 300) / "student.safetensors", -1)
        save(run_dir, 250, keep=1)
        assert_holds(run_dir, 250)

    def test_nothing_is_dropped_before_the_new_one_is_complete(self, run_dir, monkeypatch):
        monkeypatch.setattr(module, "save_file", raising(OSError(errno.EIO, "Input/output error")))
        with pytest.raises(UserError):
            save(run_dir, 3, keep=1)
        assert saved_steps(run_dir) == [1, 2]


def raising(error: Exception):
    def fail(*args, **kwargs):
        raise error

    return fail


@pytest.fixture
def tiny_disk(tmp_path: Path):
    """A file system of one megabyte."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if not mounted or mounted.returncode:
        pytest.skip("a file system can only be mounted by root, on Linux")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


class TestFailedWrites:
    def assert_intact(self, run_dir: Path) -> None:
        assert saved_steps(run_dir) == [1, 2]
        assert_holds(run_dir, 2)

    @pytest.mark.parametrize(
        ("tensors", "state"),
        [
            ({"student": {"big": torch.zeros(1 << 19)}}, {}),
            ({"a": {"small": torch.zeros(1 << 16)}, "b": {"big": torch.zeros(1 << 18)}}, {}),
            ({"student": {"small": torch.zeros(4)}}, {"big": "x" * (2 << 20)}),
        ],
        ids=["first file", "second file", "state"],
    )
    def test_full_disk(self, tiny_disk, tensors, state):
        for step in (1, 2):
            save(tiny_disk, step)
        with pytest.raises(UserError) as caught:
            save_checkpoint(tiny_disk, 3, tensors, state, keep=1)
        message = str(caught.value)
        assert (
            f"the checkpoint of step 3 could not be written to {tiny_disk / 'checkpoints'}: the disk is full" in message
        )
        assert "The last one, step_00000002, is intact. Make room" in message
        self.assert_intact(tiny_disk)

        save(tiny_disk, 3)  # room enough for a small one: the failure left nothing behind
        assert_holds(tiny_disk, 3)

    def test_full_disk_before_the_first_checkpoint(self, tiny_disk):
        with pytest.raises(UserError, match=r"the disk is full\. Make room"):
            save_checkpoint(tiny_disk, 1, {"student": {"big": torch.zeros(1 << 19)}}, {}, keep=1)
        assert saved_steps(tiny_disk) == []

    @pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
    @pytest.mark.parametrize("files_before", [0, 2])
    def test_full_disk_or_quota(self, run_dir, monkeypatch, number, files_before):
        written, write = [], module.save_file

        def full(tensors, path):
            if len(written) == files_before:
                raise OSError(number, os.strerror(number))
            written.append(path)
            write(tensors, path)

        monkeypatch.setattr(module, "save_file", full)
        with pytest.raises(UserError, match=r"the disk is full\. The last one, step_00000002, is intact"):
            save(run_dir, 3)
        self.assert_intact(run_dir)

    def test_failing_device(self, run_dir, monkeypatch):
        """A disk may fail as late as in fsync; then nothing may be renamed into place."""
        monkeypatch.setattr(os, "fsync", raising(OSError(errno.EIO, "Input/output error")))
        with pytest.raises(UserError, match=r"step 3 could not be written .*Input/output error"):
            save(run_dir, 3)
        monkeypatch.undo()
        self.assert_intact(run_dir)

    def test_what_is_called_intact_is(self, run_dir, monkeypatch):
        checkpoint_path(run_dir, 9).mkdir()
        monkeypatch.setattr(module, "save_file", raising(OSError(errno.ENOSPC, "No space left on device")))
        with pytest.raises(UserError, match="The last one, step_00000002, is intact"):
            save(run_dir, 3)

    def test_advice_fits_the_reason(self, tmp_path):
        (tmp_path / "run").write_text("a file where the run's folder should be")
        with pytest.raises(UserError, match="Not a directory") as caught:
            save(tmp_path / "run", 1)
        assert "Make room" not in str(caught.value)
