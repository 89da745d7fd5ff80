"""Every drafter returns AR's tokens in the programs that users run, which are optimised.

The other tests compile without most optimisations, and with flags that find mistakes in dtypes. One
process with none of them decodes with every drafter, and the tests read its report.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cllm_jax.drafters.registry import DRAFTERS
from tests.decoding.as_users_run import GREEDY, HOT, RUNS, TOKENS, key_of

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
OWN = ('JAX_', 'XLA_')
"""Beginnings of the names of variables that the tests set for themselves."""


@pytest.fixture(scope='module')
def report():
    """What the process found."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(OWN)}
    env |= {'JAX_PLATFORMS': 'cpu'}
    command = [sys.executable, '-m', 'tests.decoding.as_users_run']
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def test_the_process_has_the_flags_of_users_and_every_drafter_that_there_is(report):
    flags = {'optimised': True, 'xla': '', 'devices': 1}
    flags |= {'precision': None, 'promotion': 'standard'}
    assert report['flags'] == flags
    assert {known.__name__ for known in DRAFTERS.values()} <= set(report['kinds'])


@pytest.mark.parametrize('model', ['embedded', 'embedded-target'])
def test_the_answers_are_worth_comparing(report, model):
    greedy, hot = (report['runs'][key_of(model, 'ar', t)]['tokens'] for t in (GREEDY, HOT))
    assert len({tuple(answer) for answer in greedy}) == 4
    assert max(map(len, greedy)) == max(map(len, hot)) == TOKENS
    assert sum(a != b for a, b in zip(greedy, hot, strict=True)) > 1, 'sampling has to choose'


@pytest.mark.parametrize(
    ('model', 'drafter', 'temperature'),
    [(*who, t) for who, temperatures in RUNS.items() for t in temperatures if who[1] != 'ar'],
)
def test_tokens_are_those_of_ar(report, model, drafter, temperature):
    plain, fast = (report['runs'][key_of(model, who, temperature)] for who in ('ar', drafter))
    assert fast['tokens'] == plain['tokens']
    if drafter != 'space':  # whose mask nobody trained
        assert sum(fast['forwards']) < sum(plain['forwards']), 'drafts are accepted, too'
