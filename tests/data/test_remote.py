"""Remote storage with real faults: transient ones are retried, permanent ones raise in time, with the reason."""

import errno
import os
import re
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import fsspec
import pytest
from storage import FaultyProxy, FileServer, S3Server
from tiny_fixtures import mounted

from scfm_core import progress
from scfm_core.data import remote
from scfm_core.data.manifest import read_optional
from scfm_core.data.remote import fetch, read
from scfm_core.errors import UserError

BODY = bytes(range(256)) * 2048  # larger than the buffers of the sockets
CANARIES = {
    "AWS_SECRET_ACCESS_KEY": "canary/of+the/s3/secret",
    "AWS_SESSION_TOKEN": "canary-of-the-session",
    "WANDB_API_KEY": "canary-of-wandb",
    "HF_TOKEN": "canary-of-hugging-face",
    "MY_PASSWORD": "canary-of-the-password",
}
TRANSIENT = ["503", "500", "reset", "reset_at_once", "short", "stall"]
LONG_PAUSE = 60.0


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    with S3Server() as server:
        server.upload_bytes(BODY, "bucket", "shards/x.tar")
        yield server


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FileServer]:
    folder = tmp_path_factory.mktemp("files")
    (folder / "shards").mkdir()
    (folder / "shards" / "x.tar").write_bytes(BODY)
    with FileServer(folder) as server:
        yield server


class Place:
    """One server behind a proxy, and the addresses of its objects."""

    def __init__(self, proxy: FaultyProxy, base: str) -> None:
        self.proxy, self.base = proxy, base

    def uri(self, name: str = "shards/x.tar") -> str:
        return f"{self.base}/{name}"

    @property
    def gets(self) -> int:
        return sum(method == "GET" for method, _ in self.proxy.requests)


@pytest.fixture(scope="module")
def s3_proxy(s3: S3Server) -> Iterator[FaultyProxy]:
    with FaultyProxy(s3.endpoint) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def http_proxy(files: FileServer) -> Iterator[FaultyProxy]:
    with FaultyProxy(files.endpoint) as proxy:
        yield proxy


def forget(proxy: FaultyProxy) -> None:
    for what in (proxy.rules, proxy.requests, proxy.faults):
        what.clear()


@pytest.fixture
def s3_place(s3: S3Server, s3_proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch) -> Place:
    for name, value in {**s3.environment, "AWS_ENDPOINT_URL": s3_proxy.endpoint}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("S3_ENDPOINT_URL", raising=False)
    place = Place(s3_proxy, "s3://bucket")
    forget(s3_proxy)
    read(place.uri(), deadline=LONG_PAUSE)  # making the client takes almost a second
    forget(s3_proxy)
    return place


@pytest.fixture
def new_clients() -> Iterator[None]:
    """A client keeps the credentials of its first request."""
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    yield
    fsspec.get_filesystem_class("s3").clear_instance_cache()


@pytest.fixture
def http_place(http_proxy: FaultyProxy) -> Place:
    forget(http_proxy)
    return Place(http_proxy, http_proxy.endpoint)


@pytest.fixture(params=[pytest.param("s3", marks=pytest.mark.processes), "http"])
def place(request: pytest.FixtureRequest) -> Place:
    found: Place = request.getfixturevalue(f"{request.param}_place")
    return found


