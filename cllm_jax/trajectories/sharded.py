"""The answers of one batch of prompts, and the Jacobi states on the way to them.

Each device has its own rows of the batch, under `jax.shard_map`; their loops end on their own, and
nothing is communicated, but inside a group of devices that share a model.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cllm_jax.decoding.drafter import Sequences
from cllm_jax.decoding.engine import stop_ids
from cllm_jax.decoding.loop import prefill
from cllm_jax.decoding.request import bucket, cache_slots, row_keys
from cllm_jax.decoding.sampling import Sampling
from cllm_jax.drafters.jacobi import Jacobi
from cllm_jax.drafters.prompt_lookup import PromptLookup, reference_rows
from cllm_jax.hf.load import Model
from cllm_jax.model.cache import Cache
from cllm_jax.model.llama import Llama
from cllm_jax.runtime.mesh import MeshConfig, make_mesh
from cllm_jax.trajectories.blocks import follow

TOGETHER = 4096
"""Tokens of blocks in a device's forward: enough to keep it busy, and a bound on memory, unless one
block of every row is more."""

FINDER = PromptLookup(block=4, ngram=8)
"""Finds the answers whose blocks are followed, by trying what the dataset says: a model that was
trained on it often says the same. Four tokens cost little where it does not."""


@dataclasses.dataclass(frozen=True)
class Found:
    """How one prompt was answered: see `store.Record`."""

    answer: np.ndarray
    states: np.ndarray
    start: np.ndarray
    forwards: int


def mesh_of(model: Model) -> Mesh:
    """The mesh that shares the model, or all devices of this process, each with a copy of it."""
    place = jax.tree.leaves(model.params)[0].sharding
    if isinstance(place, NamedSharding) and 'data' in place.mesh.axis_names:
        return place.mesh
    return make_mesh(MeshConfig(), jax.local_devices())


def prompt_keys(seed: int, names: Sequence[str]) -> jax.Array:
    """The PRNG key of each prompt: a hash of the run's seed and the prompt's id."""
    digests = [hashlib.sha256(f'{seed}/{name}'.encode()).digest() for name in names]
    return row_keys(seed, [int.from_bytes(digest[:4], 'big') for digest in digests])


def trajectories(
    model: Model,
    prompts: Sequence[np.ndarray],
    keys: jax.Array,
    references: Sequence[np.ndarray],
    *,
    block: int,
    mode: Literal['block', 'sliding'],
    max_tokens: int,
    rows: int,
    width: int,
) -> list[Found]:
    """Answer prompts together, keeping the states.

    Args:
      model: greedy decoding of it is the answer.
      prompts: token ids.
      keys: one PRNG key per prompt, of its random guesses.
      references: what the answers may be. They never change one, only how soon it is found.
      block: tokens per state (n).
      mode: `sliding` states are the windows of sliding decoding; `block` ones are those of every
        block of the answer, which is found first (`blocks.py`).
      max_tokens: longest answer.
      rows: size of the batch, at least that of `prompts`; the rest is padding.
      width: length to which prompts are padded.
    """
    mesh, steps = mesh_of(model), bucket(max_tokens)
    size = -(-rows // mesh.shape['data']) * mesh.shape['data']
    prompt_BP = np.zeros((size, width), np.int32)
    prompt_len_B, max_tokens_B = np.ones(size, np.int32), np.zeros(size, np.int32)
    for i, prompt in enumerate(prompts):
        prompt_BP[i, : len(prompt)] = prompt
        prompt_len_B[i], max_tokens_B[i] = len(prompt), max_tokens
    keys_B = keys[np.minimum(np.arange(size), len(prompts) - 1)]
    drafter, weights = Jacobi(block, mode), ()
    if mode == 'block':
        drafter = FINDER
        texts = [
            [*prompt[-drafter.ngram :], *reference[:max_tokens]]
            for prompt, reference in zip(prompts, references, strict=True)
        ]
        weights = reference_rows(texts, size, bucket(drafter.ngram + max_tokens + 1))
    # Guesses are looked up in the same buffer as tokens: the last block's have to be in it too.
    slots = cache_slots(width, steps, max(drafter.nodes, block))
    run = _decoder(model.module, drafter, mesh, slots, steps)
    sequences, cache, forwards_B, trace = run(
        model.params, stop_ids(model), prompt_BP, prompt_len_B, max_tokens_B, keys_B, weights
    )
    tokens_BS, length_B = jax.device_get((sequences.tokens_BS, sequences.length_B))
    answers = [tokens_BS[i, len(p) : length_B[i] + 1] for i, p in enumerate(prompts)]
    if mode == 'block':
        return _blocks(model, mesh, sequences, cache, block, answers, width)
    states_BIn, position_BI, forwards_B = jax.device_get(
        (trace.tokens_BIN, trace.position_BI, forwards_B)
    )
    found = []
    for i, answer in enumerate(answers):
        done = slice(1, forwards_B[i])
        start = position_BI[i, done] - prompt_len_B[i]
        found.append(Found(answer, states_BIn[i, done], start, int(forwards_B[i])))
    return found


@functools.cache
def _decoder(module: Llama, drafter: Any, mesh: Mesh, slots: int, steps: int) -> Callable:
    """A compiled `(params, stop_ids, prompts, lengths, max_tokens, keys, weights) -> decoded rows`.

    What the drafter has for weights has a row per prompt.
    """

    def decode(params, stop_ids_E, prompt_BP, prompt_len_B, max_tokens_B, keys_B, weights):
        state = prefill(
            module,
            params,
            drafter,
            weights,
            Sampling(),
            prompt_BP,
            prompt_len_B,
            max_tokens_B,
            stop_ids_E,
            keys_B,
            slots=slots,
            steps=steps,
            trace=isinstance(drafter, Jacobi),
            to_the_end=True,
        )
        return state.sequences, state.cache, state.forwards_B, state.trace

    return _on_rows(decode, mesh, whole=2, rows=5)


@functools.cache
def _follower(module: Llama, mesh: Mesh, block: int, blocks: int, slots: int) -> Callable:
    """A compiled `(params, first, sequences, cache) -> states and forwards`, see `follow`."""

    def run(params, first, sequences, cache):
        state_IBMn, forwards_BM = follow(
            module, params, sequences, cache, first, block=block, blocks=blocks, slots=slots
        )
        return state_IBMn.transpose(1, 2, 0, 3), forwards_BM

    return _on_rows(run, mesh, whole=2, rows=2)


def _on_rows(function: Callable, mesh: Mesh, whole: int, rows: int) -> Callable:
    """Compiled, each device with all of the first arguments and its rows of the others."""
    data = PartitionSpec('data')
    return jax.jit(
        jax.shard_map(
            function,
            mesh=mesh,
            in_specs=(PartitionSpec(),) * whole + (data,) * rows,
            out_specs=data,
            axis_names={'data'},  # what shares a model is left to the compiler
            check_vma=False,
        )
    )


def _blocks(
    model: Model,
    mesh: Mesh,
    sequences: Sequences,
    cache: Cache,
    block: int,
    answers: Sequence[np.ndarray],
    width: int,
) -> list[Found]:
    """The states of all blocks of decoded answers, as many blocks at a time as are fast."""
    count = max(-(-(len(answer) - 1) // block) for answer in answers)
    if count == 0:
        nothing = np.zeros((0, block), np.int32), np.zeros(0, np.int32)
        return [Found(answer, *nothing, forwards=1) for answer in answers]
    own_rows = len(sequences.length_B) // mesh.shape['data']
    most = max(1, TOGETHER // (own_rows * block))
    slots, first, parts = -(-bucket(width + count * block) // 64) * 64, 0, []
    while first < count:  # powers of two and few sizes of the cache: few programs to compile
        together = 1 << min(count - first, most).bit_length() - 1
        run = _follower(model.module, mesh, block, together, slots)
        parts.append(run(model.params, np.int32(first), sequences, cache))
        first += together
    states_BMIn, forwards_BM = (
        np.concatenate(part, axis=1) for part in zip(*jax.device_get(parts), strict=True)
    )
    return [_joined(*row) for row in zip(answers, states_BMIn, forwards_BM, strict=False)]


def _joined(answer: np.ndarray, states_MIn: np.ndarray, forwards_M: np.ndarray) -> Found:
    """One answer's states in order, each block's with its fixed point behind them."""
    block = states_MIn.shape[2]
    padded = np.concatenate([answer, np.zeros(block, np.int32)])
    states, start = [np.zeros((0, block), np.int32)], []
    for m in np.flatnonzero(forwards_M):
        begin, forwards = m * block, forwards_M[m]
        states += [states_MIn[m, :forwards], padded[None, begin : begin + block]]
        start += [begin] * (forwards + 1)
    # The prefill is a forward too.
    return Found(
        answer, np.concatenate(states), np.asarray(start, np.int32), 1 + int(forwards_M.sum())
    )
