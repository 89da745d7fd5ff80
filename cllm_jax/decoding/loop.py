"""THE loop: draft -> verify -> accept, for every drafter and every purpose.

Invariants:
  I1  the cache holds exactly `length` tokens of a row; one more, the pending token, is committed.
  I2  node 0 of every draft is the pending token; a node stands at position `length + depth` and
      sees the cache and what it follows (`tree.py`).
  I3  a choice depends on (params, committed prefix, row key, position) alone (`sampling.py`).
  I4  the committed tokens are the target's choices: 1..N per forward. (`Sampling.typical`, which
      only Medusa takes, is the one exception, and lossy.)
  I5  rejected keys need no rollback: `length` is the only commit pointer, and the slots beyond it
      are overwritten before they are seen. Of a tree the accepted path is moved together first.
  I6  a row stops at its first stop token or exactly at its limit, and is frozen from then on.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from cllm_jax.decoding.drafter import Draft, Sequences, Verdict, put
from cllm_jax.decoding.sampling import Sampling, choose, likely_enough
from cllm_jax.decoding.tree import Layout, accept, before, layout, mask
from cllm_jax.model.cache import Cache, compact, init_cache
from cllm_jax.model.llama import Llama, taken
from cllm_jax.runtime.backend import EIGEN


@struct.dataclass
class Trace:
    """What each of a row's forwards verified: the draft, and the position of its first node."""

    tokens_BIN: jax.Array
    position_BI: jax.Array


@struct.dataclass
class DecodeState:
    """Everything the loop carries. A row's forward 0 is its prefill; I is the longest answer."""

    cache: Cache
    sequences: Sequences
    drafter: Any
    limit_B: jax.Array
    """Sequence length, prompt included, at which a row is full."""
    finished_B: jax.Array
    forwards_B: jax.Array
    """Calls of the model while the row was unfinished, prefill included."""
    emitted_BI: jax.Array
    """Tokens committed by each of the row's forwards; 0 behind the last."""
    iteration: jax.Array
    trace: Trace | None


def _is_stop(tokens_BN: jax.Array, stop_ids_E: jax.Array) -> jax.Array:
    return (tokens_BN[:, :, None] == stop_ids_E[None, None]).any(-1)


_compiled_prefill = partial(
    jax.jit,
    static_argnames=(
        'model',
        'drafter',
        'sampling',
        'slots',
        'room',
        'steps',
        'trace',
        'to_the_end',
    ),
)
_compiled_advance = partial(
    jax.jit, static_argnames=('model', 'drafter', 'sampling'), donate_argnames='state'
)


