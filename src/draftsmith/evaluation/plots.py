"""The report's plots: inline SVG whose text stays text, so that the page's own font and zoom apply to it."""

import io
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from markupsafe import Markup, escape
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from draftsmith.core.records.evaluation import Tau
from draftsmith.core.secrets import line

Points = tuple[Sequence[float], Sequence[float]]

COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8a6d00", "#56b4e9", "#666666"]  # Okabe-Ito, darkened yellow
WIDTH_IN = 5.0
LEGEND_LINE_IN = 0.2
LEGEND_CHARACTERS = 44  # in one line of the legend, each entry with its line sample
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "draftsmith",  # the same run gives the same file
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e6ea",
    "axes.axisbelow": True,
    "lines.linewidth": 1.8,
    "lines.markersize": 4,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}
LABEL_CHARACTERS, TITLE_CHARACTERS = 32, 80
MOST = 40  # rows or lines: a category may be anything, so there may be thousands
NO_METADATA = {"Creator": None, "Date": None, "Format": None, "Type": None}


def _plain(text: str, most: int = LABEL_CHARACTERS) -> str:
    """A label of one short line that matplotlib reads neither as a formula nor as hidden."""
    text = line(text)
    short = text if len(text) <= most else f"{text[: most - 1]}…"
    return short.replace("$", r"\$").lstrip("_") or "-"


def _counted(title: str, count: int) -> str:
    return title if count <= MOST else f"{title} (the first {MOST} of {count:,})"


def _svg(title: str, height_in: float, draw: Callable[[Axes], None]) -> Markup:
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH_IN, height_in), layout="constrained")
        axes = figure.subplots()
        axes.set_prop_cycle(color=COLOURS)
        draw(axes)
        axes.set_title(_plain(title, TITLE_CHARACTERS))
        handles, labels = axes.get_legend_handles_labels()
        if len(labels) > 1:
            fitting = max(1, LEGEND_CHARACTERS // (max(len(label) for label in labels) + 5))
            lines = math.ceil(len(labels) / fitting)
            figure.set_figheight(height_in + LEGEND_LINE_IN * max(0, lines - 2))
            figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), fitting))
        buffer = io.StringIO()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph")  # the page's fonts draw the text
            warnings.filterwarnings("ignore", "constrained_layout")  # names as wide as the plot leave it little room
            figure.savefig(buffer, format="svg", metadata=NO_METADATA)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'<g id="[a-z_A-Z]+\d*">', "<g>", text)  # such names repeat from plot to plot; nothing refers to them
    return Markup(text.replace("<svg", f'<svg class="plot" role="img" aria-label="{escape(line(title))}"', 1))


def line_plot(
    title: str,
    labels: tuple[str, str],
    series: Mapping[str, Points],
    ticks: Mapping[float, str] | None = None,
    doubling: bool = False,
    mark: tuple[float, str] | None = None,
    from_zero: bool = False,
) -> Markup:
    """One line per entry of `series`; `mark` is a vertical line with its meaning; `doubling` a log-2 x axis."""

    def draw(axes: Axes) -> None:
        for name, (x, y) in list(series.items())[:MOST]:
            axes.plot(x, y, marker="o" if len(x) <= 30 else None, label=_plain(name))
        if doubling:
            axes.set_xscale("log", base=2)
        if ticks:
            axes.set_xticks(list(ticks), list(ticks.values()))
            axes.minorticks_off()
        if mark:
            axes.axvline(mark[0], color="#444444", linestyle="--", linewidth=1.2, label=_plain(mark[1]))
        if from_zero:
            axes.set_ylim(bottom=0)
        axes.set_xlabel(_plain(labels[0]))
        axes.set_ylabel(_plain(labels[1]))

    return _svg(_counted(title, len(series)), 2.9, draw)


def interval_plot(title: str, rows: Sequence[str], series: Mapping[str, Sequence[Tau | None]]) -> Markup:
    """One line of taus with their intervals per row, one colour per entry of `series`."""
    slot, title, rows = 0.64 / max(1, len(series)), _counted(title, len(rows)), rows[:MOST]

    def draw(axes: Axes) -> None:
        for number, (name, values) in enumerate(series.items()):
            shown = [(row, t, t.tau) for row, t in enumerate(values[:MOST]) if t is not None and t.tau is not None]
            dots = [(row, value, tau.low or value, tau.high or value) for row, tau, value in shown]
            if not dots:
                continue
            y = [row + (number + 0.5) * slot - 0.32 for row, *_ in dots]
            error = [[max(0.0, v - low) for _, v, low, _ in dots], [max(0.0, high - v) for _, v, _, high in dots]]
            axes.errorbar([v for _, v, _, _ in dots], y, xerr=error, fmt="o", capsize=3, label=_plain(name))
        axes.set_yticks(range(len(rows)), [_plain(row) for row in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlabel("tau")

    return _svg(title, 1.3 + len(rows) * max(0.3, 0.17 * len(series)), draw)
