"""Pictures as SVG files that look alike: a dark card that can be read on any page.

The same numbers give the same bytes, whatever settings of matplotlib somebody has.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cllm_jax.runs.atomic import write_atomic

LIGHT, DIM, EDGE, CARD = '#f9fafb', '#a4adba', '#475467', '#101828'
COLOURS = ('#2dd4a7', '#f79009', '#53b1fd', '#f670c7', '#fde272', '#a48afb', '#ff8a80', '#98a2b3')
MARKS = ('o', 's', '^', 'D', 'v')
"""Lines differ in more than their colour."""
STYLE = {
    'figure.facecolor': CARD,
    'figure.titlesize': 13,
    'figure.labelsize': 8.5,
    'axes.facecolor': CARD,
    'axes.edgecolor': EDGE,
    'axes.labelcolor': LIGHT,
    'axes.titlecolor': LIGHT,
    'axes.titlesize': 10,
    'axes.titlelocation': 'left',
    'axes.grid': True,
    'axes.spines.top': False,
    'axes.spines.right': False,
    'grid.color': '#344054',
    'grid.linewidth': 0.6,
    'lines.markersize': 4,
    'lines.linewidth': 1.4,
    'legend.frameon': False,
    'legend.labelcolor': LIGHT,
    'font.size': 9,
    'text.color': LIGHT,
    'text.parse_math': False,  # a dollar in the name of a file is one
    'xtick.color': DIM,
    'ytick.color': DIM,
    'svg.fonttype': 'none',  # text stays text
    'svg.hashsalt': 'cllm_jax',
}


@contextmanager
def picture(
    path: Path, title: str, caption: str, shape: tuple[int, int] = (1, 1), height: float = 3.6
) -> Iterator[list[Any]]:
    """Yields the axes of a new picture, row by row, and writes it.

    Args:
      caption: what the numbers come from.
      shape: rows and columns of axes.
      height: of a row, in inches.
    """
    from matplotlib import style
    from matplotlib.figure import Figure

    rows, columns = shape
    with style.context(['default', STYLE]):
        figure = Figure((4.2 * max(columns, 2), height * rows + 0.7), layout='constrained')
        figure.suptitle(title, x=0.01, horizontalalignment='left')
        figure.supxlabel(caption, x=0.01, horizontalalignment='left', color=DIM)
        yield list(figure.subplots(rows, columns, squeeze=False).flat)
        figure.savefig(drawn := io.BytesIO(), format='svg', metadata={'Date': None, 'Title': title})
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, drawn.getvalue())


def look(number: int) -> dict[str, Any]:
    """How the first, second, ... line of a picture is drawn, counted from 0."""
    return {
        'color': COLOURS[number % len(COLOURS)],
        'marker': MARKS[number % len(MARKS)],
        'linestyle': '-' if number < len(COLOURS) else '--',
    }


def legend_outside(axes: Any) -> None:
    """Say what the lines are, to the right of them."""
    axes.legend(loc='upper left', bbox_to_anchor=(1.01, 1), fontsize=8)


def in_percent(axes: Any) -> None:
    """Of an axis with shares."""
    axes.set_ylim(-0.02, 1.02)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ['0 %', '25 %', '50 %', '75 %', '100 %'])
