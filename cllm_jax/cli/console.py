"""What commands print: notes, progress, metrics, plans."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import yaml
from rich import progress as bars
from rich.console import Console as Rich
from rich.segment import Segment, Segments
from rich.style import Style
from rich.table import Table
from rich.text import Text

from cllm_jax.runs.recipe import to_json
from cllm_jax.runtime.processes import is_main


class RichConsole(Rich):
    """Leaves it to `guard` how a command ends whose reader is gone; rich would end it with 1."""

    def on_broken_pipe(self) -> None:
        raise


class Console:
    """Messages for a person on stderr; results stay on stdout, so that they can be piped.

    Of several processes only the first one speaks.
    """

    def __init__(self):
        shared = {'highlight': False, 'soft_wrap': True, 'emoji': False, 'markup': False}
        shared['quiet'] = not is_main()
        self.err = RichConsole(stderr=True, **shared)
        # A terminal folds a long line, where rich would cut a cell. Both, or a dumb one has 80.
        self.out = RichConsole(width=10_000, height=10_000, **shared)

    def note(self, text: str) -> None:
        self.err.print(text)

    def dropped(self, source: Any) -> None:
        """Say how many rows of a `Source` its reader left out, and why."""
        for reason, count in source.dropped.items():
            self.note(f'{source.name}: {count} rows left out, {reason}')

    def opened(self, *models: Any) -> None:
        """Say which adapter was merged into each `Model` that has one."""
        for model in models:
            if model.adapter:
                self.note(f'model {model.title}')

    def drawn(self, paths: Sequence[Path]) -> None:
        """Say which pictures there are now."""
        self.note(f'drew {", ".join(map(str, paths))}')

    def result(self, text: object) -> None:
        self.out.print(text)

    def literal(self, dim: str, text: str) -> None:
        """Two texts, character for character: rich would leave out control characters."""
        self.out.print(Segments([Segment(dim, Style(dim=True)), Segment(f'{text}\n')]))

    @contextmanager
    def status(self, text: str) -> Iterator[None]:
        """Say what is going on, and how long it took."""
        begin = time.perf_counter()
        with self.err.status(Text(text)):
            yield
        self.note(f'{text}: {time.perf_counter() - begin:.1f} s')

    def metrics(self, record: Mapping[str, Any]) -> None:
        """One line of training numbers."""
        shown = {k: f'{v:.4g}' if isinstance(v, float) else v for k, v in record.items()}
        self.note('  '.join(f'{k} {v}' for k, v in shown.items()))

    @contextmanager
    def progress(self, text: str, total: int) -> Iterator[Any]:
        """A progress bar; yields `advance(items, note)`. One line per call where no terminal is."""
        if not self.err.is_terminal:
            yield _plain_progress(self, text, total)
            return
        columns = (
            bars.TextColumn('{task.description}', markup=False),
            bars.BarColumn(),
            bars.MofNCompleteColumn(),
            bars.TimeElapsedColumn(),
            bars.TimeRemainingColumn(),
            bars.TextColumn('{task.fields[note]}', markup=False),
        )
        with bars.Progress(*columns, console=self.err) as bar:
            task = bar.add_task(text, total=total, note='')
            yield lambda items, note='': bar.update(task, advance=items, note=note)


def _plain_progress(console: Console, text: str, total: int):
    begin, done = time.perf_counter(), 0

    def advance(items: int, note: str = '') -> None:
        nonlocal done
        done += items
        left = (total - done) * (time.perf_counter() - begin) / max(done, 1)
        console.note(f'{text}: {done}/{total}  {note}  {left:.0f} s left')

    return advance


def table(title: str, columns: list[str], rows: list[list[object]]) -> Table:
    """A small table; numbers are right-aligned, and None is a dash."""
    result = Table(title=title, title_justify='left', show_edge=False)
    for i, name in enumerate(columns):
        result.add_column(name, justify='left' if i == 0 else 'right')
    for row in rows:
        result.add_row(*map(_cell, row))
    return result


def _cell(value: object) -> str:
    if value is None:
        return '-'
    return number(value) if isinstance(value, float) else str(value)


def number(value: float) -> str:
    """Three significant digits, without an exponent below a million."""
    value = float(f'{value:.3g}')
    return f'{value:,.0f}' if 1e3 <= abs(value) < 1e6 else f'{value:.3g}'


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ('B', 'KiB', 'MiB', 'GiB'):
        if count < 1024:
            return f'{number(count)} {unit}'
        count /= 1024
    return f'{number(count)} TiB'


def print_plan(console: Console, settings: Any, facts: Mapping[str, object]) -> None:
    """What --plan shows: the resolved settings, the devices, and what the run needs."""
    devices = jax.devices()
    facts = {'devices': f'{len(devices)} x {devices[0].device_kind}', **facts}
    console.result(yaml.safe_dump(to_json(settings), sort_keys=False).rstrip())
    console.out.print(table('plan', ['', ''], [[k, v] for k, v in facts.items()]))
