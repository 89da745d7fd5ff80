"""Sampled tokens follow the softmax exactly, and their noise belongs to a position."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chisquare

from cllm_jax.decoding.request import row_keys
from cllm_jax.decoding.sampling import Sampling, choose, gumbel, truncate
from cllm_jax.errors import ConfigError

ROWS, POSITIONS, VOCAB = 40, 500, 8
LOGITS_V = np.array([1.2, -0.5, 0.3, 2.0, -1.5, 0.0, 0.9, -0.9], np.float32)
choose_jit = jax.jit(choose)
gumbel_jit = jax.jit(gumbel, static_argnums=2)


def kept_probabilities(logits_V, sampling: Sampling) -> np.ndarray:
    """The law by its definition: sort, cut, renormalise; no ties expected."""
    p = np.exp(logits_V.astype(np.float64) / sampling.temperature)
    order = np.argsort(-p)
    if sampling.top_k:
        p[order[sampling.top_k :]] = 0
    p /= p.sum()
    total = 0.0
    for i in order:
        if total >= sampling.top_p:
            p[i] = 0
        total += p[i]
    return p / p.sum()


@pytest.mark.parametrize(
    'sampling',
    [Sampling(1.0), Sampling(0.7), Sampling(1.5, 5), Sampling(1.0, 0, 0.8), Sampling(0.9, 6, 0.7)],
    ids=str,
)
def test_choices_follow_the_truncated_softmax(sampling):
    """Chi-square over 20 000 positions; keys and positions are both varied."""
    logits = np.broadcast_to(LOGITS_V, (ROWS, POSITIONS, VOCAB))
    positions = np.broadcast_to(np.arange(POSITIONS, dtype=np.int32), (ROWS, POSITIONS))
    tokens = np.asarray(choose_jit(logits, row_keys(0, range(ROWS)), positions, sampling))
    expected = kept_probabilities(LOGITS_V, sampling) * tokens.size
    seen, kept = np.bincount(tokens.ravel(), minlength=VOCAB), expected > 0
    assert expected[kept].min() >= 5 and kept.sum() > 1
    assert seen[~kept].sum() == 0
    assert chisquare(seen[kept], expected[kept]).pvalue > 1e-3
    pairs, equal = tokens.size / 2, (tokens[:, 1::2] == tokens[:, ::2]).sum()
    law = (expected**2).sum() / tokens.size**2 * pairs
    neighbours = chisquare([equal, pairs - equal], [law, pairs - law])
    assert neighbours.pvalue > 1e-3, 'the noise of neighbouring positions must be independent'


def test_noise_depends_on_key_and_position_alone():
    keys = row_keys(0, range(4))
    positions = jnp.asarray([[3, 4, 5], [9, 3, 1], [3, 4, 5], [0, 0, 7]], jnp.int32)
    noise = np.asarray(gumbel_jit(keys, positions, VOCAB))
    turned = gumbel_jit(keys[::-1], positions[::-1, ::-1], VOCAB)
    assert (turned == noise[::-1, ::-1]).all()
    assert (noise[3, 0] == noise[3, 1]).all()
    distinct = {n.tobytes() for n in (*noise[0], *noise[1], *noise[2], noise[3, 0], noise[3, 2])}
    assert len(distinct) == 11
    logits = np.random.default_rng(0).normal(size=(4, 3, VOCAB)).astype(np.float32)
    for t in (0.5, 2.0):  # powers of two scale without rounding
        assert (
            choose(logits * t, keys, positions, Sampling(t)) == (logits + noise).argmax(-1)
        ).all()


def test_greedy_needs_no_key_and_tiny_temperatures_agree():
    logits = np.random.default_rng(1).normal(size=(4, 3, VOCAB)).astype(np.float32) * 1000
    keys, positions = row_keys(0, range(4)), jnp.zeros((4, 3), jnp.int32)
    best = logits.argmax(-1)
    assert (choose(logits, None, None, Sampling()) == best).all()
    for sampling in (Sampling(1e-6), Sampling(1e-6, 3, 0.5), Sampling(1.0, top_k=1)):
        tokens = choose(logits, keys, positions, sampling)
        assert tokens.dtype == jnp.int32 and (tokens == best).all()


def kept(logits, **rule) -> list[int]:
    out = truncate(jnp.asarray(logits, jnp.float32)[None, None], Sampling(1.0, **rule))[0, 0]
    finite = np.isfinite(out)
    assert (np.asarray(out)[finite] == np.asarray(logits, np.float32)[finite]).all()
    return np.flatnonzero(finite).tolist()


def test_top_k_keeps_ties_at_the_border():
    assert kept([3, 1, 2, 2, 0], top_k=2) == [0, 2, 3]
    assert kept([3, 1, 2, 2, 0], top_k=1) == [0]
    assert kept([3, 1, 2, 2, 0], top_k=5) == kept([3, 1, 2, 2, 0], top_k=99) == [0, 1, 2, 3, 4]


def test_top_p_keeps_the_token_that_crosses_the_border():
    logits = np.log([0.5, 0.25, 0.125, 0.125])
    for p, count in ((0.01, 1), (0.5, 1), (0.51, 2), (0.74, 2), (0.76, 4), (1.0, 4)):
        assert kept(logits, top_p=p) == list(range(count))
    assert kept(np.log([0.125, 0.5, 0.125, 0.25]), top_p=0.6) == [1, 3]
    assert kept(logits, top_p=1e-40) == [0], 'which is 0 in float32'
    assert kept(np.log([0.5, 0.25, 0.125, 0.125]), top_k=2, top_p=0.66) == [0]


@pytest.mark.parametrize('vocab', [1, 2, 7, 300])
def test_what_is_kept_is_what_sorting_keeps(vocab):
    """Random logits with ties, zeros of both signs and infinities, as traced numbers."""
    rng, run = np.random.default_rng(vocab), jax.jit(truncate)
    for top_k, top_p in itertools.product((0, 1, 2, 5, vocab, 10**12), (1.0, 0.9, 0.3, 1e-9)):
        logits = np.round(rng.normal(0, 2, (3, 4, vocab)), 1).astype(np.float32)
        logits[rng.random(logits.shape) < 0.1] = -0.0
        logits[rng.random(logits.shape) < 0.1] = -np.inf
        logits[:, :, 0] = 0.5
        sampling = Sampling(1.0, top_k, top_p)
        out = np.array(run(logits, sampling) if sampling.truncates else logits)
        for row, result in zip(logits.reshape(-1, vocab), out.reshape(-1, vocab), strict=True):
            expected = row.copy()
            if 0 < top_k < vocab:
                expected[row < np.sort(row)[-top_k]] = -np.inf
            if top_p < 1:
                p = np.exp(expected, dtype=np.float64)
                p /= p.sum()
                mass = np.array([p[expected > x].sum() for x in expected])  # before each
                close = (mass > 0) & (np.abs(mass - top_p) < 1e-5)
                expected[mass >= top_p] = -np.inf
                expected[close], result[close] = 0, 0
            assert (result == expected).all()


def test_sampling_is_a_pytree_of_its_numbers():
    for sampling in (Sampling(), Sampling(np.float64(0.7)), Sampling(0.7, np.int64(3), 0.9)):
        leaves, form = jax.tree.flatten(sampling)
        again = jax.tree.unflatten(form, leaves)
        assert again == sampling and hash(again) == hash(sampling)
        assert (again.greedy, again.truncates) == (sampling.greedy, sampling.truncates)
        assert all(type(leaf) in (int, float) for leaf in leaves), 'which are weakly typed'
    forms = {jax.tree.structure(Sampling(t, k)) for t in (0, 0.5, 2.0) for k in (0, 1, 9)}
    assert len(forms) == 3


@pytest.mark.parametrize(
    ('field', 'value'),
    [
        *itertools.product(['temperature'], [-1.0, float('nan'), float('inf'), 1e-7]),
        ('top_k', -1),
        *itertools.product(['top_p'], [0.0, 1.1, float('nan')]),
        ('top_k', 2.5),
    ],
)
def test_rules_out_of_range_are_refused(field, value):
    with pytest.raises(ConfigError, match=f'{field} {value}: '):
        Sampling(**{field: value})
