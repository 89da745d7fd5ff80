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

from cllm_jax.decoding.loop import Buffers, Decoder, Programs, programs
from cllm_jax.decoding.request import (
    FIRST_ROOM,
    Request,
    Texts,
    bucket,
    cache_slots,
    check,
    encode_each,
    pad_prompts,
    padded_batch,
    row_keys,
    stop_ids,
)
from cllm_jax.decoding.result import Answer, DecodeResult, Trajectory
from cllm_jax.decoding.state import DecodeState, grow, replace_rows
from cllm_jax.decoding.text import cut, find_stop, text_of
from cllm_jax.hf.model import Model
from cllm_jax.runtime.backend import backend_of
from cllm_jax.runtime.keys import keys_for
from cllm_jax.runtime.processes import fetch
from cllm_jax.runtime.programs import bounded
from cllm_jax.runtime.threads import side_by_side

LEAST_ROWS = 2
"""Fewest rows that a thread of its own decodes: a single one would read all weights for itself."""

STREAM_ITERATIONS = 4
"""Iterations between two looks at the text when streaming or searching for stop strings."""

ENDLESS = np.iinfo(np.int32).max

Ids = Sequence[Sequence[int]]
"""Prompts as token ids."""
Progress = Callable[[int], None]
"""Is told how many more prompts are finished."""


def programs_of(model: Model, request: Request) -> Programs:
    """The compiled functions that decode a request with a model."""
    return programs(model.backend.exactly(request.exact))


def decoder_of(model: Model, request: Request) -> Decoder:
    """What decodes a request with a model."""
    module, params = model.decoding_on(model.backend.exactly(request.exact))
    most = np.int32(request.commit or ENDLESS)
    first = np.int32(1 if request.exact == 'program' else ENDLESS)
    how = (stop_ids(model), request.sampling, most, first)
    return Decoder(module, params, request.drafter, *how)


def start(
    model: Model,
    request: Request,
    prompts: Ids,
    keys: jax.Array,
    rows: int = 0,
    width: int = 0,
    to_the_end: bool = False,
) -> DecodeState:
    """Prefill one batch, filled up with rows that never run; raises ConfigError (see `check`).

    Args:
      rows: size of the batch; by default the next power of two.
      width: length to which prompts are padded; by default the bucket of the longest.
      to_the_end: decode in the same call, to the end or until the cache is full.
    """
    check(model, request, prompts)
    rows, width = rows or padded_batch(len(prompts)), width or bucket(max(map(len, prompts)))
    batch = pad_prompts(prompts, rows, width, request.max_tokens, keys)
    batch = batch.replace(keys_B=keys_for(model.params, batch.keys_B))
    steps, nodes = bucket(request.max_tokens), request.drafter.nodes
    exact, sizes = model.backend.exactly(request.exact).exact, (steps, min(steps, FIRST_ROOM))
    slots, room = (cache_slots(width, size, nodes, exact) for size in sizes)
    if request.exact == 'program':
        room = slots  # growing would be another program, and not at the same token for all drafts
    buffers, decoder = Buffers(slots, steps, room, request.trace), decoder_of(model, request)
    run = programs_of(model, request).prefill
    return run(decoder, batch, buffers=buffers, to_the_end=to_the_end)


def answers(state: DecodeState, rows: int) -> tuple[list[list[int]], list[list[int]]]:
    """Committed answer tokens and tokens per forward of the first `rows` rows."""
    seq = state.sequences
    wanted = (seq.tokens_BS, seq.prompt_len_B, seq.length_B, state.emitted_BI, state.forwards_B)
    columns = [column[:rows] for column in fetch(wanted)]
    tokens = [row[a : b + 1].tolist() for row, a, b in zip(*columns[:3], strict=True)]
    return tokens, [row[:n].tolist() for row, n in zip(*columns[3:], strict=True)]


def run_until(
    model: Model, request: Request, state: DecodeState, until: int = ENDLESS, idle: int = 0
) -> DecodeState:
    """Iterate up to iteration `until`, or until `idle` rows (all, if 0) are finished.

    A cache that is full becomes twice as long.
    """
    bounds = np.int32(until), np.int32(idle or state.rows)
    decoder, run = decoder_of(model, request), programs_of(model, request).advance
    state = run(decoder, *bounds, state)
    while lacks_room(request, state):
        state = run(decoder, *bounds, with_more_room(state))
    return state


def lacks_room(request: Request, state: DecodeState) -> bool:
    """Whether a row waits for a longer cache."""
    return state.cache.slots < state.longest and not fetch(state.fits(request.drafter.nodes))


