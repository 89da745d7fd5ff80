"""What a consistency step costs, relative to an autoregressive one on the same answers."""

import dataclasses
import statistics
import time
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp

from cllm_jax.decoding.result import Trajectory
from cllm_jax.hf.model import Model
from cllm_jax.model.llama import Llama
from cllm_jax.training.noise import Noise
from cllm_jax.training.optimizer import OptimizerConfig, make_optimizer
from cllm_jax.training.packing import make_batch
from cllm_jax.training.step import LossWeights, make_step, new_state, text_loss

WEIGHTS, NOISE = LossWeights(ar_weight=6.0, global_weight=1.0), Noise(decay=8.0, fresh=0.15)
"""Those of `configs/embedded.yaml`."""


def step_cost(
    model: Model, records: Sequence[Trajectory], batch: int = 16, repeats: int = 5
) -> dict[str, float]:
    """Seconds of an autoregressive and of a consistency step over the same answers.

    Products are computed in the precision of the model's own, weights are float32. Each step is
    timed `repeats` times, in turn, after one that compiles; medians count.
    """
    records = [record for record in records if len(record.states)]
    module = Llama(model.config, jnp.float32, model.module.products, backend=model.backend)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), model.params)
    optimizer = make_optimizer(OptimizerConfig(kind='muon'), steps=100)
    plain = dataclasses.replace(WEIGHTS, ar_weight=1.0, global_weight=0.0)
    steps, states, seconds = [], [], ([], [])
    for weights, noise in ((plain, None), (WEIGHTS, NOISE)):
        packed = make_batch(records, min(batch, len(records)), 0, 0, noise)
        packed = jax.tree.map(jnp.asarray, packed)
        clean = int((packed.segment_BT == 0).sum())
        steps.append((make_step(partial(text_loss, module, weights), optimizer), packed))
        states.append(new_state(optimizer, params))
    for _ in range(repeats + 1):
        for i, (step, packed) in enumerate(steps):
            begin = time.perf_counter()
            states[i], _ = jax.block_until_ready(step(states[i], packed))
            seconds[i].append(time.perf_counter() - begin)
    ar, consistency = (statistics.median(times[1:]) for times in seconds)
    return {
        'ar_step_seconds': ar,
        'consistency_step_seconds': consistency,
        'ratio': consistency / ar,
        'clean_tokens': clean,
        'clean_tokens_per_second': clean / consistency,
    }
