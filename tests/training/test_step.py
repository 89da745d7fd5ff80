"""One step: what it learns from, and micro-batches."""

import dataclasses
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cllm_jax.model.llama import Llama, forward
from cllm_jax.training.noise import Noise
from cllm_jax.training.optimizer import OptimizerConfig, make_optimizer
from cllm_jax.training.packing import make_batch, samples_of_step
from cllm_jax.training.step import (
    LossWeights,
    batch_totals,
    hidden_states,
    make_step,
    new_state,
    said_after_guesses,
    text_loss,
)
from tests.tiny_training import BLOCK, CONFIG, params_of, samples


def test_converged_states_have_no_gradient():
    data = [dataclasses.replace(s, states=s.states[-1:], start=s.start[-1:]) for s in samples(4)]
    batch = make_batch(data, 4, 0, 0, Noise(windows=2))
    weights = LossWeights(ar_weight=0.0, global_weight=1.0)
    loss = partial(text_loss, Llama(CONFIG), weights)
    grads = jax.jit(jax.grad(lambda p: loss(p, (), batch, batch_totals(batch))[0]))(params_of())
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads)) == 0


@pytest.mark.parametrize('noise', [None, Noise(windows=2)])
def test_accumulation_changes_nothing(mixed_dtypes, noise):
    weights = LossWeights(ar_weight=1.0, global_weight=float(noise is not None))
    optimizer = make_optimizer(OptimizerConfig(warmup=0.0), 10)
    batch = make_batch(samples(), 4, 0, 0, noise)
    results = []
    for accumulate in (1, 2):
        loss = partial(text_loss, Llama(CONFIG), weights)
        state = new_state(optimizer, params_of())
        state, metrics = make_step(loss, optimizer, accumulate)(state, batch)
        results.append((state.params, metrics))
    (params, metrics), (expected, whole) = results
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
        assert np.allclose(a, b, atol=2e-4)
    assert float(metrics['loss']) == pytest.approx(float(whole['loss']), rel=1e-5)
    norm = float(metrics['gradient_norm'])
    assert float(whole['gradient_norm']) == pytest.approx(norm, rel=1e-4)


@pytest.mark.parametrize('accumulate', [1, 2])
def test_an_update_is_made_only_if_loss_and_gradient_are_finite(mixed_dtypes, accumulate):
    """Whatever the other one says: a loss of NaN may have a finite gradient, or none at all."""

    @jax.custom_jvp
    def scaled(x, factors):
        return x * factors[0]

    @scaled.defjvp
    def _(primals, tangents):
        return scaled(*primals), tangents[0] * primals[1][1]

    def loss(params, factors, batch, totals):
        value = (params['w'] ** 2).sum()
        return scaled(value, factors), {'value': value}

    optimizer = make_optimizer(OptimizerConfig(warmup=0.0), 100)
    batch = make_batch(samples(), 4, 0, 0, None)
    step = make_step(loss, optimizer, accumulate)
    state = new_state(optimizer, {'w': jnp.asarray([3.0, 4.0])})
    losses, gradients = (1.0, jnp.nan, jnp.inf, -jnp.inf), (1.0, jnp.nan, jnp.inf, 1e30)
    for of_loss, of_gradient in itertools.product(losses, gradients):
        before = jax.device_get(state)
        sound = of_loss == of_gradient == 1.0
        for count in (1, 2):
            state, metrics = step(state, batch, jnp.asarray([of_loss, of_gradient]))
            assert int(metrics['skipped']) == (0 if sound else count), (of_loss, of_gradient)
            assert np.isfinite(metrics['loss']) == (of_loss == 1.0)
        now, then = (jax.tree.leaves((s.params, s.opt_state.inner_state)) for s in (state, before))
        assert all(map(np.array_equal, now, then)) == (not sound)
        assert int(state.step) == int(before.step) + 2
        good, metrics = step(state, batch, jnp.ones(2))
        assert metrics['skipped'] == 0 and np.isfinite(metrics['loss'])
        assert not np.array_equal(before.params['w'], good.params['w'])
        state = good


def test_forced_labels_are_what_verification_says():
    """The label of a place is the model's choice after prompt, answer, and its own guesses."""
    data, model, params = samples(6), Llama(CONFIG), params_of()
    batch = make_batch(data, 6, 0, 0, Noise(windows=2))
    noisy = batch.offset_BW.shape[1]
    hidden_BWD = hidden_states(model, params, batch)[:, -noisy:]
    guesses_BW = np.asarray(model.apply({'params': params}, hidden_BWD, method='logits').argmax(-1))
    labels_BW = np.asarray(said_after_guesses(model, params, batch, guesses_BW))
    compared = 0
    for row, (_, sample) in enumerate(samples_of_step(data, 6, 0, 0)):
        for here in (slice(0, BLOCK), slice(BLOCK, 2 * BLOCK)):
            ahead, guesses = batch.offset_BW[row, here], guesses_BW[row, here]
            if (ahead >= 0).any():
                first = int(np.argmax(ahead >= 0))
                begin = int(batch.context_BT[row, -noisy:][here][0])
                text = np.concatenate([sample.prompt, sample.answer])[: begin + first]
                for place in np.flatnonzero(ahead >= 0):
                    said = np.concatenate([text, guesses[first - 1 : place]])
                    plain = forward(model, params, jnp.asarray(said[None], jnp.int32))
                    assert labels_BW[row, here][place] == int(plain[0, -1].argmax())
                    compared += 1
    assert compared > 10


def test_forced_labels_teach(mixed_dtypes):
    weights = LossWeights(ar_weight=1.0, global_weight=0.0, forced_weight=1.0)
    optimizer = make_optimizer(OptimizerConfig(warmup=0.0, learning_rate=1e-2), 10)
    batch, state = make_batch(samples(), 8, 0, 0, Noise()), new_state(optimizer, params_of())
    step, found = make_step(partial(text_loss, Llama(CONFIG), weights), optimizer), []
    for _ in range(6):
        state, metrics = step(state, batch)
        found.append(float(metrics['forced_loss']))
    assert found[-1] < found[0] and np.isfinite(found).all()
