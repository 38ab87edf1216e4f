"""The server of `scfm play`: the page of Gradio, the images, and no other address.

Gradio can also serve files of this machine, take uploads and pass requests on to other servers. Nothing here uses that, and these
addresses are closed.
"""

import importlib
import ipaddress
import os
import re
import socket
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from recipes.play import Entry, Player
from scfm_core.errors import UserError, missing_extra

_PORT = 7860
_GRADIO = re.compile(
    r"/(|config|theme\.css|favicon\.ico|(assets|static|svelte)/[\w./@-]+|gradio_api/(info|startup-events|app_id|reset|cancel|heartbeat/\w+|"
    r"queue/join|queue/data|run/predict))/?"
)
"""The addresses of Gradio that the page needs. Under assets/ and static/ are its scripts, fonts and icons."""
_LARGEST_BODY = 1 << 20
"""Bytes of a request: the longest prompt has less. Gradio would read any number of them into memory."""
_IMAGE = re.compile(r"/images/([\w-]+)/[^/]+")
_HEADERS = {
    # The browser asks no other server than this one: Gradio's page names a script of a public server, for pages in frames.
    "content-security-policy": "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


def require_packages() -> None:
    """UserError if the packages of the page are missing."""
    # Read when gradio is imported. It counts its users otherwise, and asks its makers' server for newer versions.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    warnings.filterwarnings(
        "ignore", module="gradio"
    )  # it uses names that newer versions of its own packages deprecate
    try:
        importlib.import_module("gradio")
    except ImportError as error:
        raise missing_extra("`scfm play`", "play", error) from error


def open_socket(host: str, port: int | None) -> socket.socket:
    """A socket that listens.

    Args:
        host: address or name.
        port: None: 7860, or a free one if that is taken; 0: a free one.

    Raises:
        UserError: if the port is taken, or the host is not an address of this machine.
    """
    if port is not None and not 0 <= port <= 65535:
        raise UserError(f"--port must be from 0 to 65535, got {port}")
    for candidate in (_PORT, 0) if port is None else (port,):
        try:
            return _listen(host, candidate)
        except (OSError, UnicodeError) as error:
            if candidate != _PORT or port is not None:
                advice = "; without --port a free one is taken" if port else ""
                raise UserError(f"cannot listen on {host} port {candidate} ({error}){advice}") from error
    raise AssertionError


def _listen(host: str, port: int) -> socket.socket:
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(128)
    except OSError:
        listener.close()
        raise
    return listener


def address_of(listener: socket.socket, host: str) -> str:
    """What a browser on this machine opens."""
    # It compares, and binds nothing.
    name = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)  # nosec B104
    return f"http://{name}:{listener.getsockname()[1]}"


def make_app(player: Player, host: str) -> Any:
    """The page as an ASGI application, which answers to the name `host` too."""
    import gradio
    from fastapi import FastAPI

    from recipes.play_html import STYLE
    from recipes.play_page import build_page

    # System fonts: the fonts of Gradio's themes come from a public server.
    theme = gradio.themes.Default(
        primary_hue="teal",
        neutral_hue="slate",
        font=("system-ui", "sans-serif"),
        font_mono=("ui-monospace", "monospace"),
    )
    app = gradio.mount_gradio_app(
        FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
        build_page(player),
        path="/",
        theme=theme,
        css=STYLE,
        footer_links=[],
        ssr_mode=False,
        mcp_server=False,
        enable_monitoring=False,
        pwa=False,
        show_error=False,
    )
    return _Gate(app, player, host)


class _Gate:
    """ASGI: the images of `player`, and the addresses of `app` that the page needs."""

    def __init__(self, app: Any, player: Player, host: str) -> None:
        self._app, self._player = app, player
        self._names = {"localhost", socket.gethostname().lower(), host.lower()}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """See the ASGI specification."""
        if scope["type"] == "websocket":
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"]

        async def guarded(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *_encoded(_HEADERS)]
            await send(message)

        headers = dict(scope["headers"])
        if not _is_from_here(headers, self._names):
            await _respond(guarded, 403, b"this page answers to its own address only", {"content-type": "text/plain"})
        elif not _is_small(headers):
            await _respond(guarded, 413, b"this request is too large", {"content-type": "text/plain"})
        elif image := _IMAGE.fullmatch(path):
            await self._send_image(image[1], guarded)
        elif _GRADIO.fullmatch(path) and ".." not in path:
            await self._app(scope, receive, guarded)
        else:
            await _respond(guarded, 404, b"not found", {"content-type": "text/plain"})

    async def _send_image(self, id: str, send: Any) -> None:
        picture = self._player.find(id)
        if picture is None:
            await _respond(send, 404, b"this image is no longer kept: make it again", {"content-type": "text/plain"})
            return
        name = f"inline; filename*=UTF-8''{quote(picture.name)}"
        headers = {"content-type": "image/png", "content-disposition": name, "cache-control": "private, max-age=3600"}
        await _respond(send, 200, picture.png, headers)


