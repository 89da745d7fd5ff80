"""Collecting Jacobi trajectories: batch by batch (`sharded.py`), into shards (`store.py`).

Each process takes every n-th shard of the prompts. Shards are written as they are finished, and a
prompt's random guesses depend on the run's seed and the prompt's id alone, so that a collection
ends with the same bytes, whether it was interrupted or not, and however many processes shared it.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cllm_jax.data.chat import check_template, is_chat
from cllm_jax.data.sources import Source
from cllm_jax.data.tokenizer import encode_examples
from cllm_jax.decoding.request import bucket, check_ids
from cllm_jax.decoding.result import UNKNOWN, Trajectory
from cllm_jax.decoding.text import text_of
from cllm_jax.errors import ConfigError, DataError
from cllm_jax.hf.model import Model
from cllm_jax.runtime.processes import barrier, is_main
from cllm_jax.runtime.threads import side_by_side
from cllm_jax.tasks.example import Example
from cllm_jax.tasks.quality import is_repetitive
from cllm_jax.trajectories import store
from cllm_jax.trajectories.sharded import mesh_of, prompt_keys, trajectories


def collect(
    directory: Path,
    model: Model,
    source: Source,
    settings: store.Collection,
    identity: dict[str, Any],
    advance_by: Callable[[int, int], None] = lambda prompts, tokens: None,
) -> Counter:
    """Collect the trajectories of every row of `source` into `directory`; returns counts.

    Finished shards of an earlier call are kept. Prompts that leave no room for `max_tokens` in the
    model's positions are counted as `too long` and skipped, those without a token as `empty`.
    Raises ConfigError for a directory with another collection, and a model without a stop token;
    DataError for a row with a token that the model does not have.

    Args:
      identity: what makes two collections the same (model, dataset, settings).
      advance_by: told of prompts done and tokens decoded.
    """
    if not model.config.eos_ids:
        raise ConfigError(f'{model.source} has no end token; set eos_token_id in its config.json')
    read = isinstance(source.rows, list)  # rows that are made on demand are texts
    chats = read and any(is_chat(row.prompt) for row in source.rows)
    if chats or len(model.tokenizer) > model.config.vocab_size:
        encode_rows(model, list(source.rows))  # its faults are known before the first shard
    shards = -(-len(source) // settings.shard)
    mine = range(jax.process_index(), shards, jax.process_count())
    manifest = store.open_manifest(directory, identity, shards, mine)
    for index in mine:
        begin = index * settings.shard
        size = min(settings.shard, len(source) - begin)
        if manifest['shards'][index]:
            advance_by(size, 0)
            continue
        rows = range(begin, begin + size)
        records, left_out = collect_rows(model, source, settings, rows, advance_by)
        counts = {'prompts': size} | left_out | _count(records)
        store.write_shard(directory, manifest, index, records, counts)
    barrier('collected')
    if is_main():
        store.finish(directory)
    barrier('finished')
    counts = Counter()
    for entry in store.read_manifest(directory)['shards']:
        counts.update(entry['counts'])
    return counts


def collect_rows(
    model: Model,
    source: Source,
    settings: store.Collection,
    rows: Sequence[int],
    advance_by: Callable[[int, int], None] = lambda prompts, tokens: None,
) -> tuple[list[Trajectory], dict[str, int]]:
    """The trajectories of some rows of `source`, in order, and how many are left out, by reason.

    Rows of a batch wait for the slowest: each batch gets rows whose reference answers have about
    the same length.
    """
    room = model.config.max_positions - settings.max_tokens
    examples = [source[i] for i in rows]
    pairs = encode_rows(model, examples)
    left_out = {
        'too long': sum(len(prompt) > room for prompt, _ in pairs),
        'empty': sum(len(prompt) == 0 for prompt, _ in pairs),
    }
    order = [i for i, (prompt, _) in enumerate(pairs) if 0 < len(prompt) <= room]
    order.sort(key=lambda i: (len(pairs[i][1]), len(pairs[i][0])))
    width, batch = bucket(max((len(pairs[i][0]) for i in order), default=1)), settings.batch
    batches = [order[begin : begin + batch] for begin in range(0, len(order), batch)]

    def answer(chosen: Sequence[int]) -> list[Trajectory]:
        prompts, references = zip(*(pairs[i] for i in chosen), strict=True)
        keys = prompt_keys(settings.seed, [examples[i].id for i in chosen])
        return trajectories(model, prompts, keys, references, settings, width)

    records: dict[int, Trajectory] = {}
    threads = model.backend.threads if mesh_of(model).size == 1 else 1
    for chosen, found in zip(batches, side_by_side(answer, batches, threads), strict=True):
        for i, one in zip(chosen, found, strict=True):
            example, answered, right = examples[i], one.answer.tolist(), UNKNOWN
            if source.checkable:
                right = int(source.check(example, text_of(model, answered)))
            finished = answered[-1] in model.config.eos_ids
            records[i] = dataclasses.replace(one, id=example.id, finished=finished, right=right)
        advance_by(len(chosen), sum(len(one.answer) for one in found))
    return [records[i] for i in sorted(records)], left_out


def encode_rows(model: Model, rows: Sequence[Example]) -> list[tuple[np.ndarray, np.ndarray]]:
    """What `encode_examples` makes of some rows; DataError for ids outside the model's table.

    Raises ConfigError for chats if the model has no template.
    """
    if any(is_chat(row.prompt) for row in rows):
        check_template(model.tokenizer, model.source)
    pairs = encode_examples(model.tokenizer, rows, model.config.eos_ids, model.config.bos_id)
    for row, arrays in zip(rows, pairs, strict=True):
        for ids in arrays:
            check_ids(model, ids, f'row {row.id}: ', DataError)
    return pairs


def _count(records: Sequence[Trajectory]) -> dict[str, int]:
    return {
        'truncated': sum(not r.finished for r in records),
        'repetitive': sum(is_repetitive(r.answer.tolist()) for r in records),
        'right': sum(r.right == 1 for r in records),
        'wrong': sum(r.right == 0 for r in records),
        'tokens': sum(len(r.answer) for r in records),
        'forwards': sum(r.forwards for r in records),
        'states': sum(len(r.states) for r in records),
    }
