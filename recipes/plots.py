"""The plots of `scfm report` and `scfm study`."""

import io
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


def figure_style() -> tuple[Any, Any]:
    """matplotlib without a display, and the style of all plots."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt, plt.rc_context(
        {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3}
    )


def to_png(plt: Any, figure: Any) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
    plt.close(figure)
    return buffer.getvalue()


@dataclass(frozen=True)
class Panel:
    """One figure of several methods, over the number of steps."""

    title: str
    lines: Mapping[str, Mapping[int, Sequence[float]]]
    """Name -> step count -> values of all seeds. `undistilled` is drawn as a dotted line."""
    floor: float | None = None
    """The noise floor, drawn as a dashed line."""
    is_log: bool = True
    """Logarithmic axis of the values."""


def quality_plot(panels: Sequence[Panel]) -> bytes:
    """A PNG: panels above each other, in each a line for each method, with a band from its best to its worst seed."""
    plt, style = figure_style()
    with style:
        figure, all_axes = plt.subplots(len(panels), figsize=(8, 4.5 * len(panels)), squeeze=False)
        for panel, axes in zip(panels, all_axes[:, 0], strict=True):
            _draw(plt, axes, panel)
        return to_png(plt, figure)


def _draw(plt: Any, axes: Any, panel: Panel) -> None:
    shades = plt.get_cmap("tab20").colors
    axes.set_prop_cycle(color=shades[::2] + shades[1::2])
    for name, rows in panel.lines.items():
        steps, means = sorted(rows), [statistics.fmean(rows[n]) for n in sorted(rows)]
        style_of = {"color": "black", "ls": ":"} if name == "undistilled" else {}
        [line] = axes.plot(steps, means, marker="o", ms=4, label=name, **style_of)
        low, high = [min(rows[n]) for n in steps], [max(rows[n]) for n in steps]
        axes.fill_between(steps, low, high, color=line.get_color(), alpha=0.15, lw=0)
    if panel.floor is not None:
        axes.axhline(panel.floor, color="black", ls="--", lw=0.8, label="two sets of the teacher's samples")
    ticks = sorted({n for rows in panel.lines.values() for n in rows})
    scale = "log" if panel.is_log else "linear"
    axes.set(xscale="log", yscale=scale, xlabel="steps of the sampler", ylabel=panel.title)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
