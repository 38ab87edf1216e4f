"""Any range of any tensor is read back from every engine's checkpoint, and no file that is read can execute code."""

import copyreg
import itertools
import os
import pickle
import random
import weakref
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from launch import run_distributed
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from scfm_core.distributed.dcp import save_dcp
from scfm_core.distributed.engine import GROUPS, Slot
from scfm_core.distributed.reader import DCP_FOLDER, DcpReader, _load, open_reader
from scfm_core.distributed.world import World
from scfm_core.errors import UserError

SHAPES = {"bias": (13,), "one": (1,), "scalar": (), "tall": (9, 2), "wide": (2, 9), "row": (1, 7), "column": (7, 1)}


def make_tensors() -> dict[str, torch.Tensor]:
    """Every element has a value of its own."""
    tensors, count = {}, 0
    for group in GROUPS:
        for name, shape in SHAPES.items():
            size = torch.Size(shape).numel()
            tensors[f"{group}.{name}"] = torch.arange(count, count + size, dtype=torch.float32).view(shape)
            count += size
    return tensors


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint's folder, written by one process."""
    save_dcp(make_tensors(), tmp_path / DCP_FOLDER, World(), on_thread=False)
    return tmp_path


def open_dcp(folder: Path) -> object:
    return open_reader(folder, "dcp", {name: list(shape) for name, shape in SHAPES.items()})


def assert_reads_every_range(reader, expected: dict[str, torch.Tensor]) -> None:
    assert {key: tuple(shape) for key, shape in reader.shapes.items()} == {
        k: tuple(t.shape) for k, t in expected.items()
    }
    ranges = []
    for key, whole in expected.items():
        assert torch.equal(reader.tensor(key), whole), key
        ranges += [(key, start, stop) for start, stop in itertools.combinations(range(whole.numel() + 1), 2)]
    random.Random(0).shuffle(ranges)  # neighbours and strangers, so that nothing kept from the last read is believed
    for key, start, stop in ranges:
        read = reader.read(key, start, stop)
        assert read.device.type == "cpu"
        assert read.dtype == expected[key].dtype
        assert torch.equal(read, expected[key].reshape(-1)[start:stop]), (key, start, stop)


class TestRanges:
    def test_of_what_one_process_wrote(self, folder):
        assert_reads_every_range(DcpReader(folder / DCP_FOLDER), make_tensors())
        assert_reads_every_range(open_dcp(folder), make_tensors())

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.int64])
    def test_dtype_is_the_writers(self, tmp_path, dtype):
        tensors = {f"{group}.w": torch.arange(6).to(dtype).view(2, 3) for group in GROUPS}
        save_dcp(tensors, tmp_path / DCP_FOLDER, World(), on_thread=False)
        assert_reads_every_range(open_reader(tmp_path, "dcp", {"w": [2, 3]}), tensors)

    def test_of_tensors_whose_memory_is_in_another_order(self, tmp_path):
        base = torch.arange(24, dtype=torch.float32)
        kinds = [base.view(4, 6).T, base.view(4, 6)[:, ::2], base[::2], base.view(4, 6)[1], base[5:9].expand(3, 4)]
        tensors = {f"{group}.{n}": tensor for group in GROUPS for n, tensor in enumerate(kinds)}
        save_dcp(tensors, tmp_path / DCP_FOLDER, World(), on_thread=False)
        assert_reads_every_range(DcpReader(tmp_path / DCP_FOLDER), tensors)

    @pytest.mark.parametrize("ranks", [2, 3])
    def test_of_what_several_processes_wrote(self, tmp_path, ranks):
        """Shards of unequal lengths, and none at all on some ranks."""
        run_distributed(_write_sharded, ranks, str(tmp_path / DCP_FOLDER))
        assert len(list((tmp_path / DCP_FOLDER).glob("*.distcp"))) == ranks
        assert_reads_every_range(DcpReader(tmp_path / DCP_FOLDER), make_tensors())
        assert_reads_every_range(open_dcp(tmp_path), make_tensors())

    def test_tensors_stored_flattened_have_their_shape(self, tmp_path):
        """As ZeRO-3's averages are."""
        flat = {key: tensor.reshape(-1) for key, tensor in make_tensors().items()}
        save_dcp(flat, tmp_path / DCP_FOLDER, World(), on_thread=False)
        assert_reads_every_range(open_dcp(tmp_path), make_tensors())

    def test_what_is_read_is_the_readers_own(self, folder):
        """Whoever scales it in place must not find it scaled when it is read again."""
        reader = open_dcp(folder)
        for _ in range(2):
            read = reader.tensor("student.tall")
            assert torch.equal(read, make_tensors()["student.tall"])
            read.zero_()


