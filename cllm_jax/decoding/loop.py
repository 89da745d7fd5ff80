"""THE loop: draft -> verify -> accept, for every drafter and every purpose.

Invariants:
  I1  the cache holds exactly `length` tokens of a row; one more, the pending token, is committed.
  I2  node 0 of every draft is the pending token; node i sits at position `length + i`.
  I3  a choice depends on (params, committed prefix, row key, position) alone (`sampling.py`).
  I4  the committed tokens are the target's choices: 1..N per forward.
  I5  rejected keys need no rollback: `length` is the only commit pointer, and the slots beyond it
      are overwritten before they are seen.
  I6  a row stops at its first stop token or exactly at its limit, and is frozen from then on.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from cllm_jax.decoding.draft import Sequences, accepted, put
from cllm_jax.decoding.sampling import Sampling, choose
from cllm_jax.models.cache import Cache, init_cache
from cllm_jax.models.llama import Llama


@struct.dataclass
class Trace:
    """What was verified in each iteration: the draft, and the position of its first node."""

    tokens_BIN: jax.Array
    position_BI: jax.Array


@struct.dataclass
class DecodeState:
    """Everything the loop carries. `emitted_BI[:, 0]` is the prefill's token, I = limit slots."""

    cache: Cache
    sequences: Sequences
    drafter: Any
    limit_B: jax.Array
    """Sequence length, prompt included, at which a row is full."""
    finished_B: jax.Array
    forwards_B: jax.Array
    """Calls of the model while the row was unfinished, prefill included."""
    emitted_BI: jax.Array
    """Tokens committed by each forward; 0 once the row is finished."""
    iteration: jax.Array
    trace: Trace | None


def _is_stop(tokens_BN: jax.Array, stop_ids_E: jax.Array) -> jax.Array:
    return (tokens_BN[:, :, None] == stop_ids_E[None, None]).any(-1)


@partial(jax.jit, static_argnames=('model', 'drafter', 'sampling', 'slots', 'steps', 'trace'))
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
) -> DecodeState:
    """Run the prompts once, commit one token each, and set up the loop's state.

    Args:
      model, params, drafter, weights, sampling: what decodes, and how tokens are chosen.
      prompt_BP: int32 prompts, padded on the right with anything.
      prompt_len_B: int32, at least 1; a row with `max_tokens` 0 is padding and never runs.
      max_tokens_B: int32 answer lengths; at most `steps`.
      stop_ids_E: int32 token ids that end a row.
      keys_B: a PRNG key per row.
      slots: cache length; at least P, and prompt_len + max_tokens + N of every row.
      steps: upper bound on answer tokens, hence on forwards.
      trace: keep every draft (`DecodeState.trace`).
    """
    batch, width = prompt_BP.shape
    cache = init_cache(model.config, batch, slots, model.dtype)
    positions_BP = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32)[None], (batch, width))
    mask_BPS = jnp.arange(slots, dtype=jnp.int32)[None, None] <= positions_BP[:, :, None]
    start_B = jnp.zeros_like(prompt_len_B)
    hidden_BPD, cache = model.apply(
        {'params': params}, prompt_BP, positions_BP, mask_BPS, cache, start_B
    )
    last_B1D = jnp.take_along_axis(hidden_BPD, (prompt_len_B - 1)[:, None, None], axis=1)
    logits_B1V = model.apply({'params': params}, last_B1D, method='logits')
    first_B1 = choose(logits_B1V, keys_B, prompt_len_B[:, None], sampling)

    live_B = max_tokens_B > 0
    tokens_BS = jnp.zeros((batch, slots), jnp.int32)
    tokens_BS = jax.lax.dynamic_update_slice(tokens_BS, prompt_BP, (0, 0))
    tokens_BS = put(tokens_BS, prompt_len_B, first_B1, jnp.ones_like(first_B1, bool))
    sequences = Sequences(tokens_BS, prompt_len_B, prompt_len_B, keys_B)
    emitted_BI = jnp.zeros((batch, steps), jnp.int32).at[:, 0].set(live_B.astype(jnp.int32))
    return DecodeState(
        cache=cache,
        sequences=sequences,
        drafter=drafter.init(weights, sequences),
        limit_B=prompt_len_B + max_tokens_B,
        finished_B=~live_B | (max_tokens_B == 1) | _is_stop(first_B1, stop_ids_E)[:, 0],
        forwards_B=live_B.astype(jnp.int32),
        emitted_BI=emitted_BI,
        iteration=jnp.int32(1),
        trace=Trace(
            jnp.zeros((batch, steps, drafter.nodes), jnp.int32),
            jnp.zeros((batch, steps), jnp.int32),
        )
        if trace
        else None,
    )


