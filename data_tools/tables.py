"""The statistics of `inspect.py` as tables of text."""

from data_tools.inspect import SourceSummary, StoredSummary, Summary
from data_tools.validate import printable


def format_summary(summary: Summary) -> str:
    """The summary as text for a terminal."""
    parts = [
        f"{summary.samples:,} samples, {bytes_text(summary.bytes)}, {summary.epoch:,} per epoch",
        _table(source_rows(summary)),
        _table(bucket_rows(summary)),
    ]
    if summary.unused_sizes:
        parts[-1] += f"\nsizes without a sample: {summary.unused_sizes}"
    parts.append(_table(caption_rows(summary)))
    if summary.captions.words:
        parts[-1] += "\nmost frequent: " + ", ".join(f"{word} {count}" for word, count in summary.captions.words)
    if summary.stored:
        parts.append(_table(stored_rows(summary.stored)))
    parts += [f"warning: {line}" for line in summary.warnings]
    return "\n".join(printable(line) for line in "\n\n".join(parts).split("\n"))


def source_rows(summary: Summary) -> list[list[str]]:
    """The table of sources; its first row is the header."""
    rows = [["source", "content", "address", "shards", "samples", "bytes", "per sample", "share of epoch"]]
    for source in summary.sources:
        content = f"images ({source.format})"
        if source.encoder is not None:
            content = f"cache {source.encoder[:12]} ({source.format}), {_text(source)}"
        rows.append(
            [
                source.name,
                content,
                source.address,
                "-" if source.shards is None else f"{source.shards:,}",
                f"{source.samples:,}",
                bytes_text(source.bytes),
                bytes_text(source.bytes / max(1, source.samples)),
                f"{source.draws / summary.epoch:.1%}",
            ]
        )
    return rows


def _text(source: SourceSummary) -> str:
    """What a cache stores of the captions."""
    if not source.fields:
        return "latents alone"
    names = ", ".join(f"{name} ({kind})" for name, kind in source.fields)
    padding = "" if source.padding is None else f", padding {source.padding}"
    return f"{names}, {source.text_length} tokens{padding}"


def bucket_rows(summary: Summary) -> list[list[str]]:
    """The table of sizes; its first row is the header."""
    rows = [["height x width", "samples", "share of epoch", f"batches of {summary.global_batch_size}", "carried over"]]
    rows += [
        [
            f"{bucket.size[0]} x {bucket.size[1]}",
            f"{bucket.samples:,}",
            f"{bucket.draws / summary.epoch:.1%}",
            f"{bucket.batches:,}",
            f"{bucket.waiting:,}",
        ]
        for bucket in summary.buckets
    ]
    return rows


def caption_rows(summary: Summary) -> list[list[str]]:
    """The table of captions; its first row is the header."""
    captions = summary.captions
    seen = max(1, captions.count)
    return [
        ["captions", f"{captions.count:,} of {summary.samples:,}"],
        ["words, shortest", f"{captions.shortest}"],
        ["words, median", f"{captions.median:g}"],
        ["words, 95 % have at most", f"{captions.percentile_95:g}"],
        ["words, longest", f"{captions.longest}"],
        ["empty", f"{captions.empty:,} ({captions.empty / seen:.1%})"],
        ["repeat an earlier one", f"{captions.repeated:,} ({captions.repeated / seen:.1%})"],
        *([] if captions.cut is None else [[f"of more than {captions.text_length} tokens", f"{captions.cut:,}"]]),
    ]


def stored_rows(stored: StoredSummary) -> list[list[str]]:
    """The table of stored tensors; its first row is the header."""
    rows = [["stored per sample", f"mean of {stored.count:,}"]]
    rows += [[name, bytes_text(size)] for name, size in stored.bytes]
    for name, median, full in stored.tokens:
        rows.append([f"{name}, median of tokens", f"{median:g} of {stored.text_length}"])
        rows.append([f"{name}, fills all tokens", f"{full:,}"])
    return rows


def bytes_text(count: float) -> str:
    """A number of bytes as text, such as `1.2 MB`, with powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB" if count < 1000 else f"{count:,.0f} TB"


def _table(rows: list[list[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    words = [
        column for column in range(len(rows[0])) if rows[0][column] in ("source", "content", "address") or column == 0
    ]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(w) if c in words else cell.rjust(w) for c, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)
