"""Collecting Jacobi trajectories: the decoding loop itself, one copy per device, states kept.

Each process takes every n-th shard of the prompts, and each of its devices its own rows of a batch
under `jax.shard_map`; the loops end on their own and nothing is communicated, but inside a group of
devices that share a model. Shards of records are
written as they are finished (`store.py`), and a prompt's random guesses depend on the run's seed
and the prompt's id alone, so that a collection ends with the same bytes, whether it was interrupted
or not, and however many processes shared it.
"""

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cllm_jax.datasets.example import Example
from cllm_jax.datasets.sources import Source
from cllm_jax.datasets.tokens import encode_examples
from cllm_jax.decoding.generate import stop_ids, text_of
from cllm_jax.decoding.loop import prefill
from cllm_jax.decoding.request import bucket, cache_slots
from cllm_jax.decoding.sampling import Sampling
from cllm_jax.drafters.jacobi import Jacobi
from cllm_jax.errors import ConfigError
from cllm_jax.evaluation.quality import is_repetitive
from cllm_jax.models.llama import Llama
from cllm_jax.models.load import Model
from cllm_jax.parallel.distributed import barrier, is_main
from cllm_jax.parallel.mesh import MeshConfig, make_mesh
from cllm_jax.trajectories.store import (
    UNKNOWN,
    Record,
    finish,
    open_manifest,
    read_manifest,
    write_shard,
)


@dataclasses.dataclass(frozen=True)
class CollectPlan:
    """What is collected, and in which portions."""

    block: int
    mode: Literal['block', 'sliding']
    max_tokens: int
    seed: int
    batch: int
    shard: int
    """Prompts per shard; a shard is the unit of resumption."""


def mesh_of(model: Model) -> Mesh:
    """The mesh that shares the model, or all devices of this process, each with a copy of it."""
    place = jax.tree.leaves(model.params)[0].sharding
    if isinstance(place, NamedSharding) and 'data' in place.mesh.axis_names:
        return place.mesh
    return make_mesh(MeshConfig(), jax.local_devices())


@lru_cache
def _collector(module: Llama, drafter: Jacobi, mesh: Mesh, slots: int, steps: int) -> Callable:
    """A compiled `(params, stop_ids, prompts, lengths, max_tokens, keys) -> decoded rows`."""

    def shard(params, stop_ids_E, prompt_BP, prompt_len_B, max_tokens_B, keys_B):
        state = prefill(
            module,
            params,
            drafter,
            (),
            Sampling(),
            prompt_BP,
            prompt_len_B,
            max_tokens_B,
            stop_ids_E,
            keys_B,
            slots=slots,
            steps=steps,
            trace=True,
            to_the_end=True,
        )
        seq, trace = state.sequences, state.trace
        return (
            seq.tokens_BS,
            seq.length_B,
            state.forwards_B,
            trace.tokens_BIN,
            trace.position_BI,
        )

    whole, rows = PartitionSpec(), PartitionSpec('data')
    return jax.jit(
        jax.shard_map(
            shard,
            mesh=mesh,
            in_specs=(whole, whole, rows, rows, rows, rows),
            out_specs=rows,
            axis_names={'data'},  # what shares a model is left to the compiler
            check_vma=False,
        )
    )


def prompt_key(seed: int, name: str) -> jax.Array:
    """The PRNG key of a prompt: a hash of the run's seed and the prompt's id."""
    digest = hashlib.sha256(f'{seed}/{name}'.encode()).digest()
    return jax.random.fold_in(jax.random.key(seed), int.from_bytes(digest[:4], 'big'))


def _states(
    window_IN: np.ndarray,
    position_I: np.ndarray,
    answer: np.ndarray,
    prompt: int,
    plan: CollectPlan,
) -> tuple[np.ndarray, np.ndarray]:
    """States `[S, n]` and their offsets from the drafts that were verified.

    A sliding draft is a state. A block draft begins at the pending token: the converged part of
    its block is put in front, and the fixed point behind the block's last state.
    """
    offsets = position_I - prompt
    if plan.mode == 'sliding':
        return window_IN, offsets
    n, states, starts = plan.block, [], []
    padded = np.concatenate([answer, np.zeros(n, np.int32)])
    for window, offset in zip(window_IN, offsets, strict=True):
        begin = offset - offset % n
        if starts and begin != starts[-1]:
            states.append(padded[starts[-1] : starts[-1] + n])
            starts.append(starts[-1])
        converged = offset - begin
        states.append(np.concatenate([answer[begin:offset], window[: n - converged]]))
        starts.append(begin)
    if starts:
        states.append(padded[starts[-1] : starts[-1] + n])
        starts.append(starts[-1])
    shape = (len(states), n)
    return np.asarray(states, np.int32).reshape(shape), np.asarray(starts, np.int32)