@_compiled_prefill
def prefill(
    model: Llama,
    params: Any,
    drafter: Any,
    weights: Any,
    sampling: Sampling,
    prompt_BP: jax.Array,
    prompt_len_B: jax.Array,
    max_tokens_B: jax.Array,
    stop_ids_E: jax.Array,
    keys_B: jax.Array,
    *,
    slots: int,
    steps: int,
    trace: bool,
    room: int = 0,
    to_the_end: bool = False,
) -> DecodeState:
    """Run the prompts once, verify a first draft behind them, and set up the loop's state.

    The last token of a prompt is the first pending one, so this is an iteration of the loop like
    any other, but for the rest of the prompt that it puts into the cache.

    Args:
      model, params, drafter, weights, sampling: what decodes, and how tokens are chosen.
      prompt_BP: int32 prompts, padded on the right with anything.
      prompt_len_B: int32, at least 1; a row with `max_tokens` 0 is padding and never runs.
      max_tokens_B: int32 answer lengths; at most `steps`.
      stop_ids_E: int32 token ids that end a row.
      keys_B: a PRNG key per row.
      slots: length of the buffers; at least P, and prompt_len + max_tokens + N of every row.
      steps: upper bound on answer tokens, hence on forwards.
      trace: keep every draft (`DecodeState.trace`).
      room: slots of the cache, at least P + N and by default all; with fewer the loop ends when a
        draft does not fit (`fits`), and goes on when the cache was made longer (`grow`).
      to_the_end: also iterate until every row is finished, see `_finish`. One call where `advance`
        would be a second one, which takes about as long as half a forward of a small model.
    """
    (batch, width), nodes = prompt_BP.shape, drafter.nodes
    live_B = max_tokens_B > 0
    tokens_BS = jnp.zeros((batch, slots), jnp.int32)
    tokens_BS = jax.lax.dynamic_update_slice(tokens_BS, prompt_BP, (0, 0))
    sequences = Sequences(tokens_BS, prompt_len_B - 1, prompt_len_B, keys_B, width)
    draft, drafter_state = drafter.draft(weights, drafter.init(weights, sequences), sequences)
    state = DecodeState(
        cache=init_cache(
            model.config, batch, room or slots, model.compute or model.dtype, nodes == 1
        ),
        sequences=sequences,
        drafter=drafter_state,
        limit_B=prompt_len_B + max_tokens_B,
        finished_B=~live_B,
        forwards_B=jnp.zeros_like(prompt_len_B),
        emitted_BI=jnp.zeros((batch, steps), jnp.int32),
        iteration=jnp.int32(0),
        trace=Trace(
            jnp.zeros((batch, steps, nodes), jnp.int32), jnp.zeros((batch, steps), jnp.int32)
        )
        if trace
        else None,
    )
    tokens_BT = jnp.pad(prompt_BP, ((0, 0), (0, nodes - 1)))
    everywhere, length_B = jnp.ones_like(draft.valid_BN), sequences.length_B
    tokens_BT = put(tokens_BT, length_B, draft.tokens_BN, everywhere)
    steps_T = jnp.arange(width + nodes - 1, dtype=jnp.int32)
    positions_BT = jnp.broadcast_to(steps_T[None], tokens_BT.shape)
    mask_BTS = steps_T[None, None] <= positions_BT[:, :, None]
    where = layout(draft)
    if where.sees_BNN is not None:
        positions_BT = put(positions_BT, length_B, length_B[:, None] + where.depth_BN, everywhere)
        rows_BN = length_B[:, None] + jnp.arange(nodes, dtype=jnp.int32)[None]
        each_B1 = jnp.arange(batch, dtype=jnp.int32)[:, None]
        mask_BTS = mask_BTS.at[each_B1, rows_BN].set(mask(where, length_B, len(steps_T)))
    at_BN = length_B[:, None] + jnp.arange(nodes, dtype=jnp.int32)[None]
    reads_prompt = getattr(drafter, 'reads_prompt', False)
    hidden_BTD, cache = model.apply(
        {'params': params},
        tokens_BT,
        positions_BT,
        mask_BTS,
        state.cache,
        jnp.zeros_like(live_B, jnp.int32),
        None if reads_prompt else at_BN,
    )
    prompt_BTD = hidden_BTD if reads_prompt else None
    hidden_BND = taken(hidden_BTD, at_BN) if reads_prompt else hidden_BTD
    logits_BNV = model.apply({'params': params}, hidden_BND, method='logits')
    state = state.replace(cache=cache)
    said = (hidden_BND, logits_BNV)
    state = _commit(drafter, weights, sampling, stop_ids_E, state, draft, where, *said, prompt_BTD)
    if not to_the_end:
        return state
    fixed = (model, params, drafter, weights, sampling, stop_ids_E, jnp.int32(steps))
    return _finish(partial(advance, *fixed), state)


