"""The servers of storage.py produce the faults that they claim: checked with raw sockets, http.client and s3fs."""

import http.client
import multiprocessing
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import fsspec  # type: ignore[import-untyped]
import pytest
from botocore.exceptions import FlexibleChecksumError  # type: ignore[import-untyped]
from storage import FaultyProxy, FileServer, S3Server

BODY = bytes(range(256)) * 4096
HALF = len(BODY) // 2
FLIPPED = BODY[:HALF] + bytes([BODY[HALF] ^ 1]) + BODY[HALF + 1 :]


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    with S3Server() as server:
        server.upload_bytes(BODY, "bucket", "shards/a b+c.bin")
        yield server


@pytest.fixture
def proxy(tmp_path: Path) -> Iterator[FaultyProxy]:
    (tmp_path / "x.bin").write_bytes(BODY)
    with FileServer(tmp_path) as files, FaultyProxy(files.endpoint) as server:
        yield server


def connect(endpoint: str) -> http.client.HTTPConnection:
    return http.client.HTTPConnection(endpoint.removeprefix("http://"), timeout=10)


def get(endpoint: str, path: str = "/x.bin", method: str = "GET") -> tuple[int, http.client.HTTPMessage, bytes]:
    with closing(connect(endpoint)) as connection:
        connection.request(method, path)
        response = connection.getresponse()
        return response.status, response.headers, response.read()


def raw_get(endpoint: str, path: str = "/x.bin") -> tuple[bytes, bytes, str]:
    """Header, body, and the end of the connection: "closed", "reset", or "silent" (for a second)."""
    host, port = endpoint.removeprefix("http://").split(":")
    received, end = b"", "closed"
    with socket.create_connection((host, int(port)), timeout=1) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: there\r\n\r\n".encode())
        try:
            while piece := connection.recv(1 << 20):
                received += piece
        except ConnectionResetError:
            end = "reset"
        except TimeoutError:
            end = "silent"
    header, _, body = received.partition(b"\r\n\r\n")
    return header, body, end


@pytest.mark.parametrize(
    ("mode", "declared", "body", "end"),
    [
        ("reset", len(BODY), BODY[:HALF], "reset"),
        ("reset_at_once", None, b"", "reset"),
        ("short", len(BODY), BODY[:HALF], "closed"),
        ("lying_short", HALF, BODY[:HALF], "closed"),
        ("flip", len(BODY), FLIPPED, "closed"),
        ("stall", len(BODY), BODY[:HALF], "silent"),
        ("slow", len(BODY), BODY, "closed"),
    ],
)
def test_a_fault_on_the_wire(proxy: FaultyProxy, mode: str, declared: int | None, body: bytes, end: str) -> None:
    proxy.slow_seconds = 0.5
    proxy.fail(mode)
    header, received, ended = raw_get(proxy.endpoint)
    assert (received == body, len(received), ended) == (True, len(body), end)
    assert header == b"" if declared is None else f"Content-Length: {declared}".encode() in header.split(b"\r\n")
    assert proxy.faults == [(mode, "/x.bin")]


@pytest.mark.parametrize(
    ("mode", "code"), [("503", b"SlowDown"), ("500", b"InternalError"), ("403", b"AccessDenied"), ("404", b"NoSuchKey")]
)
def test_a_refusal(proxy: FaultyProxy, mode: str, code: bytes) -> None:
    proxy.fail(mode)
    status, headers, body = get(proxy.endpoint)
    assert (status, headers["Connection"], code in body) == (int(mode), "close", True)


def test_http_client_distinguishes_short_from_lying_short(proxy: FaultyProxy) -> None:
    proxy.fail("short")
    proxy.fail("lying_short")
    with pytest.raises(http.client.IncompleteRead):
        get(proxy.endpoint)
    assert get(proxy.endpoint)[2] == BODY[:HALF]
    assert get(proxy.endpoint)[2] == BODY


def test_only_slow_is_slow(proxy: FaultyProxy) -> None:
    proxy.slow_seconds = 0.6
    proxy.fail("slow")
    start = time.monotonic()
    assert get(proxy.endpoint)[2] == BODY
    middle = time.monotonic()
    assert get(proxy.endpoint)[2] == BODY
    assert middle - start > 0.55 > time.monotonic() - middle


