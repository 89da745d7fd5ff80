"""A race is the decodes themselves, forward by forward, each with its own time."""

import dataclasses
import itertools

import pytest

from cllm_jax.errors import ConfigError
from cllm_jax.evaluation.outcome import OPEN, outcomes
from cllm_jax.evaluation.race import least_seconds, moment, race
from cllm_jax.evaluation.recording import trace_decode
from tests.evaluation.test_recording import DRAFTERS, PROMPTS, method


class Clock:
    """Seconds that pass between its calls, as a list says; 1 after its end."""

    def __init__(self, *steps: float):
        self.steps, self.now = iter(steps), 0.0

    def __call__(self) -> float:
        self.now += next(self.steps, 1)
        return self.now


def timeless(trace):
    return dataclasses.replace(trace, seconds=None)


@pytest.mark.parametrize('name', ['Jacobi', 'tree'])
def test_a_race_ends_with_the_decodes_and_goes_forward_by_forward(name):
    named = {'AR': method(DRAFTERS['AR']), name: method(DRAFTERS[name])}
    frames = list(race(named, PROMPTS[1], row=3, clock=Clock()))
    for (each, asked), last in zip(named.items(), frames[-1], strict=True):
        assert timeless(last.trace) == trace_decode(each, asked, PROMPTS[1], row=3)
        assert last.finished
    for before, after in itertools.pairwise(frames):
        moved = [(a, b) for a, b in zip(before, after, strict=True) if a is not b]
        [(a, b)] = moved
        assert not a.finished and b.trace.forwards[:-1] == a.trace.forwards
        assert b.trace.seconds == a.trace.seconds + 1, 'what the other took does not count'
    counts = [len(runner.trace.forwards) for runner in frames[-1]]
    assert len(frames) == sum(counts) - 1
    assert [runner.trace.seconds for runner in frames[-1]] == counts


def test_the_decode_with_the_least_time_goes_next():
    """AR's prefill takes 9 seconds, Jacobi's forwards 2 each: these go until they have taken 9."""
    named = {'AR': method(DRAFTERS['AR']), 'Jacobi': method(DRAFTERS['Jacobi'])}
    clock = Clock(0, 9, 50, *(2, 2) * 5, 2, 1)
    frames = list(itertools.islice(race(named, PROMPTS[0], clock=clock), 6))
    took = [tuple(runner.trace.seconds for runner in frame) for frame in frames]
    assert took == [(9, 2), (9, 4), (9, 6), (9, 8), (9, 10), (11, 10)]
    assert [moment(frame) for frame in frames] == [9, 9, 9, 9, 10, 11]
    assert least_seconds(frames) == 2


@pytest.mark.parametrize('name', DRAFTERS)
def test_what_is_told_of_a_token_while_a_decode_goes_on_stays(name):
    trace, told = trace_decode(name, method(DRAFTERS[name]), PROMPTS[0]), 0
    wanted = outcomes(trace)
    for size in range(1, len(trace.forwards)):
        part = dataclasses.replace(trace, forwards=trace.forwards[:size])
        for row, final in zip(outcomes(part, finished=False), wanted, strict=False):
            for now, later in zip(row, final, strict=True):
                # Beyond the end of the answer nothing becomes of a guess, though it was one.
                assert now in (OPEN, later) or later == OPEN
                told += now != OPEN
    assert told


def test_a_stop_string_ends_a_race():
    named = {n: method(DRAFTERS[n], stop=('so',)) for n in ('AR', 'Jacobi')}
    *_, last = race(named, PROMPTS[0], clock=Clock())
    assert last[0].trace.answer == last[1].trace.answer
    whole = trace_decode('AR', method(DRAFTERS['AR']), PROMPTS[0])
    assert len(last[0].trace.answer) < len(whole.answer)


def test_a_prompt_that_cannot_be_decoded_is_refused():
    with pytest.raises(ConfigError, match='outside the vocabulary'):
        next(race({'AR': method(DRAFTERS['AR'])}, [1, 100_000]))
