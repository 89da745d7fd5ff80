"""From prompts to answers: batches prompts, runs the loop, refills the batch, takes the results."""

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from threading import Event, Lock
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cllm_jax.decoding.loop import (
    DecodeState,
    advance,
    advance_by_eigen,
    fits,
    grow,
    prefill,
    prefill_by_eigen,
    replace_rows,
)
from cllm_jax.decoding.request import (
    FIRST_ROOM,
    Request,
    bucket,
    cache_slots,
    check,
    encode,
    encode_each,
    row_keys,
)
from cllm_jax.decoding.result import DecodeResult, Trajectory
from cllm_jax.decoding.text import cut, find_stop, settled, text_of
from cllm_jax.errors import ConfigError
from cllm_jax.hf.load import Model
from cllm_jax.runtime.backend import by_eigen, side_by_side, useful_threads
from cllm_jax.runtime.processes import fetch, keys_beside

LEAST_ROWS = 2
"""Fewest rows of a batch that a thread of its own decodes: a single one would read all weights for
itself."""

STREAM_ITERATIONS = 4
"""Iterations between two looks at the text when streaming or searching for stop strings."""


def start(
    model: Model,
    request: Request,
    prompts: Sequence[Sequence[int]],
    keys: jax.Array,
    weights: Any,
    rows: int = 0,
    width: int = 0,
    to_the_end: bool = False,
) -> DecodeState:
    """Prefill one batch. The batch is filled up with rows that never run.

    Args:
      rows: size of the batch; by default the next power of two.
      width: length to which prompts are padded; by default the bucket of the longest.
      to_the_end: decode in the same call, to the end or until the cache is full.

    Raises:
      ConfigError: see `check`.
    """
    check(model, request, prompts)
    rows = rows or 1 << (len(prompts) - 1).bit_length()
    width, steps = width or bucket(max(map(len, prompts))), bucket(request.max_tokens)
    nodes = request.drafter.nodes
    prompt_BP = np.zeros((rows, width), np.int32)
    prompt_len_B = np.ones(rows, np.int32)
    max_tokens_B = np.zeros(rows, np.int32)
    for i, ids in enumerate(prompts):
        prompt_BP[i, : len(ids)] = ids
        prompt_len_B[i], max_tokens_B[i] = len(ids), request.max_tokens
    if rows > len(prompts):
        keys = keys[np.minimum(np.arange(rows), len(prompts) - 1)]
    keys = keys_beside(model.params, keys)
    run = prefill_by_eigen if by_eigen(model.params) else prefill
    return run(
        model.module,
        model.params,
        request.drafter,
        weights,
        request.sampling,
        prompt_BP,
        prompt_len_B,
        max_tokens_B,
        stop_ids(model),
        keys,
        slots=cache_slots(width, steps, nodes),
        steps=steps,
        trace=request.trace,
        room=cache_slots(width, min(steps, FIRST_ROOM), nodes),
        to_the_end=to_the_end,
    )


def stop_ids(model: Model) -> np.ndarray:
    """The ids that end an answer; -1, which no token has, if there are none."""
    return np.asarray(model.config.eos_ids or (-1,), np.int32)


def answers(state: DecodeState, rows: int) -> tuple[list[list[int]], list[list[int]]]:
    """Committed answer tokens and tokens per forward of the first `rows` rows."""
    seq = state.sequences
    wanted = (seq.tokens_BS, seq.prompt_len_B, seq.length_B, state.emitted_BI, state.forwards_B)
    tokens_BS, prompt_len_B, length_B, emitted_BI, forwards_B = fetch(wanted)
    spans = zip(tokens_BS, prompt_len_B, length_B, strict=True)
    tokens = [row[a : b + 1].tolist() for row, a, b in spans]
    accepted = [row[:n].tolist() for row, n in zip(emitted_BI, forwards_B, strict=True)]
    return tokens[:rows], accepted[:rows]


def run_until(
    model: Model, request: Request, weights: Any, state: DecodeState, until: int, idle: int = 0
) -> DecodeState:
    """Iterate up to iteration `until`, or until `idle` rows (all, if 0) are finished.

    A cache that is full becomes twice as long.
    """
    until, idle = np.int32(until), np.int32(idle or len(state.finished_B))
    how = (request.drafter, weights, request.sampling, stop_ids(model))
    run = advance_of(model)
    state = run(model.module, model.params, *how, until, idle, state)
    while _lacks_room(request, state):
        state = run(model.module, model.params, *how, until, idle, _with_more_room(state))
    return state


def advance_of(model: Model) -> Callable[..., DecodeState]:
    """`advance`, as it is compiled for the model."""
    return advance_by_eigen if by_eigen(model.params) else advance


def _lacks_room(request: Request, state: DecodeState) -> bool:
    """Whether a row waits for a longer cache."""
    longest = state.sequences.tokens_BS.shape[1]
    return state.cache.slots < longest and not fetch(fits(state, request.drafter.nodes))


