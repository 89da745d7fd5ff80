"""Batches that are refilled, and caches that grow, give what each prompt gives alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cllm_jax as cllm
from cllm_jax.decoding import engine
from cllm_jax.decoding.engine import decode_all, decode_batch, decode_refilling, run_until, start
from cllm_jax.decoding.request import Request, row_keys
from cllm_jax.decoding.sampling import Sampling
from cllm_jax.decoding.state import replace_rows
from cllm_jax.drafters.autoregressive import AutoRegressive
from cllm_jax.drafters.draft_model import DraftModel
from cllm_jax.drafters.jacobi import Jacobi
from cllm_jax.drafters.lookahead import Lookahead
from cllm_jax.model.llama import forward as model_forward
from tests.tiny import (
    BIASES,
    byte_tokenizer,
    compilations,
    ragged_prompts,
    random_model,
    text_config,
    tiny_config,
)

BIASED = [random_model(config=tiny_config(layers=1, **BIASES[name])) for name in BIASES]
MODEL = random_model(config=tiny_config(layers=1, eos_ids=(3, 7, 12, 20)))
LENGTHS = (1, 9, 3, 14, 2, 5, 16, 8)
TALKER = random_model(
    config=text_config(layers=1, eos_ids=(3,), max_positions=256), tokenizer=byte_tokenizer()
)
ENDLESS = dataclasses.replace(TALKER, config=dataclasses.replace(TALKER.config, eos_ids=()))
TEXTS = ragged_prompts(2, (1, 9, 3, 14, 2), vocab=200)
LONG = 90
"""Tokens of an answer: more than fit into 32 slots, or 64."""


@pytest.mark.parametrize('model', BIASED, ids=BIASES)
def test_models_with_every_bias_decode_as_their_plain_forward_says(model):
    prompts, length = ragged_prompts(2, LENGTHS[:4]), 12
    plain = decode_all(model, Request(AutoRegressive(), length), prompts)
    assert decode_all(model, Request(Jacobi(6), length), prompts).tokens == plain.tokens
    forward = jax.jit(model_forward, static_argnums=0)
    for prompt, answer in zip(prompts, plain.tokens, strict=True):
        text = jnp.asarray([[*prompt, *answer, *[0] * (40 - len(prompt) - len(answer))]])
        says = jnp.argmax(forward(model.module, model.params, text)[0], axis=-1).tolist()
        assert answer == says[len(prompt) - 1 : len(prompt) - 1 + len(answer)]


@pytest.mark.parametrize(
    ('drafter', 'sampling'),
    [
        (Jacobi(6), Sampling()),
        (Lookahead(3, 3, 2), Sampling(1.0)),
        # Its state is a cache, which has heads before rows.
        (DraftModel(MODEL.module, MODEL.params, 3), Sampling()),
    ],
    ids=('chain', 'tree, sampled', 'draft model'),
)
def test_refilled_rows_decode_as_if_alone(drafter, sampling):
    request = Request(drafter, 24, sampling, seed=3, trace=True)
    prompts = ragged_prompts(2, LENGTHS)
    alone = [
        decode_batch(MODEL, request, [prompt], row_keys(3, [i])) for i, prompt in enumerate(prompts)
    ]
    assert len({len(one.tokens[0]) for one in alone}) > 2, 'they finish at different times'
    for batch in (1, 3):
        request, done = dataclasses.replace(request, batch=batch), []
        refilled = decode_all(MODEL, request, prompts, done.append)
        assert refilled.texts == [one.texts[0] for one in alone]
        assert refilled.tokens == [one.tokens[0] for one in alone]
        assert refilled.accepted == [one.accepted[0] for one in alone]
        assert sum(done) == len(prompts)
        for i, (here, one) in enumerate(zip(refilled.trajectories, alone, strict=True)):
            np.testing.assert_array_equal(here.states, one.trajectories[0].states)
            np.testing.assert_array_equal(here.start, one.trajectories[0].start)
            assert here.states.base is None, 'a view would keep those of the whole batch'
            assert here.prompt.tolist() == prompts[i]
            assert here.answer.tolist() == refilled.tokens[i]
            assert here.forwards == refilled.forwards[i]
            assert here.finished == (here.answer[-1] in MODEL.config.eos_ids)


def test_several_rows_are_refilled_at_a_time():
    """A quarter of eight; the last prompt is alone in its refill."""
    request = Request(Jacobi(6), 24, seed=3, trace=True, batch=1)
    prompts, done = ragged_prompts(2, (LENGTHS * 2)[:11]), []
    alone = decode_all(MODEL, request, prompts)
    request, keys = dataclasses.replace(request, batch=8), row_keys(3, range(11))
    found = decode_refilling(MODEL, request, prompts, keys, 16, done.append)
    assert [one.tokens for one in found] == alone.tokens
    assert [one.accepted for one in found] == alone.accepted
    assert sum(done) == 11


def test_refilling_compiles_once_for_any_number_of_prompts():
    request = Request(Jacobi(4), 24, batch=4)
    decode_all(MODEL, request, ragged_prompts(0, LENGTHS[:6]))
    compiled = compilations()
    result = decode_all(MODEL, request, ragged_prompts(1, LENGTHS[:6] * 4))
    assert compilations() == compiled
    assert len(result.tokens) == 24 and all(map(len, result.tokens))


def test_a_batch_of_one_compiles_nothing_that_a_single_prompt_does_not():
    request = Request(Jacobi(5), 24, batch=1)
    decode_all(MODEL, request, ragged_prompts(0, LENGTHS[:1]))
    compiled = compilations()
    decode_all(MODEL, request, ragged_prompts(1, LENGTHS))
    assert compilations() == compiled


def test_rows_that_end_at_a_stop_string_are_refilled_too():
    model = random_model(config=text_config(layers=1), tokenizer=byte_tokenizer())
    prompts = ragged_prompts(4, (3, 8, 5, 2, 7, 6, 4), vocab=200)
    request = Request(Jacobi(4), 24, batch=1)
    stop = tuple({text[5:6] for text in decode_all(model, request, prompts).texts if text[5:6]})
    request = dataclasses.replace(request, stop=stop)
    alone = decode_all(model, request, prompts)
    refilled = decode_all(model, dataclasses.replace(request, batch=3), prompts)
    assert refilled.tokens == alone.tokens and refilled.accepted == alone.accepted
    assert refilled.texts == alone.texts


def test_the_rows_of_a_batch_that_go_on_are_left_as_they_are():
    """Bit for bit: another row's refill is not an event for them."""
    request = Request(Jacobi(4), 24)
    prompts = ragged_prompts(5, (4, 6, 3))
    state = start(MODEL, request, prompts, row_keys(0, range(3)), width=16)
    state = run_until(MODEL, request, state, 4)
    old = jax.tree.map(np.array, jax.device_get((state.sequences.tokens_BS, state.cache.k_RSH)))
    fresh = start(MODEL, request, prompts[:1], row_keys(9, [0]), rows=2, width=16)
    state = replace_rows(state, np.array([1, 4], np.int32), fresh)
    tokens_BS, k_L = jax.device_get((state.sequences.tokens_BS, state.cache.k_RSH))
    others = [0, 2, 3]
    np.testing.assert_array_equal(tokens_BS[others], old[0][others])
    for old_RSH, new_RSH in zip(old[1], k_L, strict=True):
        old_KB, new_KB = (x.reshape(2, 4, *x.shape[1:]) for x in (old_RSH, new_RSH))
        np.testing.assert_array_equal(new_KB[:, others], old_KB[:, others])
        assert not np.array_equal(new_KB[:, 1], old_KB[:, 1])


