"""`scfm data inspect --html`: samples and statistics of a data set in one HTML file without external resources."""

import base64
import contextlib
import html
import io
import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data_tools.inspect import Summary
from data_tools.tables import bucket_rows, bytes_text, caption_rows, source_rows, stored_rows
from scfm_core.data.corpus import Corpus
from scfm_core.data.schema import Record, Size
from scfm_core.errors import UserError

_MAX_SIDE = 320
"""Longest side of a thumbnail in pixels. Images smaller than half of it are enlarged without smoothing."""
_STYLE = """
:root { --ink: #1f2328; --soft: #667; --line: #e4e4e0; --paper: #fff; --accent: #3b6ea8 }
* { box-sizing: border-box }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: #f7f7f4; margin: 0 auto; padding: 2rem 1.5rem 4rem;
  max-width: 1480px }
h1 { font-size: 1.7rem; margin: 0 } h2 { font-size: 1.15rem; margin: 2.4rem 0 .8rem }
.note { color: var(--soft); margin: .2rem 0 0; overflow-wrap: anywhere }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: .8rem; margin: 1.4rem 0 0 }
.tile, .panel, figure { background: var(--paper); border: 1px solid var(--line); border-radius: 10px }
.tile { padding: .8rem 1rem } .tile b { display: block; font-size: 1.45rem; line-height: 1.25; font-weight: 650 }
.tile span { color: var(--soft); font-size: .85rem }
.panel { padding: .4rem 1rem; overflow-x: auto }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(340px, 1fr)); gap: 1rem; align-items: start }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th, td { padding: .45rem .7rem .45rem 0; text-align: right; border-top: 1px solid var(--line); white-space: nowrap }
tr:first-child th { border-top: 0; font-weight: 600; font-size: .85rem; color: var(--soft) }
th.text, td.text { text-align: left } td.wide { white-space: normal; overflow-wrap: anywhere; min-width: 14rem }
td.bar { width: 34%; min-width: 10rem; padding-left: .8rem }
td.bar span { display: block; height: .8rem; border-radius: 3px; background: var(--accent); min-width: 2px }
.shape { display: inline-grid; place-items: center; width: 26px; height: 26px; margin-right: .6rem; vertical-align: middle }
.shape i { border: 1.5px solid var(--accent); border-radius: 2px; background: #e8eff7 }
.warning { background: #fff6dd; border: 1px solid #ecd58f; border-radius: 10px; padding: .7rem 1rem; margin: 1rem 0 0 }
.warning p { margin: .15rem 0; overflow-wrap: anywhere }
.words { padding: 1rem } .words span { display: inline-block; margin: 0 .4rem .45rem 0; padding: .1rem .6rem; background: #eef2f7;
  border-radius: 99px } .words small { color: var(--soft) }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(215px, 1fr)); gap: 1rem }
figure { margin: 0; overflow: hidden; display: flex; flex-direction: column }
.thumb { aspect-ratio: 1; background: #ecece8; display: grid; place-items: center; padding: 8px; position: relative }
.thumb img { max-width: 100%; max-height: 100%; object-fit: contain; display: block; border-radius: 3px; min-height: 0 }
.thumb.small img { image-rendering: pixelated } .thumb em { color: #a33; font-style: normal; font-size: .85rem; padding: 1rem;
  overflow-wrap: anywhere; overflow: hidden; max-height: 100% }
figcaption { padding: .7rem .85rem .75rem; display: flex; flex-direction: column; gap: .45rem; flex: 1 }
.said { margin: 0; font-size: .9rem; line-height: 1.4; overflow-wrap: anywhere; display: -webkit-box; -webkit-box-orient: vertical;
  -webkit-line-clamp: 6; overflow: hidden } .said.none { color: #a33 }
.of { margin: auto 0 0; font-size: .78rem; color: var(--soft); display: flex; justify-content: space-between; gap: .6rem }
.of span { white-space: nowrap; overflow: hidden; text-overflow: ellipsis }
.key { margin: 0; font: .74rem ui-monospace, monospace; color: var(--soft); white-space: nowrap; overflow: hidden;
  text-overflow: ellipsis }
@media print { body { background: #fff } figure { break-inside: avoid } }
"""
# Captions are untrusted text. They are escaped; this policy is a second protection: nothing is run or downloaded.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def write_contact_sheet(
    corpus: Corpus,
    summary: Summary,
    path: Path,
    *,
    decode: Callable[[Tensor], Tensor] | None,
    count: int = 48,
    seed: int = 0,
) -> Path:
    """Write one HTML file with the statistics, and with samples as training sees them.

    Args:
        corpus: of which `summary` was made.
        summary: its selected samples are shown, in turn from each source and size.
        path: of the file; overwritten.
        decode: cached latents [B, C, h, w], as they are stored, to images [B, 3, H, W] in [0, 1]. None: their first
            channel is shown in grey.
        count: maximum number of samples.
        seed: of the selection.

    Returns:
        `path`.

    Raises:
        UserError: if the file cannot be written. For a sample that cannot be read, the page shows the error.
    """
    cards = [
        _card(corpus, corpus.configs[number].name, item, decode)
        for number, item in _choose(corpus, summary, count, seed)
    ]
    names = ", ".join(source.name for source in summary.sources)
    note = ""
    if corpus.is_cached:
        note = "cached latents, decoded" if decode else "the first channel of cached latents, not images"
    body = [
        f"<h1>{html.escape(names)}</h1>",
        f"<p class=note>{html.escape(', '.join(source.address for source in summary.sources))}</p>",
        _tiles(summary),
        _warnings(summary),
        "<h2>Sources</h2>" + _panel(source_rows(summary), text_columns=(0, 1, 2), wide=(1, 2)),
        "<h2>Sizes</h2>" + _sizes(summary),
        "<h2>Captions</h2>" + _captions(summary),
        f"<h2>{len(cards)} samples</h2>",
        f"<p class=note>Taken in turn from every source and size, cropped as in training{f'; {note}' if note else ''}.</p>"
        f"<br><div class=grid>{''.join(cards)}</div>",
    ]
    page = (
        f'<!doctype html><html lang=en><meta charset=utf-8><meta http-equiv=Content-Security-Policy content="{_POLICY}">'
        f'<meta name=viewport content="width=device-width, initial-scale=1"><title>{html.escape(names)} · scfm</title>'
        f"<style>{_STYLE}</style><body>{''.join(body)}</body></html>"
    )
    try:
        path.write_text(page, encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}). Choose another place") from error
    return path


