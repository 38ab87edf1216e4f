"""The page of `scfm play`: its inputs and what they do. The models are in `play.py`, the images as HTML in `play_html.py`."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from recipes.play import Entry, Job, Picture, Player, Stopped
from recipes.play_checks import MOST_SEEDS, MOST_STEPS, TEACHER_STEPS, Ask, checked_rows, checked_steps, seeds_of
from recipes.play_html import Slot, cards, facts_html, notes, problem, tables, wrapped
from scfm_core.errors import UserError

_NONE = "none"
_AUTOMATIC = "Strength, automatic"
_LONG: dict[str, Any] = {
    "preprocess": False,
    "show_progress": "hidden",
    "api_visibility": "private",
    "concurrency_limit": 16,
    "trigger_mode": "multiple",
}
"""Events that make images. Those of several visitors run at once, and their images take turns. The values are checked here. A visitor
may start another one at any time, which stops the one before."""


@dataclass(frozen=True)
class Inputs:
    """The values of the page's inputs, in its order, not checked."""

    prompt: Any
    seed: Any
    by_hand: Any
    strength: Any
    run: Any
    other: Any
    undistilled: Any
    teacher: Any
    width: Any
    height: Any
    guidance: Any


def show_images(player: Player, steps: Any, inputs: Inputs, job: Job | None = None) -> Iterator[str]:
    """The images side by side, as HTML, after each image anew.

    Raises:
        Stopped: if the job was stopped.
    """
    try:
        count = checked_steps(steps)
        entries, ask = _read(player, inputs)
        slots = [Slot(entry.name, entry, ask, count) for entry in entries]
        first = entries[0]
        if inputs.undistilled and first.has_teacher:
            slots.append(Slot("Undistilled model", first, ask, count, undistilled=True))
        if inputs.teacher and first.has_teacher:
            slots.append(Slot("Teacher", first, ask, TEACHER_STEPS, undistilled=True))
        _check_steps(slots)
    except UserError as error:
        yield wrapped(problem(error))
        return
    yield from _filled(player, slots, job or Job(), lambda made: notes(ask) + cards(slots, made))


def show_grid(player: Player, rows: str | None, columns: Any, inputs: Inputs, job: Job | None = None) -> Iterator[str]:
    """Images of several steps and seeds, as HTML, after each image anew. Errors as in `show_images`."""
    try:
        counts = checked_rows(rows)
        entries, ask = _read(player, inputs)
        asks = seeds_of(ask, columns)
        planned = [(entry.name, entry, counts, False) for entry in entries]
        first = entries[0]
        if inputs.undistilled and first.has_teacher:
            planned.append(("Undistilled model", first, counts, True))
        if inputs.teacher and first.has_teacher:
            planned.append(("Teacher", first, [TEACHER_STEPS], True))
        slots = [
            Slot(title, entry, each, count, undistilled)
            for title, entry, own, undistilled in planned
            for count in own
            for each in asks
        ]
        _check_steps(slots)
    except UserError as error:
        yield wrapped(problem(error))
        return
    yield from _filled(player, slots, job or Job(), lambda made: notes(ask) + tables(slots, made))


def strength_of(entry: Entry, steps: Any) -> float | None:
    """The strength that the page shows for a step count; None if there is none."""
    try:
        return round(entry.strength(checked_steps(steps)), 4)
    except UserError:
        return None


def _read(player: Player, inputs: Inputs) -> tuple[list[Entry], Ask]:
    """The models that were chosen, and what was asked."""
    first = player.named(inputs.run)
    entries = [first]
    if inputs.other not in (None, _NONE, first.name):
        entries.append(player.named(inputs.other))
    ask = player.check(
        first,
        inputs.prompt,
        inputs.seed,
        strength=inputs.strength if inputs.by_hand else None,
        guidance=inputs.guidance,
        height=inputs.height,
        width=inputs.width,
    )
    return entries, ask


def _check_steps(slots: Sequence[Slot]) -> None:
    """UserError if an adapter does not have a step count: it may have been exported for another one."""
    for slot in slots:
        strength = None if slot.undistilled else slot.ask.strength
        slot.entry.model.settings(steps=slot.steps, strength=strength, undistilled=slot.undistilled)


def _filled(
    player: Player, slots: Sequence[Slot], job: Job, render: Callable[[Sequence[Picture | None]], str]
) -> Iterator[str]:
    """The page after each image."""
    made: list[Picture | None] = [None] * len(slots)
    yield wrapped(render(made))
    for number, slot in enumerate(slots):
        try:
            made[number] = player.picture(slot.entry, slot.ask, slot.steps, job, undistilled=slot.undistilled)
        except UserError as error:
            yield wrapped(problem(error) + render(made))
            return
        yield wrapped(render(made))


@dataclass(frozen=True)
class _Controls:
    """Components of Gradio, whose values are those of `Inputs` and the step count."""

    steps: Any
    button: Any
    inputs: list[Any]
    """In the order of `Inputs`."""


def build_page(player: Player) -> Any:
    """The page, as Gradio's `Blocks`."""
    import gradio

    with gradio.Blocks(title="scfm play", analytics_enabled=False, fill_width=True) as page:
        names = ", ".join(entry.name for entry in player.entries)
        about = f"{names} on {player.entries[0].origin['model']}"
        _html(gradio, f'<h1>scfm play</h1><p class="quiet">{escape(about)}</p>', "scfm-head")
        with gradio.Row(equal_height=False):
            with gradio.Column(scale=2, min_width=300):
                controls = _add_controls(gradio, player)
            with gradio.Column(scale=5, min_width=320, elem_id="scfm-results"), gradio.Tabs():
                with gradio.Tab("Images"):
                    _add_images(gradio, player, controls)
                with gradio.Tab("Grid"):
                    _add_grid(gradio, player, controls)
                with gradio.Tab("Details"):
                    _html(gradio, facts_html(player), "scfm-details")

        def leave(request: gradio.Request) -> None:
            player.leave(request.session_hash)

        page.unload(leave)
    page.queue(max_size=64)
    return page


