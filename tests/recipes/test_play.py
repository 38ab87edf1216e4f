"""`scfm play` without a browser: its images, what visitors write, several visitors, the addresses of its server."""

import asyncio
import dataclasses
import io
import json
import os
import queue
import re
import shutil
import signal
import socket
import sys
import threading
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from play_screenshot import serve_in_thread
from runs import ALL_TARGETS
from tiny_fixtures import smallest_tree

from recipes import play, play_page, play_server
from recipes.cli import main
from recipes.play import Entry, Job, Player, Stopped
from recipes.play_checks import checked_rows, seeds_of
from recipes.play_html import facts_html
from recipes.play_page import Inputs, show_grid, show_images, strength_of
from scfm_core.errors import UserError
from scfm_core.train.parse import dump_config, parse_config
from scfm_core.train.trainer import Trainer

PROMPT = "a digit"


def write_run(tiny, folder, weights="lora", **method):
    """A run whose adapter changes the images, without training."""
    tree = smallest_tree(tiny, folder, ALL_TARGETS)
    tree["method"] |= method
    tree["train"]["weights"] = weights
    tree["sample"]["prompts"] = [PROMPT]
    config = parse_config(tree, source="test")
    trainer = Trainer(config)
    with torch.no_grad():
        for name, parameter in trainer.model.parameters(config.sample.weights).items():
            if ".lora_B." in name:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    trainer.state.save()
    (folder / "config.yaml").write_text(dump_config(config))
    return folder


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    return [write_run(tiny, root / "scaled", step_gain={"gamma": 0.5}), write_run(tiny, root / "plain")]


@pytest.fixture(scope="module")
def player(runs):
    return Player([Entry(run) for run in runs])


def inputs(**changes):
    usual = {
        "prompt": PROMPT, "seed": "5", "by_hand": False, "strength": 0.5, "run": "scaled", "other": "none", "undistilled": False,
        "teacher": False, "width": 16, "height": 16, "guidance": 3.5,
    }  # fmt: skip
    return Inputs(**(usual | changes))


def last(pages):
    return list(pages)[-1]


def pictures(player, html):
    """The images of a page, in its order."""
    return [player.find(id) for id in re.findall(r'<img src="images/([\w-]+)/', html)]


def pixels(png):
    return np.asarray(Image.open(io.BytesIO(png)), dtype=int)


def test_an_image_is_the_file_of_scfm_sample(player, runs, tmp_path):
    words = ["--prompt", PROMPT, "--steps", "3", "--seed", "5", "--output", str(tmp_path)]
    assert main(["sample", str(runs[0]), *words]) == 0
    [path] = tmp_path.glob("*.png")
    html = last(show_images(player, 3, inputs()))
    [picture] = pictures(player, html)
    assert picture.png == path.read_bytes()
    assert picture.settings["strength"] == pytest.approx(3**-0.5)
    assert picture.name == "a-digit_seed5_3steps.png" and f'download="{picture.name}"' in html
    for text in ("3 steps, strength 0.577", "shift 3, guidance 3.5", f"{picture.seconds:.2f} s"):
        assert text in html


def test_side_by_side(player):
    pages = list(show_images(player, 2, inputs(other="plain", undistilled=True, teacher=True)))
    assert [len(pictures(player, page)) for page in pages] == [0, 1, 2, 3, 4]
    assert pages[0].count("waiting") == 2 * 4
    scaled, plain, undistilled, teacher = pictures(player, pages[-1])
    assert [each.settings.get("run") for each in (scaled, plain, undistilled, teacher)] == [
        "scaled",
        "plain",
        None,
        None,
    ]
    assert [each.settings["steps"] for each in (scaled, plain, undistilled, teacher)] == [2, 2, 2, 32]
    assert [each.settings["strength"] for each in (scaled, plain)] == [pytest.approx(2**-0.5), 1]
    assert undistilled.settings["weights"] == "teacher" and undistilled.settings["strength"] == 0
    without = pictures(player, last(show_images(player, 2, inputs(by_hand=True, strength=0))))[0]
    assert np.array_equal(pixels(undistilled.png), pixels(without.png))
    assert np.abs(pixels(undistilled.png) - pixels(scaled.png)).max() > 20


