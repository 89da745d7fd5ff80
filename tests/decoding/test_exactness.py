"""A row's bits depend on nothing but the row: in a class of shapes, and within one program.

The programs are compiled in a process of its own with the flags that users have: tests turn
optimisations off, on which rounding hangs (`rounding.py`).
"""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cllm_jax as cllm
from cllm_jax.decoding import loop
from cllm_jax.decoding.engine import decode_all
from cllm_jax.decoding.promise import drafts_chains, first_difference, promise, reference
from cllm_jax.decoding.request import Request, cache_slots, row_keys
from cllm_jax.decoding.sampling import Sampling
from cllm_jax.drafters.autoregressive import AutoRegressive
from cllm_jax.drafters.draft_model import DraftModel
from cllm_jax.drafters.jacobi import Jacobi
from cllm_jax.drafters.jacobi_tree import JacobiTree
from cllm_jax.drafters.prompt_lookup import PromptLookup
from cllm_jax.errors import ConfigError
from cllm_jax.model.llama import forward
from cllm_jax.runtime import backend
from cllm_jax.runtime.backend import CPU, backend_of
from tests.drafters.examples import DRAFTERS, with_random_weights
from tests.tiny import ragged_prompts, random_model, tiny_config

MODEL = random_model(config=tiny_config(layers=1))
PROMPTS = ragged_prompts(5, (3, 7, 4))


