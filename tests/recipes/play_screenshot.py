"""The picture of docs/play.md, after `make demo`:

python tests/recipes/play_screenshot.py runs/demo/trajectories runs/demo/paper_recipe docs/play.png
"""

import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from recipes.play import Entry, Player
from recipes.play_server import address_of, make_server, open_socket, require_packages


def serve_in_thread(player: Player) -> tuple[str, Callable[[], None]]:
    """Serve the page on a free port; returns its address, and a function that stops it."""
    listener, server = open_socket("127.0.0.1", 0), make_server(player)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()

    def stop() -> None:
        server.handle_exit(signal.SIGINT, None)
        thread.join(timeout=20)

    return address_of(listener, "127.0.0.1"), stop


def open_page(page: Any, address: str) -> None:
    """Open the page, and wait until there was no request for half a second: until then Gradio may set an input again.

    The page's heartbeat, which stays open, does not count. With it, playwright's `networkidle` never comes.
    """
    pending: set[Any] = set()
    latest = time.monotonic()

    def begin(request: Any) -> None:
        nonlocal latest
        if "/heartbeat/" not in request.url:
            pending.add(request)
            latest = time.monotonic()

    def end(request: Any) -> None:
        nonlocal latest
        pending.discard(request)
        latest = time.monotonic()

    page.on("request", begin)
    page.on("requestfinished", end)
    page.on("requestfailed", end)
    page.goto(address)
    page.get_by_role("button", name="Generate", exact=True).wait_for()
    while pending or time.monotonic() - latest < 0.5:
        page.wait_for_timeout(50)


def main(*words: str) -> None:
    from playwright.sync_api import sync_playwright

    *runs, output = map(Path, words)
    require_packages()
    player = Player([Entry(run) for run in runs])
    player.warm_up()
    address, stop = serve_in_thread(player)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1100, "height": 900})
        open_page(page, address)
        page.get_by_label("Prompt").fill("a handwritten digit three")
        page.get_by_role("slider", name="Steps").fill("1")
        page.get_by_role("button", name="Generate", exact=True).click()
        page.wait_for_function("document.querySelectorAll('#scfm-images img').length === 4")
        page.wait_for_timeout(500)
        page.screenshot(path=output)
        browser.close()
    stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