def test_a_reader_that_nothing_uses_is_freed(tmp_path):
    folder = tmp_path
    save_dcp(make_tensors(), folder, World(), on_thread=False)()
    reader = DcpReader(folder)
    reader.tensor("student.tall")
    alive = weakref.ref(reader)
    del reader
    assert alive() is None


class TestSlots:
    def test_are_filled_in_place(self, folder):
        expected = make_tensors()
        slots, whole = {}, {}
        for key, tensor in expected.items():
            whole[key] = torch.full_like(tensor, -1).view(-1)
            half = tensor.numel() // 2
            slots[key] = Slot(whole[key][half:], half)
        open_dcp(folder).fill(slots)
        for key, tensor in expected.items():
            half = tensor.numel() // 2
            assert torch.equal(whole[key][half:], tensor.view(-1)[half:]), key
            assert bool((whole[key][:half] == -1).all()), key

    def test_of_two_dimensions_from_the_middle(self, folder):
        local = torch.zeros(3, 2)
        open_dcp(folder).fill({"student.tall": Slot(local, 4)})
        assert torch.equal(local, make_tensors()["student.tall"][2:5])

    def test_without_elements_are_left_alone(self, folder):
        """A rank beyond the last row."""
        open_dcp(folder).fill({"student.wide": Slot(torch.zeros(0, 9), 18), "student.bias": Slot(torch.zeros(0), 13)})

    def test_of_leaves_that_require_gradients(self, folder):
        parameter = torch.nn.Parameter(torch.zeros(13))
        open_dcp(folder).fill({"ema_slow.bias": Slot(parameter)})
        assert torch.equal(parameter, make_tensors()["ema_slow.bias"])

    def test_that_the_checkpoint_lacks_are_named(self, folder):
        with pytest.raises(UserError, match=r"has no tensor 'student\.other'; it was written by another version"):
            open_dcp(folder).fill({"student.other": Slot(torch.zeros(1))})


def _write_sharded(folder: str) -> None:
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    tensors = {
        key: distribute_tensor(tensor, mesh, [Shard(0) if tensor.ndim else Replicate()])
        for key, tensor in make_tensors().items()
    }
    dcp.save(tensors, checkpoint_id=folder)
    dist.destroy_process_group()


class TestWhatIsMissing:
    @pytest.mark.parametrize("missing", [GROUPS[:1], GROUPS[1:3], GROUPS[3:], GROUPS])
    def test_groups_are_named(self, tmp_path, missing):
        tensors = {k: t for k, t in make_tensors().items() if k.partition(".")[0] not in missing}
        save_dcp(tensors or {"other.w": torch.zeros(1)}, tmp_path / DCP_FOLDER, World(), on_thread=False)
        with pytest.raises(UserError) as caught:
            open_dcp(tmp_path)
        assert str(caught.value).endswith(f"has no tensors of {', '.join(missing)}")

    def test_a_group_is_not_taken_for_another(self, tmp_path):
        """`exp_avg` is the beginning of `exp_avg_sq`."""
        tensors = {k: t for k, t in make_tensors().items() if not k.startswith("exp_avg.")}
        save_dcp(tensors, tmp_path / DCP_FOLDER, World(), on_thread=False)
        with pytest.raises(UserError, match=r"has no tensors of exp_avg$"):
            open_dcp(tmp_path)

    @pytest.mark.parametrize("kind", ["dcp", "zero"])
    def test_folder(self, tmp_path, kind):
        with pytest.raises(UserError, match=f"cannot be read as {kind}"):
            open_reader(tmp_path / "nowhere", kind, {})

    def test_files_of_deepspeed(self, folder):
        with pytest.raises(UserError, match="cannot be read as zero"):
            open_reader(folder, "zero", {})


class TestMetadata:
    def test_what_is_no_pickle(self, folder):
        for content in (
            b"\0",
            b"{}",
            b"no pickle at all",
            b"\x80\x04",
            random.Random(0).randbytes(64),
            b"\x80\x02}q\x00.",
            b"N.",
        ):
            (folder / DCP_FOLDER / ".metadata").write_bytes(content)
            with pytest.raises(UserError, match="cannot be read as dcp"):
                open_dcp(folder)

    def test_empty(self, folder):
        (folder / DCP_FOLDER / ".metadata").write_bytes(b"")
        with pytest.raises(UserError, match="cannot be read as dcp"):
            open_dcp(folder)

    def test_cut_anywhere(self, folder):
        good = (folder / DCP_FOLDER / ".metadata").read_bytes()
        for length in range(0, len(good), 7):
            (folder / DCP_FOLDER / ".metadata").write_bytes(good[:length])
            with pytest.raises(UserError, match="cannot be read as dcp"):
                open_dcp(folder)

    def test_is_a_folder(self, folder):
        (folder / DCP_FOLDER / ".metadata").unlink()
        (folder / DCP_FOLDER / ".metadata").mkdir()
        with pytest.raises(UserError, match="cannot be read as dcp"):
            open_dcp(folder)


