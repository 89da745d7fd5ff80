"""A decode as it went, forward by forward, and the JSON file that keeps it."""

import dataclasses
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config

from cllm_jax.errors import DataError
from cllm_jax.runs.atomic import write_atomic

STRICT = ConfigDict(strict=True, extra='forbid', allow_inf_nan=False)


@with_config(STRICT)
@dataclasses.dataclass(frozen=True)
class Forward:
    """What one call of the model verified, and what it gave.

    A node that could not be accepted (`Draft.valid_BN`), or that follows such a one, is left out.
    """

    start: int
    """Place of node 0 in the answer; -1, the prompt's last token, for the prefill."""
    tokens: tuple[int, ...]
    """The draft. A node stands as many places after node 0 as it has nodes before it."""
    parents: tuple[int, ...]
    """The node that each follows; -1 for node 0."""
    window: int
    """How many of the first nodes are a Jacobi window, whose guesses begin random and are kept."""
    accepted: tuple[int, ...]
    """The nodes after node 0 that were right, one after the other."""
    committed: tuple[int, ...]
    """The tokens that it added to the answer: mostly those of `accepted` and one more."""

    @property
    def places(self) -> list[int]:
        """Where in the answer each node stands."""
        found = [self.start]
        for parent in self.parents[1:]:
            found.append(found[parent] + 1)
        return found


@with_config(STRICT)
@dataclasses.dataclass(frozen=True)
class DecodeTrace:
    """How a method answered a prompt."""

    name: str
    """What the method is called."""
    model: str
    prompt: str
    forwards: tuple[Forward, ...]
    pieces: dict[int, str]
    """The text of every token."""
    seconds: float | None = None
    """Median of its time, prefill included, compilation left out; None if it was not measured."""
    timed: str = ''
    """Which way to compute the same was the fastest, and is what `seconds` tells, if another."""

    @property
    def answer(self) -> list[int]:
        return list(itertools.chain.from_iterable(f.committed for f in self.forwards))


@with_config(STRICT)
@dataclasses.dataclass(frozen=True)
class TraceFile:
    """What a file holds."""

    format: Literal['cllm_jax trace 1']
    decodes: tuple[DecodeTrace, ...]


def accepted(
    tokens: Sequence[int], parents: Sequence[int], committed: Sequence[int]
) -> tuple[int, ...]:
    """The nodes of the first of the longest paths from node 0 that spell committed tokens."""
    paths: dict[int, tuple[int, ...]] = {0: ()}
    for node, parent in enumerate(parents):
        before = paths.get(parent)
        if before is None or len(before) == len(committed):
            continue
        if tokens[node] == committed[len(before)]:
            paths[node] = (*before, node)
    return max(paths.values(), key=len)


def checked(trace: DecodeTrace) -> DecodeTrace:
    """The trace, if its forwards can be those of one decode; raises DataError."""
    where = f'trace of {trace.name!r}'
    if not trace.forwards:
        raise DataError(f'{where}: has no forward; decode again')
    if trace.seconds is not None and trace.seconds <= 0:
        raise DataError(f'{where}: seconds {trace.seconds}; they must be above 0')
    place = -1
    for number, forward in enumerate(trace.forwards, 1):
        order = all(-1 <= p < i and (p < 0) == (i == 0) for i, p in enumerate(forward.parents))
        sizes = len(forward.tokens) == len(forward.parents) > 0 and forward.committed
        fits = forward.start == place and 0 <= forward.window <= len(forward.tokens)
        if not (order and sizes and fits) or forward.accepted != accepted(
            forward.tokens, forward.parents, forward.committed
        ):
            rule = 'does not follow from the one before it and its own draft'
            raise DataError(f'{where}, forward {number}: {rule}; decode again')
        place += len(forward.committed)
    return trace


def write_traces(path: Path, traces: Sequence[DecodeTrace]) -> None:
    """Write a file that `read_traces` reads; its directory is made if need be."""
    content = dataclasses.asdict(TraceFile('cllm_jax trace 1', tuple(traces)))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, (json.dumps(content, separators=(',', ':')) + '\n').encode())


def read_traces(path: Path) -> list[DecodeTrace]:
    """The traces of a file; raises DataError if it is damaged or another kind of file."""
    remedy = 'write it again (python -m cllm_jax.decode --trace FILE)'
    try:
        found = TypeAdapter(TraceFile).validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = '.'.join(map(str, first['loc'])) or 'its beginning'
        raise DataError(f'{path}: not a trace, at {place}: {first["msg"]}; {remedy}') from None
    if not found.decodes:
        raise DataError(f'{path}: has no decode; {remedy}')
    try:
        return [checked(trace) for trace in found.decodes]
    except DataError as error:
        raise DataError(f'{path}: {error}') from None
