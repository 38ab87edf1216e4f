"""The page of `scfm play` in Chromium: prompt to image, slider to strength, comparison, wrong prompts, two visitors at once."""

import io
import json
import re
import shutil
import socket

import pytest
from PIL import Image
from play_screenshot import open_page, serve_in_thread
from test_play import PROMPT, player, runs  # noqa: F401

sync_api = pytest.importorskip("playwright.sync_api", reason="the browser is driven by playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium in PATH (apt-get install chromium)"),
]
WAIT = 60_000
"""Milliseconds: never reached, but on a busy machine."""


@pytest.fixture(scope="module")
def asked():
    """Names and addresses other than this machine's that were asked for."""
    return []


@pytest.fixture(scope="module")
def address(player, asked):  # noqa: F811
    """The page; Python's connections to other machines are refused."""
    pytest.importorskip("gradio", reason="the page needs scfm[play]")  # two seconds, which only these tests need
    connect, getaddrinfo = socket.socket.connect, socket.getaddrinfo

    def refusing(self, target):
        if isinstance(target, tuple) and target[0] not in ("127.0.0.1", "::1"):
            asked.append(target)
            raise OSError("no network")
        return connect(self, target)

    def resolving(host, *words, **named):
        if host not in ("127.0.0.1", "localhost", None):
            asked.append(host)
            raise socket.gaierror("no network")
        return getaddrinfo(host, *words, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refusing)
        patch.setattr(socket, "getaddrinfo", resolving)
        url, stop = serve_in_thread(player)
        yield url
        stop()


@pytest.fixture(scope="module")
def browser():
    # No name is resolved, and nothing but this machine is reached.
    rules = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", rules]
        )
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser, address, asked):
    """Opens the page as a new visitor; errors of its scripts and requests to other servers fail the test."""
    errors, contexts = [], []

    def visit(width=1100, height=850):
        context = browser.new_context(viewport={"width": width, "height": height})
        context.set_default_timeout(WAIT)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on(
            "request", lambda request: request.url.startswith((address, "data:", "blob:")) or asked.append(request.url)
        )
        open_page(page, address)
        return page

    yield visit
    for context in contexts:
        context.close()
    assert errors == [] and asked == []


def generate(page):
    page.get_by_role("button", name="Generate", exact=True).click()


def images(page, count, box="#scfm-images"):
    """The addresses of the images, when there are so many and none is waited for."""
    found = page.locator(f"{box} img")
    sync_api.expect(found).to_have_count(count, timeout=WAIT)
    sync_api.expect(page.locator(f"{box} .waiting")).to_have_count(0, timeout=WAIT)
    page.wait_for_function(
        "box => [...document.querySelectorAll(`${box} img`)].every(img => img.naturalWidth)", arg=box
    )
    return [image.get_attribute("src") for image in found.all()]


def settings(page, address, source):
    png = page.request.get(f"{address}/{source}").body()
    return json.loads(Image.open(io.BytesIO(png)).info["scfm"])


def strength(page):
    return page.locator("#scfm-strength input[type=number]")


def set_steps(page, count):
    slider = page.get_by_role("slider", name="Steps")
    slider.focus()
    slider.fill(str(count))