def with_more_room(state: DecodeState) -> DecodeState:
    """The state with a cache twice as long, or as long as any row may need."""
    return bounded(grow)(state, min(2 * state.cache.slots, state.longest))


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
    columns, seq = answers(state, state.rows), state.sequences
    traced = state.trace and fetch((state.trace, seq.prompt_len_B, seq.tokens_BS))
    now, found = time.perf_counter(), {}
    for i, begin in begun.items():
        (tokens, accepted), text, trajectory = (column[i] for column in columns), None, None
        if model.tokenizer is not None:
            if cut_off := find_stop(model, tokens, request.stop):
                text, size = cut_off
                tokens, accepted = tokens[:size], _of_first(size, accepted)
            else:
                text = text_of(model, tokens)
        if traced:
            trace, prompt_len_B, tokens_BS = traced
            verified = slice(1, len(accepted))
            trajectory = Trajectory(
                trace.tokens_BIN[i, verified].copy(),  # a view keeps all rows
                trace.position_BI[i, verified] - prompt_len_B[i],
                tokens_BS[i, : prompt_len_B[i]].copy(),
                np.asarray(tokens, np.int32),
                forwards=len(accepted),
                finished=tokens[-1] in model.config.eos_ids,
            )
        found[i] = Answer(text, tokens, accepted, now - begin, trajectory)
    return found


def _of_first(tokens: int, accepted: Sequence[int]) -> list[int]:
    """The tokens per forward of the first `tokens` tokens."""
    steps = zip(accepted, itertools.accumulate(accepted), strict=True)
    return [min(n, n + tokens - end) for n, end in steps if end - n < tokens]


def decode_side_by_side(
    model: Model, request: Request, prompts: Ids, keys: jax.Array, progress: Progress
) -> list[Answer]:
    """Decode prompts, `request.batch` at a time, in as many parts as threads are useful.

    All parts have the same shapes and share their compilations. One thread at a time reports.
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
    model: Model, request: Request, prompts: Ids, keys: jax.Array, width: int, progress: Progress
) -> list[Answer]:
    """Decode batch after batch, each in a single call, or two where its cache was short.

    For where refilling gains nothing, and no stop string can end an answer.
    """
    batch, found = padded_batch(request.batch), []
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
    model: Model, request: Request, prompts: Ids, keys: jax.Array, width: int, progress: Progress
) -> list[Answer]:
    """Decode prompts in one batch; when a quarter of it is finished, the next ones take its place.

    So no row waits long for the slowest, and all of it runs with three compilations.
    """
    begin, batch = time.perf_counter(), padded_batch(request.batch)
    size, refill = min(request.batch, len(prompts)), max(request.batch // 4, 1)
    state = start(model, request, prompts[:size], keys[:size], batch, width)
    held, begun = {row: row for row in range(size)}, dict.fromkeys(range(size), begin)
    waiting, found = list(range(size, len(prompts))), {}
    while held:
        idle = batch - len(held) + (min(refill, len(waiting)) or len(held))
        state, finished = run_until_idle(model, request, state, size, idle)
        ready = [row for row in held if finished[row]]
        answered = take_answers(model, request, state, {row: begun[row] for row in ready})
        found |= {held.pop(row): answered[row] for row in ready}
        progress(len(ready))
        while waiting and ready:
            begin, count = time.perf_counter(), min(refill, len(waiting), len(ready))
            rows, ready = ready[:count], ready[count:]
            chosen, waiting = waiting[:count], waiting[count:]
            prompts_R, keys_R = [prompts[i] for i in chosen], keys[np.asarray(chosen)]
            fresh = start(model, request, prompts_R, keys_R, refill, width)
            rows_R = np.array(rows + [batch] * (refill - count), np.int32)
            state = bounded(replace_rows)(state, rows_R, fresh)
            held |= dict(zip(rows, chosen, strict=True))
            begun |= dict.fromkeys(rows, begin)
    return [found[i] for i in range(len(prompts))]


def decode_batch(model: Model, request: Request, prompts: Ids, keys: jax.Array) -> DecodeResult:
    """Decode token-id prompts, `request.batch` of them at a time, each with its key."""
    return DecodeResult.of(
        decode_side_by_side(model, request, prompts, keys, lambda finished: None)
    )


def decode_all(
    model: Model, request: Request, prompts: Texts, progress: Progress = lambda finished: None
) -> DecodeResult:
    """Decode any number of prompts, those of about the same length together; in the given order."""
    encoded = encode_each(model, prompts)
    check(model, request, encoded)
    found: dict[int, Answer] = {}
    for rows in by_length([len(ids) for ids in encoded], request.batch):
        ids, keys = [encoded[i] for i in rows], row_keys(request.seed, rows)
        some = decode_side_by_side(model, request, ids, keys, progress)
        found |= dict(zip(rows, some, strict=True))
    return DecodeResult.of([found[i] for i in range(len(encoded))])


def by_length(lengths: Sequence[int], batch: int) -> list[list[int]]:
    """Indices by length, in groups of a batch or more that end where the padded width grows."""
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        last = groups[-1] if groups else []
        if last and (len(last) < batch or bucket(lengths[last[-1]]) == bucket(lengths[i])):
            last.append(i)
        else:
            groups.append([i])
    return groups