def test_a_stall_ends_by_itself(proxy: FaultyProxy) -> None:
    proxy.stall_seconds = 0.1
    proxy.fail("stall")
    assert raw_get(proxy.endpoint)[1:] == (BODY[:HALF], "closed")


def test_rules_match_and_count_down(proxy: FaultyProxy) -> None:
    proxy.fail("503", times=2, path_contains="x.bin")
    proxy.fail("404", method="HEAD")
    proxy.fail("500", path_contains="x.bin?again")
    paths = ["/", "/x.bin", "/x.bin", "/x.bin", "/x.bin?again", "/x.bin?again"]
    assert [get(proxy.endpoint, path)[0] for path in paths] == [200, 503, 503, 200, 500, 200]
    assert [get(proxy.endpoint, method="HEAD")[0] for _ in range(2)] == [404, 200]
    assert proxy.requests == [("GET", path) for path in paths] + [("HEAD", "/x.bin")] * 2
    assert [mode for mode, _ in proxy.faults] == ["503", "503", "500", "404"]

    proxy.fail("403", times=-1, method="")
    assert [get(proxy.endpoint, method=method)[0] for method in ("GET", "HEAD", "GET")] == [403] * 3
    proxy.rules.clear()
    assert get(proxy.endpoint)[0] == 200
    with pytest.raises(ValueError, match="not one of"):
        proxy.fail("sulk")


def test_concurrent_requests_use_up_a_rule_once_each(proxy: FaultyProxy) -> None:
    proxy.fail("503", times=7)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: get(proxy.endpoint), range(24)))
    assert sorted(status for status, _, _ in answers) == [200] * 17 + [503] * 7
    assert all(body == BODY for status, _, body in answers if status == 200)


def test_a_connection_is_kept_until_a_fault(proxy: FaultyProxy) -> None:
    with closing(connect(proxy.endpoint)) as connection:
        ports = []
        for fault in (None, None, "flip", None):
            if fault:
                proxy.fail(fault)
            connection.request("GET", "/x.bin")
            assert connection.sock is not None
            ports.append(connection.sock.getsockname()[1])
            connection.getresponse().read()
    assert ports[0] == ports[1] == ports[2] != ports[3]


def test_the_proxy_changes_nothing_else() -> None:
    """A plain socket is upstream: it gets what the client sent, and the client gets its answer, unchanged."""
    with socket.create_server(("127.0.0.1", 0)) as upstream:
        arrived = b""

        def answer() -> None:
            nonlocal arrived
            connection, _ = upstream.accept()
            with connection:
                while not arrived.endswith(b"hello"):
                    arrived += connection.recv(65536)
                connection.sendall(
                    b'HTTP/1.1 206 Some\r\nETag: "1"\r\nX-Two: a\r\nX-Two: b\r\nContent-Length: 2\r\n\r\nhi'
                )

        thread = threading.Thread(target=answer)
        thread.start()
        with (
            FaultyProxy(f"http://127.0.0.1:{upstream.getsockname()[1]}") as proxy,
            closing(connect(proxy.endpoint)) as client,
        ):
            client.putrequest("POST", "//a%20b/?c=d%2Fe", skip_host=True, skip_accept_encoding=True)
            for pair in (
                "Host: the.bucket:80",
                "Range: bytes=1-2",
                "Transfer-Encoding: chunked",
                "Connection: X-Hop",
                "X-Hop: 1",
            ):
                client.putheader(*pair.split(": "))
            client.endheaders([b"hel", b"lo"], encode_chunked=True)
            response = client.getresponse()
            assert (response.status, response.reason, response.read()) == (206, "Some", b"hi")
            assert response.getheaders() == [("ETag", '"1"'), ("X-Two", "a"), ("X-Two", "b"), ("Content-Length", "2")]
        thread.join()
    assert arrived.split(b"\r\n") == [
        b"POST //a%20b/?c=d%2Fe HTTP/1.1",
        b"Host: the.bucket:80",
        b"Range: bytes=1-2",
        b"Content-Length: 5",
        b"",
        b"hello",
    ]


def test_no_upstream_is_a_bad_gateway() -> None:
    with FaultyProxy("http://127.0.0.1:9") as proxy:
        assert get(proxy.endpoint)[0] == 502