def test_prompt_to_images_slider_to_strength_and_the_file(visit, address):
    page = visit()
    sync_api.expect(page.get_by_label("Prompt")).to_have_value(PROMPT)
    sync_api.expect(strength(page)).to_have_value("0.5")
    sync_api.expect(strength(page)).to_be_disabled()
    set_steps(page, 3)
    sync_api.expect(strength(page)).to_have_value("0.5774", timeout=WAIT)
    page.get_by_label("Prompt").fill("<b>two</b> ${1} {{2}}")
    page.get_by_label("Prompt").press("Enter")
    sources = images(page, 4)
    found = [settings(page, address, source) for source in sources]
    assert [(each["steps"], each.get("run")) for each in found] == [(3, "scaled"), (3, "plain"), (3, None), (32, None)]
    assert {each["prompt"] for each in found} == {"<b>two</b> ${1} {{2}}"} and found[0]["strength"] == pytest.approx(
        3**-0.5
    )
    captions = page.locator("#scfm-images figcaption").all_inner_texts()
    assert [text.split("\n")[0] for text in captions] == ["scaled", "plain", "Undistilled model", "Teacher"]
    assert "3 steps, strength 0.577" in captions[0] and "shift 3, guidance 3.5" in captions[0]
    assert all(re.search(r"\d\.\d\d s", text) for text in captions)
    with page.expect_download() as saved:
        page.get_by_role("link", name="Save PNG").first.click()
    assert saved.value.suggested_filename == "b-two-b-1-2_seed0_3steps.png"
    with Image.open(saved.value.path()) as image:
        assert json.loads(image.info["scfm"]) == found[0]

    page.get_by_label("Set the strength by hand").check()
    sync_api.expect(strength(page)).to_be_enabled(timeout=WAIT)
    strength(page).fill("0.8")
    page.get_by_label("Undistilled model").uncheck()
    page.get_by_label("Teacher").uncheck()
    page.get_by_label("Compare with").click()
    page.get_by_role("option", name="none").click()
    generate(page)
    [source] = images(page, 1)
    assert settings(page, address, source)["strength"] == 0.8
    set_steps(page, 5)
    page.get_by_label("Set the strength by hand").uncheck()
    sync_api.expect(strength(page)).to_have_value("0.4472", timeout=WAIT)
    page.get_by_label("plain", exact=True).check()
    sync_api.expect(strength(page)).to_have_value("1", timeout=WAIT)
    page.get_by_role("tab", name="Details").click()
    sync_api.expect(page.get_by_text("1 / steps^0.5")).to_be_visible()


def test_what_is_wrong_is_a_message_and_the_page_goes_on(visit):
    """On a phone, where the images are below the inputs."""
    page = visit(width=390)
    problem = page.locator("#scfm-images [role=alert]")
    for prompt, message in (("", "There is no prompt"), ("a \ud800 b", "half of a character")):
        # As a script writes it: the driver cannot send half of a character.
        page.get_by_label("Prompt").evaluate(
            "(box, text) => { box.value = JSON.parse(text); box.dispatchEvent(new Event('input', {bubbles: true})) }",
            json.dumps(prompt),
        )
        generate(page)
        sync_api.expect(problem).to_contain_text(message, timeout=WAIT)
        sync_api.expect(problem).to_be_in_viewport()
    page.get_by_label("Prompt").fill("a " * 12)
    page.get_by_label("Seed", exact=True).fill("first")
    generate(page)
    sync_api.expect(problem).to_contain_text("The seed must be an integer from 0 to 2^62, got 'first'.", timeout=WAIT)
    page.get_by_label("Seed", exact=True).fill("7")
    page.get_by_text("Size and guidance").click()
    page.get_by_label("Width").fill("18")
    generate(page)
    sync_api.expect(problem).to_contain_text("An image of 16 x 18 pixels cannot be packed", timeout=WAIT)
    page.get_by_label("Width").fill("20")
    generate(page)
    images(page, 4)
    sync_api.expect(page.locator("#scfm-images [role=status]")).to_have_text(
        "The prompt has 13 tokens. The model reads the first 8."
    )
    sync_api.expect(problem).to_have_count(0)
    assert page.get_by_text("Traceback").count() == 0


def test_two_visitors_at_once(visit, address):
    pages = [visit(), visit(width=390)]
    for number, page in enumerate(pages):
        page.get_by_label("Prompt").fill(f"visitor {number}")
        page.get_by_label("Seed", exact=True).fill(str(number))
        page.get_by_role("tab", name="Grid").click()
        page.get_by_label("Steps of the rows").fill("1, 2")
    for page in pages:
        page.get_by_role("button", name="Generate grid").click()
    for number, page in enumerate(pages):
        found = [settings(page, address, source) for source in images(page, 4 * (2 + 2 + 2 + 1), "#scfm-grid")]
        assert {each["prompt"] for each in found} == {f"visitor {number}"}
        assert {each["seed"] for each in found} == {number + column for column in range(4)}
    assert pages[1].evaluate("document.documentElement.scrollWidth <= innerWidth"), "the page is wider than a phone"
