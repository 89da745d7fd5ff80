"""THE loop: draft -> verify -> accept, for every drafter and every purpose.

Invariants:
  I1  the cache holds exactly `length` tokens of a row; one more, the pending token, is committed.
  I2  node 0 of every draft is the pending token; a node stands at position `length + depth` and
      sees the cache and what it follows (`tree.py`).
  I3  a choice depends on (params, committed prefix, row key, position) alone (`sampling.py`).
  I4  the committed tokens are the target's choices: 1..N per forward. (`Sampling.typical`, which
      only Medusa takes, is the one exception, and lossy.)
  I5  rejected keys need no rollback: `length` is the only commit pointer, and the slots after it
      are overwritten before they are seen. Of a tree the accepted path is moved together first.
  I6  a row stops at its first stop token or exactly at its limit, and is frozen from then on.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from cllm_jax.decoding import tree
from cllm_jax.decoding.drafter import Draft, Drafter, Sequences, Verdict, put
from cllm_jax.decoding.sampling import Sampling, choose, likely_enough
from cllm_jax.decoding.state import DecodeState, Trace, part_of, replace_rows
from cllm_jax.model.cache import compact
from cllm_jax.model.llama import Llama, take_rows
from cllm_jax.runtime.backend import Backend
from cllm_jax.runtime.programs import bounded


@struct.dataclass
class Decoder:
    """What decodes: a model, a drafter for it, how tokens are chosen, and what ends an answer."""

    model: Llama = struct.field(pytree_node=False)
    params: Any
    drafter: Drafter
    stop_ids_E: jax.Array
    """int32 token ids that end a row; -1, which is not a token, if there are none."""
    sampling: Sampling = Sampling()
    most: int | jax.Array = np.int32(np.iinfo(np.int32).max)
    """Most tokens that a forward commits. Traced: AR by a drafter's own program has 1."""
    first: int | jax.Array = np.int32(np.iinfo(np.int32).max)
    """And the prefill. With 1 what a draft commits was all computed by the loop, as AR's is."""


@struct.dataclass
class Prompts:
    """A batch of prompts, padded on the right with anything, and a PRNG key for each."""

    tokens_BP: jax.Array
    length_B: jax.Array
    """int32, at least 1."""
    max_tokens_B: jax.Array
    """int32 answer lengths; a row with 0 is padding and never runs."""
    keys_B: jax.Array


@dataclasses.dataclass(frozen=True)
class Buffers:
    """Static sizes of what the loop carries."""

    slots: int
    """Length of the token buffers: at least P, and prompt + max_tokens + N of every row."""
    steps: int
    """Upper bound on answer tokens, hence on forwards."""
    room: int = 0
    """Slots of the cache, at least P + N; 0 for all. With fewer the loop ends when a draft does not
    fit (`DecodeState.fits`), until the cache was made longer (`state.grow`)."""
    trace: bool = False
    """Keep every draft (`DecodeState.trace`)."""


class Programs(NamedTuple):
    """The compiled `prefill` and `advance` of one set of compiler options."""

    prefill: Callable[..., DecodeState]
    advance: Callable[..., DecodeState]


def programs(backend: Backend) -> Programs:
    """`prefill` and `advance` as they are compiled for a backend."""
    return Programs(*map(bounded, _programs(backend.compiler_options + backend.exact_options)))


@functools.cache
def _programs(compiler_options: tuple[tuple[str, Any], ...]) -> Programs:
    # Compiler options belong to the outermost jit.
    compiled = functools.partial(jax.jit, compiler_options=dict(compiler_options))
    run = compiled(prefill, static_argnames=('buffers', 'to_the_end'))
    return Programs(run, compiled(advance, donate_argnames='state'))