@pytest.mark.parametrize("mode", ["stall", "slow"])
def test_closing_does_not_wait_for_a_client(proxy: FaultyProxy, mode: str) -> None:
    proxy.slow_seconds = 30
    proxy.fail(mode)
    with closing(connect(proxy.endpoint)) as connection, closing(connect(proxy.endpoint)) as idle:
        idle.connect()
        connection.request("GET", "/x.bin")
        response = connection.getresponse()
        start = time.monotonic()
        proxy.__exit__()
        assert time.monotonic() - start < 1
        if mode == "stall":
            with pytest.raises(http.client.IncompleteRead):
                response.read()
        with pytest.raises(ConnectionRefusedError):
            get(proxy.endpoint)
        assert idle.sock is not None
        assert idle.sock.recv(1) == b""
        while proxy.connections:
            time.sleep(0.01)
        assert time.monotonic() - start < 2


@pytest.mark.processes
def test_a_forked_process_keeps_no_connection_open(proxy: FaultyProxy) -> None:
    """Otherwise a reset waits for the data worker that was forked meanwhile."""
    with closing(connect(proxy.endpoint)) as connection:
        connection.request("GET", "/x.bin")
        connection.getresponse().read()
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(30,))
        child.start()
        try:
            proxy.fail("reset")
            connection.request("GET", "/x.bin")
            response = connection.getresponse()
            with pytest.raises(ConnectionResetError):
                response.read()
        finally:
            child.kill()
            child.join()


def filesystem(endpoint: str, monkeypatch: pytest.MonkeyPatch, s3: S3Server) -> fsspec.AbstractFileSystem:
    """A new s3fs with its own connections and with keys from the environment."""
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    options = {"client_kwargs": {"endpoint_url": endpoint}, "skip_instance_cache": True}
    return fsspec.core.url_to_fs("s3://bucket/shards", **options)[0]


def test_s3fs_through_the_proxy(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranges, odd keys, writes and listings pass; s3fs retries a refusal and does not see a flipped bit."""
    with FaultyProxy(s3.endpoint) as proxy:
        files = filesystem(proxy.endpoint, monkeypatch, s3)
        assert files.ls("bucket/shards") == ["bucket/shards/a b+c.bin"]
        assert files.cat_file("bucket/shards/a b+c.bin") == BODY
        assert files.cat_file("bucket/shards/a b+c.bin", start=1000, end=2000) == BODY[1000:2000]
        files.pipe_file("bucket/written", BODY[::-1])
        assert files.cat_file("bucket/written") == BODY[::-1]
        assert {"GET", "PUT"} <= {method for method, _ in proxy.requests}
        assert ("GET", "/bucket/shards/a%20b%2Bc.bin") in proxy.requests
        assert proxy.faults == []

        proxy.fail("503", path_contains="written")
        assert files.cat_file("bucket/written") == BODY[::-1]
        proxy.fail("flip", path_contains="a%20b")
        assert files.cat_file("bucket/shards/a b+c.bin") == FLIPPED
        assert [mode for mode, _ in proxy.faults] == ["503", "flip"]


def test_the_s3_server(s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.bin", "deep/er/b.bin"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    s3.upload(tmp_path, "another")
    s3.upload(tmp_path, "another", "pre/fix/")
    s3.delete("another", "a.bin")
    files = filesystem(s3.endpoint, monkeypatch, s3)
    found = {path: files.cat_file(path) for path in files.find("another")}
    assert found == {
        "another/deep/er/b.bin": b"deep/er/b.bin",
        "another/pre/fix/a.bin": b"a.bin",
        "another/pre/fix/deep/er/b.bin": b"deep/er/b.bin",
    }


@pytest.mark.processes
def test_the_s3_server_ends_with_its_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """With checksums, botocore refuses a flipped bit."""
    with S3Server(checksums=True) as server, FaultyProxy(server.endpoint) as proxy:
        server.upload_bytes(BODY, "bucket", "key")
        files = filesystem(proxy.endpoint, monkeypatch, server)
        assert files.cat_file("bucket/key") == BODY
        proxy.fail("flip")
        with pytest.raises(FlexibleChecksumError):
            files.cat_file("bucket/key")
    with pytest.raises(ConnectionRefusedError):
        get(server.endpoint, "/")