def _is_from_here(headers: dict[bytes, bytes], names: set[str]) -> bool:
    """Whether a request is for this page: not from another site, nor for a name that was bound to this address (DNS rebinding).

    Names other than `names` are refused; an address is what the person who started the page has opened.
    """
    host, origin = headers.get(b"host", b"").decode("latin-1"), headers.get(b"origin", b"").decode("latin-1")
    name = urlsplit(f"//{host}").hostname or ""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        if name not in names:
            return False
    return not origin or urlsplit(origin).netloc == host


def _is_small(headers: dict[bytes, bytes]) -> bool:
    """Whether the body of a request is small. One in chunks does not say its length; browsers do not send such for this page."""
    length = headers.get(b"content-length", b"0")
    return (
        b"transfer-encoding" not in headers and length.isdigit() and len(length) < 12 and int(length) <= _LARGEST_BODY
    )


async def _respond(send: Any, status: int, body: bytes, headers: dict[str, str]) -> None:
    headers = headers | {"content-length": str(len(body))}
    await send({"type": "http.response.start", "status": status, "headers": _encoded(headers)})
    await send({"type": "http.response.body", "body": body})


def _encoded(headers: dict[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.encode(), value.encode()) for name, value in headers.items()]


def make_server(player: Player, host: str = "127.0.0.1") -> Any:
    """The server, which listens on a socket with `run(sockets=[...])`. `handle_exit(signal.SIGINT, None)` ends it."""
    import uvicorn

    class Server(uvicorn.Server):
        was_busy = False

        def handle_exit(self, sig: int, frame: Any) -> None:
            # Open pages hold their connections: nothing waits for them.
            self.should_exit = self.force_exit = True
            self.was_busy = player.stop()

    # "critical": at the end it would print an error for each open page. Errors of Gradio's events are printed by Gradio.
    config = uvicorn.Config(make_app(player, host), log_level="critical", ws="none", timeout_graceful_shutdown=1)
    return Server(config)


def serve(player: Player, listener: socket.socket, host: str) -> None:
    """Serve the page until Ctrl-C or SIGTERM."""
    server = make_server(player, host)
    print(f"\n{address_of(listener, host)}    (Ctrl-C ends it)", flush=True)
    if host not in ("127.0.0.1", "localhost", "::1"):
        print(f"it listens on {host}: who can reach this machine can use the page", flush=True)
    server.run(sockets=[listener])
    print("\nstopped", flush=True)
    if server.was_busy:
        # The thread with the model works on: the exit of the interpreter would take its memory away.
        sys.stdout.flush()
        os._exit(0)


def play(words: Sequence[str], *, base: str | None = None, host: str = "127.0.0.1", port: int | None = None) -> None:
    """Load the models and serve the page until Ctrl-C.

    Args:
        words: folders of runs, adapters of `scfm export`, and changes of the configuration of the runs, as `section.key=value`.
        base: base model, a hub id or a folder; None: the one that the run or the adapter names.
        host: address to listen on.
        port: None: 7860, or a free one if that is taken; 0: a free one.

    Raises:
        UserError: if a model cannot be used, or the port is taken.
    """
    require_packages()
    overrides = [word for word in words if re.match(r"[a-z_]+(\.[a-z_]+)*=", word)]
    paths = [word for word in words if word not in overrides]
    if not paths:
        raise UserError("give the folder of a run, or an adapter that `scfm export` wrote")
    listener = open_socket(host, port)  # a taken port is found before the models are loaded
    entries = []
    for path in dict.fromkeys(paths):
        start = time.perf_counter()
        entries.append(Entry(Path(path), overrides, base))
        print(f"{path}: loaded in {time.perf_counter() - start:.1f} s", flush=True)
    names = [entry.name for entry in entries]
    for path, entry in zip(dict.fromkeys(paths), entries, strict=True):
        if names.count(entry.name) > 1:
            entry.name = path
    player = Player(entries)
    player.warm_up()
    serve(player, listener, host)