def test_an_image_is_made_once(player, monkeypatch):
    first = last(show_images(player, 2, inputs(seed="70", teacher=True)))
    monkeypatch.setattr(player.entries[0].model, "sample", None)
    assert last(show_images(player, 2, inputs(seed="70", teacher=True))) == first


def test_the_strength_of_the_steps(player):
    scaled, plain = player.entries
    for steps in range(1, 17):
        assert strength_of(scaled, steps) == pytest.approx(steps**-0.5, abs=1e-4) and strength_of(plain, steps) == 1
    assert strength_of(scaled, 17) is None
    [picture] = pictures(player, last(show_images(player, 4, inputs(by_hand=True, strength=0.8))))
    assert picture.settings["strength"] == 0.8
    assert "1 / steps^0.5" in facts_html(player) and "1 for every step count" in facts_html(player)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": ""}, "There is no prompt"),
        ({"prompt": " \n"}, "There is no prompt"),
        ({"prompt": None}, "There is no prompt"),
        ({"prompt": ["a"]}, "There is no prompt"),
        ({"prompt": "a \ud800 b"}, "half of a character"),
        ({"seed": ""}, "The seed must be an integer from 0 to 2^62, got &#x27;&#x27;"),
        ({"seed": "-1"}, "The seed must be"),
        ({"seed": "<b>"}, "got &#x27;&lt;b&gt;&#x27;"),
        ({"seed": "9" * 30}, "The seed must be"),
        ({"seed": "\u0663"}, "The seed must be"),
        ({"width": 15}, "An image of 16 x 15 pixels cannot be packed"),
        ({"width": 16.5}, "must be positive integers"),
        ({"height": -16}, "must be positive integers"),
        ({"height": "tall"}, "must be positive integers"),
        ({"height": 1e9}, "more than 4 times the 16 x 16 of the training"),
        ({"guidance": -1}, "The guidance must be a number from 0 to 100"),
        ({"guidance": float("nan")}, "The guidance must be"),
        ({"by_hand": True, "strength": "much"}, "The strength must be a number from -10 to 10"),
        ({"run": "/etc"}, "This run is not on the page"),
        ({"other": ["scaled"]}, "This run is not on the page"),
    ],
)  # fmt: skip
def test_what_a_visitor_gets_wrong_is_a_message(player, changes, message):
    for pages in (show_images(player, 2, inputs(**changes)), show_grid(player, "1", 1, inputs(**changes))):
        [page] = pages
        assert message in page and 'role="alert"' in page and "<img" not in page
        page.encode()  # no lone surrogate


@pytest.mark.parametrize("steps", [0, 17, 2.5, "4", None, float("inf"), True])
def test_wrong_steps(player, steps):
    [page] = show_images(player, steps, inputs())
    assert "The steps must be an integer from 1 to 16" in page


def test_wrong_grids(player):
    for rows, columns in (
        ("", 1),
        ("1, two", 1),
        ("1, 17", 1),
        (None, 1),
        ("1, 2", 0),
        ("1", 9),
        ("1", "2"),
        ("1 2 3 4 5 6 7 8 9", 1),
    ):
        [page] = show_grid(player, rows, columns, inputs())
        assert 'role="alert"' in page
    assert checked_rows(" 1,4 2,,4") == [1, 4, 2]


