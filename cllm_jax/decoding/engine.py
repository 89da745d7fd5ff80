"""From prompts to answers: batches prompts, runs the loop, refills the batch, takes the results."""

import dataclasses
import itertools
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from threading import Event, Lock

import jax
import jax.numpy as jnp
import numpy as np

from cllm_jax.decoding.loop import Buffers, Decoder, programs
from cllm_jax.decoding.request import (
    FIRST_ROOM,
    Request,
    bucket,
    cache_slots,
    check,
    encode_each,
    pad_prompts,
    row_keys,
    stop_ids,
)
from cllm_jax.decoding.result import Answer, DecodeResult, Trajectory
from cllm_jax.decoding.state import DecodeState, grow, replace_rows
from cllm_jax.decoding.text import cut, find_stop, text_of
from cllm_jax.hf.load import Model
from cllm_jax.runtime.backend import backend_of
from cllm_jax.runtime.processes import fetch, keys_beside
from cllm_jax.runtime.threads import side_by_side

LEAST_ROWS = 2
"""Fewest rows of a batch that a thread of its own decodes: a single one would read all weights for
itself."""

STREAM_ITERATIONS = 4
"""Iterations between two looks at the text when streaming or searching for stop strings."""

ENDLESS = np.iinfo(np.int32).max


def decoder_of(model: Model, request: Request) -> Decoder:
    """What decodes a request with a model."""
    ends = stop_ids(model)
    return Decoder(model.module, model.params, request.drafter, ends, request.sampling)


def start(
    model: Model,
    request: Request,
    prompts: Sequence[Sequence[int]],
    keys: jax.Array,
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
    batch = pad_prompts(prompts, rows, width, request.max_tokens, keys)
    batch = batch.replace(keys_B=keys_beside(model.params, batch.keys_B))
    slots = cache_slots(width, steps, nodes)
    room = cache_slots(width, min(steps, FIRST_ROOM), nodes)
    buffers = Buffers(slots, steps, room, request.trace)
    run = programs(model.backend).prefill
    return run(decoder_of(model, request), batch, buffers=buffers, to_the_end=to_the_end)


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
    model: Model, request: Request, state: DecodeState, until: int = ENDLESS, idle: int = 0
) -> DecodeState:
    """Iterate up to iteration `until`, or until `idle` rows (all, if 0) are finished.

    A cache that is full becomes twice as long.
    """
    bounds = np.int32(until), np.int32(idle or state.rows)
    decoder, run = decoder_of(model, request), programs(model.backend).advance
    state = run(decoder, *bounds, state)
    while lacks_room(request, state):
        state = run(decoder, *bounds, with_more_room(state))
    return state


def lacks_room(request: Request, state: DecodeState) -> bool:
    """Whether a row waits for a longer cache."""
    return state.cache.slots < state.longest and not fetch(state.fits(request.drafter.nodes))


def with_more_room(state: DecodeState) -> DecodeState:
    """The state with a cache twice as long, or as long as any row may need."""
    return grow(state, min(2 * state.cache.slots, state.longest))


def run_until_idle(
    model: Model, request: Request, state: DecodeState, rows: int, idle: int
) -> tuple[DecodeState, np.ndarray]:
    """Run until `idle` rows are finished; which are, bool `[B]`.

    With stop strings, the text of the first `rows` rows is looked at every few iterations.
    """
    while True:
        until = int(fetch(state.iteration)) + STREAM_ITERATIONS if request.stop else ENDLESS
        state = run_until(model, request, state, until, idle)
        finished = np.array(fetch(state.finished_B))
        if finished.sum() >= idle:
            return state, finished
        for i, tokens in enumerate(answers(state, rows)[0]):
            if not finished[i]:
                finished[i] = cut(text_of(model, tokens), request.stop) is not None
        state = state.replace(finished_B=jnp.asarray(finished))


def take_answers(
    model: Model, request: Request, state: DecodeState, begun: dict[int, float]
) -> dict[int, Answer]:
    """The answers of some rows of a batch, given when each began."""
    tokens, accepted = answers(state, state.rows)
    if state.trace is not None:
        seq, trace = state.sequences, state.trace
        wanted = (trace.tokens_BIN, trace.position_BI, seq.prompt_len_B, seq.tokens_BS)
        states_BIN, position_BI, prompt_len_B, tokens_BS = fetch(wanted)
    now, found = time.perf_counter(), {}
    for i, begin in begun.items():
        text, trajectory = None, None
        if model.tokenizer is not None:
            if cut_off := find_stop(model, tokens[i], request.stop):
                text, size = cut_off
                tokens[i], accepted[i] = tokens[i][:size], _of_first(size, accepted[i])
            else:
                text = text_of(model, tokens[i])
        if state.trace is not None:
            verified = slice(1, len(accepted[i]))
            trajectory = Trajectory(
                states_BIN[i, verified].copy(),  # a view keeps all rows
                position_BI[i, verified] - prompt_len_B[i],
                tokens_BS[i, : prompt_len_B[i]].copy(),
                np.asarray(tokens[i], np.int32),
                forwards=len(accepted[i]),
                finished=tokens[i][-1] in model.config.eos_ids,
            )
        found[i] = Answer(text, tokens[i], accepted[i], now - begin, trajectory)
    return found