def prefill(
    decoder: Decoder, prompts: Prompts, buffers: Buffers, to_the_end: bool = False
) -> DecodeState:
    """Run the prompts once, verify a first draft after them, and set up the loop's state.

    The last token of a prompt is the first pending one, so this is an iteration of the loop like
    any other, except that it also puts the rest of the prompt into the cache. `to_the_end` iterates
    too (`_finish`): a second call takes as long as half a forward of a small model.
    """
    (batch, width), drafter = prompts.tokens_BP.shape, decoder.drafter
    nodes, length_B = drafter.nodes, prompts.length_B - 1
    tokens_BS = jnp.zeros((batch, buffers.slots), jnp.int32)
    tokens_BS = jax.lax.dynamic_update_slice(tokens_BS, prompts.tokens_BP, (0, 0))
    sequences = Sequences(tokens_BS, length_B, prompts.length_B, prompts.keys_B, width)
    draft, drafter_state = drafter.draft(drafter.init(sequences), sequences, decoder.sampling)
    state = DecodeState(
        cache=decoder.model.new_cache(batch, buffers.room or buffers.slots, one_query=nodes == 1),
        sequences=sequences,
        drafter=drafter_state,
        limit_B=prompts.length_B + prompts.max_tokens_B,
        finished_B=prompts.max_tokens_B <= 0,
        forwards_B=jnp.zeros_like(length_B),
        emitted_BI=jnp.zeros((batch, buffers.steps), jnp.int32),
        iteration=jnp.int32(0),
        trace=_room_to_trace(draft, buffers.steps) if buffers.trace else None,
    )
    where, everywhere = tree.layout(draft), jnp.ones_like(draft.valid_BN)
    tokens_BT = jnp.pad(prompts.tokens_BP, ((0, 0), (0, nodes - 1)))
    tokens_BT = put(tokens_BT, length_B, draft.tokens_BN, everywhere)
    steps_T = jnp.arange(width + nodes - 1, dtype=jnp.int32)
    positions_BT = jnp.broadcast_to(steps_T[None], tokens_BT.shape)
    # What a prompt leaves in the cache must not depend on how wide it is padded.
    seen = state.cache.slots if decoder.model.backend.exact else len(steps_T)
    mask_BTS = tree.causal_mask(positions_BT, seen)
    at_BN = length_B[:, None] + jnp.arange(nodes, dtype=jnp.int32)[None]
    if where.sees_BNN is not None:
        positions_BT = put(positions_BT, length_B, length_B[:, None] + where.depth_BN, everywhere)
        each_B1 = jnp.arange(batch, dtype=jnp.int32)[:, None]
        mask_BTS = mask_BTS.at[each_B1, at_BN].set(tree.mask(where, length_B, seen))
    rows = (tokens_BT, positions_BT, mask_BTS, state.cache, jnp.zeros_like(length_B))
    first = decoder.replace(most=jnp.minimum(decoder.most, decoder.first))
    state = _verify(first, state, draft, where, rows, at_BN)
    if not to_the_end:
        return state
    return _finish(functools.partial(advance, decoder, jnp.int32(buffers.steps)), decoder, state)


def advance(decoder: Decoder, until: jax.Array, idle: jax.Array, state: DecodeState) -> DecodeState:
    """Iterate until `idle` rows are finished, `state.iteration` is `until`, or the cache is full.

    Both are traced: streaming in small steps and a batch that stops early to be refilled share a
    compilation. Nothing is read back to the host inside. `state` is donated.
    """
    drafter = decoder.drafter

    def unfinished(state: DecodeState) -> jax.Array:
        going_on = (state.finished_B.sum(dtype=jnp.int32) < idle) & (state.iteration < until)
        return going_on & state.fits(drafter.nodes)

    def iterate(state: DecodeState) -> DecodeState:
        seq = state.sequences
        draft, drafter_state = drafter.draft(state.drafter, seq, decoder.sampling)
        where = tree.layout(draft)
        positions_BN = seq.length_B[:, None] + where.depth_BN
        mask_BNS = tree.mask(where, seq.length_B, state.cache.slots)
        rows = (draft.tokens_BN, positions_BN, mask_BNS, state.cache, seq.length_B)
        return _verify(decoder, state.replace(drafter=drafter_state), draft, where, rows)

    return jax.lax.while_loop(unfinished, iterate, state)


def _verify(
    decoder: Decoder,
    state: DecodeState,
    draft: Draft,
    where: tree.Layout,
    rows: tuple,
    at_BN: jax.Array | None = None,
) -> DecodeState:
    """One forward of the model, and the state after what it accepts of the draft.

    Args:
      rows: what the model reads: tokens, positions, mask, cache, and where in it they go.
      at_BN: which of the rows are the nodes of the draft; None if all are.
    """
    model, params = decoder.model, {'params': decoder.params}
    whole = decoder.drafter.reads_prompt and at_BN is not None
    hidden_BTD, cache = model.apply(params, *rows, None if whole else at_BN)
    hidden_BND = take_rows(hidden_BTD, at_BN) if whole else hidden_BTD
    logits_BNV = model.apply(params, hidden_BND, method='logits')
    forward = logits_BNV, hidden_BND, hidden_BTD if whole else None
    return _commit(decoder, state.replace(cache=cache), draft, where, forward)


