"""Logging: `metrics.jsonl` has every step once; W&B works without a network."""

import json
import math
import os
import selectors
import socket
import sys
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import pytest

from scfm_core.errors import UserError
from scfm_core.train.config import WandbConfig
from scfm_core.train.history import read_metrics
from scfm_core.train.metrics import IncidentsFile, MetricsFile
from scfm_core.train.wandb_log import WandbLog


def row(step: int) -> dict[str, float]:
    return {"step": step, "loss": 1 / (step + 1), "lr": 2e-5}


def write_rows(path: Path, *steps: int) -> None:
    path.write_text("".join(json.dumps(row(step)) + "\n" for step in steps))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


class TestMetricsFile:
    def test_starts_empty(self, path):
        MetricsFile(path, 0).close()
        assert path.read_text() == ""
        assert read_metrics(path) == []

    def test_numbers_are_read_unchanged(self, path):
        file = MetricsFile(path, 0)
        file.write(row(1))
        file.close()
        assert read_metrics(path) == [row(1)]

    def test_numbers_that_are_not_finite_are_null(self, path):
        """Python would write NaN and Infinity, which are not JSON."""
        file = MetricsFile(path, 0)
        wild = {"loss": math.nan, "grad_norm": math.inf, "low": -math.inf, "skipped": "loss is nan", "sample_ids": [8]}
        file.write({"step": 1, **wild})
        file.close()
        (line,) = path.read_text().splitlines()
        parsed = json.loads(line, parse_constant=pytest.fail)
        assert parsed == {**wild, "step": 1, "loss": None, "grad_norm": None, "low": None}

    def test_a_row_is_in_the_file_before_write_returns(self, path):
        """If the process is killed, no written row is lost."""
        file = MetricsFile(path, 0)
        for step in (1, 2, 3):
            file.write(row(step))
            assert read_metrics(path)[-1] == row(step)
        file.close()

    @pytest.mark.parametrize("resumed_at", [0, 1, 3, 5, 9])
    def test_resuming_drops_steps_after_the_checkpoint(self, path, resumed_at):
        write_rows(path, 1, 2, 3, 4, 5)
        file = MetricsFile(path, resumed_at)
        file.write({"step": 100})
        file.close()
        assert [r["step"] for r in read_metrics(path)] == [*range(1, min(resumed_at, 5) + 1), 100]

    @pytest.mark.parametrize("torn", ['{"step": 4, "lo', '{"step": 4, "loss": 0.2', "{", "\0\0\0\0"])
    def test_an_incomplete_last_line_is_ignored(self, path, torn):
        write_rows(path, 1, 2, 3)
        with path.open("a") as file:
            file.write(torn)
        assert [r["step"] for r in read_metrics(path)] == [1, 2, 3]

        resumed = MetricsFile(path, 3)
        resumed.write(row(4))
        resumed.close()
        assert [json.loads(line) for line in path.read_text().splitlines()] == [row(step) for step in (1, 2, 3, 4)]

    def test_a_last_line_without_newline_is_kept(self, path):
        path.write_text(json.dumps(row(1)))
        file = MetricsFile(path, 1)
        file.write(row(2))
        file.close()
        assert read_metrics(path) == [row(1), row(2)]

    def test_three_resumes_leave_every_step_once(self, path):
        for resumed_at, reached in ((0, 7), (5, 9), (5, 6), (6, 10)):
            file = MetricsFile(path, resumed_at)
            for step in range(resumed_at + 1, reached + 1):
                file.write(row(step))
            file.close()
        assert read_metrics(path) == [row(step) for step in range(1, 11)]

    def test_no_other_file_remains_in_the_folder(self, path):
        write_rows(path, 1, 2)
        MetricsFile(path, 1).close()
        assert [file.name for file in path.parent.iterdir()] == ["metrics.jsonl"]

    def test_missing_file_has_no_rows(self, path):
        assert read_metrics(path) == []