def test_a_long_prompt_is_truncated_with_a_note(player):
    entry = player.entries[0]
    long = player.check(entry, "a " * 9, "0")
    assert long.notes == ("The prompt has 10 tokens. The model reads the first 8.",)
    huge = player.check(entry, "b " * 9999, "0")
    assert len(huge.prompt) == 10_000 and huge.notes[0] == "The prompt was cut to its first 10000 characters."
    assert player.check(entry, "a " * 6, "0").notes == ()
    assert long.notes[0] in last(show_images(player, 1, inputs(prompt="a " * 9)))


def test_the_text_of_a_visitor_is_no_html(player):
    html = last(show_images(player, 1, inputs(prompt='"><script>x</script>${1}{{2}}')))
    assert "<script>" not in html and '"&quot;&gt;&lt;script&gt;x' in html


def test_a_grid(player):
    pages = list(show_grid(player, "1, 4", 2, inputs(seed="7", teacher=True)))
    made = pictures(player, pages[-1])
    assert len(pages) == 1 + len(made) == 7
    assert [(each.settings["steps"], each.settings["seed"]) for each in made] == [
        (steps, seed) for steps in (1, 4, 32) for seed in (7, 8)
    ]
    single = pictures(player, last(show_images(player, 4, inputs(seed="8"))))[0]
    assert single.png == made[3].png
    assert [each.seed for each in seeds_of(player.check(player.entries[0], "a", "7"), 3)] == [7, 8, 9]


def test_two_visitors_at_once_get_their_own_images(player):
    asked = [{"prompt": "zero", "seed": "1"}, {"prompt": "nine", "seed": "2", "run": "plain"}]
    alone = [pictures(player, last(show_images(player, 3, inputs(**each, undistilled=True)))) for each in asked]
    both, found = Player(player.entries), [[], []]

    def visit(number):
        found[number] = pictures(both, last(show_images(both, 3, inputs(**asked[number], undistilled=True))))

    threads = [threading.Thread(target=visit, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [[each.png for each in own] for own in found] == [[each.png for each in own] for own in alone]


def test_old_images_are_dropped(player, monkeypatch):
    small = Player(player.entries)
    monkeypatch.setattr(play, "_KEPT_BYTES", 1)
    [first] = pictures(small, last(show_images(small, 1, inputs(seed="1"))))
    [second] = pictures(small, last(show_images(small, 1, inputs(seed="2"))))
    assert small.find(first.id) is None and small.find(second.id) is second


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            RuntimeError("secret"),
            "The image could not be made (RuntimeError). The terminal of `scfm play` has the details.",
        ),
        (torch.OutOfMemoryError("secret"), "too little free memory"),
        (UserError("the file is gone"), "The file is gone."),
    ],
)
def test_a_failure_is_a_message_without_traceback(player, monkeypatch, capsys, error, message):
    def fail(*words, **named):
        raise error

    monkeypatch.setattr(player.entries[0].model, "sample", fail)
    page = last(show_images(player, 1, inputs(seed="99")))
    assert message in page and "secret" not in page and "Traceback" not in page
    assert ("secret" in capsys.readouterr().err) == isinstance(error, RuntimeError) - isinstance(
        error, torch.OutOfMemoryError
    )


class ThreeSteps(Job):
    """A job that is stopped before its fourth step."""

    steps = 0

    def check(self):
        self.steps += 1
        if self.steps > 3:
            self.stop()
        super().check()


def test_a_stopped_job_ends_at_the_next_step(player):
    job = ThreeSteps()
    with pytest.raises(Stopped):
        last(show_grid(player, "8, 9", 2, inputs(seed="41"), job))
    assert job.steps == 4
    assert len(pictures(player, last(show_images(player, 1, inputs(seed="41"))))) == 1