def short(text: str) -> bytes:
    return b"\x8c" + bytes([len(text.encode())]) + text.encode()


def call_of(protocol: int, module: str, name: str, argument: str) -> bytes:
    """A pickle, opcode by opcode, that calls `module.name(argument)`; from protocol 4 on a name may have dots."""
    text = b"X" + len(argument.encode()).to_bytes(4, "little") + argument.encode()
    found = (
        short(module) + short(name) + b"\x93"
        if protocol >= 4
        else b"c" + module.encode() + b"\n" + name.encode() + b"\n"
    )
    return bytes([0x80, protocol]) + found + text + b"\x85R."


class Reduced:
    """What `pickle.dump` makes of an object that names its own maker."""

    def __init__(self, function: Callable[..., object], argument: str) -> None:
        self.function, self.argument = function, argument

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return self.function, (self.argument,)


def attacks(marker: Path) -> dict[str, bytes]:
    """Pickles that create `marker` when an ordinary unpickler reads them."""
    touch, python = f"touch {marker}", f"open({str(marker)!r}, 'w').close()"
    found: dict[str, bytes] = {}
    for protocol in (2, 4):
        for module, name, argument in (
            ("os", "system", touch),
            ("builtins", "eval", python),
            ("builtins", "exec", python),
            ("subprocess", "getoutput", touch),
        ):
            found[f"{module}.{name} protocol {protocol}"] = call_of(protocol, module, name, argument)
        for function, argument in ((os.system, touch), (eval, python)):
            # What such files hold, and in the midst of it one object that names its own maker.
            hidden = {"a": OrderedDict(b=PurePosixPath("x")), "c": (1.0, [Reduced(function, argument)])}
            found[f"hidden {function.__name__} protocol {protocol}"] = pickle.dumps([torch.Size([1]), hidden], protocol)
    found["__builtin__.eval protocol 2"] = call_of(2, "__builtin__", "eval", python)
    # A dotted name reaches through what an allowed module has imported itself.
    for module in ("torch", "torch.serialization", "pathlib", "torch.distributed.checkpoint.filesystem"):
        found[f"os.system in {module}"] = call_of(4, module, "os.system", touch)
    # `getattr` is read for members of an Enum; here it gives a method of an allowed class.
    path = b"cpathlib\nPosixPath\n"
    for module in ("builtins", "__builtin__"):
        method = f"c{module}\ngetattr\n".encode() + path + text("touch") + b"\x86R"
        found[f"{module}.getattr"] = b"\x80\x02" + method + path + text(str(marker)) + b"\x85R\x85R."
    return found


def text(value: str) -> bytes:
    """In a pickle."""
    return b"X" + len(value.encode()).to_bytes(4, "little") + value.encode()


NAMES = sorted(attacks(Path("/nonexistent/marker")))


@pytest.fixture(params=NAMES)
def attack(request, tmp_path) -> tuple[bytes, Path]:
    """A pickle, and the file that is there if it was executed."""
    marker = tmp_path / "executed"
    return attacks(marker)[request.param], marker


def zip_of(content: bytes, path: Path) -> None:
    """What `torch.save` writes, with `content` as the pickle."""
    torch.save([torch.zeros(1)], path)
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, data in entries.items():
            archive.writestr(name, content if name.endswith("data.pkl") else data)


def test_metadata_of_python_3_11_2(folder):
    """Debian 12 has it. It writes a member of an Enum as `getattr` of its class; later versions by its value."""
    path, members = folder / DCP_FOLDER / ".metadata", []

    def by_attribute(member):
        members.append(member)
        return getattr, (type(member), member.name)

    metadata = pickle.loads(path.read_bytes())
    with path.open("wb") as file:
        pickler = pickle.Pickler(file)
        pickler.dispatch_table = copyreg.dispatch_table | {_MEM_FORMAT_ENCODING: by_attribute}
        pickler.dump(metadata)
    assert members
    assert_reads_every_range(open_dcp(folder), make_tensors())


