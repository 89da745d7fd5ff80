"""How fast trajectories are collected.

The ratio compares like with like in one run: collection in batches, and decoding some of the
prompts one at a time, by their tokens per second.
"""

import statistics
import time
from collections.abc import Mapping

from cllm_jax.data.sources import Source
from cllm_jax.decoding.engine import decode_batch
from cllm_jax.decoding.request import Request, encode, row_keys
from cllm_jax.decoding.result import Trajectory
from cllm_jax.drafters.jacobi import Jacobi
from cllm_jax.hf.model import Model
from cllm_jax.trajectories.collector import collect_rows
from cllm_jax.trajectories.store import Collection


def collection_speed(
    model: Model, source: Source, plans: Mapping[str, Collection], alone: int, repeats: int = 3
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
