"""The picture of docs/play.md, after `make demo`:

python tests/recipes/play_screenshot.py runs/demo/trajectories runs/demo/paper_recipe docs/play.png
"""

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

from recipes.play import Entry, Player
from recipes.play_server import require_packages, serve_in_thread


def main(*words: str) -> None:
    *runs, output = map(Path, words)
    require_packages()
    player = Player([Entry(run) for run in runs])
    player.warm_up()
    address, stop = serve_in_thread(player)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1100, "height": 900})
        page.goto(address)
        page.wait_for_load_state("networkidle")  # until then Gradio may set an input again
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
