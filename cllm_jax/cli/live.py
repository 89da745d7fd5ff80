"""Pictures that follow each other in a terminal, as time goes by."""

import time
from collections.abc import Callable, Iterable
from typing import TypeVar

from rich.console import RenderableType
from rich.live import Live

from cllm_jax.cli.console import RichConsole
from cllm_jax.runtime.processes import is_main

Frame = TypeVar('Frame')


def play(
    frames: Iterable[tuple[float, Frame]],
    draw: Callable[[Frame, int, int], RenderableType],
    pace: float,
) -> Frame:
    """Show frames, each in the place of the one before, and return the last one.

    Where no terminal is, the last one is printed alone and at once. Ctrl-C leaves the frame that
    was shown, and the cursor below it.

    Args:
      frames: each with its moment, seconds since the beginning. Computed while they are shown.
      draw: gives the picture of a frame in so many columns and lines.
      pace: seconds that one of theirs lasts here; more where computing them takes longer.
    """
    console = RichConsole(highlight=False, emoji=False, markup=False, quiet=not is_main())
    if not console.is_terminal or console.is_dumb_terminal:
        *_, (_, frame) = frames
        console.print(draw(frame, console.width, 10_000))
        return frame
    with Live(console=console, auto_refresh=False, vertical_overflow='crop') as live:
        begin = time.perf_counter()
        for moment, frame in frames:
            time.sleep(max(0.0, begin + pace * moment - time.perf_counter()))
            live.update(draw(frame, console.width, console.height), refresh=True)
    return frame
