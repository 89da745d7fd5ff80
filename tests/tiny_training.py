"""A model, samples with states, and a whole run, tiny enough for tests of training."""

import dataclasses
from functools import cache, partial

import jax
import numpy as np

from cllm_jax.data.sources import Source
from cllm_jax.decoding.result import Trajectory
from cllm_jax.hf.model import Model
from cllm_jax.model.llama import Llama, init_params
from cllm_jax.tasks.example import Example
from cllm_jax.training.config import TrainConfig
from cllm_jax.training.held_out import HeldOut
from cllm_jax.training.noise import Noise
from cllm_jax.training.objective import Learner
from cllm_jax.training.objectives import objective_of
from tests.tiny import byte_tokenizer, text_config

CONFIG, SHALLOW = text_config(layers=2), text_config(layers=1)
BLOCK = 8


@cache
def params_of(config=CONFIG):
    params = jax.jit(partial(init_params, Llama(config)))(jax.random.key(0))
    return jax.tree.map(lambda x: x * 3 if x.ndim > 1 else x, params)


MODEL = Model(SHALLOW, params_of(SHALLOW), byte_tokenizer(), 'tiny')


def samples(count: int = 12, seed: int = 0, block: int = BLOCK) -> list[Trajectory]:
    """Random prompts and answers with states: random guesses, partly right, and the fixed point."""
    rng, made = np.random.default_rng(seed), []
    for _ in range(count):
        prompt = rng.integers(3, 90, rng.integers(2, 9)).astype(np.int32)
        answer = rng.integers(3, 90, rng.integers(5, 30)).astype(np.int32)
        padded = np.concatenate([answer, np.zeros(block, np.int32)])
        states, start = [], []
        for begin in range(0, len(answer), block):
            truth = padded[begin : begin + block]
            for right in range(1, block + 1, 3):
                state = rng.integers(3, 90, block).astype(np.int32)
                state[:right] = truth[:right]
                states.append(state)
                start.append(begin)
            states.append(truth)
            start.append(begin)
        made.append(Trajectory(np.stack(states), np.asarray(start, np.int32), prompt, answer))
    return made


def tiny_run(**changes) -> tuple[Learner, list[Trajectory], Source, TrainConfig]:
    """What `train` takes: a learner, samples, held-out prompts and settings, small enough."""
    settings = TrainConfig(
        steps=6,
        batch=4,
        noise=Noise(windows=2),
        held_out=HeldOut(every=3, prompts=3, max_tokens=8, block=4),
        log_every=1,
        save_every=2,
    )
    settings = dataclasses.replace(settings, **changes)
    rows = [Example(str(i), 'abc'[i % 3] * 3, 'x') for i in range(3)]
    source = Source('held', rows, lambda example, text: text.startswith('x'))
    learner = objective_of(settings).learner(settings, MODEL, samples())
    return learner, samples(), source, settings