def _of_first(tokens: int, accepted: Sequence[int]) -> list[int]:
    """The tokens per forward of the first `tokens` tokens."""
    ends = list(itertools.accumulate(accepted))
    return [
        n - max(0, end - tokens) for n, end in zip(accepted, ends, strict=True) if end - n < tokens
    ]


def decode_side_by_side(
    model: Model,
    request: Request,
    prompts: Sequence[Sequence[int]],
    keys: jax.Array,
    progress: Callable[[int], None] = lambda finished: None,
) -> list[Answer]:
    """Decode prompts, `request.batch` at a time, in as many parts as threads are useful.

    All parts have the same shapes, so they share their compilations. `progress` is told how many
    more prompts are finished, by one thread at a time.
    """
    width, rows = bucket(max(map(len, prompts))), min(request.batch, len(prompts))
    refilled, parts = rows < len(prompts), max(1, rows // LEAST_ROWS)
    if parts > 1:
        parts = min(parts, backend_of((model.params, request.drafter)).threads)
    share = dataclasses.replace(request, batch=-(-rows // parts))
    reporting, over = Lock(), Event()

    def report(finished: int) -> None:
        if over.is_set():
            raise CancelledError
        with reporting:
            progress(finished)

    def decode_part(part: int) -> list[Answer]:
        own, keys_B = prompts[part::parts], keys[part::parts] if parts > 1 else keys
        if not share.stop and (share.batch == 1 or not refilled):
            return decode_whole_batches(model, share, own, keys_B, width, report)
        return decode_refilling(model, share, own, keys_B, width, report)

    try:
        found = list(side_by_side(decode_part, range(parts), parts))
    finally:
        over.set()
    return [found[i % parts][i // parts] for i in range(len(prompts))]


def decode_whole_batches(
    model: Model,
    request: Request,
    prompts: Sequence[Sequence[int]],
    keys: jax.Array,
    width: int,
    progress: Callable[[int], None],
) -> list[Answer]:
    """Decode batch after batch, each in a single call, in another only where its cache was short.

    For where refilling gains nothing, and no stop string can end an answer.
    """
    batch, found = _power_of_two(request.batch), []
    for first in range(0, len(prompts), batch):
        begin, some = time.perf_counter(), slice(first, first + batch)
        state = start(model, request, prompts[some], keys[some], batch, width, to_the_end=True)
        if lacks_room(request, state):
            state = run_until(model, request, with_more_room(state))
        begun = dict.fromkeys(range(len(prompts[some])), begin)
        found += take_answers(model, request, state, begun).values()
        progress(len(begun))
    return found


def decode_refilling(
    model: Model,
    request: Request,
    prompts: Sequence[Sequence[int]],
    keys: jax.Array,
    width: int,
    progress: Callable[[int], None],
) -> list[Answer]:
    """Decode prompts in one batch; when a quarter of it is finished, the next ones take its place.

    So no row waits long for the slowest, and all of it runs with three compilations.
    """
    begin, batch = time.perf_counter(), _power_of_two(request.batch)
    size, refill = min(request.batch, len(prompts)), max(request.batch // 4, 1)
    state = start(model, request, prompts[:size], keys[:size], batch, width)
    padding = batch - size
    held, begun = dict(enumerate(range(size))), dict.fromkeys(range(size), begin)
    waiting, found = list(range(size, len(prompts))), {}
    while held:
        enough = min(refill, len(waiting)) or len(held)
        state, finished = run_until_idle(model, request, state, size, padding + enough)
        ready = [row for row in held if finished[row]]
        answered = take_answers(model, request, state, {row: begun[row] for row in ready})
        found |= {held.pop(row): answered[row] for row in ready}
        progress(len(ready))
        while waiting and ready:
            begin, chosen = time.perf_counter(), waiting[:refill]
            rows, ready = ready[: len(chosen)], ready[len(chosen) :]
            chosen, waiting = chosen[: len(rows)], waiting[len(rows) :]
            prompts_R, keys_R = [prompts[i] for i in chosen], keys[np.asarray(chosen)]
            fresh = start(model, request, prompts_R, keys_R, refill, width)
            rows_R = np.full(refill, batch, np.int32)
            rows_R[: len(rows)] = rows
            state = replace_rows(state, rows_R, fresh)
            held |= dict(zip(rows, chosen, strict=True))
            begun |= dict.fromkeys(rows, begin)
        padding = batch - len(held)
    return [found[i] for i in range(len(prompts))]


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()


def decode_batch(
    model: Model, request: Request, prompts: Sequence[Sequence[int]], keys: jax.Array
) -> DecodeResult:
    """Decode token-id prompts, `request.batch` of them at a time, each with its key."""
    return DecodeResult.of(decode_side_by_side(model, request, prompts, keys))


def decode_all(
    model: Model,
    request: Request,
    prompts: Sequence[str | Sequence[int]],
    progress: Callable[[int], None] = lambda finished: None,
) -> DecodeResult:
    """Decode any number of prompts, those of about the same length together; in the given order.

    `progress` is told how many more are finished.
    """
    encoded = encode_each(model, prompts)
    check(model, request, encoded)
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    found: dict[int, Answer] = {}
    for rows in _groups(order, [bucket(len(ids)) for ids in encoded], request.batch):
        ids, keys = [encoded[i] for i in rows], row_keys(request.seed, rows)
        some = decode_side_by_side(model, request, ids, keys, progress)
        found |= dict(zip(rows, some, strict=True))
    return DecodeResult.of([found[i] for i in range(len(encoded))])


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
