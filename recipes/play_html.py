"""The images of `scfm play` as HTML, and the page's style."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from urllib.parse import quote

from recipes.play import Entry, Picture, Player
from recipes.play_checks import Ask

_SMALL = 256
"""Pixels: smaller images are enlarged without smoothing."""

STYLE = """
.gradio-container { max-width: 1280px !important; overflow: clip !important; }
footer { display: none !important; }
.scfm { --quiet: color-mix(in srgb, var(--body-text-color) 72%, transparent); color: var(--body-text-color); line-height: 1.45; }
.scfm h1 { font-size: 1.5rem; font-weight: 650; margin: 0; }
.scfm p { margin: 0 0 .75rem; overflow-wrap: anywhere; }
.scfm a { color: var(--link-text-color); text-decoration: underline; }
.scfm .quiet { color: var(--quiet); }
.scfm .problem { background: #fef2f2; border-left: 4px solid #b91c1c; border-radius: 4px; color: #7f1d1d; padding: .75rem 1rem; }
.scfm .empty { border: 1px dashed var(--border-color-primary); border-radius: 8px; color: var(--quiet); margin: 0;
  padding: 4rem 1rem; text-align: center; }
.scfm .cards { display: grid; gap: 1rem; grid-template-columns: repeat(var(--columns), minmax(0, 1fr)); }
.scfm .cards.one { max-width: 420px; }
.scfm figure { margin: 0; min-width: 0; }
.scfm figure a { padding: 0; }
.scfm .frame { background: var(--background-fill-secondary); border-radius: 6px; display: block; overflow: hidden; width: 100%; }
.scfm .frame img { display: block; height: 100%; margin: 0; object-fit: contain; width: 100%; }
.scfm .small img { image-rendering: pixelated; }
.scfm .waiting { animation: scfm-wait 1s ease-in-out infinite alternate; background: var(--border-color-primary); }
@keyframes scfm-wait { to { opacity: .35; } }
.scfm figcaption { font-size: .875rem; margin-top: .5rem; overflow-wrap: anywhere; }
.scfm figcaption strong { display: block; }
.scfm figcaption span { color: var(--quiet); display: block; }
.scfm .scroll { overflow-x: auto; }
.scfm table { border-collapse: collapse; font-size: .875rem; margin: 0 0 1.5rem; text-align: left; }
.scfm caption { font-size: 1rem; font-weight: 600; padding: 0 0 .5rem; text-align: left; }
.scfm th { color: var(--quiet); font-weight: 400; }
.scfm .grid th, .scfm .grid td { padding: 3px; white-space: nowrap; }
.scfm .grid tbody th { padding-right: .75rem; vertical-align: top; }
.scfm .grid th strong, .scfm .grid th span { display: block; }
.scfm .grid th strong { color: var(--body-text-color); font-weight: 500; }
.scfm .grid .frame { width: clamp(72px, 9vw, 132px); }
.scfm .facts { width: 100%; }
.scfm .facts th, .scfm .facts td { border-top: 1px solid var(--border-color-primary); overflow-wrap: anywhere;
  padding: .4rem .75rem .4rem 0; vertical-align: top; }
.scfm .facts th { white-space: nowrap; width: 9rem; }
#scfm-random { align-self: end; margin-bottom: 12px; }
#scfm-generate { bottom: 12px; position: sticky; z-index: 5; }
@media (max-width: 700px) { .scfm .cards { grid-template-columns: repeat(min(2, var(--columns)), minmax(0, 1fr)); } }
"""


@dataclass(frozen=True)
class Slot:
    """A place for an image of the page."""

    title: str
    entry: Entry
    ask: Ask
    steps: int
    undistilled: bool = False

    @property
    def table(self) -> tuple[str, str, bool]:
        """Of a grid; a run may have the title of the teacher."""
        return self.title, self.entry.name, self.undistilled


def wrapped(html: str) -> str:
    """In the element that `STYLE` is for."""
    return f'<div class="scfm">{html}</div>'


def problem(error: Exception) -> str:
    """A message, as a sentence."""
    text = str(error)
    text = text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")
    return f'<p class="problem" role="alert">{escape(text)}</p>'


def notes(ask: Ask) -> str:
    """What was changed in the prompt."""
    return "".join(f'<p class="quiet" role="status">{escape(note)}</p>' for note in ask.notes)


def cards(slots: Sequence[Slot], made: Sequence[Picture | None]) -> str:
    """Images side by side."""
    figures = []
    for slot, picture in zip(slots, made, strict=True):
        lines = [f"{slot.steps} steps" if slot.steps > 1 else "1 step"]
        if picture is not None:
            lines[0] += f", strength {picture.settings['strength']:.3g}" if not slot.undistilled else ""
            lines.append(_sampling(slot, picture))
            lines.append(f"{picture.seconds:.2f} s")
        text = "".join(f"<span>{escape(line)}</span>" for line in lines)
        link = "" if picture is None else f'<a href="{_url(picture)}" download="{escape(picture.name)}">Save PNG</a>'
        figures.append(
            f"<figure>{_frame(slot, picture)}<figcaption><strong>{escape(slot.title)}</strong>{text}{link}</figcaption></figure>"
        )
    only = " one" if len(figures) == 1 else ""
    return f'<div class="cards{only}" style="--columns: {len(figures)}">{"".join(figures)}</div>'


def tables(slots: Sequence[Slot], made: Sequence[Picture | None]) -> str:
    """Tables: a row for each step count, a column for each seed."""
    html = []
    for table in dict.fromkeys(slot.table for slot in slots):
        own = [(slot, picture) for slot, picture in zip(slots, made, strict=True) if slot.table == table]
        seeds = list(dict.fromkeys(slot.ask.seed for slot, _ in own))
        head = "".join(f'<th scope="col">seed {seed}</th>' for seed in seeds)
        rows = []
        for at in range(0, len(own), len(seeds)):
            row = own[at : at + len(seeds)]
            slot = row[0][0]
            label = f"{slot.steps} steps" if slot.steps > 1 else "1 step"
            done = [each for _, each in row if each is not None]
            strength = (
                f"<span>strength {done[0].settings['strength']:.3g}</span>" if done and not slot.undistilled else ""
            )
            seconds = f"<span>{sum(each.seconds for each in done) / len(done):.2f} s an image</span>" if done else ""
            cells = "".join(f"<td>{_frame(*cell)}</td>" for cell in row)
            rows.append(f'<tr><th scope="row"><strong>{label}</strong>{strength}{seconds}</th>{cells}</tr>')
        html.append(
            f'<div class="scroll"><table class="grid"><caption>{escape(own[0][0].title)}</caption><thead><tr><th></th>{head}</tr></thead>'
            f"<tbody>{''.join(rows)}</tbody></table></div>"
        )
    return "".join(html)


def _frame(slot: Slot, picture: Picture | None) -> str:
    """The image, which opens in a tab of its own, or the place that waits for it."""
    height, width = slot.ask.height or 1, slot.ask.width or 1
    style = f'style="aspect-ratio: {width} / {height}"'
    if picture is None:
        return f'<div class="frame waiting" {style} role="img" aria-label="waiting"></div>'
    small = " small" if max(width, height) < _SMALL else ""
    strength = "" if slot.undistilled else f", strength {picture.settings['strength']:.3g}"
    about = f"{slot.title}, steps {slot.steps}{strength}, seed {slot.ask.seed}, {picture.seconds:.2f} s"
    return (
        f'<a class="frame{small}" {style} href="{_url(picture)}" target="_blank" title="{escape(about)}">'
        f'<img src="{_url(picture)}" alt="{escape(f"{slot.ask.prompt[:200]} ({about})")}"></a>'
    )


def _url(picture: Picture) -> str:
    return quote(picture.address)


def _sampling(slot: Slot, picture: Picture) -> str:
    shift = f"shift {picture.settings['shift']:.3g}"
    return f"{shift}, guidance {picture.settings['guidance']:g}" if slot.entry.model.family.has_guidance else shift


def facts_html(player: Player) -> str:
    """What the models of the page are."""
    html = []
    for entry in player.entries:
        rows = "".join(
            f'<tr><th scope="row">{escape(name)}</th><td>{escape(text)}</td></tr>'
            for name, text in entry.facts().items()
        )
        html.append(f'<table class="facts"><caption>{escape(entry.name)}</caption><tbody>{rows}</tbody></table>')
    return "".join(html)