def _commit(
    drafter: Any,
    weights: Any,
    sampling: Sampling,
    stop_ids_E: jax.Array,
    state: DecodeState,
    draft: Draft,
    where: Layout,
    hidden_BND: jax.Array,
    logits_BNV: jax.Array,
    prompt_BTD: jax.Array | None = None,
) -> DecodeState:
    """Accept what the model chose after the nodes of `draft`, which are in the cache by now."""
    seq = state.sequences
    y_BN = choose(logits_BNV, seq.keys_B, seq.length_B[:, None] + 1 + where.depth_BN, sampling)
    liked_BN = None
    if sampling.typical:
        liked_BN = likely_enough(before(draft, logits_BNV), draft.tokens_BN, sampling)
    accepted_B, chosen_BP, path_BP = accept(draft, where, y_BN, liked_BN)
    length = chosen_BP.shape[1]
    steps_P = jnp.arange(length, dtype=jnp.int32)[None]

    stop_BP = _is_stop(chosen_BP, stop_ids_E)
    until_stop_B = jnp.where(stop_BP.any(1), jnp.argmax(stop_BP, axis=1) + 1, length + 1)
    room_B = state.limit_B - (seq.length_B + 1)
    count_B = jnp.minimum(accepted_B + 1, jnp.minimum(until_stop_B, room_B))
    finished_B = state.finished_B | (count_B == until_stop_B) | (count_B == room_B)
    count_B = jnp.where(state.finished_B, 0, count_B)

    now_B, live_B1 = state.forwards_B, ~state.finished_B[:, None]
    trace = state.trace
    if trace is not None:
        flat_BX = trace.tokens_BIN.reshape(len(now_B), -1)
        nodes = draft.tokens_BN.shape[1]
        live_BN = jnp.broadcast_to(live_B1, draft.tokens_BN.shape)
        flat_BX = put(flat_BX, now_B * nodes, draft.tokens_BN, live_BN)
        trace = Trace(
            flat_BX.reshape(trace.tokens_BIN.shape),
            put(trace.position_BI, now_B, seq.length_B[:, None], live_B1),
        )
    cache = state.cache if path_BP is None else compact(state.cache, seq.length_B, path_BP)
    path_BP = jnp.broadcast_to(steps_P, chosen_BP.shape) if path_BP is None else path_BP
    verdict = Verdict(y_BN, logits_BNV, hidden_BND, path_BP, count_B, prompt_BTD)
    return DecodeState(
        cache=cache,
        sequences=seq.replace(
            tokens_BS=put(seq.tokens_BS, seq.length_B + 1, chosen_BP, steps_P < count_B[:, None]),
            length_B=seq.length_B + count_B,
        ),
        drafter=drafter.update(weights, state.drafter, draft, verdict, seq),
        limit_B=state.limit_B,
        finished_B=finished_B,
        forwards_B=state.forwards_B + (count_B > 0).astype(jnp.int32),
        emitted_BI=put(state.emitted_BI, now_B, count_B[:, None], live_B1),
        iteration=state.iteration + 1,
        trace=trace,
    )


@_compiled_advance
def advance(
    model: Llama,
    params: Any,
    drafter: Any,
    weights: Any,
    sampling: Sampling,
    stop_ids_E: jax.Array,
    until: jax.Array,
    idle: jax.Array,
    state: DecodeState,
) -> DecodeState:
    """Iterate until `idle` rows are finished, `state.iteration` is `until`, or the cache is full.

    `idle` and `until` are traced numbers: streaming calls this with small steps, and a batch that
    is to be refilled stops early, with one compilation. Nothing is read back to the host inside.
    `state` is donated.
    """

    def unfinished(state: DecodeState) -> jax.Array:
        going_on = (state.finished_B.sum() < idle) & (state.iteration < until)
        return going_on & fits(state, drafter.nodes)

    def iterate(state: DecodeState) -> DecodeState:
        seq = state.sequences
        draft, drafter_state = drafter.draft(weights, state.drafter, seq)
        where = layout(draft)
        positions_BN = seq.length_B[:, None] + where.depth_BN
        mask_BNS = mask(where, seq.length_B, state.cache.slots)
        hidden_BND, cache = model.apply(
            {'params': params}, draft.tokens_BN, positions_BN, mask_BNS, state.cache, seq.length_B
        )
        logits_BNV = model.apply({'params': params}, hidden_BND, method='logits')
        state = state.replace(cache=cache, drafter=drafter_state)
        return _commit(
            drafter, weights, sampling, stop_ids_E, state, draft, where, hidden_BND, logits_BNV
        )

    return jax.lax.while_loop(unfinished, iterate, state)


