"""The states of the blocks of an answer are those of decoding block by block."""

import dataclasses
from itertools import pairwise

import jax
import numpy as np
import pytest

from cllm_jax.decoding.engine import decode_batch
from cllm_jax.decoding.request import Request, encode
from cllm_jax.drafters.jacobi import Jacobi
from cllm_jax.trajectories import sharded
from cllm_jax.trajectories.store import read_records
from tests.trajectories.examples import MODEL, SETTINGS, collect_into, source


def test_block_states_go_from_random_to_the_fixed_point(collected):
    n = SETTINGS.block
    for record in read_records(collected[0]):
        answer, prompt = record.answer, set(record.prompt.tolist())
        for begin in sorted(set(record.start.tolist())):
            states = record.states[record.start == begin]
            truth = answer[begin : begin + n]
            assert begin % n == 0
            assert states[0, 0] == truth[0]
            assert set(states[0, 1:].tolist()) <= prompt
            assert (states[-1, : len(truth)] == truth).all()
            right = [int(np.cumprod(s[: len(truth)] == truth).sum()) for s in states[:-1]]
            assert all(a < b for a, b in pairwise(right))
        assert 1 + sum(record.start[1:] == record.start[:-1]) == record.forwards or not len(
            record.start
        )


def as_decoded(prompt: str, key: jax.Array, n: int) -> tuple[list, list, int]:
    """States, starts and forwards of one prompt, from decoding it block by block.

    The windows that were verified, each after what its block had converged to by then, and the
    fixed point after the last of each block.
    """
    request = Request(Jacobi(n, 'block'), max_tokens=30, trace=True)
    one = decode_batch(MODEL, request, [encode(MODEL, prompt)], key[None])
    answer, (trajectory,) = one.tokens[0], one.trajectories
    windows, starts = trajectory.states.tolist(), trajectory.start.tolist()
    blocks, states, begins = [at - at % n for at in starts], [], []
    for i, (at, begin, window) in enumerate(zip(starts, blocks, windows, strict=True)):
        states.append(answer[begin:at] + window[: n - (at - begin)])
        begins.append(begin)
        if begin not in blocks[i + 1 :]:
            states.append((answer + [0] * n)[begin : begin + n])
            begins.append(begin)
    return states, begins, one.forwards[0]


@pytest.mark.parametrize('block', (1, 3, 8, 100))
def test_block_states_are_those_of_decoding_block_by_block(block, tmp_path, monkeypatch):
    monkeypatch.setattr(sharded, 'TOGETHER', 2 * block)  # two blocks of a row at a time
    settings, lengths = dataclasses.replace(SETTINGS, block=block), set()
    collect_into(tmp_path, settings)
    for i, record in enumerate(read_records(tmp_path)):
        key = sharded.prompt_keys(settings.seed, [record.id])[0]
        states, starts, forwards = as_decoded(source()[i].prompt, key, block)
        assert record.states.tolist() == states
        assert record.start.tolist() == starts
        assert record.forwards == forwards
        lengths.add(len(record.answer))
    assert 1 in lengths and 30 in lengths and len(lengths) > 5