def test_a_stopped_job_does_not_wait_for_its_turn(player):
    busy, entered, release = Player(player.entries), threading.Event(), threading.Event()
    first = threading.Thread(target=busy._worker.call, args=(lambda: (entered.set(), release.wait()),))
    first.start()
    assert entered.wait(10)
    ended = []

    def wait():
        with busy.job("a", "grid") as job, pytest.raises(Stopped):
            ended.append(busy._worker.call(lambda: ended.append("ran"), job))

    second = threading.Thread(target=wait)
    second.start()
    while len(busy._worker._waiting) < 2:
        second.join(0.001)
    busy.leave("b")
    busy.leave("a")
    second.join(10)
    release.set()
    first.join(10)
    assert not second.is_alive() and not ended and not busy._jobs


def test_the_end_of_the_server_ends_all_waits(player):
    busy, entered, release = Player(player.entries), threading.Event(), threading.Event()
    errors = []

    def wait(function):
        with pytest.raises(UserError, match="stopped") as caught:
            busy._worker.call(function)
        errors.append(caught.value)

    threads = [
        threading.Thread(target=wait, args=(lambda: (entered.set(), release.wait()),)),
        threading.Thread(target=wait, args=(lambda: errors.append("ran"),)),
    ]
    threads[0].start()
    assert entered.wait(10)
    threads[1].start()
    while len(busy._worker._waiting) < 2:
        threads[1].join(0.001)
    assert busy.stop()
    for thread in threads:
        thread.join(10)
    release.set()
    assert busy._worker.call(lambda: 3) == 3 and len(errors) == 2 and "ran" not in errors
    assert not busy.stop()


def test_full_weights_without_teacher(tiny, tmp_path):
    """There is no strength to choose, and nothing to compare with."""
    alone = Player([Entry(write_run(tiny, tmp_path / "full", "full", teacher_fraction=0.0, flow_fraction=1.0))])
    [picture] = pictures(
        alone, last(show_images(alone, 2, inputs(run=None, by_hand=True, strength=0.3, undistilled=True, teacher=True)))
    )
    assert picture.settings["strength"] == 1 and "none: full weights" in facts_html(alone)


def test_an_exported_adapter(player, runs, tiny, tmp_path):
    """In one file for all step counts, and in one for 4 steps."""
    folder, base = runs[0] / "adapter", str(tiny / "flux")
    [expected] = pictures(player, last(show_images(player, 4, inputs())))
    shutil.rmtree(folder, ignore_errors=True)
    for words, strength, fact in (([], 0.5, "1 / steps^0.5"), (["--steps", "4"], 1, "4 steps")):
        assert main(["export", str(runs[0]), "--dtype", "float32", *words]) == 0
        [file] = folder.glob("*_4steps_*" if words else "*.safetensors")
        alone = Player([Entry(file if words else folder, base=base)])
        found, undistilled = pictures(alone, last(show_images(alone, 4, inputs(run=None, undistilled=True))))
        assert np.abs(pixels(found.png) - pixels(expected.png)).max() <= 2
        assert np.abs(pixels(undistilled.png) - pixels(expected.png)).max() > 10
        job = ThreeSteps()
        with pytest.raises(Stopped):
            last(show_images(alone, 4, inputs(run=None, seed="6"), job))
        assert job.steps == 4
        assert (found.settings["adapter"], found.settings["model"]) == (file.stem, "flux")
        assert found.settings["strength"] == strength and fact in facts_html(alone)
    [page] = show_images(alone, 3, inputs(run=None))
    assert "This adapter is folded for 4 steps" in page
    [page] = show_grid(alone, "4, 3", 1, inputs(run=None))
    assert "This adapter is folded for 4 steps" in page
    assert strength_of(alone.entries[0], 3) is None and alone.entries[0].first_steps == 4
    assert Entry(file).origin["model"] == "flux"  # as its run says
    with pytest.raises(UserError, match="names no base model"):
        Entry(Path(shutil.copy(file, tmp_path)))


