"""Which window `Jacobi(block='auto')` takes: the one that decodes fastest on this machine.

A window of n tokens costs c(n) and commits some of them. What it costs hangs on the machine and is
measured once; what it commits hangs on the model and is learnt from what that has decoded. Both
are kept (`runs/notes.py`). The choice hangs on times; the tokens do not, see docs/exactness.md.
"""

import dataclasses
import json
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cllm_jax.decoding.engine import decode_all
from cllm_jax.decoding.request import Request, Texts
from cllm_jax.decoding.result import DecodeResult
from cllm_jax.drafters.autoregressive import AutoRegressive
from cllm_jax.drafters.jacobi import AUTO, Jacobi
from cllm_jax.evaluation.forward_cost import ITERATIONS, NeverRight, endless, time_once
from cllm_jax.hf.model import Model
from cllm_jax.runs.notes import read_note, write_note

FIRST = 16
"""The window of a model of which nothing is known."""
SAMPLE = 4
"""Prompts that are decoded to learn about a model, where more are to come."""
PROMPT = 64
"""Tokens of the prompts with which windows are timed."""
LEAST_GAIN = 1.05
"""How much faster than AR a window is expected to be before it is taken: times have noise."""
ENOUGH = 1 << 16
"""Forwards after which what was learnt counts half, as new ones come."""
SECONDS = 1.0
"""To measure in, apart from what compiles."""
REPEATS = 3
FEWEST = 4
"""Forwards that are timed at least."""
PRIOR = 'accepted.json'
"""A file in a model's directory: what its windows were seen to commit when it was made."""

