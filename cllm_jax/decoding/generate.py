"""From prompts to answers: encodes and batches prompts, runs the loop, collects the results."""

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cllm_jax.decoding.loop import DecodeState, advance, prefill
from cllm_jax.decoding.result import DecodeResult, Trajectory
from cllm_jax.decoding.sampling import Sampling
from cllm_jax.decoding.text import cut, find_stop, settled, text_of
from cllm_jax.errors import ConfigError
from cllm_jax.models.load import Model
from cllm_jax.parallel.distributed import fetch, keys_beside

STREAM_ITERATIONS = 4
"""Iterations between two looks at the text when streaming or searching for stop strings."""


@dataclasses.dataclass(frozen=True)
class Request:
    """How to decode; the same for every prompt of a call."""

    drafter: Any
    max_tokens: int = 128
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    seed: int = 0
    stop: tuple[str, ...] = ()
    """The answer ends before the first of these strings."""
    batch: int = 32
    trace: bool = False
    """Report the drafts of every iteration."""

    def __post_init__(self):
        if self.max_tokens < 1:
            raise ConfigError(f'max_tokens {self.max_tokens}: must be at least 1')
        if self.batch < 1:
            raise ConfigError(f'batch {self.batch}: must be at least 1')
        if isinstance(self.stop, str):
            raise ConfigError(
                f'stop {self.stop!r}: must be a tuple of strings; write ({self.stop!r},)'
            )
        if '' in self.stop:
            raise ConfigError("stop string '': must not be empty; leave it out")


def bucket(size: int) -> int:
    """The next of 16, 24, 32, 48, 64, ...: few shapes to compile, at most a third wasted."""
    power = 16
    while power < size:
        if power * 3 // 2 >= size:
            return power * 3 // 2
        power *= 2
    return power


