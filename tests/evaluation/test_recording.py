"""What is recorded is what the loop did: its drafts, its tokens, its forwards."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from cllm_jax.decoding.drafter import Draft, Drafter
from cllm_jax.decoding.engine import decode_all
from cllm_jax.decoding.request import Request, encode, row_keys
from cllm_jax.drafters.autoregressive import AutoRegressive
from cllm_jax.drafters.jacobi import Jacobi
from cllm_jax.drafters.jacobi_tree import JacobiTree
from cllm_jax.drafters.lookahead import Lookahead
from cllm_jax.drafters.prompt_lookup import PromptLookup
from cllm_jax.errors import DataError
from cllm_jax.evaluation.recording import trace_all, trace_decode, trace_of_record, window_of
from cllm_jax.evaluation.speed import Method
from cllm_jax.evaluation.trace import checked
from cllm_jax.trajectories import sharded
from cllm_jax.trajectories.store import Collection
from tests.tiny import byte_tokenizer, copy_model, echo_config

PROMPTS = ['the 你, so\n', 'this, the 你o']
CONFIG = dataclasses.replace(echo_config(byte_tokenizer()), layers=1)
MODEL = copy_model(len(byte_tokenizer()(PROMPTS[0])['input_ids']), CONFIG, byte_tokenizer())
PARENTS = (-1, 0, 0, 1, 1, 2, 3)
INVALID = 2


@struct.dataclass
class Fixed(Drafter):
    """A tree whose nodes say 5, 6, 7, ...; one of them, and so what follows it, cannot be right."""

    nodes = len(PARENTS)

    def draft(self, state, sequences, sampling):
        tokens_BN = jnp.broadcast_to(
            jnp.arange(4, 4 + self.nodes, dtype=jnp.int32)[None],
            (len(sequences.length_B), self.nodes),
        )
        tokens_BN = tokens_BN.at[:, 0].set(sequences.window(1)[:, 0])
        valid_1N = jnp.arange(self.nodes)[None] != INVALID
        return Draft.tree(tokens_BN, valid_1N, np.array(PARENTS)), state


DRAFTERS = {
    'AR': AutoRegressive(),
    'Jacobi': Jacobi(6),
    'block': Jacobi(6, 'block'),
    'chains': Jacobi(6, 'block', recycle=1, lookup=True),
    'branches': JacobiTree(6, 2, 2),
    'lookup': PromptLookup(5),
    'lookahead': Lookahead(3, 3, 2, 4),
    'tree': Fixed(),
}


def method(drafter: Drafter, **changes) -> Method:
    return Method(MODEL, Request(drafter, **{'max_tokens': 20, 'batch': 1} | changes))


@pytest.mark.parametrize('name', DRAFTERS)
def test_a_record_is_the_decode(name):
    asked = method(DRAFTERS[name])
    traced = dataclasses.replace(asked.request, trace=True)  # one program for both
    result = decode_all(MODEL, traced, PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        trace = checked(trace_decode(name, asked, prompt, row))
        assert trace.answer == result.tokens[row]
        assert [len(f.committed) for f in trace.forwards] == result.accepted[row]
        said = [''.join(trace.pieces[token] for token in trace.answer)]
        assert '\ufffd' in said[0] or said == result.texts[row : row + 1]
        for forward in trace.forwards:
            assert set(forward.tokens) <= trace.pieces.keys()
            assert forward.window == (0 if name in ('AR', 'lookup', 'tree') else forward.window)


def test_nodes_that_cannot_be_accepted_are_left_out_and_the_others_numbered():
    trace = trace_decode('tree', method(Fixed()), PROMPTS[1])
    for forward in trace.forwards:
        assert forward.tokens[1:] == (5, 7, 8, 10)  # neither 6 nor 9, which follows it
        assert forward.parents == (-1, 0, 1, 1, 2)


@pytest.mark.parametrize('mode', ['sliding', 'block'])
def test_a_collected_record_is_the_decode_that_it_records(mode):
    """Apart from the prefill, which collections do not keep."""
    settings = Collection(6, mode, max_tokens=20, batch=2)
    ids, keys = [np.array(encode(MODEL, p)) for p in PROMPTS], row_keys(0, range(2))
    references = [np.array([3], np.int32)] * 2
    records = sharded.trajectories(MODEL, ids, keys, references, settings, 16)
    for row, record in enumerate(records):
        found = trace_of_record(record, mode, MODEL)
        wanted = trace_decode('', method(Jacobi(6, mode)), PROMPTS[row], row)
        assert found.answer == wanted.answer and found.prompt == PROMPTS[row]
        assert len(found.forwards) == record.forwards == len(wanted.forwards)
        assert found.forwards[1:] == wanted.forwards[1:]


def test_a_record_without_states_or_with_other_tokens_is_refused():
    ids = np.array([5, 6], np.int32)
    one = sharded.Trajectory(np.zeros((0, 4), np.int32), np.zeros(0, np.int32), ids, ids, id='a')
    with pytest.raises(DataError, match="'a': has no states"):
        trace_of_record(one, 'block', MODEL)
    with pytest.raises(DataError, match='outside the vocabulary'):
        trace_of_record(dataclasses.replace(one, answer=ids + 9999), 'block', MODEL)


def test_a_stop_string_ends_a_record_with_the_token_that_completes_it():
    whole = trace_decode('Jacobi', method(DRAFTERS['Jacobi']), PROMPTS[0])
    trace = trace_decode('Jacobi', method(DRAFTERS['Jacobi'], stop=('so',)), PROMPTS[0])
    texts = [trace.pieces[token] for token in trace.answer]
    assert 'so' in ''.join(texts) and 'so' not in ''.join(texts[:-1])
    assert trace.answer == whole.answer[: len(trace.answer)]
    assert trace.forwards[:-1] == whole.forwards[: len(trace.forwards) - 1]


def test_methods_are_recorded_prompt_by_prompt_and_timed():
    methods = [(name, method(DRAFTERS[name])) for name in ('AR', 'Jacobi')]
    told: list[int] = []
    found = trace_all(methods, PROMPTS, 1, told.append)
    assert [(t.prompt, t.name) for t in found] == [(p, n) for p in PROMPTS for n, _ in methods]
    assert all(trace.seconds > 0 for trace in found) and told == [1, 1]
    assert found[0].answer == found[1].answer and len(found[1].forwards) < len(found[0].forwards)


def test_a_window_is_what_begins_random_and_is_kept():
    windows = {name: window_of(drafter) for name, drafter in DRAFTERS.items()}
    assert windows == dict.fromkeys(windows, 0) | {
        'Jacobi': 6, 'block': 6, 'chains': 6, 'branches': 6, 'lookahead': 4,
    }  # fmt: skip
    assert window_of(Jacobi(1)) == window_of(Lookahead()) == 0