@pytest.fixture
def growths(monkeypatch):
    """Slots of every longer cache, where a cache has room for 8 tokens of an answer at first."""
    slots, grow = [], engine.grow
    monkeypatch.setattr(engine, 'FIRST_ROOM', 8)

    def counted(state, size):
        slots.append(size)
        return grow(state, size)

    monkeypatch.setattr(engine, 'bounded', lambda run: counted if run is grow else run)
    return slots


@pytest.mark.parametrize(
    ('drafter', 'sampling', 'batch'),
    [
        (AutoRegressive(), Sampling(), 5),
        (Jacobi(6), Sampling(), 5),
        (Jacobi(6), Sampling(), 2),
        (Lookahead(3, 3, 2), Sampling(1.0), 5),
        (DraftModel(TALKER.module, TALKER.params, 3), Sampling(), 5),
    ],
    ids=('one node', 'chain', 'chain, refilled', 'tree, sampled', 'draft model'),
)
def test_answers_do_not_depend_on_the_room_that_a_cache_has_at_first(
    growths, monkeypatch, drafter, sampling, batch
):
    request = Request(drafter, LONG, sampling, seed=3, batch=batch, trace=True)
    short = decode_all(TALKER, request, TEXTS)
    assert growths[-1] == 128, 'slots are doubled, up to the most that a row may need'
    growths.clear()
    monkeypatch.setattr(engine, 'FIRST_ROOM', LONG)
    long = decode_all(TALKER, request, TEXTS)
    assert not growths and max(map(len, long.tokens)) == LONG
    assert short.tokens == long.tokens and short.accepted == long.accepted
    for here, there in zip(short.trajectories, long.trajectories, strict=True):
        np.testing.assert_array_equal(here.states, there.states)


def test_a_cache_grows_for_a_draft_that_does_not_fit_and_for_no_other(growths):
    """Of 32 slots a prompt takes 9; an answer's last token is in no cache."""
    for tokens, slots in ((24, []), (25, [64])):
        decode_all(ENDLESS, Request(AutoRegressive(), tokens), TEXTS[1:2])
        assert growths == slots
    state = start(TALKER, Request(Jacobi(6), LONG), TEXTS, row_keys(0, range(5)))
    assert state.cache.slots == 32 and state.sequences.tokens_BS.shape[1] == 128


def test_streams_and_stop_strings_go_on_in_a_longer_cache(growths):
    prompt = TALKER.tokenizer.decode(TEXTS[1])
    whole = cllm.decode(TALKER, [prompt], Jacobi(5), max_tokens=LONG).texts[0]
    pieces = list(cllm.stream(TALKER, prompt, Jacobi(5), max_tokens=LONG))
    assert ''.join(pieces) == whole and len(pieces) > 1
    stop = whole[-8:]
    stopped = cllm.decode(TALKER, [prompt], Jacobi(5), max_tokens=LONG, stop=(stop,)).texts[0]
    assert stopped == whole[: whole.index(stop)]
    assert growths.count(128) == 3