class TestIncidentsFile:
    def test_rows_are_only_appended(self, tmp_path):
        for number in range(3):
            IncidentsFile(tmp_path / "incidents.jsonl").write({"event": "skip", "step": number})
        incidents = read_metrics(tmp_path / "incidents.jsonl")
        assert [(incident["event"], incident["step"]) for incident in incidents] == [("skip", n) for n in range(3)]

    def test_has_the_time(self, tmp_path):
        before = datetime.now(UTC).replace(microsecond=0)
        IncidentsFile(tmp_path / "incidents.jsonl").write({"event": "rollback"})
        incident = json.loads((tmp_path / "incidents.jsonl").read_text())
        when = datetime.strptime(incident["time"], "%Y-%m-%dT%H:%M:%S%z")
        assert before <= when <= datetime.now(UTC)

    def test_numbers_that_are_not_finite_are_null(self, tmp_path):
        IncidentsFile(tmp_path / "incidents.jsonl").write({"event": "skip", "loss": math.nan})
        line = (tmp_path / "incidents.jsonl").read_text()
        assert json.loads(line, parse_constant=pytest.fail)["loss"] is None

    def test_without_an_incident_there_is_no_file(self, tmp_path):
        IncidentsFile(tmp_path / "incidents.jsonl")
        assert list(tmp_path.iterdir()) == []