def _decode(
    model: Model,
    plan: CollectPlan,
    mesh: Mesh,
    rows: Sequence[tuple[Example, np.ndarray]],
    width: int,
) -> list[tuple[np.ndarray, int, np.ndarray, np.ndarray]]:
    """Answer, forwards, states and offsets of one batch of prompts."""
    steps = bucket(plan.max_tokens)
    size = -(-plan.batch // mesh.shape['data']) * mesh.shape['data']
    prompt_BP = np.zeros((size, width), np.int32)
    prompt_len_B, max_tokens_B = np.ones(size, np.int32), np.zeros(size, np.int32)
    for i, (_, prompt) in enumerate(rows):
        prompt_BP[i, : len(prompt)] = prompt
        prompt_len_B[i], max_tokens_B[i] = len(prompt), plan.max_tokens
    keys = [prompt_key(plan.seed, example.id) for example, _ in rows]
    keys_B = jnp.stack(keys + keys[:1] * (size - len(rows)))
    drafter = Jacobi(plan.block, plan.mode)
    slots = cache_slots(width, steps, plan.block)
    run = _collector(model.module, drafter, mesh, slots, steps)
    out = run(model.params, stop_ids(model), prompt_BP, prompt_len_B, max_tokens_B, keys_B)
    tokens_BS, length_B, forwards_B, window_BIN, position_BI = jax.device_get(out)
    result = []
    for i, (_, prompt) in enumerate(rows):
        answer = tokens_BS[i, len(prompt) : length_B[i] + 1]
        done = slice(1, forwards_B[i])
        states, start = _states(
            window_BIN[i, done], position_BI[i, done], answer, len(prompt), plan
        )
        result.append((answer, int(forwards_B[i]), states, start))
    return result


def _record(model: Model, source: Source, example: Example, prompt: np.ndarray, found) -> Record:
    answer, forwards, states, start = found
    right = UNKNOWN
    if source.checkable:
        right = int(source.check(example, text_of(model, answer.tolist())))
    return Record(
        id=example.id,
        prompt=prompt,
        answer=answer,
        states=states,
        start=start,
        finished=int(answer[-1]) in model.config.eos_ids,
        right=right,
        forwards=forwards,
    )


def collect(
    directory: Path,
    model: Model,
    source: Source,
    plan: CollectPlan,
    identity: dict[str, Any],
    advance_by: Callable[[int, int], None] = lambda prompts, tokens: None,
) -> Counter:
    """Collect the trajectories of every row of `source` into `directory`; returns counts.

    Finished shards of an earlier call are kept. Prompts that leave no room for `max_tokens` in the
    model's positions are counted as `too long` and skipped.

    Args:
      identity: what makes two collections the same (model, dataset, settings).
      advance_by: told of prompts done and tokens decoded.

    Raises:
      ConfigError: the directory holds another collection; the model has no stop token.
    """
    if not model.config.eos_ids:
        raise ConfigError(f'{model.source} has no end token; set eos_token_id in its config.json')
    shards = -(-len(source) // plan.shard)
    mine = range(jax.process_index(), shards, jax.process_count())
    manifest = open_manifest(directory, identity, shards, mine)
    for index in mine:
        begin = index * plan.shard
        size = min(plan.shard, len(source) - begin)
        if manifest['shards'][index]:
            advance_by(size, 0)
            continue
        rows = range(begin, begin + size)
        records = collect_records(model, source, plan, rows, advance_by)
        write_shard(directory, manifest, index, records, _count(records, size))
    barrier('collected')
    if is_main():
        finish(directory)
    barrier('finished')
    counts = Counter()
    for entry in read_manifest(directory)['shards']:
        counts.update(entry['counts'])
    return counts


def collect_records(
    model: Model,
    source: Source,
    plan: CollectPlan,
    rows: Sequence[int],
    advance_by: Callable[[int, int], None] = lambda prompts, tokens: None,
) -> list[Record]:
    """The trajectories of some rows of `source`, in order; prompts that are too long are left out.

    Rows of a batch wait for the slowest, so each batch gets rows of about the same length, as the
    reference answers tell it.
    """
    mesh, room = mesh_of(model), model.config.max_positions - plan.max_tokens
    examples = [source[i] for i in rows]
    pairs = encode_examples(model.tokenizer, examples, model.config.eos_ids[0])
    order = [i for i, (prompt, _) in enumerate(pairs) if len(prompt) <= room]
    order.sort(key=lambda i: (len(pairs[i][1]), len(pairs[i][0])))
    width = bucket(max((len(pairs[i][0]) for i in order), default=1))
    records: dict[int, Record] = {}
    for begin in range(0, len(order), plan.batch):
        chosen = order[begin : begin + plan.batch]
        found = _decode(model, plan, mesh, [(examples[i], pairs[i][0]) for i in chosen], width)
        for i, one in zip(chosen, found, strict=True):
            records[i] = _record(model, source, examples[i], pairs[i][0], one)
        advance_by(len(chosen), sum(len(one[0]) for one in found))
    return [records[i] for i in sorted(records)]


def _count(records: Sequence[Record], prompts: int) -> dict[str, int]:
    return {
        'prompts': prompts,
        'too long': prompts - len(records),
        'truncated': sum(not r.finished for r in records),
        'repetitive': sum(is_repetitive(r.answer.tolist()) for r in records),
        'right': sum(r.right == 1 for r in records),
        'wrong': sum(r.right == 0 for r in records),
        'tokens': sum(len(r.answer) for r in records),
        'forwards': sum(r.forwards for r in records),
        'states': sum(len(r.states) for r in records),
    }
