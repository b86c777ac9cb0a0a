"""One SVG a group: a bar for each median with a whisker from the smallest to the largest run; percentiles side by side.

Needs matplotlib, of the extra `bench`. Called by __main__. Calls results.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .results import PERCENTS, Line, number

_BAR_INCHES = 0.32
_WIDTH_INCHES = 8.0
_COLOUR = "#3b6ea8"
_SHADES = ("#9db8d6", "#5b8abf", "#27496d")


def can_plot() -> bool:
    return find_spec("matplotlib") is not None


def plot(path: Path, lines: Sequence[Line]) -> None:
    """Draw a group: one panel for each unit, and one for each measure that yields distributions."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "jobq", "font.size": 9}
    from matplotlib import pyplot

    panels: dict[tuple[str, str], list[Line]] = {}
    for line in lines:
        measure = line["name"].rpartition("/")[0] if "count" in line else ""
        panels.setdefault((line["unit"], measure), []).append(line)
    heights = [1.0 + len(rows) * (2 if measure else 1) for (_, measure), rows in panels.items()]
    figure, axes = pyplot.subplots(
        len(panels),
        1,
        figsize=(_WIDTH_INCHES, _BAR_INCHES * (sum(heights) + 1.5 * len(panels))),
        gridspec_kw={"height_ratios": heights},
        squeeze=False,
        layout="constrained",
    )
    for axis, ((unit, measure), rows) in zip(axes[:, 0], panels.items(), strict=True):
        (_percentiles if measure else _medians)(axis, rows)
        axis.set_xlabel(unit)
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0.12)
        axis.set_xlim(left=0)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def _medians(axis: Any, rows: Sequence[Line]) -> None:
    medians = [line["median"] for line in rows]
    whiskers = [[line["median"] - line["min"] for line in rows], [line["max"] - line["median"] for line in rows]]
    places = range(len(rows))
    axis.barh(places, medians, xerr=whiskers, color=_COLOUR, height=0.7, ecolor="#888888", capsize=2)
    for place, line in zip(places, rows, strict=True):
        axis.annotate(number(line["median"]), (line["max"], place), (4, 0), textcoords="offset points", va="center")
    _name(axis, rows)


def _percentiles(axis: Any, rows: Sequence[Line]) -> None:
    for shade, percent in enumerate(PERCENTS):
        values = [line[f"p{percent}"] for line in rows]
        places = [place + 0.27 * (shade - 1) for place in range(len(rows))]
        axis.barh(places, values, color=_SHADES[shade], height=0.25, label=f"p{percent}")
        for place, value in zip(places, values, strict=True):
            axis.annotate(number(value), (value, place), (4, 0), textcoords="offset points", va="center", size=7)
    axis.legend(frameon=False)
    _name(axis, rows)


def _name(axis: Any, rows: Sequence[Line]) -> None:
    axis.set_yticks(range(len(rows)), [line["name"].partition("/")[2] for line in rows])
    axis.invert_yaxis()
