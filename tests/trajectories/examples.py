"""A tiny model, a dataset, and what is collected of them."""

from collections import Counter
from pathlib import Path

import numpy as np

from cllm_jax.data.sources import Source
from cllm_jax.decoding.result import Trajectory
from cllm_jax.hf.model import Model
from cllm_jax.tasks.example import Example
from cllm_jax.trajectories.collector import collect
from cllm_jax.trajectories.store import Collection
from tests.tiny import byte_tokenizer, random_model, text_config

MODEL = random_model(0, text_config(eos_ids=tuple(range(1, 261, 23))), byte_tokenizer())
SETTINGS = Collection(block=8, mode='block', max_tokens=30, seed=3, batch=8, shard=8)


def source(count: int = 20) -> Source:
    rows = [
        Example(f'row-{i}', 'some words to draw from'[: 3 + i], 'an answer') for i in range(count)
    ]
    return Source('rows', rows, lambda example, text: 'e' in text)


def identity(settings: Collection = SETTINGS) -> dict:
    return settings.identity | {'model': 'tiny'}


def collect_into(
    directory: Path,
    settings: Collection = SETTINGS,
    model: Model = MODEL,
    rows: Source | None = None,
) -> Counter:
    """Collect `rows`, by default all twenty."""
    return collect(directory, model, rows or source(), settings, identity(settings))


def trajectory(answer, states=((4, 5),), start=(0,), **other) -> Trajectory:
    """One that nobody decoded."""
    states, start, answer = (np.asarray(x, np.int32) for x in (states, start, answer))
    return Trajectory(states, start, np.asarray([1, 2], np.int32), answer, **other)
