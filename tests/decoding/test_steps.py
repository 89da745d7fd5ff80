"""Who looks at every step gets the same answers, and sees them grow; nobody else pays for it."""

import dataclasses
import itertools

import pytest

import cllm_jax as cllm
from cllm_jax.decoding.engine import decode_all
from cllm_jax.decoding.request import Request
from cllm_jax.decoding.sampling import Sampling
from cllm_jax.decoding.steps import Step, decode_steps
from cllm_jax.drafters.jacobi import Jacobi
from cllm_jax.errors import ConfigError
from tests.tiny import byte_tokenizer, compilations, copy_model, echo_config

CONFIG = dataclasses.replace(echo_config(byte_tokenizer()), layers=1)
MODEL = copy_model(len(byte_tokenizer()('the 你, so\n')['input_ids']), CONFIG, byte_tokenizer())
PROMPTS = ['the 你, so\n', 'this, the 你o', 'so\nthe', 'a much longer prompt, the 你, so\n']
JACOBI = Request(Jacobi(6), max_tokens=20, batch=2)


def watched(request, prompts=PROMPTS):
    steps = []
    return decode_steps(MODEL, request, prompts, steps.append), steps


@pytest.mark.parametrize(
    'request_',
    [
        JACOBI,
        dataclasses.replace(JACOBI, sampling=Sampling(0.9), seed=3, batch=8),
        dataclasses.replace(JACOBI, stop=('so', 'x')),
    ],
    ids=['Jacobi', 'sampled', 'stop'],
)
def test_the_answers_are_those_of_other_calls_and_grow_by_what_each_forward_commits(request_):
    wanted = decode_all(MODEL, request_, PROMPTS)
    found, steps = watched(request_)
    for name in ('texts', 'tokens', 'accepted'):
        assert getattr(found, name) == getattr(wanted, name), name
    assert [step.forward for step in steps] == list(range(1, len(steps) + 1))
    assert steps[-1].tokens == tuple(map(tuple, found.tokens))
    for row, accepted in enumerate(found.accepted):
        sizes = [0, *(len(step.tokens[row]) for step in steps)]
        grown = [b - a for a, b in itertools.pairwise(sizes) if b > a]
        assert grown == accepted
        for step, size in zip(steps, sizes[1:], strict=True):
            assert step.tokens[row] == tuple(found.tokens[row][:size])


def test_a_prompt_of_a_later_batch_has_nothing_at_first():
    _, steps = watched(dataclasses.replace(JACOBI, batch=1), PROMPTS[:2])
    assert steps[0].tokens[0] and not steps[0].tokens[1]


def test_a_callback_can_end_the_decoding():
    seen = []

    def stop(step):
        seen.append(step)
        raise StopAsyncIteration

    with pytest.raises(StopAsyncIteration):
        decode_steps(MODEL, JACOBI, PROMPTS, stop)
    assert len(seen) == 1


def test_what_is_called_is_a_function():
    with pytest.raises(ConfigError, match='on_step 3: must be a function'):
        cllm.decode(MODEL, PROMPTS, on_step=3)


def test_the_public_call_hands_steps_on_and_is_not_compiled_for_it():
    options = {'drafter': Jacobi(6), 'max_tokens': 20, 'batch': 2}
    plain = cllm.decode(MODEL, PROMPTS, **options)
    cllm.decode(MODEL, PROMPTS, **options, on_step=lambda step: None)
    compiled, steps = compilations(), []
    found = cllm.decode(MODEL, PROMPTS, **options, on_step=steps.append)
    assert cllm.decode(MODEL, PROMPTS, **options).tokens == found.tokens == plain.tokens
    assert compilations() == compiled
    assert all(isinstance(step, cllm.Step) and step.__class__ is Step for step in steps)
    with pytest.raises(dataclasses.FrozenInstanceError):
        steps[0].forward = 2