@pytest.fixture(autouse=True)
def short_stall(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client gives up a stalled connection after 0.3 seconds instead of 20."""
    monkeypatch.setattr(remote, "_STALL_SECONDS", 0.3)
    monkeypatch.setattr(remote, "_CONNECT_SECONDS", 1.0)


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Records the pauses, and skips them."""
    asked: list[float] = []
    monkeypatch.setattr(remote, "time", SimpleNamespace(monotonic=time.monotonic, sleep=asked.append))
    return asked


class TestTransientFaults:
    @pytest.mark.parametrize("times", [1, 3])
    @pytest.mark.parametrize("mode", TRANSIENT)
    def test_fetch_succeeds(self, place: Place, pauses: list[float], tmp_path: Path, mode: str, times: int) -> None:
        place.proxy.fail(mode, times)
        fetch(place.uri(), tmp_path / "x.tar", deadline=LONG_PAUSE)
        assert (tmp_path / "x.tar").read_bytes() == BODY
        assert [fault for fault, _ in place.proxy.faults] == [mode] * times
        assert place.gets == times + 1  # no second layer retries by itself
        # aiohttp itself retries a request once if the connection ends without a byte.
        assert len(pauses) == times or (mode == "reset_at_once" and len(pauses) in (times - 1, times - 2))

    @pytest.mark.parametrize("mode", ["503", "reset", "short"])
    def test_read_succeeds(self, place: Place, pauses: list[float], mode: str) -> None:
        place.proxy.fail(mode, 2)
        place.proxy.fail("503", method="HEAD")
        assert read(place.uri(), deadline=LONG_PAUSE) == BODY
        assert place.gets >= 3

    def test_all_at_once(self, place: Place, pauses: list[float], tmp_path: Path) -> None:
        for mode in TRANSIENT:
            place.proxy.fail(mode)
        (tmp_path / "x.tar").write_bytes(BODY + b"longer than what comes")
        fetch(place.uri(), tmp_path / "x.tar", deadline=LONG_PAUSE)
        assert (tmp_path / "x.tar").read_bytes() == BODY

    def test_pauses_grow_and_differ(self, http_place: Place, pauses: list[float], tmp_path: Path) -> None:
        http_place.proxy.fail("503", 8)
        fetch(http_place.uri(), tmp_path / "x.tar", deadline=LONG_PAUSE)
        full = [min(0.25 * 2**attempt, 10.0) for attempt in range(8)]
        assert all(most / 2 <= asked <= most for asked, most in zip(pauses, full, strict=True))
        assert len({asked / most for asked, most in zip(pauses, full, strict=True)}) == 8

    def test_a_download_reports_its_progress(self, place: Place, tmp_path: Path) -> None:
        progress.start()
        began = progress.last()[0]
        fetch(place.uri(), tmp_path / "x.tar", deadline=LONG_PAUSE)
        assert progress.last()[0] > began

    def test_a_slow_body_is_not_a_dead_connection(self, place: Place, tmp_path: Path) -> None:
        place.proxy.slow_seconds = 1.2  # four times the tolerated silence
        place.proxy.fail("slow")
        fetch(place.uri(), tmp_path / "x.tar", deadline=LONG_PAUSE)
        assert (tmp_path / "x.tar").read_bytes() == BODY
        assert place.gets == 1


class TestPermanentFaults:
    def test_the_deadline_holds_for_one_attempt(
        self, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A byte from time to time, so that no silence is too long."""
        monkeypatch.setattr(remote, "_STALL_SECONDS", 10.0)
        place.proxy.slow_seconds = 16
        place.proxy.fail("slow", -1)
        start = time.monotonic()
        with pytest.raises(UserError, match=rf"^data: {re.escape(place.uri())} could not be read within 1 s"):
            fetch(place.uri(), tmp_path / "x.tar", deadline=1)
        assert time.monotonic() - start < 12

    @pytest.mark.parametrize("mode", TRANSIENT)
    def test_the_deadline_holds(self, place: Place, tmp_path: Path, mode: str) -> None:
        place.proxy.fail(mode, -1)
        start = time.monotonic()
        with pytest.raises(
            UserError, match=rf"^data: {re.escape(place.uri())} could not be read within 1 s; .*raise data"
        ):
            fetch(place.uri(), tmp_path / "x.tar", deadline=1)
        assert time.monotonic() - start < 15
        assert place.gets >= 2

    def test_the_last_fault_is_named(self, place: Place, tmp_path: Path) -> None:
        place.proxy.fail("503", -1)
        with pytest.raises(UserError, match=r"failed with: .*(status 503|SlowDown|503)"):
            fetch(place.uri(), tmp_path / "x.tar", deadline=0.5)

    def test_read_has_a_deadline_too(self, place: Place) -> None:
        place.proxy.fail("stall", -1)
        with pytest.raises(UserError, match="could not be read within 1 s"):
            read(place.uri(), deadline=1)

    def test_no_server(self, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            endpoint = f"http://127.0.0.1:{free.getsockname()[1]}"
            monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
            uri = place.uri() if place.base.startswith("s3") else f"{endpoint}/x.tar"
            with pytest.raises(UserError, match=f"^data: {uri} could not be read within 2 s.*127.0.0.1"):
                fetch(uri, tmp_path / "x.tar", deadline=2)

    def test_no_such_host(self, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://nowhere.invalid")
        uri = place.uri() if place.base.startswith("s3") else "https://nowhere.invalid/x.tar"
        with pytest.raises(UserError, match=f"^data: {uri} could not be read within 2 s.*nowhere.invalid"):
            fetch(uri, tmp_path / "x.tar", deadline=2)


class TestRefusals:
    """One request and one answer, for any deadline."""

    @pytest.mark.parametrize("function", ["fetch", "read"])
    @pytest.mark.parametrize("status", ["403", "404"])
    def test_by_the_server(self, place: Place, tmp_path: Path, status: str, function: str) -> None:
        place.proxy.fail(status, -1, method="")
        what = {
            "403": "(no permission to read .* .403.*credentials|the server answers 403)",
            "404": "there is no .*404",
        }[status]
        with pytest.raises(UserError, match=what) as refused:
            if function == "fetch":
                fetch(place.uri(), tmp_path / "x.tar", deadline=LONG_PAUSE)
            else:
                read(place.uri(), deadline=LONG_PAUSE)
        assert place.uri() in str(refused.value)
        assert len(place.proxy.requests) == 1

    @pytest.mark.parametrize("name", ["shards/y.tar", "nothing/here/x.tar"])
    def test_no_such_object(self, place: Place, tmp_path: Path, name: str) -> None:
        with pytest.raises(UserError, match=rf"^data: there is no {re.escape(place.uri(name))} \(404\)"):
            fetch(place.uri(name), tmp_path / "x.tar", deadline=LONG_PAUSE)
        assert place.gets == 1
        assert not (tmp_path / "x.tar").exists()

    def test_another_refusal_is_not_a_missing_object(self, http_place: Place) -> None:
        """Whatever the address says."""
        http_place.proxy.fail("403", -1, method="")
        with pytest.raises(UserError, match="the server answers 403"):
            read_optional(http_place.uri("(404)/x.tar"), LONG_PAUSE)
        http_place.proxy.rules.clear()
        assert read_optional(http_place.uri("(404)/x.tar"), LONG_PAUSE) is None

    def test_no_such_bucket(self, s3_place: Place, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"^data: there is no s3://no-such-bucket/x.tar \(404\)"):
            fetch("s3://no-such-bucket/x.tar", tmp_path / "x.tar", deadline=LONG_PAUSE)
        assert s3_place.gets == 1

    def test_no_credentials(
        self, s3_place: Place, new_clients: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            monkeypatch.delenv(name)
        monkeypatch.setenv("AWS_ENDPOINT_URL", s3_place.proxy.endpoint)
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
            monkeypatch.setenv(name, str(tmp_path / "none"))
        with pytest.raises(
            UserError, match=r"there are no credentials\. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        ):
            fetch(s3_place.uri(), tmp_path / "x.tar", deadline=LONG_PAUSE)
        assert s3_place.proxy.requests == []

    @pytest.mark.parametrize(
        ("uri", "package", "module", "message"),
        [
            ("s3://bucket/x", "s3", "s3fs", "scfm[s3]"),
            ("https://host/x", "https", "aiohttp", "scfm[http]"),
            ("gs://bucket/x", "gs", "gcsfs", "scfm[gcs]"),
            ("abfs://bucket/x", "abfs", "adlfs", "scfm[azure]"),
            ("az://bucket/x", "az", "adlfs", "scfm[azure]"),
        ],
    )
    def test_a_missing_package(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        uri: str,
        package: str,
        module: str,
        message: str,
    ) -> None:
        monkeypatch.setitem(sys.modules, module, None)  # so that importing it fails
        monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, package, raising=False)
        with pytest.raises(UserError, match=rf"^data: {uri} needs a package .*: pip install '{re.escape(message)}'"):
            fetch(uri, tmp_path / "x.tar", deadline=1)


class TestTheLocalDisk:
    """The storage did not fail, and a retry would not help."""

    @pytest.fixture
    def full_disk(self, tmp_path: Path) -> Iterator[Path]:
        yield from mounted(tmp_path / "disk", "size=256k")

    def test_the_folder_was_deleted(self, place: Place, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="gone") as refused:
            fetch(place.uri(), tmp_path / "gone" / "x.tar", deadline=LONG_PAUSE)
        assert not isinstance(refused.value, UserError)
        assert place.gets == 1

    def test_it_is_full(self, place: Place, full_disk: Path) -> None:
        with pytest.raises(OSError, match="No space left") as refused:
            fetch(place.uri(), full_disk / "x.tar", deadline=3)
        assert refused.value.errno == errno.ENOSPC
        assert place.gets == 1

    def test_it_is_read_only(self, place: Place, full_disk: Path) -> None:
        subprocess.run(["mount", "-o", "remount,ro", str(full_disk)], check=True)
        with pytest.raises(OSError, match="Read-only") as refused:
            fetch(place.uri(), full_disk / "x.tar", deadline=3)
        assert refused.value.errno == errno.EROFS


@pytest.fixture
def canaries(new_clients: None, monkeypatch: pytest.MonkeyPatch) -> Callable[[object], list[str]]:
    """Puts secrets into the environment; returns a function that lists those in a text."""
    for name, value in CANARIES.items():
        monkeypatch.setenv(name, value)
    return lambda thing: [value for value in CANARIES.values() if value in str(thing)]


class _Echo(BaseHTTPRequestHandler):
    """Refuses every request, and repeats it in the answer, as debugging proxies do."""

    def do_GET(self) -> None:
        body = f"<Error><Code>AccessDenied</Code><Message>{CANARIES} {self.headers}</Message></Error>".encode()
        self.send_response(int(self.path.rpartition("-")[2][:3]), f"no {CANARIES['HF_TOKEN']}")
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def echo(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), _Echo) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


class TestSecrets:
    @pytest.mark.parametrize("mode", ["403", "404", "503", "reset", "stall"])
    def test_not_in_our_errors(
        self,
        place: Place,
        tmp_path: Path,
        canaries: Callable[[object], list[str]],
        capfd: pytest.CaptureFixture[str],
        caplog: pytest.LogCaptureFixture,
        mode: str,
    ) -> None:
        caplog.set_level("INFO")
        place.proxy.fail(mode, -1)
        with pytest.raises(UserError) as refused:
            fetch(place.uri(), tmp_path / "x.tar", deadline=1)
        assert place.uri() in str(refused.value)
        assert canaries("".join(traceback.format_exception(refused.value))) == []
        assert canaries(capfd.readouterr()) == canaries(caplog.text) == []

    @pytest.mark.parametrize("status", ["403", "404", "400", "503"])
    def test_not_in_a_message_if_the_server_repeats_them(
        self,
        echo: str,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        canaries: Callable[[object], list[str]],
        status: str,
    ) -> None:
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        monkeypatch.setenv("AWS_ENDPOINT_URL", echo)
        for uri in (f"s3://bucket/x-{status}", f"{echo}/x-{status}"):
            with pytest.raises(UserError) as refused:
                fetch(uri, tmp_path / "x", deadline=1)
            assert canaries(refused.value) == []

    def test_not_in_a_traceback_if_the_server_repeats_them(
        self, echo: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, canaries: Callable[[object], list[str]]
    ) -> None:
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        monkeypatch.setenv("AWS_ENDPOINT_URL", echo)
        for uri in ("s3://bucket/x-403", f"{echo}/x-403", "s3://bucket/x-404", "s3://bucket/x-503"):
            with pytest.raises(UserError) as refused:
                fetch(uri, tmp_path / "x", deadline=1)
            assert canaries("".join(traceback.format_exception(refused.value))) == []

    @pytest.mark.parametrize(
        "endpoint",
        [
            "http://user:canary-of-the-endpoint@127.0.0.1:9",
            pytest.param(
                "http://user:canary-of-the-endpoint@127.0.0.1:9/?sig=canary-of-the-query",
            ),
        ],
    )
    def test_not_those_of_the_endpoint(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, new_clients: None, endpoint: str
    ) -> None:
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        with pytest.raises(UserError) as refused:
            fetch("s3://bucket/x", tmp_path / "x", deadline=1)
        assert "canary" not in str(refused.value)

    def test_a_message_is_not_truncated_within_a_secret(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("MY_TOKEN", "hush" * 20)
        for length in range(200, 320):
            assert "hush" not in remote._summary(RuntimeError("." * length + "hush" * 20))