class TestServer:
    def get(self, player, path, **headers):
        """Status and headers of an address, and whether Gradio answered."""
        given = [(name.encode(), value.encode()) for name, value in ({"host": "127.0.0.1:7860"} | headers).items()]
        passed, sent = [], []

        async def gradio(scope, receive, send):
            passed.append(scope["path"])
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b""})

        async def send(message):
            sent.append(message)

        gate = play_server._Gate(gradio, player, "GPU01.cluster.example")
        asyncio.run(gate({"type": "http", "path": path, "headers": given}, None, send))
        headers = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
        assert headers["content-security-policy"].startswith("default-src 'self'")
        return sent[0]["status"], headers, sent[1]["body"], bool(passed)

    @pytest.mark.parametrize(
        "path", ["/", "/config", "/assets/index-3.js", "/gradio_api/queue/join", "/gradio_api/heartbeat/a1"]
    )
    def test_the_page_is_open(self, player, path):
        assert self.get(player, path)[3]

    @pytest.mark.parametrize(
        "path",
        [
            "/gradio_api/file=/etc/passwd", "/gradio_api/file/etc/passwd", "/gradio_api/upload", "/gradio_api/proxy=http://a", "/login",
            "/gradio_api/stream/1", "/gradio_api/component_server", "/static/../../x", "/assets/..", "/monitoring", "/images/a/../b",
            "/gradio_api/run/other", "/docs", "/etc/passwd", "//etc/passwd",
        ],
    )  # fmt: skip
    def test_no_path_of_the_machine_is_open(self, player, path):
        status, _, _, passed = self.get(player, path)
        assert status == 404 and not passed

    @pytest.mark.parametrize(
        ("headers", "status"),
        [
            ({"host": "localhost:7860", "origin": "http://localhost:7860"}, 200),
            ({"host": "[::1]:7860"}, 200),
            ({"host": "192.168.0.7:7860", "origin": "http://192.168.0.7:7860"}, 200),
            ({"host": "gpu01.cluster.example:7860"}, 200),  # the one of --host, which the page prints
            ({"host": "evil.example:7860"}, 403),  # a name that was bound to this address
            ({"origin": "http://evil.example"}, 403),  # another site's script
            ({"origin": "null"}, 403),
            ({"host": ""}, 403),
        ],
    )
    def test_other_sites_get_no_answer(self, player, headers, status):
        found, _, _, passed = self.get(player, "/gradio_api/queue/join", **headers)
        assert (found, passed) == (status, status == 200)

    @pytest.mark.parametrize(
        ("headers", "status"),
        [
            ({"content-length": "20000"}, 200),
            ({"content-length": "2000000"}, 413),
            ({"content-length": "9" * 5000}, 413),
            ({"content-length": "-1"}, 413),
            ({"transfer-encoding": "chunked"}, 413),
        ],
    )
    def test_large_requests_are_not_read(self, player, headers, status):
        found, _, _, passed = self.get(player, "/gradio_api/queue/join", **headers)
        assert (found, passed) == (status, status == 200)

    def test_an_image(self, player):
        [picture] = pictures(player, last(show_images(player, 1, inputs(prompt="é\r\n/../ï"))))
        status, headers, body, _ = self.get(player, f"/{picture.address}")
        assert (status, body, headers["content-type"]) == (200, picture.png, "image/png")
        assert headers["content-disposition"] == "inline; filename*=UTF-8''%C3%A9-%C3%AF_seed5_1steps.png"
        assert json.loads(Image.open(io.BytesIO(body)).info["scfm"])["prompt"] == "é\r\n/../ï"
        assert self.get(player, "/images/unknown/a.png")[0] == 404

    def test_ports(self, monkeypatch, capsys):
        with play_server.open_socket("127.0.0.1", 0) as taken:
            port = taken.getsockname()[1]
            monkeypatch.setattr(play_server, "_PORT", port)
            with play_server.open_socket("127.0.0.1", None) as free:
                assert free.getsockname()[1] != port
                assert play_server.address_of(free, "0.0.0.0") == f"http://127.0.0.1:{free.getsockname()[1]}"
            for host, number, message in (
                ("127.0.0.1", port, "without --port a free one is taken"),
                ("127.0.0.1", 70000, "--port must be from 0 to 65535"),
                ("192.0.2.1", 0, "cannot listen on 192.0.2.1 port 0"),
            ):
                assert main(["play", "runs/any", "--host", host, "--port", str(number)]) == 2
                assert message in capsys.readouterr().err

    def test_without_gradio(self, monkeypatch, capsys):
        monkeypatch.setitem(sys.modules, "gradio", None)
        assert main(["play", "runs/any"]) == 2
        assert "pip install 'scfm[play]'" in capsys.readouterr().err

    def test_wrong_words(self, monkeypatch, capsys, tmp_path):
        monkeypatch.setattr(play_server, "require_packages", lambda: None)
        assert main(["play", "sample.seed=3", "--port", "0"]) == 2
        assert main(["play", str(tmp_path), "--port", "0"]) == 2
        err = capsys.readouterr().err
        assert "give the folder of a run" in err and "is neither a run" in err

    def test_ctrl_c_ends_it_quietly(self, player, capfd):
        """The signal comes while a page is open."""
        pytest.importorskip("gradio")
        pytest.importorskip("uvicorn")
        assert threading.current_thread() is threading.main_thread()
        listener = play_server.open_socket("127.0.0.1", 0)
        target, address = listener.getsockname(), play_server.address_of(listener, "127.0.0.1")
        opened = []

        def visit():
            try:
                urllib.request.urlopen(f"{address}/", timeout=20).read()
                opened.append(urllib.request.urlopen(f"{address}/gradio_api/heartbeat/a1", timeout=20))
            finally:
                os.kill(os.getpid(), signal.SIGINT)

        visitor = threading.Thread(target=visit)
        visitor.start()
        play_server.serve(player, listener, "127.0.0.1")
        visitor.join()
        opened.pop().close()
        out, err = capfd.readouterr()
        assert err == "" and out == f"\n{address}    (Ctrl-C ends it)\n\nstopped\n"
        with pytest.raises(OSError):
            socket.create_connection(target)


