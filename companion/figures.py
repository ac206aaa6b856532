"""One style, one colour for each method, and figures that carry their own data. Every chapter draws with it."""

import inspect
import io
import re
import textwrap
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {
    "flow": "#4D4D4D",
    "sgd": "#0072B2",
    "heun": "#D17C00",
    "rk4": "#00795B",
    "momentum": "#A8327D",
    "adaptive": "#A3492F",
    "quiet": "#7D7D7D",
}
"""One colour for each method, the same in the whole book and distinguishable under the common colour blindnesses."""

STYLE: dict[str, Any] = {
    "axes.edgecolor": "#4D4D4D",
    "axes.facecolor": "white",
    "axes.grid": True,
    "axes.labelcolor": "black",
    "axes.labelsize": 10,
    "axes.prop_cycle": "cycler('color', ['1f77b4', 'ff7f0e', '2ca02c', 'd62728', '9467bd', '8c564b', 'e377c2', "
    "'7f7f7f', 'bcbd22', '17becf'])",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": "auto",
    "axes.titlelocation": "left",
    "axes.titlesize": 10.5,
    **dict.fromkeys([f"boxplot.{part}props.color" for part in ("box", "cap", "flier", "whisker")], "black"),
    "boxplot.flierprops.markeredgecolor": "black",
    "figure.constrained_layout.use": True,
    "figure.dpi": 200,
    "figure.edgecolor": "white",
    "figure.facecolor": "white",
    "figure.figsize": (5.0, 3.2),
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "grid.color": "#E6E6E6",
    "image.cmap": "viridis",
    "legend.frameon": False,
    "legend.labelcolor": "None",
    "lines.color": "C0",
    "lines.linewidth": 1.8,
    "patch.edgecolor": "black",
    "patch.facecolor": "C0",
    "savefig.edgecolor": "auto",
    "savefig.facecolor": "white",
    "text.color": "black",
    "xtick.color": "black",
    "xtick.labelcolor": "inherit",
    "ytick.color": "black",
    "ytick.labelcolor": "inherit",
}
"""The Matplotlib settings of the whole book, for ``plt.style.use(figures.STYLE)``: every colour, so that none of
another style that a reader has set before remains."""

WORDS = COLOURS | {"heun": "#9C5C00", "quiet": "#6B6B6B"}
"""The colours of words, dark enough for a contrast of 4.5 to 1 on white."""

_METADATA_KEY, _EXPLORER_KEY = "figure", "explorer"


def label(axes: "Axes", x: float, y: float, text: str, colour: str, **kwargs: Any) -> None:
    """Writes ``text`` next to its line, in the line's colour, where a legend would make the reader look twice.

    Args:
        axes: where to write.
        x: position in data coordinates.
        y: position in data coordinates.
        text: the words.
        colour: a key of :data:`WORDS`, or any Matplotlib colour.
        **kwargs: those of ``Axes.annotate``.
    """
    axes.annotate(text, (x, y), color=WORDS.get(colour, colour), fontweight="bold", **kwargs)


