"""What became of guesses, on decodes that were made by hand."""

import pytest

from cllm_jax.evaluation.outcome import (
    AFTER,
    COMMITTED,
    FORWARDED,
    PASSING,
    RANDOM,
    STATIONARY,
    WRONG,
    outcomes,
    statistics,
)
from cllm_jax.evaluation.trace import Forward
from tests.evaluation.traces import jacobi, plain, tree


def test_every_guess_of_a_window_has_its_outcome():
    assert outcomes(jacobi()) == [
        [COMMITTED, RANDOM, RANDOM, RANDOM],
        [COMMITTED, WRONG, PASSING, STATIONARY],
        [COMMITTED, WRONG, STATIONARY, STATIONARY],
        [COMMITTED, FORWARDED, FORWARDED, WRONG],
        [COMMITTED, FORWARDED, RANDOM, AFTER],
    ]


def test_nodes_of_a_tree_are_right_on_the_path_alone():
    """A right token on another branch is wrong where the path has it, else passing."""
    assert outcomes(tree())[1] == [
        COMMITTED, FORWARDED, WRONG, WRONG, FORWARDED, WRONG, WRONG, WRONG, WRONG,
    ]  # fmt: skip
    one = Forward(0, (1, 5, 3), (-1, 0, 1), 0, (), (2,))
    more = Forward(1, (2, 3), (-1, 0), 0, (1,), (3, 4))
    found = outcomes(tree(forwards=(tree().forwards[0], one, more)))
    assert found[1:] == [[COMMITTED, WRONG, PASSING], [COMMITTED, FORWARDED]]


def test_statistics_count_as_the_paper_does():
    found = statistics([jacobi()])
    assert (found.tokens, found.forwards, found.window) == (8, 5, 4)
    assert found.tokens_per_forward == 8 / 5
    assert found.fast_forwarded == (1 + 1 + 3 + 2) / 4, 'with the token that would be right anyway'
    assert found.stationary == 2 * 4 / 8, 'two places, in windows of four of eight tokens'
    assert found.acceptance == [1 / 2, 1.0], 'the end of the answer refuses nothing'
    both = statistics([jacobi(), jacobi(seconds=1.5)])
    assert (both.tokens, both.forwards, both.seconds) == (16, 10, 2.0)
    assert both.stationary == found.stationary


def test_methods_without_a_window_have_nothing_stationary():
    assert statistics([plain()]).stationary is None
    assert statistics([plain()]).fast_forwarded == 1
    assert statistics([tree()]).stationary is None
    assert statistics([jacobi(seconds=None)]).seconds is None


@pytest.mark.parametrize('made', [jacobi, tree, plain])
def test_what_is_committed_is_the_answer(made):
    trace = made()
    for forward, row in zip(trace.forwards, outcomes(trace), strict=True):
        taken = [n for n, outcome in enumerate(row) if outcome == FORWARDED]
        assert [forward.tokens[n] for n in taken] == list(forward.committed[: len(taken)])