def _commit(
    decoder: Decoder, state: DecodeState, draft: Draft, where: tree.Layout, forward: tuple
) -> DecodeState:
    """Accept what the model chose after the nodes of `draft`, which are in the cache by now.

    `forward` is what it gave: `logits`, `hidden` and `prompt` of a `Verdict`.
    """
    logits_BNV, hidden_BND, prompt_BTD = forward
    seq, sampling, liked_BN = state.sequences, decoder.sampling, None
    y_BN = choose(logits_BNV, seq.keys_B, seq.length_B[:, None] + 1 + where.depth_BN, sampling)
    if sampling.lossy:
        liked_BN = likely_enough(tree.at_parent(draft, logits_BNV), draft.tokens_BN, sampling)
    accepted_B, chosen_BP, path_BP = tree.accept(draft, where, y_BN, liked_BN)
    accepted_B = jnp.minimum(accepted_B, decoder.most - 1)
    length = chosen_BP.shape[1]
    stop_BP = (chosen_BP[:, :, None] == decoder.stop_ids_E[None, None]).any(-1)
    until_stop_B = jnp.where(stop_BP.any(1), jax.lax.argmax(stop_BP, 1, jnp.int32) + 1, length + 1)
    room_B = state.limit_B - (seq.length_B + 1)
    count_B = jnp.minimum(accepted_B + 1, jnp.minimum(until_stop_B, room_B))
    finished_B = state.finished_B | (count_B == until_stop_B) | (count_B == room_B)
    count_B = jnp.where(state.finished_B, 0, count_B)

    now_B, live_B1 = state.forwards_B, ~state.finished_B[:, None]
    trace = state.trace and _traced(state, draft, live_B1)
    verdict = Verdict(y_BN, logits_BNV, hidden_BND, path_BP, count_B, prompt_BTD)
    is_new_BP = jnp.arange(length, dtype=jnp.int32)[None] < count_B[:, None]
    tokens_BS = put(seq.tokens_BS, seq.length_B + 1, chosen_BP, is_new_BP)
    is_chain = draft.parent_BN is None
    return state.replace(
        cache=state.cache if is_chain else compact(state.cache, seq.length_B, path_BP),
        sequences=seq.replace(tokens_BS=tokens_BS, length_B=seq.length_B + count_B),
        drafter=decoder.drafter.update(state.drafter, draft, verdict, seq, sampling),
        finished_B=finished_B,
        forwards_B=now_B + (count_B > 0).astype(jnp.int32),
        emitted_BI=put(state.emitted_BI, now_B, count_B[:, None], live_B1),
        iteration=state.iteration + 1,
        trace=trace,
    )


def _room_to_trace(draft: Draft, steps: int) -> Trace:
    """A trace of so many forwards, before the first one."""
    rows, nodes = draft.tokens_BN.shape
    tokens_BIN = jnp.zeros((rows, steps, nodes), jnp.int32)
    parent_BIN = None if draft.parent_BN is None else tokens_BIN
    return Trace(tokens_BIN, tokens_BIN[:, :, 0], tokens_BIN > 0, parent_BIN)


def _traced(state: DecodeState, draft: Draft, live_B1: jax.Array) -> Trace:
    """The trace with the draft of this forward, of rows that are not finished."""
    trace, now_B = state.trace, state.forwards_B

    def put_draft(old_BIN: jax.Array, new_BN: jax.Array) -> jax.Array:
        (rows, nodes), live_BN = new_BN.shape, jnp.broadcast_to(live_B1, new_BN.shape)
        flat_BX = put(old_BIN.reshape(rows, -1), now_B * nodes, new_BN, live_BN)
        return flat_BX.reshape(old_BIN.shape)

    drafts = trace.tokens_BIN, trace.valid_BIN, trace.parent_BIN
    drafted = draft.tokens_BN, draft.valid_BN, draft.parent_BN
    tokens_BIN, *others = jax.tree.map(put_draft, drafts, drafted)
    position_BI = put(trace.position_BI, now_B, state.sequences.length_B[:, None], live_B1)
    return Trace(tokens_BIN, position_BI, *others)


def _finish(
    go_on: Callable[[jax.Array, DecodeState], DecodeState], decoder: Decoder, state: DecodeState
) -> DecodeState:
    """Iterate until every row is finished, or stop where `go_on`, which is `advance`, stops.

    Where finished rows take time (`Backend.narrowest`), the half that finishes last goes on as a
    batch of its own.
    """
    half, narrowest = state.rows // 2, decoder.model.backend.narrowest
    if narrowest is None or half < narrowest:
        return go_on(jnp.int32(state.rows), state)
    state = go_on(jnp.int32(state.rows - half), state)
    rows_R = jnp.argsort(state.finished_B, stable=True)[:half]
    rest = _finish(go_on, decoder, part_of(state, rows_R))
    return replace_rows(state, rows_R, rest).replace(iteration=rest.iteration)