def _with_more_room(state: DecodeState) -> DecodeState:
    """The state with a cache twice as long, or as long as any row may need."""
    return grow(state, min(2 * state.cache.slots, state.sequences.tokens_BS.shape[1]))


def _run(
    model: Model, request: Request, weights: Any, state: DecodeState, rows: int, idle: int
) -> tuple[DecodeState, np.ndarray]:
    """Run until `idle` rows are finished; which are, bool `[B]`.

    With stop strings, the text of the first `rows` rows is looked at every few iterations.
    """
    while True:
        until = int(fetch(state.iteration)) + STREAM_ITERATIONS if request.stop else _ENDLESS
        state = run_until(model, request, weights, state, until, idle)
        finished = np.array(fetch(state.finished_B))
        if finished.sum() >= idle:
            return state, finished
        for i, tokens in enumerate(answers(state, rows)[0]):
            if not finished[i]:
                finished[i] = cut(text_of(model, tokens), request.stop) is not None
        state = state.replace(finished_B=jnp.asarray(finished))


_ENDLESS = np.iinfo(np.int32).max


def _first(tokens: int, accepted: Sequence[int]) -> list[int]:
    """The tokens per forward of the first `tokens` tokens."""
    ends = list(itertools.accumulate(accepted))
    return [
        n - max(0, end - tokens) for n, end in zip(accepted, ends, strict=True) if end - n < tokens
    ]


@dataclasses.dataclass(frozen=True)
class _Answer:
    """What is known of one finished prompt."""

    text: str | None
    tokens: list[int]
    accepted: list[int]
    seconds: float
    trajectory: Trajectory | None


def _harvest(
    model: Model, request: Request, state: DecodeState, begun: dict[int, float]
) -> dict[int, _Answer]:
    """The answers of some rows of a batch, given when each began."""
    tokens, accepted = answers(state, len(state.finished_B))
    if state.trace is not None:
        states_BIN, position_BI, prompt_len_B = fetch(
            (state.trace.tokens_BIN, state.trace.position_BI, state.sequences.prompt_len_B)
        )
    now, found = time.perf_counter(), {}
    for i, begin in begun.items():
        text, trajectory = None, None
        if model.tokenizer is not None:
            if cut_off := find_stop(model, tokens[i], request.stop):
                text, size = cut_off
                tokens[i], accepted[i] = tokens[i][:size], _first(size, accepted[i])
            else:
                text = text_of(model, tokens[i])
        if state.trace is not None:
            forwards = slice(1, len(accepted[i]))
            starts = position_BI[i, forwards] - prompt_len_B[i]
            trajectory = Trajectory(states_BIN[i, forwards].copy(), starts)  # a view keeps all rows
        found[i] = _Answer(text, tokens[i], accepted[i], now - begin, trajectory)
    return found


