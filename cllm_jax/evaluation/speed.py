"""How fast a way of decoding is: tokens per forward, tokens per second, and identity with AR.

Everything compared is decoded in the same run by the same loop, prompt by prompt in turn, so that
a change of the machine's mood hits all alike. Compilation is kept out by decoding every prompt
once before anything is timed.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from cllm_jax.decoding.engine import decode_batch
from cllm_jax.decoding.request import Request, encode, row_keys
from cllm_jax.decoding.result import DecodeResult
from cllm_jax.hf.load import Model, load


@dataclasses.dataclass(frozen=True)
class Way:
    """A model with a way to decode it."""

    model: Model
    request: Request
    weights: Any = ()


def ar_ways(name: str, model: Model, request: Request, mesh: Mesh | None = None) -> dict[str, Way]:
    """Autoregressive decoding, in each precision in which it may be the fastest.

    A speed-up counts from the faster. In mixed precision on a CPU that is one or the other: there
    is half as much to read of bfloat16 matrices, and a single row has to be multiplied with what
    they were converted to.

    Args:
      name: of the way with the model as it is; the other has the precision behind it.
      model, mesh: what decodes.
      request: what it is asked for, with `AutoRegressive()` as its drafter.
    """
    ways = {name: Way(model, request)}
    if model.module.compute is not None and jax.default_backend() == 'cpu':
        ways[f'{name}, float32'] = Way(load(model.source, 'float32', mesh), request)
    return ways


def tokens_per_forward(result: DecodeResult) -> float:
    """Committed tokens over calls of the model, prefill included, over all prompts."""
    return sum(map(len, result.tokens)) / max(sum(result.forwards), 1)


def share_identical(a: DecodeResult, b: DecodeResult) -> float:
    """Share of prompts whose tokens are the same in both, 0..1."""
    same = [x == y for x, y in zip(a.tokens, b.tokens, strict=True)]
    return sum(same) / max(len(same), 1)


def one_by_one(way: Way, prompts: Sequence[str | Sequence[int]]) -> DecodeResult:
    """Every prompt decoded alone, by the very calls that `tokens_per_second` times."""
    parts = [_once(way, prompts, range(i, i + 1), 1)[0] for i in range(len(prompts))]
    return DecodeResult(
        [text for part in parts for text in part.texts],
        [tokens for part in parts for tokens in part.tokens],
        [accepted for part in parts for accepted in part.accepted],
        [seconds for part in parts for seconds in part.seconds],
    )


def tokens_per_second(
    ways: Mapping[str, Way],
    prompts: Sequence[str | Sequence[int]],
    repeats: int = 3,
    progress: Callable[[int], None] = lambda prompts: None,
    batch: int = 1,
) -> dict[str, float]:
    """End-to-end speed of each way: tokens over wall-clock, prefill included.

    Prompts are decoded `batch` at a time, in one call, `repeats` times by every way in turn; the
    median of its times counts.
    """
    totals = {name: [0, 0.0] for name in ways}
    for begin in range(0, len(prompts), batch):
        rows = range(begin, min(begin + batch, len(prompts)))
        for name, way in ways.items():
            totals[name][0] += sum(map(len, _once(way, prompts, rows, batch)[0].tokens))
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(repeats):
            for name, way in ways.items():
                seconds[name].append(_once(way, prompts, rows, batch)[1])
        for name in ways:
            totals[name][1] += statistics.median(seconds[name])
        progress(len(rows))
    return {name: tokens / max(taken, 1e-9) for name, (tokens, taken) in totals.items()}


def _once(
    way: Way, prompts: Sequence[str | Sequence[int]], rows: range, batch: int
) -> tuple[DecodeResult, float]:
    """Some of the prompts decoded, and the seconds that took."""
    request = dataclasses.replace(way.request, batch=batch)
    ids, keys = [encode(way.model, prompts[i]) for i in rows], row_keys(request.seed, rows)
    begin = time.perf_counter()
    result = decode_batch(way.model, request, ids, keys, way.weights)
    return result, time.perf_counter() - begin