def test_a_visitor_who_leaves_or_starts_another_job_stops_the_first(player, monkeypatch):
    pytest.importorskip("gradio")
    started, stopped = queue.SimpleQueue(), queue.SimpleQueue()

    def sample(prompt, *, seed, before_step, **settings):
        started.put(seed)
        try:
            while True:
                before_step()
                time.sleep(0.005)
        finally:
            stopped.put(seed)

    monkeypatch.setattr(player.entries[0].model, "sample", sample)
    address, stop = serve_in_thread(player)
    try:
        with urllib.request.urlopen(f"{address}/config", timeout=20) as answer:
            [images] = [each for each in json.load(answer)["dependencies"] if len(each["inputs"]) == 12]

        def generate(seed):
            values = [4, *dataclasses.astuple(inputs(seed=str(seed)))]
            body = json.dumps({"data": values, "fn_index": images["id"], "session_hash": "a1"}).encode()
            request = urllib.request.Request(
                f"{address}/gradio_api/queue/join", body, {"content-type": "application/json"}
            )
            urllib.request.urlopen(request, timeout=20).close()
            assert started.get(timeout=20) == seed

        visit = urllib.request.urlopen(f"{address}/gradio_api/heartbeat/a1", timeout=20)
        generate(101)
        generate(102)
        assert stopped.get(timeout=20) == 101
        visit.close()
        assert stopped.get(timeout=20) == 102
    finally:
        stop()


def test_the_page_has_no_inputs_that_take_files(player):
    gradio = pytest.importorskip("gradio")
    page = play_page.build_page(player)
    kinds = {type(block) for block in page.blocks.values()}
    assert gradio.Textbox in kinds and not kinds & {gradio.File, gradio.Image, gradio.Gallery, gradio.UploadButton}
    assert page.analytics_enabled is False
