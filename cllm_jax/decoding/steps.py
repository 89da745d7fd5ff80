"""Decoding with a look at the answers after every call of the model."""

import dataclasses
import itertools
import time
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from cllm_jax.decoding.engine import answers, by_length, run_until, start, take_answers
from cllm_jax.decoding.request import Request, Texts, check, encode_each, row_keys
from cllm_jax.decoding.result import Answer, DecodeResult
from cllm_jax.decoding.text import find_stop
from cllm_jax.errors import ConfigError
from cllm_jax.hf.model import Model
from cllm_jax.runtime.processes import fetch


@dataclasses.dataclass(frozen=True)
class Step:
    """How far a call of `decode` is."""

    forward: int
    """Calls of the model by now, prefills included. One is of a batch: it adds at least a token to
    every answer of the batch that has not ended."""
    tokens: tuple[tuple[int, ...], ...]
    """For each prompt, in the given order, its answer so far: none before its batch begins, all of
    it after its end."""


def decode_steps(
    model: Model, request: Request, prompts: Texts, on_step: Callable[[Step], object]
) -> DecodeResult:
    """As `engine.decode_all`, by calls of one iteration each, and `on_step` is told after each.

    Batches are not refilled, and one thread decodes. What `on_step` raises ends the decoding.
    """
    if not callable(on_step):
        rule = 'must be a function of one argument, a Step'
        raise ConfigError(f'on_step {on_step!r}: {rule}; write on_step=print')
    encoded = encode_each(model, prompts)
    check(model, request, encoded)
    so_far: list[tuple[int, ...]] = [()] * len(encoded)
    found: dict[int, Answer] = {}
    forwards = itertools.count(1)

    def told(tokens: dict[int, tuple[int, ...]]) -> None:
        for row, ids in tokens.items():
            so_far[row] = ids
        on_step(Step(next(forwards), tuple(so_far)))

    for group in by_length([len(ids) for ids in encoded], request.batch):
        for first in range(0, len(group), request.batch):
            rows = group[first : first + request.batch]
            some = _decode_batch(model, request, {row: encoded[row] for row in rows}, told)
            found |= dict(zip(rows, some, strict=True))
    return DecodeResult.of([found[row] for row in range(len(encoded))])


def _decode_batch(
    model: Model,
    request: Request,
    prompts: dict[int, list[int]],
    told: Callable[[dict[int, tuple[int, ...]]], None],
) -> list[Answer]:
    """The answers to a batch of prompts, each by its number in the call."""
    begin, rows = time.perf_counter(), list(prompts)
    state = start(model, request, list(prompts.values()), row_keys(request.seed, rows))
    for until in itertools.count(2):
        finished, tokens = np.array(fetch(state.finished_B)), {}
        for i, (row, ids) in enumerate(zip(rows, answers(state, len(rows))[0], strict=True)):
            stop = request.stop and find_stop(model, ids, request.stop)
            tokens[row] = tuple(ids[: stop[1]] if stop else ids)
            finished[i] |= bool(stop)
        told(tokens)
        if finished.all():
            break
        if request.stop:
            state = state.replace(finished_B=jnp.asarray(finished))
        state = run_until(model, request, state, until)
    taken = take_answers(model, request, state, dict.fromkeys(range(len(rows)), begin))
    return [taken[i] for i in range(len(rows))]