def cache_slots(width: int, steps: int, nodes: int) -> int:
    """Slots for a padded prompt, an answer and a draft: no bucket of its own, since these have."""
    return -(-(width + steps + nodes) // 16) * 16


def encode(model: Model, prompt: str | Sequence[int]) -> list[int]:
    """Token ids of a prompt; a list of ids is only checked.

    Raises:
      ConfigError: text without a tokenizer, no token at all, or an id outside the vocabulary.
    """
    if not isinstance(prompt, str):
        ids = [int(i) for i in prompt]
    elif model.tokenizer is None:
        raise ConfigError(f'{model.source} has no tokenizer; pass lists of token ids')
    else:
        ids = model.tokenizer(prompt)['input_ids']
        if not ids and model.config.bos_id is not None:
            ids = [model.config.bos_id]
    if not ids:
        raise ConfigError('empty prompt: decoding starts from at least one token; pass a BOS token')
    if bad := [i for i in ids if not 0 <= i < model.config.vocab_size]:
        raise ConfigError(
            f'token id {bad[0]}: outside the vocabulary 0..{model.config.vocab_size - 1}; '
            'was the prompt made with another tokenizer?'
        )
    return ids


def check(model: Model, request: Request, prompts: Sequence[Sequence[int]]) -> None:
    """Refuse what cannot be decoded, before any time is spent.

    Raises:
      ConfigError: stop strings without a tokenizer, or prompt and answer exceed the positions.
    """
    if request.stop and model.tokenizer is None:
        raise ConfigError(f'{model.source} has no tokenizer; stop strings need one')
    limit = model.config.max_positions
    for i, ids in enumerate(prompts):
        if len(ids) + request.max_tokens > limit:
            raise ConfigError(
                f'prompt {i}: {len(ids)} tokens + max_tokens {request.max_tokens} exceed the '
                f"model's {limit} positions; shorten one of them"
            )


def row_keys(seed: int, rows: Sequence[int]) -> jax.Array:
    """One PRNG key per prompt, by its index in the call: batching does not change an answer."""
    return _fold_in_each(jax.random.key(seed), np.asarray(rows, np.uint32))


_fold_in_each = jax.jit(jax.vmap(jax.random.fold_in, (None, 0)))


def start(
    model: Model, request: Request, prompts: Sequence[Sequence[int]], keys: jax.Array, weights: Any
) -> DecodeState:
    """Prefill one batch. The batch is filled up to a power of two with rows that never run.

    Raises:
      ConfigError: see `check`.
    """
    check(model, request, prompts)
    rows = 1 << (len(prompts) - 1).bit_length()
    width, steps = bucket(max(map(len, prompts))), bucket(request.max_tokens)
    prompt_BP = np.zeros((rows, width), np.int32)
    prompt_len_B = np.ones(rows, np.int32)
    max_tokens_B = np.zeros(rows, np.int32)
    for i, ids in enumerate(prompts):
        prompt_BP[i, : len(ids)] = ids
        prompt_len_B[i], max_tokens_B[i] = len(ids), request.max_tokens
    if rows > len(prompts):
        keys = keys[np.minimum(np.arange(rows), len(prompts) - 1)]
    keys = keys_beside(model.params, keys)
    return prefill(
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
        slots=cache_slots(width, steps, request.drafter.nodes),
        steps=steps,
        trace=request.trace,
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


def run_until(model: Model, request: Request, weights: Any, state: DecodeState, until: int):
    return advance(
        model.module,
        model.params,
        request.drafter,
        weights,
        request.sampling,
        stop_ids(model),
        np.int32(until),
        state,
    )


def _finish(model: Model, request: Request, weights: Any, state: DecodeState, rows: int):
    """Run to the end; with stop strings, look at the text every few iterations."""
    steps = state.emitted_BI.shape[1]
    looks = range(1 + STREAM_ITERATIONS, steps, STREAM_ITERATIONS) if request.stop else ()
    for until in looks:
        state = run_until(model, request, weights, state, until)
        finished = np.array(fetch(state.finished_B))
        if finished.all():
            return state
        for i, tokens in enumerate(answers(state, rows)[0]):
            if not finished[i]:
                finished[i] = cut(text_of(model, tokens), request.stop) is not None
        state = state.replace(finished_B=jnp.asarray(finished))
    return run_until(model, request, weights, state, steps)


def _first(tokens: int, accepted: Sequence[int]) -> list[int]:
    """The tokens per forward of the first `tokens` tokens."""
    ends = list(itertools.accumulate(accepted))
    return [
        n - max(0, end - tokens) for n, end in zip(accepted, ends, strict=True) if end - n < tokens
    ]


def decode_batch(
    model: Model,
    request: Request,
    prompts: Sequence[Sequence[int]],
    keys: jax.Array,
    weights: Any = (),
) -> DecodeResult:
    """Decode one batch of token-id prompts."""
    begin = time.perf_counter()
    state = start(model, request, prompts, keys, weights)
    state = jax.block_until_ready(_finish(model, request, weights, state, len(prompts)))
    seconds = time.perf_counter() - begin
    tokens, accepted = answers(state, len(prompts))
    texts: list[str | None] = [None] * len(prompts)
    for i, ids in enumerate(tokens if model.tokenizer is not None else ()):
        if found := find_stop(model, ids, request.stop):
            texts[i], size = found
            tokens[i], accepted[i] = ids[:size], _first(size, accepted[i])
        else:
            texts[i] = text_of(model, ids)
    trajectories = None
    if state.trace is not None:
        states_BIN, position_BI, prompt_len_B = fetch(
            (state.trace.tokens_BIN, state.trace.position_BI, state.sequences.prompt_len_B)
        )
        trajectories = [
            Trajectory(states_BIN[i, 1 : len(a)], position_BI[i, 1 : len(a)] - prompt_len_B[i])
            for i, a in enumerate(accepted)
        ]
    return DecodeResult(texts, tokens, accepted, [seconds] * len(prompts), trajectories)


def decode_all(
    model: Model,
    request: Request,
    prompts: Sequence[str | Sequence[int]],
    weights: Any = (),
    progress: Callable[[int], None] = lambda done: None,
) -> DecodeResult:
    """Decode any number of prompts in batches of similar length; results keep the given order."""
    encoded = [encode(model, p) for p in prompts]
    check(model, request, encoded)
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    parts: dict[int, tuple[DecodeResult, int]] = {}
    for begin in range(0, len(order), request.batch):
        rows = order[begin : begin + request.batch]
        result = decode_batch(
            model, request, [encoded[i] for i in rows], row_keys(request.seed, rows), weights
        )
        parts |= {row: (result, i) for i, row in enumerate(rows)}
        progress(begin + len(rows))
    picked = [parts[i] for i in range(len(encoded))]

    def column(name: str) -> list:
        return [getattr(result, name)[i] for result, i in picked]

    return DecodeResult(
        column('texts'),
        column('tokens'),
        column('accepted'),
        column('seconds'),
        column('trajectories') if request.trace else None,
    )


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
