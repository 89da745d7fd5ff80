"""Rows of a batch that are taken, replaced or given more room, alone and while they decode."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cllm_jax.decoding import loop
from cllm_jax.decoding.drafter import Sequences
from cllm_jax.decoding.engine import run_until, start
from cllm_jax.decoding.request import Request, row_keys
from cllm_jax.decoding.sampling import Sampling
from cllm_jax.decoding.state import DecodeState, Trace, grow, part_of, replace_rows
from cllm_jax.drafters.autoregressive import AutoRegressive
from cllm_jax.drafters.draft_model import DraftModel
from cllm_jax.drafters.jacobi import Jacobi
from cllm_jax.drafters.lookahead import Lookahead
from cllm_jax.model.cache import Cache
from tests.tiny import ragged_prompts, random_model, tiny_config

MODEL = random_model(config=tiny_config(layers=1, eos_ids=(3, 7, 12, 20)))
PROMPTS = ragged_prompts(3, (1, 9, 3, 14, 2, 5, 16, 8) * 4)
LONGEST = 40
HEADS, SLOTS, NODES = 2, 5, 3


def state_of(rows: int, seed: int = 0, slots: int = SLOTS) -> DecodeState:
    """A state with another number in every place, and a cache in what the drafter carries."""
    rng = np.random.default_rng(seed)

    def some(*shape):
        return jnp.asarray(rng.integers(1, 1 << 20, shape), jnp.int32)

    def cache():
        x_RSH = some(HEADS * rows, slots, 2).astype(jnp.float32)
        return Cache((x_RSH,), (x_RSH + 1,))

    length_B = jnp.asarray(rng.integers(0, slots - NODES, rows), jnp.int32)
    sequences = Sequences(
        some(rows, 2 * SLOTS), length_B, some(rows), row_keys(seed, range(rows)), 4
    )
    return DecodeState(
        cache=cache(),
        sequences=sequences,
        drafter=(cache(), some(rows, 4, 2)),
        limit_B=some(rows),
        finished_B=jnp.asarray(rng.random(rows) < 0.5),
        forwards_B=some(rows),
        emitted_BI=some(rows, 6),
        iteration=jnp.int32(seed),
        trace=Trace(
            some(rows, 6, NODES), some(rows, 6), some(rows, 6, NODES) % 2 > 0, some(rows, 6, NODES)
        ),
    )


def rows_of(state: DecodeState) -> list[list[np.ndarray]]:
    """Every array by rows; of a cache the rows are those of all heads."""

    def by_row(x):
        if isinstance(x, Cache):
            heads = (x_RSH.reshape(HEADS, state.rows, -1) for x_RSH in jax.tree.leaves(x))
            return [x_KBX.swapaxes(0, 1) for x_KBX in heads]
        return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x

    rowwise = state.replace(iteration=None)
    leaves = jax.tree.leaves(jax.tree.map(by_row, rowwise, is_leaf=lambda x: isinstance(x, Cache)))
    return [[np.array(leaf[row]) for leaf in leaves] for row in range(state.rows)]


def test_a_part_has_the_rows_that_are_named_in_that_order():
    state, chosen = state_of(5), [3, 0, 4]
    part = part_of(state, jnp.asarray(chosen))
    assert part.rows == 3 and part.iteration == state.iteration
    whole = rows_of(state)
    jax.tree.map(np.testing.assert_array_equal, rows_of(part), [whole[row] for row in chosen])


def test_rows_are_replaced_and_the_others_stay():
    """Bit for bit; what is named beyond the batch is padding."""
    state, fresh = state_of(5), state_of(3, seed=1)
    old, new = rows_of(state), rows_of(fresh)
    replaced = replace_rows(state, jnp.asarray([4, 5, 1]), fresh)
    assert replaced.iteration == 0, "the batch's own"
    expected = [old[0], new[2], old[2], old[3], new[0]]
    jax.tree.map(np.testing.assert_array_equal, rows_of(replaced), expected)


def test_rows_with_a_shorter_cache_fill_its_first_slots():
    state, fresh = state_of(2, slots=8), state_of(1, seed=1)
    old, new = (np.array(s.cache.k_RSH[0]) for s in (state, fresh))
    fresh = fresh.replace(drafter=part_of(state, jnp.asarray([0])).drafter)
    replaced = np.asarray(replace_rows(state, jnp.asarray([1]), fresh).cache.k_RSH[0])
    places = np.arange(2 * HEADS) % 2 == 1
    np.testing.assert_array_equal(replaced[places, :SLOTS], new)
    np.testing.assert_array_equal(replaced[places, SLOTS:], old[places, SLOTS:])
    np.testing.assert_array_equal(replaced[~places], old[~places])


def test_a_grown_cache_keeps_its_slots_and_the_state_says_what_fits():
    state = state_of(4)
    grown = grow(state, 9)
    for old, new in zip(jax.tree.leaves(state.cache), jax.tree.leaves(grown.cache), strict=True):
        np.testing.assert_array_equal(new[:, :SLOTS], old)
        assert new.shape[1] == 9 and not new[:, SLOTS:].any()
    assert grown.cache.slots == 9 and grown.longest == state.longest == 2 * SLOTS
    length_B = jnp.asarray([SLOTS - NODES, 0, SLOTS, 1], jnp.int32)
    sequences = state.sequences.replace(length_B=length_B)
    for finished, fits in ((2, True), (0, False)):
        finished_B = jnp.arange(4) == finished
        rest = state.replace(sequences=sequences, finished_B=finished_B)
        assert bool(rest.fits(NODES)) == fits, 'what is finished needs no room'


@pytest.fixture
def widths(monkeypatch):
    """Rows of every batch that goes on, as the loop is compiled."""
    found = []

    def spied(state, rows_R):
        found.append(len(rows_R))
        return part_of(state, rows_R)

    monkeypatch.setattr(loop, 'part_of', spied)
    return found


def kept(state: DecodeState) -> list[np.ndarray]:
    """What is known of each row, with keys and values up to its length."""
    seq = state.sequences
    used_BS = np.arange(state.cache.slots) < np.asarray(seq.length_B)[:, None]
    cache = [
        np.asarray(x).reshape(-1, state.rows, *x.shape[1:]) * used_BS[None, :, :, None]
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
        (DraftModel(MODEL.module, MODEL.params, 3), Sampling(1.0), 16, [8]),
    ],
    ids=('chain', 'one node, sampled', 'tree, sampled', 'draft model, sampled'),
)
def test_half_of_a_batch_goes_on_as_it_would_in_the_whole(widths, drafter, sampling, rows, halves):
    request = Request(drafter, LONGEST, sampling, trace=True)
    prompts, keys = PROMPTS[:rows], row_keys(3, range(rows))
    narrowed = start(MODEL, request, prompts, keys, to_the_end=True)
    assert widths == halves
    whole = run_until(MODEL, request, start(MODEL, request, prompts, keys), LONGEST)
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
    full = start(MODEL, request, PROMPTS[:16], keys, to_the_end=True)
    assert widths == [8] and (~full.finished_B).sum() > 8
    done = run_until(MODEL, request, grow(full, 64), LONGEST)
    whole = run_until(MODEL, request, start(MODEL, request, PROMPTS[:16], keys), LONGEST)
    for here, there in zip(kept(done), kept(whole), strict=True):
        np.testing.assert_allclose(here, there, atol=2e-5)