class Table:
    """A table: shown as one on a page, in Colab and in Jupyter, and aligned where there is text only.

    Columns of numbers stand to the right.

    Args:
        headings: the columns' names, with their units.
        rows: the cells of each row, formatted: strings, or what ``str`` makes of them. Two stars around a cell mark it.

    Example:
        >>> Table(["method", "steps"], [["SGD", 42], ["**Momentum**", 17]])
        method    steps
        SGD          42
        Momentum     17
    """

    def __init__(self, headings: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        self.lines = [list(headings), *([str(cell) for cell in row] for row in rows)]
        columns = zip(*self.lines[1:], strict=True)
        self._is_right = [all(re.fullmatch(r"[^a-zA-Z]*\d[^a-zA-Z]*", cell) for cell in column) for column in columns]

    def _repr_markdown_(self) -> str:
        rule = ["---:" if right else "---" for right in self._is_right]
        return "\n".join(f"| {' | '.join(line)} |" for line in [self.lines[0], rule, *self.lines[1:]])

    def __repr__(self) -> str:
        plain = [[cell.replace("**", "") for cell in line] for line in self.lines]
        widths = [max(map(len, column)) for column in zip(*plain, strict=True)]
        places = [">" if right else "<" for right in self._is_right]
        return "\n".join(
            "  ".join(
                f"{cell:{place}{width}}" for cell, place, width in zip(line, places, widths, strict=True)
            ).rstrip()
            for line in plain
        )


class Source:
    """Code of the package, shown in colour: what ``inspect.getsource`` finds, without its docstring.

    Args:
        *objects: functions, methods or classes.

    Example:
        >>> from companion import SGD
        >>> print(Source(SGD.update_step))
        def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
            gradient = ops.cast(gradient, variable.dtype)
            h = ops.cast(learning_rate, variable.dtype)
            self.assign_sub(variable, ops.multiply(gradient, h))
    """

    def __init__(self, *objects: Any) -> None:
        sources = (textwrap.dedent(inspect.getsource(each)).rstrip() for each in objects)
        self.code = "\n\n\n".join(
            re.sub(r'^ *r?""".*?"""\n', "", code, flags=re.DOTALL | re.MULTILINE) for code in sources
        )

    def _repr_markdown_(self) -> str:
        return f"```python\n{self.code}\n```"

    def __repr__(self) -> str:
        return self.code


def data(figure: "Figure") -> list[dict[str, Any]]:
    """Reads back what a figure shows: for each axes its titles, lines, points, bars and images, to six digits.

    The book stores this next to each picture, and its tests assert it.

    Args:
        figure: a Matplotlib figure.

    Returns:
        One dictionary for each axes, with the keys ``title``, ``xlabel``, ``ylabel`` and, where there are any,
        ``lines`` (``label``, ``x``, ``y``), ``points`` (of scatters), ``bars`` (width, height), ``contours``
        (``level``, ``points``) and ``images``.

    Example:
        >>> import matplotlib.pyplot as plt
        >>> figure, axes = plt.subplots()
        >>> _ = axes.plot([0, 1], [2, 3], label="loss")
        >>> data(figure)[0]["lines"]
        [{'label': 'loss', 'x': [0.0, 1.0], 'y': [2.0, 3.0]}]
    """
    return [_axes_data(axes) for axes in figure.axes]


def _axes_data(axes: "Axes") -> dict[str, Any]:
    from matplotlib.collections import PathCollection
    from matplotlib.container import BarContainer
    from matplotlib.contour import ContourSet

    found: dict[str, Any] = {
        "title": axes.get_title(loc="left") or axes.get_title(),
        "xlabel": axes.get_xlabel(),
        "ylabel": axes.get_ylabel(),
    }
    lines = [
        {
            "label": str(line.get_label()),
            "x": _rounded(line.get_xdata(orig=False)),
            "y": _rounded(line.get_ydata(orig=False)),
        }
        for line in axes.get_lines()
    ]
    scatters = [drawn for drawn in axes.collections if isinstance(drawn, PathCollection)]
    points = [_rounded(np.asarray(scatter.get_offsets())) for scatter in scatters]
    bars = [
        _rounded([bar.get_width(), bar.get_height()])
        for container in axes.containers
        if isinstance(container, BarContainer)
        for bar in container
    ]
    contours = [
        {"level": level, "points": _rounded(np.asarray(path.vertices)[::20])}
        for drawn in axes.collections
        if isinstance(drawn, ContourSet)
        for level, path in zip(_rounded(drawn.levels), drawn.get_paths(), strict=False)
    ]
    images = [_rounded(image.get_array()) for image in axes.images]
    kinds = {"lines": lines, "points": points, "bars": bars, "contours": contours, "images": images}
    return found | {kind: values for kind, values in kinds.items() if values}


def _rounded(values: Any) -> list[Any]:
    def six_digits(value: Any) -> Any:
        if isinstance(value, list):
            return [six_digits(entry) for entry in value]
        return float(f"{value:.6g}") if np.isfinite(value) else None

    return six_digits(np.ma.filled(np.ma.asarray(values, dtype=float), np.nan).tolist())


def _rounded_if_a_place(found: re.Match[str]) -> str:
    return found[0] if found[0].startswith(">") else f"{float(found[0]):.2f}".rstrip("0").rstrip(".")


def show(
    figure: "Figure", explorer: str | None = None, start: dict[str, Any] | None = None, instead: bool = True
) -> None:
    """Displays a figure in a notebook with its :func:`data` in the output's metadata, and closes it.

    The picture is SVG, the same to the letter for the same figure, so that a page can give it its own colours.

    Args:
        figure: a Matplotlib figure.
        explorer: the name of an explorer, a figure to be moved, which the book's page offers. In Colab, in print and
            without JavaScript there is only the figure. Defaults to ``None``: there is none.
        start: the settings that the explorer begins with, where they are not its own.
        instead: whether the explorer takes the figure's place; else it stands below. Defaults to ``True``.
    """
    import matplotlib.pyplot as plt
    from IPython import display

    buffer = io.StringIO()
    with plt.rc_context({"svg.hashsalt": "companion", "svg.fonttype": "none"}):  # words stay words
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    plt.close(figure)
    drawing = buffer.getvalue().replace("'DejaVu Sans'", "'DejaVu Sans', Verdana, sans-serif")
    # A hundredth of a point is finer than a screen. What stands between two tags are words.
    drawing = re.sub(r">[^<]+|-?\d+\.\d{3,}", _rounded_if_a_place, drawing)
    bundle = {"image/svg+xml": drawing, "text/plain": "<Figure>"}
    offer = {_EXPLORER_KEY: {"name": explorer, "start": start or {}, "instead": instead}} if explorer else {}
    display.display(bundle, raw=True, metadata={_METADATA_KEY: data(figure), **offer})