def _html(gradio: Any, html: str, name: str) -> Any:
    return gradio.HTML(wrapped(html), elem_id=name, js_on_load=None, apply_default_css=False)


def _add_controls(gradio: Any, player: Player) -> _Controls:
    entry, several = player.entries[0], len(player.entries) > 1
    names, usual = [each.name for each in player.entries], entry.usual
    prompt = gradio.Textbox(entry.prompt, label="Prompt", lines=1, max_lines=8, placeholder="What the image shows")
    with gradio.Row():
        seed = gradio.Textbox("0", label="Seed", scale=3, min_width=120)
        shuffle = gradio.Button("Random", scale=2, min_width=90, size="md", elem_id="scfm-random")
    steps = gradio.Slider(1, MOST_STEPS, entry.first_steps, step=1, label="Steps")
    strength = gradio.Slider(
        0, 2, strength_of(entry, entry.first_steps), step=0.0001, interactive=False, elem_id="scfm-strength",
        label=_AUTOMATIC if entry.has_strength else "Strength",
    )  # fmt: skip
    by_hand = gradio.Checkbox(
        False, label="Set the strength by hand", visible=any(each.has_strength for each in player.entries)
    )
    run = gradio.Radio(names, value=names[0], label="Run", visible=several)
    other = gradio.Dropdown(
        [_NONE, *names], value=names[1] if several else _NONE, label="Compare with", visible=several
    )
    undistilled = gradio.Checkbox(True, label="Undistilled model, same steps", visible=entry.has_teacher)
    teacher = gradio.Checkbox(True, label=f"Teacher, {TEACHER_STEPS} steps", visible=entry.has_teacher)
    with gradio.Accordion("Size and guidance", open=False):
        with gradio.Row():
            width = gradio.Number(usual["width"], label="Width", precision=0, min_width=80)
            height = gradio.Number(usual["height"], label="Height", precision=0, min_width=80)
        guidance = gradio.Number(
            usual["guidance"], label="Guidance", visible=entry.model.family.has_guidance, min_width=80
        )
    button = gradio.Button("Generate", variant="primary", elem_id="scfm-generate")
    quick = {"queue": False, "show_progress": "hidden", "preprocess": False, "api_visibility": "private"}
    shuffle.click(lambda: str(random.randrange(2**31)), None, seed, **quick)

    def set_strength(count: Any, name: Any, is_by_hand: Any) -> Any:
        return gradio.skip() if is_by_hand else strength_of(player.named(name), count)

    def set_by_hand(count: Any, name: Any, is_by_hand: Any) -> Any:
        value = {} if is_by_hand else {"value": strength_of(player.named(name), count)}
        label = "Strength, by hand" if is_by_hand else _AUTOMATIC
        return gradio.update(interactive=bool(is_by_hand), label=label, **value)

    def set_run(count: Any, name: Any, is_by_hand: Any) -> Any:
        chosen = player.named(name).usual
        shown = set_strength(count, name, is_by_hand)
        return shown, chosen["width"], chosen["height"], chosen["guidance"]

    source = [steps, run, by_hand]
    steps.change(set_strength, source, strength, trigger_mode="always_last", **quick)
    by_hand.change(set_by_hand, source, strength, **quick)
    run.change(set_run, source, [strength, width, height, guidance], **quick)
    return _Controls(
        steps, button, [prompt, seed, by_hand, strength, run, other, undistilled, teacher, width, height, guidance]
    )


def _until_stopped(gradio: Any, pages: Iterator[str]) -> Iterator[Any]:
    """The pages. A stopped job ends without a page: the place on the screen is that of the job after it."""
    try:
        yield from pages
    except Stopped:
        yield gradio.skip()


def _add_images(gradio: Any, player: Player, controls: _Controls) -> None:
    images = gradio.HTML(
        wrapped('<p class="empty">The images appear here.</p>'), js_on_load=None, elem_id="scfm-images"
    )

    def generate(request: gradio.Request, steps: Any, *values: Any) -> Iterator[Any]:
        with player.job(request.session_hash, "images") as job:
            yield from _until_stopped(gradio, show_images(player, steps, Inputs(*values), job))

    triggers = [controls.button.click, controls.inputs[0].submit]
    gradio.on(triggers, generate, [controls.steps, *controls.inputs], images, **_LONG)
    # On a phone the images are below the inputs.
    to_images = "() => { if (innerWidth <= 700) document.querySelector('#scfm-images').scrollIntoView() }"
    controls.button.click(None, None, None, js=to_images, api_visibility="private")


def _add_grid(gradio: Any, player: Player, controls: _Controls) -> None:
    folded = player.entries[0].folded_steps
    with gradio.Row(equal_height=True):
        rows = gradio.Textbox(str(folded or "1, 2, 4, 8"), label="Steps of the rows", min_width=120)
        columns = gradio.Slider(1, MOST_SEEDS, 4, step=1, label="Number of seeds", min_width=120)
    button = gradio.Button("Generate grid", variant="primary")
    grid = _html(gradio, '<p class="empty">The grid appears here.</p>', "scfm-grid")

    def generate(request: gradio.Request, counts: Any, number: Any, *values: Any) -> Iterator[Any]:
        with player.job(request.session_hash, "grid") as job:
            yield from _until_stopped(gradio, show_grid(player, counts, number, Inputs(*values), job))

    button.click(generate, [rows, columns, *controls.inputs], grid, **_LONG)
