"""The answers of one batch of prompts, and the Jacobi states on the way to them.

Each device has its own rows of the batch, under `jax.shard_map`; their loops end on their own, and
nothing is communicated, except inside a group of devices that share a model.
"""

import functools
import hashlib
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cllm_jax.decoding.loop import Buffers, Decoder, prefill
from cllm_jax.decoding.request import bucket, cache_slots, pad_prompts, row_keys, stop_ids
from cllm_jax.decoding.result import Trajectory
from cllm_jax.drafters.jacobi import Jacobi
from cllm_jax.drafters.prompt_lookup import PromptLookup, reference_rows
from cllm_jax.hf.model import Model
from cllm_jax.model.llama import Llama
from cllm_jax.runtime.mesh import MeshConfig, make_mesh
from cllm_jax.trajectories.blocks import BlockSizes, follow
from cllm_jax.trajectories.store import Collection

TOGETHER = 4096
"""Tokens of blocks in a device's forward: enough to keep it busy, and a bound on memory, unless one
block of every row is more."""
PROGRAMS = 16
"""How many of each kind are kept: one for every length of prompts would be too many in the end."""
FINDER = PromptLookup(block=4, ngram=8)
"""Finds the answers whose blocks are followed, by trying what the dataset says, which a model that
was trained on it often says too. Four tokens cost little where it does not."""


def mesh_of(model: Model) -> Mesh:
    """The mesh that shares the model, or all devices of this process, each with a copy."""
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
    settings: Collection,
    width: int,
) -> list[Trajectory]:
    """Answer prompts together, keeping the states.

    Args:
      model: greedy decoding of it is the answer.
      prompts: token ids, at most `settings.batch`; the rest of the batch is padding.
      keys: one PRNG key per prompt, of its random guesses.
      references: what the answers may be. They never change one, only how soon it is found.
      settings: what is collected. `sliding` states are the windows of sliding decoding; `block`
        ones are those of every block of the answer, which is found first (`blocks.py`).
      width: length to which prompts are padded.
    """
    mesh, steps, block = mesh_of(model), bucket(settings.max_tokens), settings.block
    rows = -(-settings.batch // mesh.shape['data']) * mesh.shape['data']
    batch = pad_prompts(prompts, rows, width, settings.max_tokens, keys)
    drafter, references_BR = Jacobi(block, settings.mode), None
    if settings.mode == 'block':
        drafter = FINDER
        both, longest = zip(prompts, references, strict=True), settings.max_tokens
        texts = [[*p[-drafter.ngram :], *reference[:longest]] for p, reference in both]
        references_BR = reference_rows(texts, rows, bucket(drafter.ngram + longest + 1))
    # Guesses are looked up in the same buffer as tokens: the last block's have to be in it too.
    slots = cache_slots(width, steps, max(drafter.nodes, block), model.backend.exact)
    buffers = Buffers(slots, steps, trace=drafter is not FINDER)
    run = compiled_decoder(model.module, drafter, mesh, buffers)
    sequences, cache, forwards_B, trace = run(model.params, stop_ids(model), batch, references_BR)
    tokens_BS, length_B = jax.device_get((sequences.tokens_BS, sequences.length_B))
    answers = [tokens_BS[i, len(p) : length_B[i] + 1] for i, p in enumerate(prompts)]
    if settings.mode == 'block':
        states = _blocks(model, sequences, cache, answers, block, width)
        return [_joined(*row) for row in zip(prompts, answers, *states, strict=False)]
    wanted = (trace.tokens_BIN, trace.position_BI, forwards_B)
    states_BIn, position_BI, forwards_B = jax.device_get(wanted)
    found = []
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        verified = slice(1, forwards_B[i])
        states, start = states_BIn[i, verified], position_BI[i, verified] - len(prompt)
        found.append(Trajectory(states, start, prompt, answer, int(forwards_B[i])))
    return found


@functools.lru_cache(PROGRAMS)
def compiled_decoder(
    module: Llama, drafter: Jacobi | PromptLookup, mesh: Mesh, buffers: Buffers
) -> Callable:
    """A compiled `(params, stop_ids, prompts, references) -> decoded rows`."""

    def decode(params, stop_ids_E, prompts, references_BR):
        own = drafter if references_BR is None else drafter.replace(references=references_BR)
        state = prefill(Decoder(module, params, own, stop_ids_E), prompts, buffers, to_the_end=True)
        return state.sequences, state.cache, state.forwards_B, state.trace

    return _on_rows(decode, module, mesh)


@functools.lru_cache(PROGRAMS)
def compiled_follower(module: Llama, mesh: Mesh, sizes: BlockSizes) -> Callable:
    """A compiled `(params, first, sequences, cache) -> states and forwards`, see `follow`."""

    def run(params, first, sequences, cache):
        state_IBMn, forwards_BM = follow(module, params, sequences, cache, first, sizes)
        return state_IBMn.transpose(1, 2, 0, 3), forwards_BM

    return _on_rows(run, module, mesh)


def _on_rows(function: Callable, module: Llama, mesh: Mesh) -> Callable:
    """Compiled, each device with all of the first two arguments and its rows of the last two."""
    data, everything = PartitionSpec('data'), PartitionSpec()
    specs = {'in_specs': (everything, everything, data, data), 'out_specs': data}
    # What shares a model is left to the compiler.
    own_rows = jax.shard_map(function, mesh=mesh, **specs, axis_names={'data'}, check_vma=False)
    return jax.jit(own_rows, compiler_options=dict(module.backend.exact_options))


def _blocks(model: Model, sequences, cache, answers, block: int, width: int):
    """The states of all blocks of decoded answers, `[B, M, I, n]`, and the forwards of each."""
    mesh, count = mesh_of(model), max(-(-(len(answer) - 1) // block) for answer in answers)
    if count == 0:
        rows = len(answers)
        return np.zeros((rows, 0, block, block), np.int32), np.zeros((rows, 0), np.int32)
    own_rows = len(sequences.length_B) // mesh.shape['data']
    most = max(1, TOGETHER // (own_rows * block))
    slots, first, found = -(-bucket(width + count * block) // 64) * 64, 0, []
    while first < count:  # powers of two and few sizes of the cache: few programs to compile
        together = 1 << min(count - first, most).bit_length() - 1
        run = compiled_follower(model.module, mesh, BlockSizes(block, together, slots))
        found.append(run(model.params, np.int32(first), sequences, cache))
        first += together
    return tuple(np.concatenate(x, axis=1) for x in zip(*jax.device_get(found), strict=True))


def _joined(prompt, answer, states_MIn, forwards_M) -> Trajectory:
    """One answer's states in order, each block's followed by its fixed point."""
    block = states_MIn.shape[2]
    padded = np.concatenate([answer, np.zeros(block, np.int32)])
    states, start = [np.zeros((0, block), np.int32)], []
    for m in np.flatnonzero(forwards_M):
        begin, forwards = m * block, forwards_M[m]
        states += [states_MIn[m, :forwards], padded[None, begin : begin + block]]
        start += [begin] * (forwards + 1)
    states, start = np.concatenate(states), np.asarray(start, np.int32)
    return Trajectory(states, start, prompt, answer, 1 + int(forwards_M.sum()))  # 1: the prefill