def _decode(
    model: Model,
    request: Request,
    prompts: Sequence[Sequence[int]],
    keys: jax.Array,
    weights: Any,
    progress: Callable[[int], None] = lambda done: None,
) -> list[_Answer]:
    """Decode prompts, `request.batch` at a time: on a CPU in parts, one for each core.

    All parts have the same shapes, so they share their compilations.
    """
    width, rows = bucket(max(map(len, prompts))), min(request.batch, len(prompts))
    refilled = rows < len(prompts)
    parts = max(1, rows // LEAST_ROWS)
    if parts > 1:
        parts = min(parts, useful_threads((model.params, weights)))
    share = dataclasses.replace(request, batch=-(-rows // parts))
    done, reporting, over = [0] * parts, Lock(), Event()

    def decode_part(part: int) -> list[_Answer]:
        def report(finished: int) -> None:
            if over.is_set():
                raise CancelledError
            with reporting:
                done[part] = finished
                progress(sum(done))

        own, keys_B = prompts[part::parts], keys[part::parts] if parts > 1 else keys
        return _decode_part(model, share, own, keys_B, weights, width, refilled, report)

    try:
        found = list(side_by_side(decode_part, range(parts), parts))
    finally:
        over.set()
    return [found[i % parts][i // parts] for i in range(len(prompts))]


def _decode_part(
    model: Model,
    request: Request,
    prompts: Sequence[Sequence[int]],
    keys: jax.Array,
    weights: Any,
    width: int,
    refilled: bool,
    progress: Callable[[int], None],
) -> list[_Answer]:
    """Decode prompts in one batch; when a quarter of it is finished, the next ones take its place.

    So no row waits long for the slowest, and all of it runs with three compilations. Where nothing
    can be gained by that, and no stop string can end an answer, a batch is a single call.
    """
    begin, batch = time.perf_counter(), 1 << (request.batch - 1).bit_length()
    if not request.stop and (batch == 1 or not refilled):
        found = []
        for first in range(0, len(prompts), batch):
            some = slice(first, first + batch)
            found += _in_one_call(model, request, prompts[some], keys[some], weights, width, batch)
            progress(len(found))
        return found
    size, refill = min(request.batch, len(prompts)), max(request.batch // 4, 1)
    state = start(model, request, prompts[:size], keys[:size], weights, batch, width)
    padding = batch - size
    held, begun = dict(enumerate(range(size))), dict.fromkeys(range(size), begin)
    waiting, found = list(range(size, len(prompts))), {}
    while held:
        enough = min(refill, len(waiting)) or len(held)
        state, finished = _run(model, request, weights, state, size, padding + enough)
        ready = [row for row in held if finished[row]]
        answered = _harvest(model, request, state, {row: begun[row] for row in ready})
        found |= {held.pop(row): answered[row] for row in ready}
        progress(len(found))
        while waiting and ready:
            begin, chosen = time.perf_counter(), waiting[:refill]
            rows, ready = ready[: len(chosen)], ready[len(chosen) :]
            chosen, waiting = chosen[: len(rows)], waiting[len(rows) :]
            prompts_R, keys_R = [prompts[i] for i in chosen], keys[np.asarray(chosen)]
            fresh = start(model, request, prompts_R, keys_R, weights, refill, width)
            rows_R = np.full(refill, batch, np.int32)
            rows_R[: len(rows)] = rows
            state = replace_rows(state, rows_R, fresh)
            held |= dict(zip(rows, chosen, strict=True))
            begun |= dict.fromkeys(rows, begin)
        padding = batch - len(held)
    return [found[i] for i in range(len(prompts))]


def _in_one_call(
    model: Model,
    request: Request,
    prompts: Sequence[Sequence[int]],
    keys: jax.Array,
    weights: Any,
    width: int,
    batch: int,
) -> list[_Answer]:
    """Decode the prompts of one batch, in another call only where the cache was too short."""
    begin = time.perf_counter()
    state = start(model, request, prompts, keys, weights, batch, width, to_the_end=True)
    if _lacks_room(request, state):
        state = run_until(model, request, weights, _with_more_room(state), _ENDLESS)
    found = _harvest(model, request, state, dict.fromkeys(range(len(prompts)), begin))
    return list(found.values())


def decode_batch(
    model: Model,
    request: Request,
    prompts: Sequence[Sequence[int]],
    keys: jax.Array,
    weights: Any = (),
) -> DecodeResult:
    """Decode token-id prompts, `request.batch` of them at a time, each with its key."""
    return _result(request, _decode(model, request, prompts, keys, weights))


def _result(request: Request, found: Sequence[_Answer]) -> DecodeResult:
    return DecodeResult(
        [one.text for one in found],
        [one.tokens for one in found],
        [one.accepted for one in found],
        [one.seconds for one in found],
        [one.trajectory for one in found] if request.trace else None,
    )


def decode_all(
    model: Model,
    request: Request,
    prompts: Sequence[str | Sequence[int]],
    weights: Any = (),
    progress: Callable[[int], None] = lambda done: None,
) -> DecodeResult:
    """Decode any number of prompts, those of about the same length together; in the given order."""
    encoded = encode_each(model, prompts)
    check(model, request, encoded)
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    found: dict[int, _Answer] = {}
    for rows in _groups(order, [bucket(len(ids)) for ids in encoded], request.batch):
        keys, before = row_keys(request.seed, rows), len(found)
        some = _decode(
            model,
            request,
            [encoded[i] for i in rows],
            keys,
            weights,
            lambda finished, before=before: progress(before + finished),
        )
        found |= dict(zip(rows, some, strict=True))
    return _result(request, [found[i] for i in range(len(encoded))])


def _groups(order: Sequence[int], widths: Sequence[int], batch: int) -> list[list[int]]:
    """Cuts an order by length where the padded width grows, into groups of a batch or more."""
    groups: list[list[int]] = []
    for i in order:
        same = groups and widths[groups[-1][-1]] == widths[i]
        if groups and (same or len(groups[-1]) < batch):
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def stream(
    model: Model, request: Request, prompt: str | Sequence[int], weights: Any = ()
) -> Iterator[str]:
    """Yield the answer's text in pieces that are never taken back.

    A piece is held while its bytes are an incomplete character, or while it could be the
    beginning of a stop string. The pieces joined are the text `decode_all` returns.
    """
    if model.tokenizer is None:
        raise ConfigError(f'{model.source} has no tokenizer; streaming text needs one')
    state = start(model, request, [encode(model, prompt)], row_keys(request.seed, [0]), weights)
    steps, until, shown, done = state.emitted_BI.shape[1], 1, 0, False
    while not done:
        until = min(until + STREAM_ITERATIONS, steps)
        state = run_until(model, request, weights, state, until)
        tokens = answers(state, 1)[0][0]
        found = find_stop(model, tokens, request.stop)
        done = found is not None or bool(state.finished_B[0])
        text = found[0] if found else text_of(model, tokens)
        if not done:
            text = settled(text, request.stop)
        if len(text) > shown:
            yield text[shown:]
            shown = len(text)
