"""Decodes of one prompt that run in turn, forward by forward, each on a clock of its own."""

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax

from cllm_jax.decoding.engine import run_until, start
from cllm_jax.decoding.request import encode, row_keys
from cllm_jax.evaluation.recording import trace_of_state
from cllm_jax.evaluation.speed import Method
from cllm_jax.evaluation.trace import DecodeTrace
from cllm_jax.tasks.example import Messages


@dataclasses.dataclass(frozen=True)
class Runner:
    """A decode as far as it got."""

    trace: DecodeTrace
    """Its `seconds` are what its own calls took, prefill included; what it waited is left out."""
    finished: bool


def race(
    named: Mapping[str, Method],
    prompt: str | Messages | Sequence[int],
    row: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[list[Runner]]:
    """Yield how far each decode is: after all their prefills, and after every forward since.

    A call of the model is one forward of one decode. The next one is of the decode that has taken
    the least seconds, so that all are shown as of the same moment. Compilation counts: run a race
    once before one whose times are to be told.

    Args:
      row: decode as the prompt of that number in a call (`Request.seed`).
      clock: seconds; with one that only counts its calls all decodes take turns.

    Raises:
      ConfigError: a prompt that cannot be decoded.
    """
    runs = [_forwards(name, method, prompt, row, clock) for name, method in named.items()]
    found = [next(run) for run in runs]
    yield found
    while going := [i for i, runner in enumerate(found) if not runner.finished]:
        first = min(going, key=lambda i: found[i].trace.seconds)
        found = [next(runs[i]) if i == first else runner for i, runner in enumerate(found)]
        yield found


def _forwards(
    name: str,
    method: Method,
    prompt: str | Messages | Sequence[int],
    row: int,
    clock: Callable[[], float],
) -> Iterator[Runner]:
    """A decode after each of its forwards."""
    model, request = method.model, dataclasses.replace(method.request, trace=True)
    ids, keys = encode(model, prompt), row_keys(request.seed, [row])
    begin = clock()
    state = jax.block_until_ready(start(model, request, [ids], keys))
    seconds = clock() - begin
    for until in itertools.count(2):
        trace, finished = trace_of_state(name, method, prompt, ids, state)
        yield Runner(dataclasses.replace(trace, seconds=seconds), finished)
        begin = clock()
        state = jax.block_until_ready(run_until(model, request, state, until))
        seconds += clock() - begin


def least_seconds(frames: Sequence[Sequence[Runner]]) -> float:
    """The least that a forward of a race took."""
    least = [runner.trace.seconds for runner in frames[0]]
    for before, after in itertools.pairwise(frames):
        for a, b in zip(before, after, strict=True):
            if a is not b:
                least.append(b.trace.seconds - a.trace.seconds)
    return min(least)


def moment(frame: Sequence[Runner]) -> float:
    """Seconds since the beginning of the race, on the clock that is ahead."""
    return max(runner.trace.seconds for runner in frame)
