"""A race of decodes in a terminal: next to each other, every token by what became of it.

Colours are never all that tells two outcomes apart: some are filled, underlined or struck out.
"""

from collections.abc import Iterator, Mapping, Sequence

from rich.console import Console as Rich
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from cllm_jax.cli.console import Console, number
from cllm_jax.cli.live import play
from cllm_jax.decoding.request import Texts
from cllm_jax.evaluation.outcome import (
    COMMITTED,
    FORWARDED,
    OPEN,
    PASSING,
    RANDOM,
    STATIONARY,
    WRONG,
    outcomes,
)
from cllm_jax.evaluation.race import Runner, least_seconds, moment, race
from cllm_jax.evaluation.speed import Method
from cllm_jax.evaluation.trace import DecodeTrace

STYLES = {
    COMMITTED: 'bold',
    FORWARDED: '#052e24 on #2dd4a7',
    STATIONARY: 'green underline',
    PASSING: 'cyan',
    WRONG: 'red strike',
    RANDOM: 'dim italic',
    OPEN: '',
}
UNKNOWN = 'not known yet'
"""What `OPEN` is called."""
DRAFTS = 8
"""Last forwards of which the drafts are shown."""
LEAST_SHOWN = 0.06
"""Seconds for which a forward is shown at least: those of a small model are too short to see."""
AROUND = 5
"""Lines of a screen that are neither answer nor drafts."""
SIGNS = {'\n': '↵', '\t': '→'}
"""How characters are shown that would move the cursor; others that have no form are a dot."""


def watch(console: Console, named: Mapping[str, Method], prompts: Texts) -> None:
    """Show how each prompt is decoded, and say what that took; all are decoded once before."""
    for row, prompt in enumerate(prompts):
        with console.status('decoded once, to compile'):
            once = list(race(named, prompt, row))
        console.literal(once[0][0].trace.prompt, '')
        frames = ((moment(frame), frame) for frame in race(named, prompt, row))
        runners = play(frames, draw, max(1.0, LEAST_SHOWN / least_seconds(once)))
        for runner in runners:
            console.result(f'{runner.trace.name}: {numbers(runner)}')
        if len({tuple(runner.trace.answer) for runner in runners}) > 1:
            console.note('their tokens differ: in bfloat16 see docs/exactness.md, --exact class')


def draw(runners: Sequence[Runner], width: int, height: int) -> RenderableType:
    """The decodes next to each other in at most so many columns and lines, and a legend.

    Each has its numbers, the end of its answer, and the drafts of its last forwards, as far as it
    can be told by now what became of them.
    """
    inner = max(width // len(runners) - 4, 1)
    parts = [_parts(runner, inner, height - AROUND) for runner in runners]
    most = max(map(len, parts))
    grid = Table.grid(expand=True)
    for _ in runners:
        grid.add_column(ratio=1)
    panels = []
    for runner, lines in zip(runners, parts, strict=True):
        lines += [Text()] * (most - len(lines))
        ended = 'bold green' if runner.finished else 'default'
        panels.append(Panel(Group(*lines), title=Text(runner.trace.name), border_style=ended))
    grid.add_row(*panels)
    return Group(grid, legend())


def legend() -> Text:
    """The outcomes, each in its style."""
    words = [Text(word or UNKNOWN, style) for word, style in STYLES.items()]
    return Text('  ', no_wrap=True, overflow='crop').join(words)


def numbers(runner: Runner) -> str:
    """What a decode has written so far, and what that took; no time if it was not measured."""
    trace = runner.trace
    tokens, forwards, seconds = len(trace.answer), len(trace.forwards), trace.seconds
    took = '' if seconds is None else f', {number(1000 * seconds)} ms'
    each = f'{tokens / forwards:.2f} tokens/forward'
    return f'{tokens} tokens, {forwards} forwards, {each}{took}'


def _parts(runner: Runner, width: int, height: int) -> list[Text]:
    """The lines of a decode, so many at most."""
    drafts = list(_drafts(runner, width))[-DRAFTS:]
    head = [*Text(numbers(runner)).wrap(_PLAIN, width), Text()]
    room = max(height - len(head) - len(drafts) - 1, 1)
    answer = _answer(runner.trace).wrap(_PLAIN, width)[-room:]
    return [*head, *answer, *([Text(), *drafts] if drafts else [])]


_PLAIN = Rich(width=80, color_system=None)
"""What rich wants to wrap a text; nothing is printed with it."""


def _answer(trace: DecodeTrace) -> Text:
    """The answer so far."""
    text = Text()
    for forward in trace.forwards:
        for i, token in enumerate(forward.committed):
            outcome = FORWARDED if i < len(forward.accepted) else COMMITTED
            text.append(shown(trace.pieces[token]), STYLES[outcome])
    return text


def _drafts(runner: Runner, width: int) -> Iterator[Text]:
    """What each forward after the prefill verified, a line for each; none of AR, which has none."""
    trace = runner.trace
    rows = zip(trace.forwards, outcomes(trace, runner.finished), strict=True)
    for count, (forward, row) in enumerate(rows, 1):
        if count == 1 or len(forward.tokens) == 1:
            continue
        line = Text(f'{count:3} ', no_wrap=True)
        for token, outcome in zip(forward.tokens, row, strict=True):
            if outcome != OPEN or not runner.finished:
                line.append(shown(trace.pieces[token]), STYLES[outcome])
        line.truncate(width, overflow='ellipsis')
        yield line


def shown(piece: str) -> str:
    """A token as it can be printed: nothing in it moves the cursor or changes colours."""
    return ''.join(c if c.isprintable() else SIGNS.get(c, '·') for c in piece)
