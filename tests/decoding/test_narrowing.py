"""A batch that goes on with half of its rows, once the others are finished, gives the same."""

import jax
import numpy as np
import pytest

from cllm_jax.decoding import loop
from cllm_jax.decoding.engine import run_until, start
from cllm_jax.decoding.request import Request, row_keys
from cllm_jax.decoding.sampling import Sampling
from cllm_jax.drafters.autoregressive import AutoRegressive
from cllm_jax.drafters.draft_model import DraftModel
from cllm_jax.drafters.jacobi import Jacobi
from cllm_jax.drafters.lookahead import Lookahead
from tests.tiny import ragged_prompts, random_model, tiny_config

MODEL = random_model(config=tiny_config(layers=1, eos_ids=(3, 7, 12, 20)))
PROMPTS = ragged_prompts(3, (1, 9, 3, 14, 2, 5, 16, 8) * 4)
LONGEST = 40


@pytest.fixture
def widths(monkeypatch):
    """Rows of every batch that goes on, as the loop is compiled."""
    found, rows_of = [], loop._rows_of

    def spied(state, rows_R):
        found.append(len(rows_R))
        return rows_of(state, rows_R)

    monkeypatch.setattr(loop, '_rows_of', spied)
    return found


def kept(state) -> list[np.ndarray]:
    """What is known of each row, with keys and values up to its length."""
    seq, rows = state.sequences, len(state.finished_B)
    used_BS = np.arange(state.cache.slots) < np.asarray(seq.length_B)[:, None]
    cache = [
        np.asarray(x).reshape(-1, rows, *x.shape[1:]) * used_BS[None, :, :, None]
        for x in jax.tree.leaves(state.cache)
    ]
    exact = (seq.tokens_BS, seq.length_B, state.finished_B, state.forwards_B, state.emitted_BI)
    return [*map(np.asarray, (*exact, *jax.tree.leaves(state.trace))), *cache]


@pytest.mark.parametrize(
    ('drafter', 'sampling', 'rows', 'halves'),
    [
        (Jacobi(6), Sampling(), 32, [16, 8]),
        (AutoRegressive(), Sampling(1.0), 16, [8]),
        (Lookahead(3, 3, 2), Sampling(1.0), 16, [8]),
        (DraftModel(MODEL.module, 3, Sampling(1.0)), Sampling(1.0), 16, [8]),
    ],
    ids=('chain', 'one node, sampled', 'tree, sampled', 'draft model, sampled'),
)
def test_half_of_a_batch_goes_on_as_it_would_in_the_whole(widths, drafter, sampling, rows, halves):
    weights = MODEL.params if isinstance(drafter, DraftModel) else ()
    request = Request(drafter, LONGEST, sampling, trace=True)
    prompts, keys = PROMPTS[:rows], row_keys(3, range(rows))
    narrowed = start(MODEL, request, prompts, keys, weights, to_the_end=True)
    assert widths == halves
    whole = start(MODEL, request, prompts, keys, weights)
    whole = run_until(MODEL, request, weights, whole, LONGEST)
    assert widths == halves, 'the other one never narrows'
    forwards = np.sort(whole.forwards_B)
    assert forwards[rows // 2 - 1] < forwards[-1], 'half of the rows finish earlier'
    for here, there in zip(kept(narrowed), kept(whole), strict=True):
        np.testing.assert_allclose(here, there, atol=2e-5)
    assert narrowed.iteration == whole.iteration


def test_a_batch_whose_cache_is_full_too_early_for_that_loses_nothing(widths, monkeypatch):
    """More than half of the rows wait for a longer cache; then they go on together."""
    monkeypatch.setattr('cllm_jax.decoding.engine.FIRST_ROOM', 2)
    request, keys = Request(Jacobi(5), LONGEST), row_keys(3, range(16))
    full = start(MODEL, request, PROMPTS[:16], keys, (), to_the_end=True)
    assert widths == [8] and (~full.finished_B).sum() > 8
    done = run_until(MODEL, request, (), loop.grow(full, 64), LONGEST)
    whole = start(MODEL, request, PROMPTS[:16], keys, ())
    whole = run_until(MODEL, request, (), whole, LONGEST)
    for here, there in zip(kept(done), kept(whole), strict=True):
        np.testing.assert_allclose(here, there, atol=2e-5)
