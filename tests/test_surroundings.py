"""The tests pass wherever they run: what a script, another machine or a Python brings along."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.test_launch import bash, program

ROOT = Path(__file__).parents[1]
SENSITIVE = (
    'tests/cli/test_console.py::test_texts_are_shown_as_they_are',
    'tests/cli/test_guard.py::test_an_interrupt_that_a_callback_swallows_comes_again',
    'tests/cli/test_settings.py::test_help_shows_docstrings_defaults_and_common_flags',
    'tests/runs/test_stages.py::test_the_command_prints_steps_or_one_line_of_error',
    'tests/test_launch.py::test_host_ends_the_step_with_sigterm_and_waits_for_it',
)
ODD = """
import os, signal, sys

for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
    signal.signal(number, signal.SIG_IGN)
os.close(0)
os.umask(0o077)
os.setsid()
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


def test_tests_pass_as_a_script_starts_them(tmp_path):
    """`pytest &` has signals ignored and no input; the rest is what people's machines set."""
    (directory := tmp_path / 'a b').mkdir()
    env = {name: value for name, value in os.environ.items() if name not in ('HOME', 'PYTHONPATH')}
    env |= {'LC_ALL': 'C', 'COLUMNS': '20', 'FORCE_COLOR': '1', 'TMPDIR': str(directory)}
    command = ['-m', 'pytest', '-q', '-n', '0', '-p', 'no:cacheprovider', *SENSITIVE]
    done = subprocess.run(
        [sys.executable, '-c', ODD, *command],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0 and ' passed' in done.stdout, done.stdout + done.stderr


def test_examples_may_be_slow_to_draw(monkeypatch):
    """Hypothesis reads the source of all that lies outside site-packages, within a draw."""
    usual, hours = time.perf_counter, iter(range(0, 10**9, 3600))

    def an_hour_later():
        monkeypatch.setattr(time, 'perf_counter', lambda: usual() + next(hours))

    slow = st.builds(an_hour_later)

    @settings(max_examples=15)
    @given(st.lists(slow, min_size=1, max_size=2), st.integers())
    def draws(_, number):
        assert isinstance(number, int)

    draws()


FOUND = {
    'none': ({}, ''),
    'one that runs': ({'python9.9': 'exit 0'}, 'python9.9'),
    'a shim without one': ({'python9.9': 'exit 127'}, ''),
    'a shim, and one': ({'python9.9': 'exit 127', 'bin/python9.9': 'exit 0'}, 'bin/python9.9'),
    'not on the path': ({'bin/python9.9': 'exit 0'}, 'bin/python9.9'),
    'without venv': ({'python9.9': '[[ $2 != *ensurepip* ]]'}, ''),
}


@pytest.mark.parametrize('name', FOUND)
def test_ci_takes_a_python_that_runs(name, tmp_path):
    programs, found = FOUND[name]
    for path, text in programs.items():
        program(tmp_path / path, text)
    if any('/' in path for path in programs):
        program(tmp_path / 'pyenv', f'[[ "$*" == "prefix 9.9" ]] && echo "{tmp_path}"')
    function = re.search(r'^find_python\(\) .*?^}$', (ROOT / '.ci/run').read_text(), re.M | re.S)[0]
    done = bash('-c', f'set -euo pipefail\n{function}\nfind_python 9.9', tools=tmp_path)
    assert (done.returncode, done.stderr) == (0, '')
    assert done.stdout.strip() == (found and str(tmp_path / found))