@pytest.fixture
def no_keys(monkeypatch, tmp_path):
    """A home without credentials, and no W&B setting in the environment."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    return home


class FakeWandb(SimpleNamespace):
    """Records all calls."""

    def __init__(self) -> None:
        super().__init__(
            inits=[],
            rows=[],
            metrics=[],
            finished=0,
            broken=False,
            Settings=dict,
            Image=lambda path: f"image of {path}",
        )

    def init(self, **options: object) -> "FakeWandb":
        self.inits.append(options)
        return self

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.metrics.append((name, step_metric))

    def log(self, values: dict[str, object]) -> None:
        if self.broken:
            raise ConnectionResetError(104, "Connection reset by peer")
        self.rows.append(values)

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch, no_keys):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


class TestWandb:
    def test_disabled_needs_no_wandb(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "wandb", None)  # importing it raises
        log = WandbLog(WandbConfig(mode="disabled"), tmp_path, {})
        log.log(row(1))
        log.image("samples", tmp_path / "x.png", 1)
        log.close()
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("mode", ["online", "offline"])
    def test_not_installed(self, tmp_path, monkeypatch, mode):
        monkeypatch.setitem(sys.modules, "wandb", None)
        with pytest.raises(
            UserError, match=rf"^wandb\.mode={mode} .*pip install 'scfm\[wandb\]', or set wandb\.mode=disabled"
        ):
            WandbLog(WandbConfig(mode=mode), tmp_path, {})

    def test_auto_needs_no_wandb(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setitem(sys.modules, "wandb", None)
        WandbLog(WandbConfig(mode="auto"), tmp_path, {}).log(row(1))
        assert capsys.readouterr().out.startswith("nothing is logged to W&B: ")
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("mode", ["online", "offline"])
    def test_mode_is_what_the_configuration_says(self, wandb, tmp_path, monkeypatch, mode):
        monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
        WandbLog(WandbConfig(mode=mode), tmp_path, {})
        assert wandb.inits[0]["mode"] == mode

    def test_auto_is_offline_without_a_key(self, wandb, no_keys, tmp_path):
        (no_keys / ".netrc").write_text("machine example.com login me password secret\n")
        WandbLog(WandbConfig(), tmp_path, {})
        assert wandb.inits[0]["mode"] == "offline"

    def test_auto_is_online_with_a_key_in_the_environment(self, wandb, tmp_path, monkeypatch):
        monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
        WandbLog(WandbConfig(), tmp_path, {})
        assert wandb.inits[0]["mode"] == "online"

    def test_auto_is_online_with_a_key_in_netrc(self, wandb, no_keys, tmp_path):
        (no_keys / ".netrc").write_text("machine api.wandb.ai login user password secret\n")
        WandbLog(WandbConfig(), tmp_path, {})
        assert wandb.inits[0]["mode"] == "online"

    @pytest.mark.parametrize("mode", ["offline", "disabled"])
    def test_auto_follows_wandb_mode(self, wandb, tmp_path, monkeypatch, mode):
        """WANDB_MODE is common on clusters whose nodes have a key in ~/.netrc but no network."""
        monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
        monkeypatch.setenv("WANDB_MODE", mode)
        WandbLog(WandbConfig(), tmp_path, {})
        assert [options["mode"] for options in wandb.inits] == ([] if mode == "disabled" else [mode])

    def test_a_resumed_run_has_the_same_id(self, wandb, tmp_path):
        for _ in range(2):
            WandbLog(WandbConfig(), tmp_path, {})
        first, second = (options["id"] for options in wandb.inits)
        assert first == second
        (tmp_path / "other").mkdir()
        WandbLog(WandbConfig(), tmp_path / "other", {})
        assert wandb.inits[2]["id"] != first

    def test_settings_and_rows_of_a_run(self, wandb, tmp_path):
        log = WandbLog(WandbConfig(project="mine"), tmp_path, {"train": {"lr": 1}})
        log.log(row(7))
        log.image("samples", Path("grid.png"), 7)
        log.close()
        options = wandb.inits[0]
        assert (options["project"], options["name"], options["dir"]) == ("mine", tmp_path.name, str(tmp_path))
        assert options["config"] == {"train": {"lr": 1}}
        assert wandb.rows == [row(7), {"samples": "image of grid.png", "step": 7}]
        assert wandb.metrics == [("step", None), ("*", "step")], "rows of a step that comes again would be dropped"
        assert wandb.finished == 1

    @pytest.mark.parametrize(
        ("variable", "value", "mode"),
        [
            ("WANDB_MODE", "dryrun", "offline"),
            ("WANDB_MODE", "run", "online"),
            ("WANDB_MODE", "DISABLED", None),
            ("WANDB_DISABLED", "true", None),
        ],
    )
    def test_other_names_of_the_modes(self, wandb, tmp_path, monkeypatch, variable, value, mode):
        monkeypatch.setenv(variable, value)
        WandbLog(WandbConfig(), tmp_path, {})
        assert [options["mode"] for options in wandb.inits] == ([] if mode is None else [mode])

    @pytest.mark.parametrize("value", ["true", "foo"])
    def test_an_unknown_mode_is_refused(self, wandb, tmp_path, monkeypatch, value):
        monkeypatch.setenv("WANDB_MODE", value)
        with pytest.raises(
            UserError, match=f"WANDB_MODE={value} is not a mode of W&B: use online, offline or disabled"
        ):
            WandbLog(WandbConfig(), tmp_path, {})

    @pytest.mark.parametrize(
        "content", [b"machine api.example.org login x password caf\xe9\n", b"\xff machine api.wandb.ai"]
    )
    def test_a_netrc_that_is_not_utf8(self, wandb, no_keys, tmp_path, content):
        (no_keys / ".netrc").write_bytes(content)
        WandbLog(WandbConfig(), tmp_path, {})
        assert wandb.inits[0]["mode"] == ("online" if b"wandb" in content else "offline")

    def test_a_user_without_a_home(self, wandb, tmp_path, monkeypatch):
        def unknown(path: Path) -> Path:
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.setattr(Path, "expanduser", unknown)
        seen = []
        monkeypatch.setattr(wandb, "define_metric", lambda *_, **__: seen.append(os.environ.get("WANDB_CACHE_DIR")))
        WandbLog(WandbConfig(), tmp_path, {})
        assert wandb.inits[0]["mode"] == "offline"
        assert set(seen) == {str(tmp_path / "wandb" / "home")}
        assert "WANDB_CACHE_DIR" not in os.environ

    def test_its_service_ends(self, wandb, tmp_path, capsys):
        """One warning; the run goes on."""
        log = WandbLog(WandbConfig(), tmp_path, {})
        wandb.broken = True
        for step in (1, 2):
            log.log(row(step))
        log.close()
        (line,) = capsys.readouterr().err.splitlines()
        assert "the run goes on without W&B" in line and "Connection reset by peer" in line
        assert wandb.finished == 0

    @pytest.mark.parametrize(
        "error", [OSError(28, "No space left on device"), KeyError("getpwuid(): uid not found: 54321")]
    )
    def test_a_failed_start_is_a_warning_offline_and_an_error_online(self, wandb, tmp_path, monkeypatch, capsys, error):
        def fail(**options: object) -> None:
            raise error

        monkeypatch.setattr(wandb, "init", fail)
        WandbLog(WandbConfig(mode="offline"), tmp_path, {}).log(row(1))
        assert "the run goes on without W&B. It could not start" in capsys.readouterr().err
        with pytest.raises(UserError, match=r"unreachable or rejects the key .*wandb\.mode=offline"):
            WandbLog(WandbConfig(mode="online"), tmp_path, {})

    def test_the_environment_of_a_sweep(self, wandb, tmp_path, monkeypatch, capsys):
        """W&B does not see the id; a new run in a sweep takes it, another one says that it does not."""
        seen = []
        monkeypatch.setattr(wandb, "define_metric", lambda *_, **__: seen.append(dict(os.environ)))
        monkeypatch.setenv("WANDB_RUN_ID", "other")
        monkeypatch.setenv("WANDB_RESUME", "must")
        for name in ("alone", "swept"):
            (tmp_path / name).mkdir()
        WandbLog(WandbConfig(), tmp_path / "alone", {})
        assert "WANDB_RUN_ID=other is ignored" in capsys.readouterr().err
        monkeypatch.setenv("WANDB_SWEEP_ID", "s")
        WandbLog(WandbConfig(), tmp_path / "swept", {})
        assert [options["id"] == "other" for options in wandb.inits] == [False, True]
        assert all("WANDB_RUN_ID" not in each for each in seen) and os.environ["WANDB_RUN_ID"] == "other"
        assert all(each["WANDB_MODE"] == "offline" for each in seen), "it would send telemetry of an offline run"


class TestRealWandb:
    @pytest.fixture
    def proxy(self, monkeypatch):
        """A port that would receive every connection of W&B."""
        with socket.create_server(("127.0.0.1", 0)) as server, selectors.DefaultSelector() as selector:
            selector.register(server, selectors.EVENT_READ)
            address = f"http://127.0.0.1:{server.getsockname()[1]}"
            monkeypatch.setenv("WANDB_BASE_URL", address)
            for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
                monkeypatch.setenv(name, address)
            monkeypatch.delenv("no_proxy", raising=False)
            monkeypatch.delenv("NO_PROXY", raising=False)
            yield selector

    @pytest.fixture
    def service(self):
        """W&B with a new background process: the process reads the environment when it starts."""
        wandb = pytest.importorskip("wandb")
        wandb.teardown()
        yield wandb
        wandb.teardown()

    @pytest.mark.processes
    def test_offline_run_stays_in_its_folder(self, no_keys, proxy, service, monkeypatch, tmp_path):
        secret = "5ec12e70" * 5
        monkeypatch.setenv("WANDB_API_KEY", secret)
        run_dir = tmp_path / "run"
        run_dir.mkdir()
        log = WandbLog(WandbConfig(mode="offline"), run_dir, {"train": {"lr": 2e-5}})
        for step in (1, 2, 3):
            log.log(row(step))
        log.close()
        service.teardown()  # as at the end of the process, which writes everything

        (folder,) = (run_dir / "wandb").glob("offline-run-*")
        (record,) = folder.glob("run-*.wandb")
        assert b"loss" in record.read_bytes()
        assert not proxy.select(timeout=0), "something connected"
        files = [file for file in run_dir.rglob("*") if file.is_file()]
        assert not [file for file in files if secret.encode() in file.read_bytes()]
        assert sorted(file.name for file in run_dir.iterdir()) == ["wandb", "wandb_id"]

    @pytest.mark.processes
    def test_online_without_a_network_suggests_offline(self, no_keys, service, monkeypatch, tmp_path):
        monkeypatch.setenv("WANDB_API_KEY", "5ec12e70" * 5)
        monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
        monkeypatch.setenv("WANDB_INIT_TIMEOUT", "1")
        with pytest.raises(UserError, match=r"wandb\.mode=offline"):
            WandbLog(WandbConfig(mode="online"), tmp_path, {})
