"""How fast a method decodes: tokens per forward, tokens per second, and identity with AR.

Everything compared is decoded in the same run by the same loop, prompt by prompt in turn, so that
what else the machine does hits all alike. Compilation is kept out by decoding every prompt once
before anything is timed.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

from jax.sharding import Mesh

from cllm_jax.decoding.drafter import Drafter
from cllm_jax.decoding.engine import decode_batch
from cllm_jax.decoding.request import Request, encode, row_keys
from cllm_jax.decoding.result import DecodeResult
from cllm_jax.hf.load import Model, load


@dataclasses.dataclass(frozen=True)
class Method:
    """A model and how it is asked to decode."""

    model: Model
    request: Request

    def with_drafter(self, drafter: Drafter) -> 'Method':
        """The same model and request with another drafter."""
        return Method(self.model, dataclasses.replace(self.request, drafter=drafter))


def plain_methods(name: str, plain: Method, mesh: Mesh | None = None) -> dict[str, Method]:
    """Autoregressive decoding, in each precision in which it may be the fastest.

    A speed-up counts from the fastest (`Backend.float32_may_be_faster`).

    Args:
      name: of the method as it is; the other has the precision added.
      plain: a model with `AutoRegressive()` as its drafter, on the devices of `mesh`.
    """
    methods, model = {name: plain}, plain.model
    if model.module.compute is not None and model.backend.float32_may_be_faster:
        wide = load(model.source, 'float32', mesh)
        methods[f'{name}, float32'] = dataclasses.replace(plain, model=wide)
    return methods


def tokens_per_forward(result: DecodeResult) -> float:
    """Committed tokens over calls of the model, prefill included, over all prompts."""
    return sum(map(len, result.tokens)) / max(sum(result.forwards), 1)


def share_identical(a: DecodeResult, b: DecodeResult) -> float:
    """Share of prompts whose tokens are the same in both, 0..1."""
    same = [x == y for x, y in zip(a.tokens, b.tokens, strict=True)]
    return sum(same) / max(len(same), 1)


def one_by_one(method: Method, prompts: Sequence[str | Sequence[int]]) -> DecodeResult:
    """Every prompt decoded alone, by the very calls that `tokens_per_second` times."""
    parts = [_once(method, prompts, range(i, i + 1), 1)[0] for i in range(len(prompts))]
    columns = ('texts', 'tokens', 'accepted', 'seconds')
    return DecodeResult(*([x for part in parts for x in getattr(part, c)] for c in columns))


def tokens_per_second(
    methods: Mapping[str, Method],
    prompts: Sequence[str | Sequence[int]],
    repeats: int = 3,
    progress: Callable[[int], None] = lambda prompts: None,
    batch: int = 1,
) -> dict[str, float]:
    """End-to-end speed of each method: tokens over wall-clock, prefill included.

    Prompts are decoded `batch` at a time, in one call, `repeats` times by every method in turn; the
    median of its times counts.
    """
    totals = {name: [0, 0.0] for name in methods}
    for begin in range(0, len(prompts), batch):
        rows = range(begin, min(begin + batch, len(prompts)))
        for name, method in methods.items():
            totals[name][0] += sum(map(len, _once(method, prompts, rows, batch)[0].tokens))
        seconds: dict[str, list[float]] = {name: [] for name in methods}
        for _ in range(repeats):
            for name, method in methods.items():
                seconds[name].append(_once(method, prompts, rows, batch)[1])
        for name in methods:
            totals[name][1] += statistics.median(seconds[name])
        progress(len(rows))
    return {name: tokens / max(taken, 1e-9) for name, (tokens, taken) in totals.items()}


def _once(
    method: Method, prompts: Sequence[str | Sequence[int]], rows: range, batch: int
) -> tuple[DecodeResult, float]:
    """Some of the prompts decoded, and the seconds that took."""
    request = dataclasses.replace(method.request, batch=batch)
    ids, keys = [encode(method.model, prompts[i]) for i in rows], row_keys(request.seed, rows)
    begin = time.perf_counter()
    result = decode_batch(method.model, request, ids, keys)
    return result, time.perf_counter() - begin