def _choose(corpus: Corpus, summary: Summary, count: int, seed: int) -> list[tuple[int, int]]:
    """(source, sample) pairs, taken in turn from each source and size; sorted."""
    random = np.random.default_rng(seed)
    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    for number, sampled in enumerate(summary.sampled):
        for item in sampled:
            groups[number, int(corpus.buckets[item])].append(item)
    ranked = []
    for (number, bucket), items in groups.items():
        for turn, at in enumerate(random.permutation(len(items)).tolist()):
            ranked.append((turn, -len(items), number, bucket, items[at]))
    return [(number, item) for _, _, number, _, item in sorted(sorted(ranked)[:count], key=lambda row: row[2:])]


def _card(corpus: Corpus, source: str, item: int, decode: Callable[[Tensor], Tensor] | None) -> str:
    height, width = corpus.sizes[corpus.buckets[item]]
    try:
        record = corpus.record(item)
    except Exception as error:  # the page shows what is wrong
        return _figure(f"<em>{html.escape(str(error)[:400])}</em>", "", source, (height, width), f"sample {item}")
    picture = _picture(record, decode)
    small = max(picture.shape[:2]) < _MAX_SIDE // 2
    if record.image is None and decode is None:
        source += ", first latent channel"
    return _figure(
        _thumbnail(picture, small),
        record.caption,
        source,
        (height, width),
        _source_name(corpus, item) or record.key,
        small,
    )


def _source_name(corpus: Corpus, item: int) -> str | None:
    """The name of the image of which a cached sample was made; None if it is not stored."""
    with contextlib.suppress(Exception):  # the json of other tools may have anything
        shard, at, _ = corpus.raw(item)
        name = json.loads((shard and shard.read(at, "json")) or b"{}").get("source")
        return name if isinstance(name, str) else None
    return None


def _figure(content: str, caption: str, source: str, size: Size, key: str, small: bool = False) -> str:
    text = f"<p class=said title='{html.escape(caption)}'>{html.escape(caption)}</p>"
    if not caption.strip():
        text = "<p class='said none'>no caption</p>"
    return (
        f"<figure><div class='thumb{' small' if small else ''}'>{content}</div><figcaption>{text}"
        f"<p class=of><span>{html.escape(source)}</span><span>{size[0]} &times; {size[1]}</span></p>"
        f"<p class=key title='{html.escape(key)}'>{html.escape(key)}</p></figcaption></figure>"
    )


