"""How fast a method decodes: tokens per forward, tokens per second, and identity with AR.

Everything compared is decoded in the same run by the same loop, prompt by prompt in turn, so that
what else the machine does hits all alike. Compilation is kept out by decoding every prompt once
before anything is timed.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import TypeVar

from cllm_jax.decoding.drafter import Drafter
from cllm_jax.decoding.engine import decode_batch
from cllm_jax.decoding.request import Request, Texts, encode, row_keys
from cllm_jax.decoding.result import DecodeResult
from cllm_jax.hf.load import MIXED, load
from cllm_jax.hf.model import Model
from cllm_jax.model.config import LlamaConfig
from cllm_jax.runtime.backend import Backend

K = TypeVar('K')
IN_CLASS = 'in its class'
"""What is said of AR with as many rows as it takes to round like a draft."""
MOST_COPIED = 4 << 30
"""Bytes of float32 weights of the largest model that is loaded again in other precisions."""


@dataclasses.dataclass(frozen=True)
class Method:
    """A model and how it is asked to decode."""

    model: Model
    request: Request

    def with_drafter(self, drafter: Drafter) -> 'Method':
        """The same model and request with another drafter."""
        return Method(self.model, dataclasses.replace(self.request, drafter=drafter))


def plain_methods(name: str, plain: Method) -> dict[str, Method]:
    """Autoregressive decoding, in each way in which it may be the fastest.

    A speed-up counts from the fastest. If a draft multiplies bfloat16 that may be one in another
    precision (`Backend.any_precision_may_be_faster`), for models of at most `MOST_COPIED`.

    Args:
      name: of AR with as few rows as is fastest; others have added what they are.
      plain: a model with `AutoRegressive()` as its drafter.
    """
    model, request = plain.model, plain.request
    fastest = Method(model, dataclasses.replace(request, exact='off'))
    methods = {name: fastest}
    if request.exact == 'class' or (model.backend.exact and request.exact == 'auto'):
        methods[f'{name}, {IN_CLASS}'] = plain
    mesh = getattr(model.params['norm'].sharding, 'mesh', None)  # None on a single device
    for other in other_precisions(model.config, model.precision, model.backend):
        copy = load(model.source, other, mesh)
        methods[f'{name}, {other}'] = dataclasses.replace(fastest, model=copy)
    return methods


def other_precisions(config: LlamaConfig, precision: str, backend: Backend) -> list[str]:
    """In which other precisions AR of a model is timed; a copy of the model for each."""
    if precision == 'float32' or not backend.any_precision_may_be_faster:
        return []
    too_large = 4 * config.parameters > MOST_COPIED
    return [] if too_large else sorted({'float32', MIXED, 'bfloat16'} - {precision})


def one_by_one(method: Method, prompts: Texts) -> DecodeResult:
    """Every prompt decoded alone, by the very calls that `tokens_per_second` times."""
    results = [_once(method, prompts, range(i, i + 1), 1)[0] for i in range(len(prompts))]
    columns = ('texts', 'tokens', 'accepted', 'seconds')
    return DecodeResult(*([x for result in results for x in getattr(result, c)] for c in columns))


def tokens_per_second(
    methods: Mapping[str, Method],
    prompts: Texts,
    repeats: int = 3,
    progress: Callable[[int], None] = lambda prompts: None,
    batch: int = 1,
) -> dict[str, float]:
    """The speed of each method, prefill included (`time_in_turn`); a call has `batch` prompts."""
    return time_in_turn(_calls(methods, prompts, batch), len(prompts), repeats, progress, batch)


def seconds_of_each(
    methods: Mapping[K, Method],
    prompts: Texts,
    repeats: int = 3,
    progress: Callable[[int], None] = lambda prompts: None,
) -> dict[K, list[float]]:
    """The seconds that each method takes for each prompt, alone, as `tokens_per_second` times."""
    timed = each_in_turn(_calls(methods, prompts, 1), len(prompts), repeats, progress)
    return {name: [seconds for _, seconds in found] for name, found in timed.items()}


def time_in_turn(
    calls: Mapping[str, Callable[[range], tuple[int, float]]],
    count: int,
    repeats: int = 3,
    progress: Callable[[int], None] = lambda rows: None,
    batch: int = 1,
) -> dict[str, float]:
    """Tokens per second of wall-clock of everything that is compared; see `each_in_turn`."""
    speed = {}
    for name, found in each_in_turn(calls, count, repeats, progress, batch).items():
        seconds = sum(seconds for _, seconds in found)
        speed[name] = sum(tokens for tokens, _ in found) / max(seconds, 1e-9)
    return speed


def each_in_turn(
    calls: Mapping[K, Callable[[range], tuple[int, float]]],
    count: int,
    repeats: int = 3,
    progress: Callable[[int], None] = lambda rows: None,
    batch: int = 1,
) -> dict[K, list[tuple[int, float]]]:
    """The tokens and the seconds of everything that is compared, call by call.

    Args:
      calls: decode some of the rows; return the tokens and the seconds that it took.
      count: how many rows there are; a call gets `batch` of them.
      repeats: times each call is timed, in turn, after a first one that compiles and whose tokens
        count; the median of its times counts.
    """
    found = {name: [] for name in calls}
    for begin in range(0, count, batch):
        rows = range(begin, min(begin + batch, count))
        first, *timed = [{n: call(rows) for n, call in calls.items()} for _ in range(repeats + 1)]
        for name in calls:
            seconds = statistics.median(each[name][1] for each in timed)
            found[name].append((first[name][0], seconds))
        progress(len(rows))
    return found


def _calls(
    methods: Mapping[K, Method], prompts: Texts, batch: int
) -> dict[K, Callable[[range], tuple[int, float]]]:
    """What `each_in_turn` calls to decode some of the prompts with each method."""

    def decode(method: Method, rows: range) -> tuple[int, float]:
        result, seconds = _once(method, prompts, rows, batch)
        return sum(map(len, result.tokens)), seconds

    return {name: partial(decode, method) for name, method in methods.items()}


def _once(method: Method, prompts: Texts, rows: range, batch: int) -> tuple[DecodeResult, float]:
    """Some of the prompts decoded, and the seconds that took."""
    request = dataclasses.replace(method.request, batch=batch)
    ids, keys = [encode(method.model, prompts[i]) for i in rows], row_keys(request.seed, rows)
    begin = time.perf_counter()
    result = decode_batch(method.model, request, ids, keys)
    return result, time.perf_counter() - begin