class TestMaliciousPickles:
    def test_do_their_harm_in_an_ordinary_unpickler(self, attack):
        """Otherwise the tests below would show nothing."""
        content, marker = attack
        pickle.loads(content)
        assert marker.exists()

    def test_code_of_torchscript_is_not_run(self, tmp_path):
        """torch.load passes such an archive to torch.jit.load, which asks no unpickler."""

        class Loaded(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.x = 1

            @torch.jit.export
            def __getstate__(self) -> tuple[int, bool]:
                return self.x, self.training

            @torch.jit.export
            def __setstate__(self, state: tuple[int, bool]) -> None:
                assert state[0] == 0, "the code was run"

        torch.jit.script(Loaded()).save(str(tmp_path / "file.pt"))
        with pytest.raises(torch.jit.Error, match="the code was run"):
            torch.load(tmp_path / "file.pt", weights_only=False, mmap=True)
        with pytest.raises(ValueError, match=r"file\.pt is an archive of TorchScript"):
            _load(tmp_path / "file.pt")

    def test_in_a_zip_do_their_harm_in_an_ordinary_load(self, tmp_path):
        zip_of(attacks(tmp_path / "executed")["os.system protocol 2"], tmp_path / "file.pt")
        torch.load(tmp_path / "file.pt", weights_only=False, mmap=True)
        assert (tmp_path / "executed").exists()

    def test_in_the_metadata(self, folder, attack):
        content, marker = attack
        (folder / DCP_FOLDER / ".metadata").write_bytes(content)
        with pytest.raises(UserError, match=r"cannot be read as dcp: it holds .*, which no checkpoint needs"):
            open_dcp(folder)
        assert not marker.exists()

    def test_behind_good_metadata(self, folder, attack):
        """Inside the real thing: what it holds besides is read too."""
        content, marker = attack
        good = (folder / DCP_FOLDER / ".metadata").read_bytes()
        (folder / DCP_FOLDER / ".metadata").write_bytes(content[:2] + content[2:-1] + b"0" + good)
        with pytest.raises(UserError, match=r"it holds .*, which no checkpoint needs"):
            open_dcp(folder)
        assert not marker.exists()

    @pytest.mark.parametrize("packed", [True, False], ids=["zip", "bare"])
    @pytest.mark.parametrize("file", ["zero_pp_rank_0_mp_rank_00_optim_states.pt", "mp_rank_00_model_states.pt"])
    def test_in_a_file_of_deepspeeds(self, folder, attack, file, packed):
        content, marker = attack
        torch.save({"optimizer_state_dict": {}}, folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
        torch.save({"param_shapes": []}, folder / "mp_rank_00_model_states.pt")
        zip_of(content, folder / file) if packed else (folder / file).write_bytes(content)
        with pytest.raises(UserError, match="cannot be read as zero") as caught:
            open_reader(folder, "zero", {})
        assert not marker.exists()
        if packed:
            assert "which no checkpoint needs" in str(caught.value)

    def test_in_the_tensors(self, folder, attack):
        """They lie one behind the other, each an archive of its own."""
        content, marker = attack
        reader = DcpReader(folder / DCP_FOLDER)
        place = next(iter(reader._places.values()))
        tensors = folder / DCP_FOLDER / place.relative_path
        zip_of(content, folder / "one.pt")
        tensors.write_bytes((folder / "one.pt").read_bytes() * 64)
        place.offset, place.length = 0, (folder / "one.pt").stat().st_size
        key, offsets = next(iter(reader._places))
        with pytest.raises(pickle.UnpicklingError):
            reader._chunk(key, offsets)
        assert not marker.exists()

    @pytest.mark.parametrize("name", ["os.system", "anything", "runtime.utils.os.system"])
    def test_classes_of_deepspeeds_are_stand_ins(self, folder, tmp_path, name):
        """None of its code runs, not even that of a class which takes what it is given to run."""
        marker = tmp_path / "executed"
        good = {"optimizer_state_dict": {"anything": Reduced(os.system, f"touch {marker}")}}
        content = pickle.dumps(good, 2)
        evil = b"c" + os.system.__module__.encode() + b"\nsystem\n"
        assert evil in content
        zip_of(content.replace(evil, f"cdeepspeed.utils\n{name}\n".encode()), folder / "rank.pt")
        loaded = _load(folder / "rank.pt")["optimizer_state_dict"]["anything"]
        assert not marker.exists()
        assert type(loaded).__module__ == "scfm_core.distributed.reader"

    def test_a_stand_in_is_no_file_of_deepspeeds(self, folder):
        zip_of(call_of(4, "deepspeed.utils", "anything", "x"), folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
        torch.save({"param_shapes": []}, folder / "mp_rank_00_model_states.pt")
        with pytest.raises(UserError, match="cannot be read as zero"):
            open_reader(folder, "zero", {})