def _picture(record: Record, decode: Callable[[Tensor], Tensor] | None) -> np.ndarray:
    """The sample as an image, uint8 [H, W, 3]."""
    if record.image is not None:
        shown: np.ndarray = record.image.permute(1, 2, 0).numpy()
        return shown
    assert record.latents is not None
    if decode is not None:
        image = decode(record.latents[None])[0].float().cpu()
    else:
        channel = record.latents[0].float()
        low, high = (float(torch.quantile(channel, share)) for share in (0.01, 0.99))
        image = ((channel - low) / max(high - low, 1e-6)).expand(3, -1, -1)
    pixels: np.ndarray = (image.clamp(0, 1).nan_to_num() * 255).round().byte().permute(1, 2, 0).numpy()
    return pixels


def _thumbnail(pixels: np.ndarray, small: bool) -> str:
    from PIL import Image

    image = Image.fromarray(np.ascontiguousarray(pixels))
    buffer = io.BytesIO()
    if small:
        factor = _MAX_SIDE // max(image.size)
        image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST).save(buffer, "PNG")
    else:
        image.thumbnail((_MAX_SIDE, _MAX_SIDE), Image.Resampling.LANCZOS)
        image.save(buffer, "JPEG", quality=85)
    content = base64.b64encode(buffer.getvalue()).decode()
    return f"<img alt='' src='data:image/{'png' if small else 'jpeg'};base64,{content}'>"


def _tiles(summary: Summary) -> str:
    shards = [source.shards for source in summary.sources if source.shards is not None]
    tiles = [
        (f"{summary.samples:,}", "samples"),
        (f"{summary.epoch:,}", "samples per epoch"),
        (f"{sum(bucket.batches for bucket in summary.buckets):,}", f"batches of {summary.global_batch_size} per epoch"),
        (bytes_text(summary.bytes), f"in {sum(shards):,} shards" if shards else "of images"),
        (f"{len(summary.buckets)}", "size" if len(summary.buckets) == 1 else "sizes"),
        (f"{summary.captions.median:g}", "words per caption (median)"),
    ]
    return f"<div class=tiles>{''.join(f'<div class=tile><b>{a}</b><span>{b}</span></div>' for a, b in tiles)}</div>"


def _warnings(summary: Summary) -> str:
    lines = "".join(f"<p>{html.escape(line)}</p>" for line in summary.warnings)
    return f"<div class=warning>{lines}</div>" if lines else ""


def _panel(rows: list[list[str]], *, text_columns: tuple[int, ...] = (0,), wide: tuple[int, ...] = ()) -> str:
    lines = []
    for number, row in enumerate(rows):
        tag = "td" if number else "th"
        cells = []
        for column, cell in enumerate(row):
            kind = " ".join(["text"] * (column in text_columns) + ["wide"] * (column in wide))
            cells.append(f"<{tag} class='{kind}'>{html.escape(cell)}</{tag}>")
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f"<div class=panel><table>{''.join(lines)}</table></div>"


def _sizes(summary: Summary) -> str:
    """The table of sizes, with an outline and a bar for each size."""
    header, *rows = bucket_rows(summary)
    max_draws = max(bucket.draws for bucket in summary.buckets) or 1
    lines = [
        "<tr>"
        + "".join(f"<th class='{'' if c else 'text'}'>{cell}</th>" for c, cell in enumerate(header))
        + "<th></th></tr>"
    ]
    for bucket, row in zip(summary.buckets, rows, strict=True):
        scale = 24 / max(bucket.size)
        shape = f"<i style='width:{bucket.size[1] * scale:.0f}px;height:{bucket.size[0] * scale:.0f}px'></i>"
        cells = "".join(f"<td>{cell}</td>" for cell in row[1:])
        bar = f"<td class=bar><span style='width:{100 * bucket.draws / max_draws:.1f}%'></span></td>"
        lines.append(f"<tr><td class=text><span class=shape>{shape}</span>{row[0]}</td>{cells}{bar}</tr>")
    unused = f"<p class=note>Sizes without a sample: {summary.unused_sizes}.</p>" if summary.unused_sizes else ""
    return f"<div class=panel><table>{''.join(lines)}</table>{unused}</div>"


def _captions(summary: Summary) -> str:
    words = "".join(
        f"<span>{html.escape(word)} <small>{count:,}</small></span>" for word, count in summary.captions.words
    )
    parts = [_panel(caption_rows(summary)), f"<div class='panel words'>{words or 'no words'}</div>"]
    if summary.stored is not None:
        parts.insert(1, _panel(stored_rows(summary.stored)))
    return f"<div class=columns>{''.join(parts)}</div>"
