"""How fast the other two stages are: collecting trajectories, and a training step.

Both ratios compare like with like in one run: collection in batches beside decoding some of the
prompts one at a time, by their tokens per second, and a consistency step beside an autoregressive
one on the same answers.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from cllm_jax.data.sources import Source
from cllm_jax.decoding.engine import decode_batch
from cllm_jax.decoding.request import Request, encode, row_keys
from cllm_jax.decoding.result import Trajectory
from cllm_jax.drafters.jacobi import Jacobi
from cllm_jax.hf.load import Model
from cllm_jax.model.llama import Llama
from cllm_jax.training.optimizer import OptimizerConfig, make_optimizer
from cllm_jax.training.packing import Noise, make_batch
from cllm_jax.training.step import LossWeights, make_step, new_state, text_loss
from cllm_jax.trajectories.collector import collect_rows
from cllm_jax.trajectories.store import Collection


def collection_speed(
    model: Model,
    source: Source,
    plans: Mapping[str, Collection],
    alone: int,
    repeats: int = 3,
) -> tuple[dict[str, dict[str, float]], list[Trajectory]]:
    """Prompts and tokens per second of collecting, and of decoding one prompt at a time.

    Args:
      model, source: what is collected: every row of `source`.
      plans: ways to collect; each has an entry in the result, and the first gives the records.
      alone: how many of the prompts are decoded alone, by the paper's block schedule.
      repeats: times each is timed, in turn, after a first one that compiles.
    """
    first = next(iter(plans.values()))
    request = Request(Jacobi(first.block, 'block'), first.max_tokens, trace=True)
    few = [(encode(model, source[i].prompt), row_keys(first.seed, [i])) for i in range(alone)]
    seconds: dict[str, list[float]] = {name: [] for name in plans}
    one_by_one, records = [], []
    for _ in range(repeats + 1):
        for name, plan in plans.items():
            begin = time.perf_counter()
            found, _ = collect_rows(model, source, plan, range(len(source)))
            seconds[name].append((time.perf_counter() - begin) / len(source))
            records = found if plan is first else records
        results = [decode_batch(model, request, [ids], keys) for ids, keys in few]
        one_by_one.append(sum(result.seconds[0] for result in results))
    # Prompts differ in length, and few stand for all: only their tokens can be compared.
    decoded = sum(len(result.tokens[0]) for result in results)
    single = decoded / statistics.median(one_by_one[1:])
    tokens = sum(len(record.answer) for record in records) / len(source)
    speeds = {}
    for name in plans:
        together = statistics.median(seconds[name][1:])
        speeds[name] = {
            'prompts_per_second': 1 / together,
            'tokens_per_second': tokens / together,
            'tokens_per_second_alone': single,
            'ratio': tokens / together / single,
        }
    return speeds, records


def step_cost(
    model: Model,
    records: list[Trajectory],
    batch: int,
    weights: LossWeights,
    noise: Noise,
    compute: Any,
    repeats: int = 5,
) -> dict[str, float]:
    """Seconds of an autoregressive and of a consistency step over the same answers.

    Args:
      model: where training starts; its weights are float32.
      records: a collection.
      batch: answers per step.
      weights, noise: of the consistency step; the other has the autoregressive loss alone.
      compute: precision of the products.
      repeats: times each step is timed, in turn, after one that compiles.
    """
    samples = [record for record in records if len(record.states)]
    module = Llama(model.config, model.params['norm'].dtype, compute, backend=model.backend)
    optimizer = make_optimizer(OptimizerConfig(kind='muon'), steps=100)
    plain = dataclasses.replace(weights, ar_weight=1.0, global_weight=0.0, local_weight=0.0)
    steps: dict[str, Callable[[], Any]] = {}
    for name, loss, states in (('ar', plain, None), ('consistency', weights, noise)):
        packed = jax.tree.map(jnp.asarray, make_batch(samples, batch, 0, 0, states))
        clean = int((packed.segment_BT == 0).sum())
        steps[name] = _stepper(
            make_step(partial(text_loss, module, loss), optimizer),
            new_state(optimizer, model.params),
            packed,
        )
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats + 1):
        for name, step in steps.items():
            begin = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - begin)
    ar, consistency = (statistics.median(seconds[name][1:]) for name in ('ar', 'consistency'))
    return {
        'ar_step_seconds': ar,
        'consistency_step_seconds': consistency,
        'ratio': consistency / ar,
        'clean_tokens': clean,
        'clean_tokens_per_second': clean / consistency,
    }


def _stepper(step: Callable, state: Any, batch: Any) -> Callable[[], None]:
    """A step that goes on from where the last call of it stopped."""

    def run() -> None:
        nonlocal state
        state, _ = jax.block_until_ready(step(state, batch))

    return run
