"""Run directories: one owner, one set of settings, and a log that outlives a crash."""

import json
import os
import signal
import subprocess
import sys

import pytest

from cllm_jax.errors import ConfigError, DataError
from cllm_jax.runs.run_dir import (
    append_metrics,
    claim,
    has_begun,
    open_run,
    read_metrics,
    rewind_metrics,
)


def test_a_run_directory_has_one_owner_and_one_set_of_settings(tmp_path):
    with (
        open_run(tmp_path, {'a': 1}),
        pytest.raises(ConfigError, match='working here'),
        open_run(tmp_path, {'a': 1}),
    ):
        pass
    for a in (2, 1):  # what ended before it began claims nothing
        with open_run(tmp_path, {'a': a}):
            pass
    for a in (2, 1):  # nor does what failed before its first step
        with open_run(tmp_path, {'a': a}):
            claim(tmp_path, {'a': a}, {'b': a})
        append_metrics(tmp_path / 'metrics.jsonl', {'step': 0})
    assert not has_begun(tmp_path)
    append_metrics(tmp_path / 'metrics.jsonl', {'step': 1})
    with pytest.raises(ConfigError, match='begun with a = 1, now 2'), open_run(tmp_path, {'a': 2}):
        pass
    with pytest.raises(ConfigError, match='begun with b = 1, now 2'):
        claim(tmp_path, {'a': 1}, {'b': 2})
    assert json.loads((tmp_path / 'settings.json').read_text()) == {'a': 1}


def test_damaged_records_of_a_run_are_left_out_or_refused(tmp_path):
    log, good = tmp_path / 'metrics.jsonl', {'step': 1, 'loss': 2.0}
    line = json.dumps(good).encode()
    for damage in (b'\0' * 40, line[:9], b'[]', b'{}', b'\xff\xfe', b''):
        log.write_bytes(line + b'\n' + damage + b'\n' + line[:5])
        assert read_metrics(log) == [good]
        rewind_metrics(log, 1)
        assert log.read_bytes() == line + b'\n'
    for text in ('[]', '{"a": 1', '\0\0', '1', '\xff'):
        (tmp_path / 'settings.json').write_text(text, 'latin-1')
        refused = pytest.raises(DataError, match=r'settings\.json: not a JSON object')
        with refused, open_run(tmp_path, {'a': 1}):
            pass


def test_a_run_goes_on_where_it_was_moved_to(tmp_path):
    (tmp_path / 'here').mkdir()
    (tmp_path / 'here/settings.json').write_text(json.dumps({'a': 1, 'root': '/old/place'}))
    (tmp_path / 'here').rename(tmp_path / 'there')
    with open_run(tmp_path / 'there', {'a': 1}):
        pass


HOLDS = """
import sys, time
from pathlib import Path
from cllm_jax.runs.run_dir import open_run

with open_run(Path(sys.argv[1]), {}):
    print('holds', flush=True)
    time.sleep(600)
"""


def test_the_owner_is_named_and_a_killed_one_owns_nothing(tmp_path):
    command = [sys.executable, '-c', HOLDS, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as owner:
        try:
            assert owner.stdout.readline() == b'holds\n'
            said = f'process {owner.pid} on {os.uname().nodename} is working here'
            with pytest.raises(ConfigError, match=said), open_run(tmp_path, {}):
                pass
        finally:
            owner.send_signal(signal.SIGKILL)
    with open_run(tmp_path, {}):
        assert (tmp_path / 'lock').read_text().startswith(f'process {os.getpid()} on ')


def test_a_run_goes_on_with_settings_newer_than_it(tmp_path):
    """What it did not note is as by default, and nothing else."""
    begun, defaults = {'loss': {'ar': 6}}, {'loss': {'ar': 1, 'new': 0}, 'more': 2, 'free': 3}
    claim(tmp_path, begun, {})
    append_metrics(tmp_path / 'metrics.jsonl', {'step': 1})
    with open_run(tmp_path, {'loss': {'ar': 6, 'new': 0}, 'more': 2}, defaults):
        pass
    for other in ({'ar': 6, 'new': 1}, {'ar': 1, 'new': 0}):
        with (
            pytest.raises(ConfigError, match='begun with loss'),
            open_run(tmp_path, {'loss': other, 'more': 2}, defaults),
        ):
            pass
    with (
        pytest.raises(ConfigError, match='begun with more = 2, now 4'),
        open_run(tmp_path, {'loss': {'ar': 6, 'new': 0}, 'more': 4}, defaults),
    ):
        pass
