"""Remote storage for a test: an S3 server, a static HTTP server, and a proxy that injects scripted faults.

Everything is real: sockets on 127.0.0.1, the wire format, TCP resets. The client under test must find out what a fault
means.
"""

import fcntl
import functools
import http.client
import os
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

import boto3  # type: ignore[import-untyped]
from botocore.config import Config  # type: ignore[import-untyped]

_MOTO = """
import logging, sys
from moto.server import ThreadedMotoServer
logging.getLogger("werkzeug").setLevel(logging.ERROR)
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""


class S3Server:
    """moto's S3 server in its own process, so that worker processes see the same buckets as the test.

    `endpoint` and `environment` (the variables that a client needs) are set inside the `with` block.

    With `checksums` an upload has a CRC32, as is boto3's default: botocore, and so s3fs, then refuses a whole object
    that differs (but not a range of it). Without `checksums`, as with many other tools, only the reader's own checks
    find a difference.
    """

    endpoint: str
    environment: dict[str, str]

    def __init__(self, checksums: bool = False) -> None:
        self._checksums = checksums

    def __enter__(self) -> "S3Server":
        # The pipe to its stdin ends with this process: the server cannot outlive a test run that was killed.
        self._process = subprocess.Popen(
            [sys.executable, "-c", _MOTO], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        try:
            assert self._process.stdout is not None
            port = self._process.stdout.readline().strip()
            if not port:
                raise RuntimeError("the S3 server did not start; its own message is on stderr")
            self.endpoint = f"http://127.0.0.1:{port}"
            self.environment = {
                "AWS_ACCESS_KEY_ID": "testing",
                "AWS_SECRET_ACCESS_KEY": "testing",
                "AWS_DEFAULT_REGION": "us-east-1",
                "AWS_ENDPOINT_URL": self.endpoint,
            }
            with closing(http.client.HTTPConnection("127.0.0.1", int(port), timeout=30)) as connection:
                connection.request("GET", "/")
                connection.getresponse().read()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.kill()
        self._process.communicate()

    def upload(self, folder: Path, bucket: str, prefix: str = "") -> None:
        """Upload all files in `folder` under `prefix`, by relative path; makes the bucket (3 characters or more)."""
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                name = path.relative_to(folder).as_posix()
                self.upload_bytes(path.read_bytes(), bucket, f"{prefix.rstrip('/')}/{name}" if prefix else name)

    def upload_bytes(self, data: bytes, bucket: str, key: str) -> None:
        """Upload one object with one PUT: its ETag is the MD5 of `data`."""
        self._client.create_bucket(Bucket=bucket)  # in us-east-1 no error if it exists
        self._client.put_object(Bucket=bucket, Key=key, Body=data)

    def delete(self, bucket: str, key: str) -> None:
        """Delete one object; no error if it does not exist, as in S3."""
        self._client.delete_object(Bucket=bucket, Key=key)

    @functools.cached_property
    def _client(self) -> Any:
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=self.environment["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=self.environment["AWS_SECRET_ACCESS_KEY"],
            region_name=self.environment["AWS_DEFAULT_REGION"],
            config=Config(request_checksum_calculation="when_supported" if self._checksums else "when_required"),
        )


_S = TypeVar("_S", bound="_Server")
_servers: "weakref.WeakSet[_Server]" = weakref.WeakSet()


class _Server(ThreadingHTTPServer):
    """A server with threads on a free port. Leaving the `with` block closes open connections."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, handler: Callable[..., BaseHTTPRequestHandler]) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.endpoint = f"http://127.0.0.1:{self.server_address[1]}"
        self.ending = threading.Event()
        self.connections: set[socket.socket] = set()
        _servers.add(self)

    def __enter__(self: _S) -> _S:
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.ending.set()
        self.shutdown()
        self.server_close()
        for connection in list(self.connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        self.connections.add(connection)
        return connection, address

    def shutdown_request(self, request: Any) -> None:
        self.connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # a client that closed its connection is not an error
            super().handle_error(request, client_address)


def _close_inherited_sockets() -> None:
    for server in list(_servers):
        for connection in [server.socket, *server.connections]:
            if connection.fileno() >= 0:
                os.close(connection.detach())


# A forked data worker would have copies of the sockets. A close here would then neither end nor reset a connection.
os.register_at_fork(after_in_child=_close_inherited_sockets)


class FileServer(_Server):
    """Serves a folder over HTTP, without ranges, as `python -m http.server` does."""

    def __init__(self, folder: Path) -> None:
        super().__init__(functools.partial(_FileHandler, directory=str(folder)))


class _FileHandler(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


_ERRORS = {"503": "SlowDown", "500": "InternalError", "403": "AccessDenied", "404": "NoSuchKey"}
MODES = (*_ERRORS, "reset", "reset_at_once", "short", "lying_short", "flip", "stall", "slow")


@dataclass
class Rule:
    """A fault for the next `times` matching requests; -1: for all."""

    mode: str
    times: int
    path_contains: str
    method: str


class FaultyProxy(_Server):
    """An HTTP/1.1 reverse proxy for `upstream` ("http://host:port"), which answers some requests with a fault.

    Method, path, query, body and all headers except hop-by-hop ones pass unchanged. `Host` too, because signatures
    cover it. A body is kept in memory, and the answer always has a Content-Length. After a fault the connection is
    closed.

    Attributes:
        requests: (method, path with its query, as sent) of each request that arrived, faulty or not.
        faults: (mode, path) of each fault injected.
        rules: the faults to come; clear it to end a fault that lasts forever.
        stall_seconds: how long a "stall" is silent before it closes.
        slow_seconds: how long a "slow" body takes.
    """

    def __init__(self, upstream: str, stall_seconds: float = 30, slow_seconds: float = 2) -> None:
        super().__init__(_ProxyHandler)
        self.upstream = urlsplit(upstream).netloc
        self.stall_seconds = stall_seconds
        self.slow_seconds = slow_seconds
        self.requests: list[tuple[str, str]] = []
        self.faults: list[tuple[str, str]] = []
        self.rules: list[Rule] = []
        self._lock = threading.Lock()

    def fail(self, mode: str, times: int = 1, path_contains: str = "", method: str = "GET") -> None:
        """Answer the next `times` matching requests with a fault, after the earlier rules are used up.

        Args:
            mode: one of the following; half of a body is rounded down, and of the body that upstream answers to this
                request: "503", "500", "403", "404": that status and S3's XML for it; upstream does not get the request.
                "reset_at_once": a TCP reset instead of an answer; upstream does not get the request. "reset": headers,
                half of the body, a TCP reset. "short": headers that promise the whole body, half of it, a clean close.
                "lying_short": half of the body, with headers that promise only that: well formed, and wrong. "flip":
                the body with one bit of its middle byte flipped, with its old ETag. "stall": headers, half of the body,
                silence for `stall_seconds` or until the proxy ends; a clean close. "slow": all of the body, in pieces.
            times: number of requests; -1: all.
            path_contains: part of the path with its query, as sent (percent-encoded).
            method: "" for any.
        """
        if mode not in MODES:
            raise ValueError(f"mode is {mode!r}, not one of {', '.join(MODES)}")
        with self._lock:
            self.rules.append(Rule(mode, times, path_contains, method))

    def note(self, method: str, path: str) -> str | None:
        """Record a request; returns its fault, if it has one, and counts it."""
        with self._lock:
            self.requests.append((method, path))
            for rule in self.rules:
                if rule.times and rule.path_contains in path and rule.method in ("", method):
                    rule.times -= rule.times > 0
                    self.faults.append((rule.mode, path))
                    return rule.mode
        return None


class _Answer(NamedTuple):
    status: int
    reason: str
    headers: list[tuple[str, str]]
    body: bytes


# Headers of one connection, not of the message (RFC 9110, 7.6.1). `Expect` is answered before a handler runs.
_HOP_BY_HOP = {
    "connection",
    "keep-alive",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "expect",
}


def _end_to_end(headers: list[tuple[str, str]]) -> list[tuple[str, str]]:
    listed = ",".join(value for name, value in headers if name.lower() == "connection")
    dropped = _HOP_BY_HOP | {token.strip().lower() for token in listed.split(",")}
    return [(name, value) for name, value in headers if name.lower() not in dropped]


class _ProxyHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # otherwise the body waits 40 ms for the acknowledgement of the headers
    server: FaultyProxy

    def forward(self) -> None:
        path = self.requestline.split()[1]  # in self.path leading slashes are merged
        body = self._read_body()
        mode = self.server.note(self.command, path)
        self.close_connection |= mode is not None
        if mode == "reset_at_once":
            self._reset()
        elif mode in _ERRORS:
            self._send(_refusal(mode), mode)
        else:
            self._send(self._ask_upstream(path, body), mode)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = do_OPTIONS = do_PATCH = forward

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        pieces = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return b"".join(pieces)

    def _ask_upstream(self, path: str, body: bytes) -> _Answer:
        headers = _end_to_end(self.headers.items())
        if "Content-Length" not in self.headers and body:
            headers.append(("Content-Length", str(len(body))))
        try:
            with closing(http.client.HTTPConnection(self.server.upstream, timeout=60)) as connection:
                connection.putrequest(self.command, path, skip_host=True, skip_accept_encoding=True)
                for name, value in headers:
                    connection.putheader(name, value)
                connection.endheaders(body or None)
                response = connection.getresponse()
                return _Answer(response.status, response.reason, _end_to_end(response.getheaders()), response.read())
        except (OSError, http.client.HTTPException) as error:
            return _Answer(502, "Bad Gateway", [], f"upstream: {error!r}\n".encode())

    def _send(self, answer: _Answer, mode: str | None) -> None:
        status, reason, headers, body = answer
        half = body[: len(body) // 2]
        if mode == "lying_short":
            body = half
        elif mode == "flip" and body:
            middle = len(body) // 2
            body = body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]
        if self.command != "HEAD" and status not in (204, 304):
            headers = [pair for pair in headers if pair[0].lower() != "content-length"]
            headers.append(("Content-Length", str(len(body))))
        elif self.command == "HEAD":
            body = half = b""
        if mode is not None:
            headers.append(("Connection", "close"))
        self.send_response_only(status, reason)
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()
        if mode == "slow":
            self._trickle(body)
        else:
            self.wfile.write(half if mode in ("reset", "short", "stall") else body)
        if mode == "reset":
            self._reset()
        elif mode == "stall":
            self.server.ending.wait(self.server.stall_seconds)

    def _trickle(self, body: bytes, pieces: int = 20) -> None:
        size = -(-len(body) // pieces)
        for piece in range(pieces):
            self.server.ending.wait(self.server.slow_seconds / pieces)
            self.wfile.write(body[piece * size : (piece + 1) * size])

    def _reset(self) -> None:
        """Reset the connection, after the client's kernel has received everything: a reset drops the rest."""
        deadline = time.monotonic() + 2
        unacknowledged = bytearray(4)
        while time.monotonic() < deadline:
            fcntl.ioctl(self.connection, termios.TIOCOUTQ, unacknowledged)
            if not any(unacknowledged):
                break
            time.sleep(0.001)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(self.connection.detach())  # the server's normal close sends FIN first


def _refusal(mode: str) -> _Answer:
    code = _ERRORS[mode]
    body = f"<Error><Code>{code}</Code><Message>{code}, by the test</Message></Error>"
    return _Answer(int(mode), http.client.responses[int(mode)], [("Content-Type", "application/xml")], body.encode())