@pytest.fixture(scope='module')
def found() -> dict:
    ours = ('JAX_DISABLE_MOST_OPTIMIZATIONS', 'XLA_FLAGS', 'JAX_NUM_CPU_DEVICES')
    users = {name: value for name, value in os.environ.items() if name not in ours}
    command = [sys.executable, '-m', 'tests.decoding.rounding']
    done = subprocess.run(command, env=users, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_ar_by_a_draft_s_program_has_its_bits(found, dtype):
    assert all(found[dtype]['program'].values()), found[dtype]['program']


@pytest.mark.slow
def test_both_sides_of_a_program_are_one_compilation(found):
    before, after = found['programs']
    assert before == after > 0


@pytest.mark.slow
@pytest.mark.parametrize('dtype', ['bfloat16', 'mixed'])
def test_in_a_class_bits_depend_on_nothing_but_the_row(found, dtype):
    part = found[dtype]
    if part['promise'] != 'class':
        pytest.skip('docs/exactness.md has no class for this hardware and jax version')
    assert all(part['class'].values()), part['class']
    assert found['answers']


@pytest.mark.slow
def test_each_part_of_the_class_is_needed(found):
    """Single rows come back, or single queries; sums are taken in any order."""
    if found['bfloat16']['promise'] != 'class':
        pytest.skip('docs/exactness.md has no class for this hardware and jax version')
    parts = found['broken']
    assert not parts['sums'], parts
    if jax.__version__.startswith('0.10.'):  # 0.12 has no loop of its own for a single row
        assert not parts['rows'] and not parts['queries'], parts


CHAINS = (AutoRegressive(), Jacobi(5), Jacobi(5, 'block'), PromptLookup(4))
TREES = (Jacobi(5, recycle=2), Jacobi(5, lookup=True), JacobiTree(6, 2), cllm.Lookahead(3, 4, 3))


@pytest.mark.parametrize('drafter', CHAINS, ids=repr)
def test_what_drafts_chains_is_known_without_running_it(drafter):
    assert drafts_chains(drafter)
    assert drafts_chains(DraftModel(MODEL.module, MODEL.params, 3))


@pytest.mark.parametrize('drafter', TREES, ids=repr)
def test_trees_are_promised_nothing(drafter):
    assert not drafts_chains(drafter)
    how, reason = promise(MODEL, Request(drafter, exact='program'))
    assert how == '' and 'tree' in reason


@pytest.mark.parametrize('name', DRAFTERS)
def test_heads_draft_trees(name):
    """Also those whose tree has a single path: it is drafted as one."""
    assert not drafts_chains(with_random_weights(DRAFTERS[name], MODEL))


def test_a_class_is_promised_only_where_one_is_known():
    def said(exact, **known):
        model = dataclasses.replace(MODEL)
        vars(model).update(known)
        return promise(model, Request(Jacobi(4), exact=exact))[0]

    classed = CPU.exactly('class')
    assert said('auto', has_class=True, backend=classed) == 'class'
    assert said('class', has_class=True, backend=CPU) == 'class'
    assert said('class', has_class=False, backend=CPU) == ''
    assert said('off', has_class=True, backend=classed) == ''
    assert said('auto', has_class=False, backend=CPU) == ''
    assert said('program', has_class=False, backend=CPU) == 'program'


def test_a_class_is_promised_for_as_many_rows_as_were_looked_at():
    model = dataclasses.replace(MODEL)
    vars(model)['has_class'] = True
    for batch, block, rows in ((64, 16, 1024), (33, 16, 1024), (65, 16, 2048), (33, 31, 1984)):
        how, reason = promise(model, Request(Jacobi(block), batch=batch, exact='class'))
        assert (how == 'class') == (rows <= 1024) == (f'{rows} rows' not in reason)


@pytest.mark.parametrize(
    ('flags', 'holds'),
    [
        ('', True),
        ('--xla_force_host_platform_device_count=4', True),
        ('--xla_cpu_enable_fast_math=true', False),
    ],
)
def test_the_table_is_of_the_usual_flags(flags, holds, monkeypatch):
    monkeypatch.setenv('XLA_FLAGS', flags)
    monkeypatch.setattr(backend, 'hardware', lambda: ('amx_bf16', '0.10'))
    assert backend_of(MODEL.params).rounding_class.dtypes == ()
    jax.config.update('jax_disable_most_optimizations', False)
    try:
        found = backend_of(MODEL.params)
    finally:
        jax.config.update('jax_disable_most_optimizations', True)
    assert found.rounding_class.dtypes == (('bfloat16',) if holds else ())
    assert found.default_dtype == ('mixed' if holds else 'float32') and found.weights_left


def test_ways_to_be_exact_replace_each_other():
    ways = ('class', 'program', 'off')
    once = {how: CPU.exactly(how) for how in ways}
    for first in ways:
        for then in ways:
            assert once[first].exactly(then).exact == once[then].exact
            assert once[first].exactly(then).exact_options == once[then].exact_options
        assert once[first].exactly('auto') is once[first]
    assert once['class'].exact and once['class'].exactly('class') == once['class']
    assert once['off'] == CPU and not CPU.exact


@pytest.mark.parametrize('how', ['class', 'program', 'off'])
@pytest.mark.parametrize('batch', [1, 4])
def test_all_ways_give_the_answers_and_the_forwards_of_each_other(how, batch):
    plain = decode_all(MODEL, Request(Jacobi(5), 20, batch=1), PROMPTS)
    found = decode_all(MODEL, Request(Jacobi(5), 20, batch=batch, exact=how), PROMPTS)
    assert (found.tokens, found.accepted) == (plain.tokens, plain.accepted)


@pytest.mark.parametrize('sampling', [Sampling(), Sampling(0.9)], ids=['greedy', 'sampled'])
@pytest.mark.parametrize('name', DRAFTERS)
def test_every_drafter_s_program_decodes_a_token_at_a_time(name, sampling):
    request = Request(with_random_weights(DRAFTERS[name], MODEL), 16, sampling, exact='program')
    one = decode_all(MODEL, reference(request, AutoRegressive()), PROMPTS)
    assert {n for accepted in one.accepted for n in accepted} == {1}
    assert one.tokens == decode_all(MODEL, request, PROMPTS).tokens


def test_python_asks_for_the_program_and_is_told_what_holds():
    jacobi = cllm.Jacobi(5)
    drafted = cllm.decode(MODEL, PROMPTS, jacobi, 12, exact='program')
    plain = cllm.decode(MODEL, PROMPTS, jacobi, 12, exact='program', commit=1)
    assert plain.tokens == drafted.tokens and sum(plain.forwards) > sum(drafted.forwards)
    assert {n for accepted in plain.accepted for n in accepted} == {1}
    assert cllm.promise(MODEL, jacobi, 'program') == 'program'
    assert cllm.promise(MODEL) == cllm.promise(MODEL, TREES[0], 'program') == ''


def test_a_prompt_attends_to_the_slots_of_its_cache_in_a_class(monkeypatch):
    """What it leaves there then does not depend on the width of the draft after it."""
    seen, verify = [], loop._verify

    def watching(decoder, state, draft, where, rows, at_BN=None):
        if at_BN is not None:
            seen.append((rows[2].shape[2], state.cache.slots))
        return verify(decoder, state, draft, where, rows, at_BN)

    monkeypatch.setattr(loop, '_verify', watching)
    other = dataclasses.replace(MODEL.config, max_positions=257)  # nothing compiled before
    model = dataclasses.replace(MODEL, config=other)
    for how in ('class', 'off'):
        decode_all(model, Request(Jacobi(6), 8, exact=how), PROMPTS)
    (of_class, slots), (own, _) = seen
    assert of_class == slots > own


def test_where_answers_part_and_how_near_they_were():
    prompts, keys_B = [[1, 2], [3, 4, 5]], row_keys(0, [0, 1])
    request = Request(Jacobi(4), 6)
    tokens = decode_all(MODEL, request, prompts).tokens
    assert first_difference(MODEL, request, prompts, keys_B, (tokens, tokens)) is None
    other = [tokens[0], [*tokens[1][:3], (tokens[1][3] + 1) % 29, *tokens[1][4:]]]
    found = first_difference(MODEL, request, prompts, keys_B, (tokens, other))
    assert (found.prompt, found.token) == (1, 3)
    assert found.ids == (tokens[1][3], other[1][3])
    text = jnp.asarray([[*prompts[1], *tokens[1][:3]]])
    logits_V = np.asarray(forward(MODEL.module, MODEL.params, text))[0, -1]
    a, b = (float(logits_V[i]) for i in found.ids)
    assert found.units * np.spacing(np.float32(max(abs(a), abs(b)))) == pytest.approx(
        a - b, rel=1e-3
    )
    shorter = [tokens[0], tokens[1][:4]]
    found = first_difference(MODEL, request, prompts, keys_B, (tokens, shorter))
    assert (found.token, found.ids) == (4, (tokens[1][4], None)) and found.units is None


def test_an_unknown_way_is_refused():
    with pytest.raises(ConfigError, match="exact 'always': must be 'auto', 'class', 'program' or"):
        Request(Jacobi(4), exact='always')


@pytest.mark.parametrize(('exact', 'unit'), [(True, 64), (False, 32)])
def test_a_cache_has_room_in_few_sizes(exact, unit):
    sizes = {cache_slots(16, steps, 5, exact) for steps in range(1, 300)}
    assert sizes == set(range(unit, 321, unit))
    assert all(cache_slots(16, steps, 5, exact) >= 21 + steps for steps in range(1, 300))