Accepted = Mapping[int, Sequence[int]]
"""By window, how many forwards committed 1, 2, ... n tokens."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """A request with a window, and why it has that one."""

    request: Request
    why: str = ''
    """'' where there was nothing to choose."""


def choose(model: Model, request: Request, prompts: Texts, sample: bool = True) -> Choice:
    """The request with a window that is expected to decode fastest, AR being one of one token.

    Args:
      prompts: what will be decoded. If more than a few, the first ones are decoded to learn about a
        model of which nothing is known.
      sample: leave that out if False.
    """
    if not is_open(request):
        return Choice(request)
    if model.config.max_positions < PROMPT + ITERATIONS + 1:
        return Choice(with_window(request, FIRST), f'block auto: {FIRST}, for texts are short')
    seen = known(model, request)
    first = with_window(request, FIRST)
    if not seen and sample and len(prompts) > SAMPLE:
        seen = learn(model, request, first, decode_all(model, first, prompts[:SAMPLE]))
    if not seen:
        why = f'block auto: {FIRST}, for nothing is known yet of what this model accepts'
        return Choice(first, why)
    speed = expected_speed(model, request, seen)
    best = max(speed, key=lambda n: speed[n] if n > 1 else speed[n] * LEAST_GAIN)
    shown = ', '.join(f'{n if n > 1 else "AR"}: {x:,.0f}' for n, x in speed.items())
    chosen = best if best > 1 else 'AR'
    why = f'block auto: {chosen}; expected tokens/s after the prefill, batch {request.batch}'
    return Choice(with_window(request, best), f'{why}: {shown}')


def is_open(request: Request) -> bool:
    """Whether the window is still to be chosen."""
    return isinstance(request.drafter, Jacobi) and request.drafter.block == AUTO


def with_window(request: Request, block: int) -> Request:
    """The request with a window of its drafter; AR for one token."""
    plain = AutoRegressive()
    drafter = dataclasses.replace(request.drafter, block=block) if block > 1 else plain
    return dataclasses.replace(request, drafter=drafter)


def expected_speed(model: Model, request: Request, seen: Accepted) -> dict[int, float]:
    """Tokens per second of a batch, without its prefill, for AR (1) and for every window."""
    seconds = measured(model, request)
    return {
        n: request.batch * (tokens_per_forward(seen, n) if n > 1 else 1.0) / seconds[n]
        for n in seconds
    }


def tokens_per_forward(seen: Accepted, window: int) -> float:
    """What a window is expected to commit per forward, of one that was seen, or of the nearest.

    A shorter one needs ceil(k / n) forwards for what one forward committed at once. A longer one
    goes on where all was accepted, as far again.
    """
    known = min(seen, key=lambda n: (abs(n.bit_length() - window.bit_length()), -n))
    counts = dict(enumerate(seen[known], 1))
    tokens = sum(k * count for k, count in counts.items())
    forwards = sum(-(-k // window) * count for k, count in counts.items())
    mean = tokens / max(forwards, 1)
    full = counts[known] / max(sum(counts.values()), 1)
    return min(mean * (1 + full * (window / known - 1)), window) if window > known else mean


def measured(model: Model, request: Request) -> dict[int, float]:
    """Seconds of a forward with one token and with every window, measured here once."""
    windows = (1, *model.backend.windows)
    nodes = [with_window(request, n).drafter.nodes for n in windows]
    facts = {'nodes': nodes, 'batch': request.batch, 'exact': request.exact}
    facts |= model.rounding
    noted = read_note('window', facts)
    if not (isinstance(noted, list) and len(noted) == len(nodes)):
        noted = _measure(endless(model), request, nodes)
        write_note('window', facts, noted)
    return dict(zip(windows, noted, strict=True))


def _measure(model: Model, request: Request, nodes: Sequence[int]) -> list[float]:
    """Seconds of a forward with so many nodes: medians, measured in turn, in about `SECONDS`."""
    rng, how = np.random.default_rng(0), {'batch': request.batch, 'exact': request.exact}
    prompts = rng.integers(0, model.config.vocab_size, (request.batch, PROMPT)).tolist()
    asked = [Request(NeverRight(n), ITERATIONS + 1, **how) for n in nodes]
    for each in asked:
        time_once(model, each, prompts, FEWEST)  # compiles
    share = SECONDS / len(nodes) / (REPEATS + 1)
    rough = [time_once(model, each, prompts, FEWEST)[1] / FEWEST for each in asked]
    counts = [int(np.clip(share / seconds, FEWEST, ITERATIONS)) for seconds in rough]
    each_time = list(zip(asked, counts, strict=True))
    times = [
        [time_once(model, each, prompts, count)[1] / count for each, count in each_time]
        for _ in range(REPEATS)
    ]
    return [statistics.median(column) for column in zip(*times, strict=True)]


def known(model: Model, request: Request) -> Accepted:
    """What windows of this model were seen to commit: here, else where it was made."""
    facts = _facts(model, request)
    noted = read_note('accepted', facts) if facts else None
    if not noted and model.directory and _is_plain(request):
        try:
            noted = json.loads((model.directory / PRIOR).read_text())
        except (OSError, ValueError):
            noted = None
    return _checked(noted)


def learn(model: Model, asked: Request, request: Request, result: DecodeResult) -> Accepted:
    """Remember what a chosen window committed in each forward; what is known by now.

    Args:
      asked: the request whose window was to be chosen; nothing is kept of another.
      request: the one that gave `result`.
    """
    if not is_open(asked) or not isinstance(request.drafter, Jacobi):
        return {}
    window, seen = request.drafter.block, dict(known(model, asked))
    before, new = seen.get(window, [0] * window), accepted(result, window)
    share = 1 if sum(before) < ENOUGH else 2
    seen[window] = [a // share + b for a, b in zip(before, new, strict=True)]
    seen = {n: counts for n, counts in seen.items() if sum(counts)}
    if seen and (facts := _facts(model, asked)):
        write_note('accepted', facts, {str(n): counts for n, counts in seen.items()})
    return seen


def accepted(result: DecodeResult, window: int) -> list[int]:
    """How many forwards after the prefill committed 1, 2, ... n tokens."""
    counts = [0] * window
    for row in result.accepted:
        for k in row[1:]:
            counts[k - 1] += 1
    return counts


def _checked(noted: object) -> Accepted:
    """What a file says, if it says how often 1, 2, ... n tokens were committed; else nothing."""
    try:
        seen = {int(n): [int(count) for count in counts] for n, counts in dict(noted or {}).items()}
    except (TypeError, ValueError):
        return {}
    return {n: c for n, c in seen.items() if len(c) == n > 1 and min(c) >= 0 and sum(c)}


def _is_plain(request: Request) -> bool:
    return request.drafter == Jacobi(request.drafter.block)


def _facts(model: Model, request: Request) -> dict[str, Any]:
    """Which model it is, by its files, and which drafter; {} for a model without files."""
    if model.directory is None:
        return {}
    place, jacobi = model.directory.absolute(), request.drafter
    files = [place] if place.is_file() else sorted(place.glob('*.safetensors'))
    stats = [(file.name, file.stat()) for file in files]
    weights = [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]
    drafter = [jacobi.mode, jacobi.recycle, jacobi.lookup]
    return {'model': str(place), 'weights': weights, 'with': model.adapter, 'drafter': drafter}
