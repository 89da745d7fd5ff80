"""Decodes are recorded: from the loop itself, timed next to each other, or from a collection."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from cllm_jax.decoding.drafter import Drafter
from cllm_jax.decoding.engine import answers, lacks_room, run_until, start, with_more_room
from cllm_jax.decoding.request import Texts, check_ids, encode, row_keys
from cllm_jax.decoding.result import Trajectory
from cllm_jax.decoding.state import DecodeState
from cllm_jax.decoding.text import find_stop, text_of
from cllm_jax.drafters.autoregressive import AutoRegressive
from cllm_jax.drafters.jacobi import Jacobi
from cllm_jax.drafters.jacobi_tree import JacobiTree
from cllm_jax.drafters.lookahead import Lookahead
from cllm_jax.errors import DataError
from cllm_jax.evaluation.speed import Method, plain_methods, seconds_of_each
from cllm_jax.evaluation.trace import DecodeTrace, Forward, accepted, checked
from cllm_jax.hf.model import Model
from cllm_jax.runtime.processes import fetch
from cllm_jax.tasks.example import Messages


def trace_all(
    methods: Sequence[tuple[str, Method]],
    prompts: Texts,
    repeats: int = 3,
    progress: Callable[[int], None] = lambda prompts: None,
) -> list[DecodeTrace]:
    """Every prompt decoded by every named method, recorded, and timed in turn (`speed.py`).

    AR is timed in each way in which it may be the fastest, and the fastest counts.
    """
    ways: dict[tuple[int, str], Method] = {}
    for i, (name, method) in enumerate(methods):
        plain = isinstance(method.request.drafter, AutoRegressive)
        same = plain_methods(name, method) if plain else {name: method}
        ways |= {(i, way): each for way, each in same.items()}
    seconds, found = seconds_of_each(ways, prompts, repeats, progress), []
    for row, prompt in enumerate(prompts):
        for i, (name, method) in enumerate(methods):
            of_method = [key for key in ways if key[0] == i]
            best = min(of_method, key=lambda key: sum(seconds[key]))
            timed = '' if best[1] == name else best[1]
            trace = trace_decode(name, method, prompt, row)
            found.append(dataclasses.replace(trace, seconds=seconds[best][row], timed=timed))
    return found


def trace_decode(
    name: str, method: Method, prompt: str | Messages | Sequence[int], row: int = 0
) -> DecodeTrace:
    """Decode a prompt as the row of that number is decoded, keeping what each forward verified."""
    model, request = method.model, dataclasses.replace(method.request, trace=True)
    ids, keys = encode(model, prompt), row_keys(request.seed, [row])
    state = start(model, request, [ids], keys, to_the_end=True)
    if lacks_room(request, state):
        state = run_until(model, request, with_more_room(state))
    return trace_of_state(name, method, prompt, ids, state)[0]


def trace_of_state(
    name: str,
    method: Method,
    prompt: str | Messages | Sequence[int],
    ids: Sequence[int],
    state: DecodeState,
) -> tuple[DecodeTrace, bool]:
    """The decode of a batch of one as far as it got, and whether it has ended.

    Args:
      ids: the prompt's tokens.
      state: of a request with `trace`.
    """
    model, request = method.model, method.request
    [tokens], [accepted] = answers(state, 1)
    found = request.stop and find_stop(model, tokens, request.stop)
    if found:
        tokens = tokens[: found[1]]
    trace, window = fetch(state.trace), window_of(request.drafter)
    forwards, ends = [], list(itertools.accumulate(accepted))
    for i, (begin, end) in enumerate(itertools.pairwise([0, *ends])):
        if begin >= len(tokens):  # a stop string ended the answer
            break
        draft, valid = trace.tokens_BIN[0, i], trace.valid_BIN[0, i]
        parents = np.arange(-1, len(draft) - 1)
        parents = parents if trace.parent_BIN is None else trace.parent_BIN[0, i]
        place = int(trace.position_BI[0, i]) - len(ids)
        forwards.append(_forward(place, draft, (valid, parents), window, tokens[begin:end]))
    asked = prompt if isinstance(prompt, str) else text_of(model, ids)
    known = DecodeTrace(name, model.title, asked, tuple(forwards), pieces(model, forwards))
    return checked(known), bool(found) or bool(fetch(state.finished_B)[0])


def trace_of_record(record: Trajectory, mode: str, model: Model) -> DecodeTrace:
    """How a collected answer came about; `mode` is that of the collection."""
    drafts = record.start.tolist(), record.states
    if mode == 'block':
        drafts = _windows_of_blocks(record)
    for ids in (record.prompt, record.answer, record.states):
        check_ids(model, ids, f'record {record.id}: ', DataError)
    if len(record.answer) > 1 and not len(drafts[0]):
        raise DataError(f'record {record.id!r}: has no states; collect its trajectory')
    starts, states = [-1, *drafts[0]], [record.prompt[-1:], *drafts[1]]
    answer, forwards = record.answer.tolist(), []
    ends = [*starts[1:], len(answer) - 1]
    for place, state, end in zip(starts, states, ends, strict=True):
        shape = np.ones(len(state), bool), np.arange(-1, len(state) - 1)
        window = 0 if place < 0 else len(state)
        forwards.append(_forward(place, state, shape, window, answer[place + 1 : end + 1]))
    texts, name = pieces(model, forwards), f'Jacobi, {mode}'
    prompt = text_of(model, record.prompt.tolist())
    return checked(DecodeTrace(name, model.title, prompt, tuple(forwards), texts))


def _windows_of_blocks(record: Trajectory) -> tuple[list[int], list[np.ndarray]]:
    """What the forwards of a block verified: a state without its tokens that are known before.

    The last state of a block is its fixed point, which needs no forward.
    """
    starts, windows, last = [], [], len(record.answer) - 1
    for begin, rows in itertools.groupby(range(len(record.start)), lambda i: record.start[i]):
        *states, truth = record.states[list(rows)]
        known = 0
        for state in states:
            starts.append(int(begin) + known)
            windows.append(state[known:])
            right = int(np.cumprod(state == truth).sum())
            known = min(max(right, known + 1), last - int(begin))
    return starts, windows


def _forward(
    place: int,
    tokens: Iterable[int],
    shape: tuple[np.ndarray, np.ndarray],
    window: int,
    committed: Sequence[int],
) -> Forward:
    """A forward of which nodes are left out that could not be accepted.

    Args:
      shape: which nodes could be, and which node each follows.
    """
    valid, parents = shape
    number = {-1: -1}
    for node, parent in enumerate(parents.tolist()):
        if node == 0 or (valid[node] and parent in number):
            number[node] = len(number) - 1
    kept = [node for node in number if node >= 0]
    draft = tuple(int(tokens[node]) for node in kept)
    after = tuple(number[int(parents[node])] for node in kept)
    guesses = sum(node < window for node in kept)
    path = accepted(draft, after, committed)
    return Forward(place, draft, after, guesses, path, tuple(map(int, committed)))


def window_of(drafter: Drafter) -> int:
    """How many of a drafter's first nodes are a Jacobi window; 0 if it has none."""
    jacobi = isinstance(drafter, Jacobi | JacobiTree | Lookahead)
    return drafter.block if jacobi and drafter.block > 1 else 0


def pieces(model: Model, forwards: Iterable[Forward]) -> dict[int, str]:
    """The text of every token; its name where that has none, as an end token."""
    used = {token for forward in forwards for token in (*forward.tokens, *forward.committed)}
    ids = sorted(used)
    named = zip(ids, model.tokenizer.convert_ids_to_tokens(ids), strict=True)
    return {token: text_of(model, [token]) or name or f'#{token}' for token, name in named}
