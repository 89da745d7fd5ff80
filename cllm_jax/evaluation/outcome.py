"""What became of every guess of a decode, and what that adds up to.

The words are those of the CLLM paper (arXiv 2403.00835, section 4.3). *Fast-forwarded*: a forward
finds several right tokens in a row. *Stationary*: a token is right although one before it is still
wrong, and stays as it is until it is committed.
"""

import dataclasses
import math
from collections.abc import Sequence

from cllm_jax.decoding.result import DecodeResult, acceptance, tokens_per_forward
from cllm_jax.evaluation.trace import DecodeTrace, Forward

COMMITTED, FORWARDED, STATIONARY, PASSING, WRONG, RANDOM = OUTCOMES = (
    'committed', 'fast-forwarded', 'stationary', 'passing', 'wrong', 'random',
)  # fmt: skip
AFTER = ''
"""Of a node after the end of the answer."""
OPEN = AFTER
"""Of a node after the end of an answer that goes on: nobody can tell yet what becomes of it."""


def outcomes(trace: DecodeTrace, finished: bool = True) -> list[list[str]]:
    """What became of every node of every forward, one of `OUTCOMES` or `AFTER`.

    A guess that no forward has computed yet is random, whatever it is, unless it is accepted. On a
    branch that the model did not take a right token is passing at most: it is not kept.

    Args:
      finished: whether the answer has ended. While it goes on, what is told but for `OPEN` stays.
    """
    answer, computed, found = trace.answer, -1, []
    end = len(answer) if finished else math.inf
    for forward in trace.forwards:
        found.append(_outcomes(forward, answer, computed, end))
        computed = max(computed, forward.start + forward.window)
    changed: set[int] = set()
    for forward, row in zip(reversed(trace.forwards), reversed(found), strict=True):
        for node, place in enumerate(forward.places[: forward.window]):
            if row[node] == WRONG:
                changed.add(place)
            elif row[node] == PASSING and place not in changed:
                row[node] = STATIONARY
    return found


def _outcomes(forward: Forward, answer: Sequence[int], computed: int, last: float) -> list[str]:
    """As `outcomes`, without looking at later forwards: what is passing may be stationary.

    Args:
      computed: the last place of which a forward has said something.
      last: the place at which the answer ends.
    """
    row, end = [], forward.start + 1 + len(forward.committed)
    for node, (token, place) in enumerate(zip(forward.tokens, forward.places, strict=True)):
        in_window = node < forward.window
        if node == 0:
            row.append(COMMITTED)
        elif node in forward.accepted:
            row.append(FORWARDED)
        elif place >= last:
            row.append(AFTER)
        elif in_window and place > computed:
            row.append(RANDOM)
        elif place >= len(answer):
            row.append(OPEN)
        elif token == answer[place] and (in_window or place >= end):
            row.append(PASSING)
        else:
            row.append(WRONG)
    return row


@dataclasses.dataclass(frozen=True)
class Statistics:
    """How a method answered some prompts."""

    tokens: int
    forwards: int
    tokens_per_forward: float
    """Prefills are counted as forwards."""
    fast_forwarded: float | None
    """Tokens that a forward after the prefill commits, the one included that it would find anyway,
    as in the paper; None if there is none."""
    stationary: float | None
    """Stationary tokens per window of `window` tokens of the answer; None without a window."""
    window: int
    acceptance: list[float]
    """Conditional acceptance of each slot (`decoding/result.py`)."""
    seconds: float | None


def statistics(traces: Sequence[DecodeTrace]) -> Statistics:
    """Of one method, over all its answers."""
    tokens, still = [trace.answer for trace in traces], 0
    committed = [[len(f.committed) for f in trace.forwards] for trace in traces]
    later = [count for row in committed for count in row[1:]]
    for trace in traces:
        rows = zip(trace.forwards, outcomes(trace), strict=True)
        pairs = (pair for f, row in rows for pair in zip(f.places, row, strict=True))
        still += len({place for place, outcome in pairs if outcome == STATIONARY})
    window = max(f.window for trace in traces for f in trace.forwards)
    seconds = [trace.seconds for trace in traces]
    result = DecodeResult([None] * len(tokens), tokens, committed, [0.0] * len(tokens))
    total = sum(map(len, tokens))
    return Statistics(
        tokens=total,
        forwards=sum(map(len, committed)),
        tokens_per_forward=tokens_per_forward(result),
        fast_forwarded=sum(later) / len(later) if later else None,
        stationary=still * window / total if window else None,
        window=window,
        acceptance=acceptance(result),
        seconds=None if None in seconds else sum(seconds),
    )
