"""Random numbers do not depend on JAX's default: not on the kind of its keys, nor on its width."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest

from cllm_jax.decoding.engine import decode_all
from cllm_jax.decoding.request import Request, row_keys
from cllm_jax.decoding.sampling import Sampling
from cllm_jax.drafters.autoregressive import AutoRegressive
from cllm_jax.drafters.jacobi import Jacobi
from cllm_jax.drafters.lookahead import Lookahead
from cllm_jax.model.llama import Llama, init_params
from cllm_jax.runtime.keys import prng_key
from cllm_jax.trajectories.sharded import prompt_keys, trajectories
from cllm_jax.trajectories.store import Collection
from tests.tiny import ragged_prompts, random_model, tiny_config

PACKAGE = Path(__file__).parents[2] / 'cllm_jax'
MODEL = random_model(config=tiny_config(layers=1, eos_ids=(3,)))
PROMPTS = ragged_prompts(2, (3, 9, 4, 12, 7))
KINDS = ('threefry2x32', 'rbg', 'unsafe_rbg')


def answers(drafter, batch: int, temperature: float) -> tuple:
    sampling = Sampling(temperature, top_k=20)
    found = decode_all(MODEL, Request(drafter, 16, sampling, 7, batch=batch), PROMPTS)
    return found.tokens, found.forwards


def states(batch: int) -> list:
    settings = Collection(block=4, mode='sliding', max_tokens=12, batch=batch)
    keys, found = prompt_keys(3, [f'{i}' for i in range(4)]), []
    for i in range(0, 4, batch):
        some = slice(i, i + batch)
        rows = [np.asarray(prompt, np.int32) for prompt in PROMPTS[some][: 4 - i]]
        none = [np.zeros(0, np.int32)] * len(rows)
        made = trajectories(MODEL, rows, keys[some], none, settings, 16)
        found += [(t.states.tolist(), t.start.tolist(), t.answer.tolist()) for t in made]
    return found


@pytest.fixture(scope='module')
def usual():
    """What there is with JAX's own defaults."""
    hot = answers(Jacobi(4), 8, 1.0)
    plain = answers(AutoRegressive(), 8, 1.0)[0]
    assert hot[0] == plain and len({tuple(answer) for answer in plain}) == len(PROMPTS)
    return hot, states(4)


@pytest.mark.parametrize('kind', KINDS)
def test_answers_and_states_do_not_depend_on_the_default_kind(kind, usual):
    hot, collected = usual
    with jax.default_prng_impl(kind):
        for batch in (1, 4, 8):
            assert answers(Jacobi(4), batch, 1.0) == hot
        assert answers(AutoRegressive(), 1, 1.0)[0] == hot[0]
        assert states(1) == states(2) == collected


@pytest.mark.parametrize('kind', KINDS[1:])
def test_new_weights_do_not_depend_on_the_default_kind(kind):
    def weights():
        return init_params(Llama(MODEL.config), prng_key(5))

    expected = weights()
    with jax.default_prng_impl(kind):
        assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), weights(), expected))


def test_64_bit_numbers_change_nothing(usual):
    seed = 2**32 - 1
    keys = jax.random.key_data(row_keys(seed, range(3)))
    with jax.enable_x64(True):
        assert (jax.random.key_data(row_keys(seed, range(3))) == keys).all()
        assert answers(Jacobi(4), 8, 1.0) == usual[0]
        assert answers(Lookahead(4, 3, 2), 8, 1.0)[0] == usual[0][0]
        assert states(4) == usual[1]
        greedy = answers(Jacobi(4), 2, 0.0)
    assert greedy == answers(Jacobi(4), 2, 0.0)


def test_keys_are_made_in_one_place():
    makes = re.compile(r'random\.(key|PRNGKey|wrap_key_data)\(')
    found = {
        str(p.relative_to(PACKAGE)) for p in PACKAGE.rglob('*.py') if makes.search(p.read_text())
    }
    assert found == {'runtime/keys.py'}
