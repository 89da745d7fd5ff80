"""Every drafter returns AR's tokens in the programs that users run: optimised, as nothing else is.

The other tests compile without most optimisations, and with flags that find mistakes in dtypes. One
process with none of them decodes with every drafter; a test reads its report.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cllm_jax.drafters.registry import DRAFTERS
from tests.decoding.as_users_run import CLLM, TARGET, TEMPERATURES, TOKENS

ROOT = Path(__file__).parents[2]
OWN = ('JAX_', 'XLA_')
"""Beginnings of the names of variables that the tests set for themselves."""


@pytest.fixture(scope='module')
def report():
    """What the process found."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(OWN)}
    env |= {'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(ROOT)}
    command = [sys.executable, '-m', 'tests.decoding.as_users_run']
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def test_the_process_has_the_flags_of_users_and_every_drafter_that_there_is(report):
    flags = {'optimised': True, 'xla': '', 'devices': 1}
    flags |= {'precision': None, 'promotion': 'standard'}
    assert report['flags'] == flags
    assert {known.__name__ for known in DRAFTERS.values()} <= set(report['drafters'])


@pytest.mark.parametrize('temperature', TEMPERATURES)
@pytest.mark.parametrize(
    ('model', 'drafter'),
    [('embedded', name) for name in CLLM] + [('embedded-target', name) for name in TARGET],
)
def test_tokens_are_those_of_ar(report, model, drafter, temperature):
    runs = report['runs']
    plain, fast = runs[f'ar of {model} {temperature}'], runs[f'{drafter} {temperature}']
    assert fast['tokens'] == plain['tokens']
    assert len({tuple(answer) for answer in plain['tokens']}) == 4
    assert max(map(len, plain['tokens'])) == TOKENS, 'long enough to differ'
    slower = sum(fast['forwards']) - sum(plain['forwards'])
    assert slower < 0 or drafter == 'space', 'more than a token per forward'
    assert slower <= 0