# Compiler options belong to the outermost jit, and who multiplies depends on the weights.
prefill_by_eigen = _compiled_prefill(prefill.__wrapped__, compiler_options=EIGEN)
advance_by_eigen = _compiled_advance(advance.__wrapped__, compiler_options=EIGEN)


NARROWEST = 8
"""Fewest rows for which the loop is compiled again, to go on with half of a batch."""


def _finish(
    go_on: Callable[[jax.Array, DecodeState], DecodeState], state: DecodeState
) -> DecodeState:
    """Iterate until every row is finished, or stop where `go_on`, which is `advance`, stops.

    A batch lasts as long as its longest answer, and on CPUs its finished rows take as much time as
    the others. So there the half that finishes last goes on as a batch of its own. On accelerators
    a forward hardly gets faster with fewer rows.
    """
    batch = len(state.finished_B)
    half = batch // 2
    if half < NARROWEST or jax.default_backend() != 'cpu':
        return go_on(jnp.int32(batch), state)
    state = go_on(jnp.int32(batch - half), state)
    rows_R = jnp.argsort(state.finished_B, stable=True)[:half]
    rest = _finish(go_on, _rows_of(state, rows_R))
    return replace_rows(state, rows_R, rest).replace(iteration=rest.iteration)


def fits(state: DecodeState, nodes: int) -> jax.Array:
    """Whether the cache has room for the next draft of every unfinished row."""
    end_B = jnp.where(state.finished_B, 0, state.sequences.length_B + nodes)
    return end_B.max() <= state.cache.slots


@partial(jax.jit, static_argnames='slots')
def grow(state: DecodeState, slots: int) -> DecodeState:
    """The same state with a cache of `slots` slots."""
    more = slots - state.cache.slots
    return state.replace(
        cache=jax.tree.map(lambda x_RSH: jnp.pad(x_RSH, ((0, 0), (0, more), (0, 0))), state.cache)
    )


def _rows_of(state: DecodeState, rows_R: jax.Array) -> DecodeState:
    """A batch of these rows alone."""

    def take(x):
        if isinstance(x, Cache):
            return jax.tree.map(take_heads, x)
        return x[rows_R] if x.ndim else x

    def take_heads(x_RSH):
        x_KBSH = x_RSH.reshape(-1, len(state.finished_B), *x_RSH.shape[1:])
        return x_KBSH[:, rows_R].reshape(-1, *x_RSH.shape[1:])

    return jax.tree.map(take, state, is_leaf=lambda x: isinstance(x, Cache))


@partial(jax.jit, donate_argnames='state')
def replace_rows(state: DecodeState, rows_R: jax.Array, fresh: DecodeState) -> DecodeState:
    """Put the rows of `fresh`, a prefill of R prompts, in the place of `rows` of a batch.

    Rows outside of the batch are left out: padding. The cache of `fresh` may be the shorter one.
    `state` is donated.
    """

    def place(old, new):
        if isinstance(old, Cache):
            return jax.tree.map(place_heads, old, new)
        return old.at[rows_R].set(new, mode='drop') if old.ndim else old

    def place_heads(old_RSH, new_RSH):  # one row per head and prompt, heads first
        old_KBSH = old_RSH.reshape(-1, len(state.finished_B), *old_RSH.shape[1:])
        new_KBSH = new_RSH.reshape(-1, size, *new_RSH.shape[1:])
        kept_KBSH = old_KBSH.at[:, rows_R, : new_RSH.shape[1]].set(new_KBSH, mode='drop')
        return kept_KBSH.reshape(old_RSH.shape)

    size = len(rows_R)
    return jax.tree.map(place, state, fresh, is_leaf=lambda x: isinstance(x, Cache))
