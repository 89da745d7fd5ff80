"""A cache that becomes longer while answers grow gives what a long one gives, and only then."""

import dataclasses

import numpy as np
import pytest

import cllm_jax as cllm
from cllm_jax.decoding import engine as generate
from cllm_jax.decoding.engine import decode_all, start
from cllm_jax.decoding.request import Request, row_keys
from cllm_jax.decoding.sampling import Sampling
from cllm_jax.drafters.autoregressive import AutoRegressive
from cllm_jax.drafters.draft_model import DraftModel
from cllm_jax.drafters.jacobi import Jacobi
from cllm_jax.drafters.lookahead import Lookahead
from tests.tiny import byte_tokenizer, ragged_prompts, random_model, text_config

MODEL = random_model(
    config=text_config(layers=1, eos_ids=(3,), max_positions=256), tokenizer=byte_tokenizer()
)
ENDLESS = dataclasses.replace(MODEL, config=dataclasses.replace(MODEL.config, eos_ids=()))
PROMPTS = ragged_prompts(2, (1, 9, 3, 14, 2), vocab=200)
LONG = 90
"""Tokens of an answer: more than fit into 32 slots, or 64."""


@pytest.fixture
def growths(monkeypatch):
    """Slots of every longer cache, where a cache has room for 8 tokens of an answer at first."""
    slots, grow = [], generate.grow
    monkeypatch.setattr(generate, 'FIRST_ROOM', 8)
    monkeypatch.setattr(generate, 'grow', lambda state, n: slots.append(n) or grow(state, n))
    return slots


@pytest.mark.parametrize(
    ('drafter', 'sampling', 'batch'),
    [
        (AutoRegressive(), Sampling(), 5),
        (Jacobi(6), Sampling(), 5),
        (Jacobi(6), Sampling(), 2),
        (Lookahead(3, 3, 2), Sampling(1.0), 5),
        (DraftModel(MODEL.module, 3, Sampling()), Sampling(), 5),
    ],
    ids=('one node', 'chain', 'chain, refilled', 'tree, sampled', 'draft model'),
)
def test_answers_do_not_depend_on_the_room_that_a_cache_has_at_first(
    growths, monkeypatch, drafter, sampling, batch
):
    weights = MODEL.params if isinstance(drafter, DraftModel) else ()
    request = Request(drafter, LONG, sampling, seed=3, batch=batch, trace=True)
    short = decode_all(MODEL, request, PROMPTS, weights)
    assert growths[-1] == 128, 'slots are doubled, up to the most that a row may need'
    growths.clear()
    monkeypatch.setattr(generate, 'FIRST_ROOM', LONG)
    long = decode_all(MODEL, request, PROMPTS, weights)
    assert not growths and max(map(len, long.tokens)) == LONG
    assert short.tokens == long.tokens and short.accepted == long.accepted
    for here, there in zip(short.trajectories, long.trajectories, strict=True):
        np.testing.assert_array_equal(here.states, there.states)


def test_a_cache_grows_for_a_draft_that_does_not_fit_and_for_no_other(growths):
    """Of 32 slots a prompt takes 9; an answer's last token is in no cache."""
    for tokens, slots in ((24, []), (25, [64])):
        decode_all(ENDLESS, Request(AutoRegressive(), tokens), PROMPTS[1:2])
        assert growths == slots
    state = start(MODEL, Request(Jacobi(6), LONG), PROMPTS, row_keys(0, range(5)), ())
    assert state.cache.slots == 32 and state.sequences.tokens_BS.shape[1] == 128


def test_streams_and_stop_strings_go_on_in_a_longer_cache(growths):
    prompt = MODEL.tokenizer.decode(PROMPTS[1])
    whole = cllm.decode(MODEL, [prompt], Jacobi(5), max_tokens=LONG).texts[0]
    pieces = list(cllm.stream(MODEL, prompt, Jacobi(5), max_tokens=LONG))
    assert ''.join(pieces) == whole and len(pieces) > 1
    stop = whole[-8:]
    stopped = cllm.decode(MODEL, [prompt], Jacobi(5), max_tokens=LONG, stop=(stop,)).texts[0]
    assert stopped == whole[: whole.index(stop)]
    assert growths.count(128) == 3