@partial(jax.jit, static_argnames=('model', 'drafter', 'sampling'), donate_argnames='state')
def advance(
    model: Llama,
    params: Any,
    drafter: Any,
    weights: Any,
    sampling: Sampling,
    stop_ids_E: jax.Array,
    until: jax.Array,
    state: DecodeState,
) -> DecodeState:
    """Iterate until every row is finished or `state.iteration` reaches `until`.

    `until` is a traced number: streaming calls this with small steps and shares the compilation
    with decoding in one go. Nothing is read back to the host inside. `state` is donated.
    """
    nodes = drafter.nodes
    steps_N = jnp.arange(nodes, dtype=jnp.int32)[None]

    def unfinished(state: DecodeState) -> jax.Array:
        return ~state.finished_B.all() & (state.iteration < until)

    def iterate(state: DecodeState) -> DecodeState:
        seq = state.sequences
        slots_S = jnp.arange(state.cache.slots, dtype=jnp.int32)

        draft, drafter_state = drafter.draft(weights, state.drafter, seq)
        positions_BN = seq.length_B[:, None] + steps_N
        mask_BNS = slots_S[None, None] <= positions_BN[:, :, None]
        hidden_BND, cache = model.apply(
            {'params': params}, draft.tokens_BN, positions_BN, mask_BNS, state.cache, seq.length_B
        )
        logits_BNV = model.apply({'params': params}, hidden_BND, method='logits')
        y_BN = choose(logits_BNV, seq.keys_B, positions_BN + 1, sampling)

        stop_BN = _is_stop(y_BN, stop_ids_E)
        until_stop_B = jnp.where(stop_BN.any(1), jnp.argmax(stop_BN, axis=1) + 1, nodes + 1)
        room_B = state.limit_B - (seq.length_B + 1)
        count_B = jnp.minimum(accepted(draft, y_BN) + 1, jnp.minimum(until_stop_B, room_B))
        finished_B = state.finished_B | (count_B == until_stop_B) | (count_B == room_B)
        count_B = jnp.where(state.finished_B, 0, count_B)

        trace = state.trace
        if trace is not None:
            at = (0, state.iteration, 0)
            trace = Trace(
                jax.lax.dynamic_update_slice(trace.tokens_BIN, draft.tokens_BN[:, None], at),
                jax.lax.dynamic_update_slice(trace.position_BI, seq.length_B[:, None], at[:2]),
            )
        return DecodeState(
            cache=cache,
            sequences=seq.replace(
                tokens_BS=put(seq.tokens_BS, seq.length_B + 1, y_BN, steps_N < count_B[:, None]),
                length_B=seq.length_B + count_B,
            ),
            drafter=drafter.update(weights, drafter_state, draft, y_BN, seq),
            limit_B=state.limit_B,
            finished_B=finished_B,
            forwards_B=state.forwards_B + (count_B > 0).astype(jnp.int32),
            emitted_BI=jax.lax.dynamic_update_slice(
                state.emitted_BI, count_B[:, None], (0, state.iteration)
            ),
            iteration=state.iteration + 1,
            trace=trace,
        )

    return jax.lax.while_loop(unfinished, iterate, state)
