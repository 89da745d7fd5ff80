"""TensorBoard and Weights & Biases show what metrics.jsonl says, and never end a training."""

import errno
import json
import struct
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cllm_jax import train
from cllm_jax.errors import ConfigError
from cllm_jax.runs import logs
from cllm_jax.runs.logs import open_logs
from cllm_jax.runs.run_dir import append_metrics, read_metrics, rewind_metrics, scalars
from cllm_jax.training import trainer
from tests.tiny_training import tiny_run

SPEED = 'train/tokens_per_second'
"""The only number that another run of the same steps has otherwise."""


def as_logged(directory: Path) -> list[tuple[int, str, float]]:
    """What metrics.jsonl says, as one number after the other."""
    records = read_metrics(directory / 'metrics.jsonl')
    return [(m['step'], name, np.float32(x)) for m in records for name, x in scalars(m).items()]


def in_tensorboard(directory: Path) -> list[tuple[int, str, float]]:
    """The same of the only event file that has any, as the library reads it."""
    pytest.importorskip('tensorboard', reason='no tensorboard, which is part of the dev extra')
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event

    (file,) = (path for path in (directory / 'tensorboard').iterdir() if path.stat().st_size)
    events = map(Event.FromString, RawEventFileLoader(str(file)).Load())
    return [(e.step, v.tag, np.float32(v.simple_value)) for e in events for v in e.summary.value]


class FakeWandb:
    """Stands in for the library; keeps what a run was told."""

    def __init__(self):
        self.runs = []
        self.Settings = dict

    def init(self, **given):
        run = SimpleNamespace(given=given, logged=[], finished=False)
        run.log = lambda numbers, step: run.logged.append((step, numbers))
        run.finish = lambda: setattr(run, 'finished', True)
        name = given['id'] or f'new{len(self.runs)}'
        (Path(given['dir']) / f'wandb/offline-run-{len(self.runs)}-{name}').mkdir(parents=True)
        self.runs.append(run)
        return run

    def shown(self) -> list[tuple[int, str, float]]:
        """What the last run was told, each step once and in order."""
        steps = [step for step, _ in self.runs[-1].logged]
        assert steps == sorted(steps)
        return [(s, k, np.float32(x)) for s, row in self.runs[-1].logged for k, x in row.items()]


@pytest.fixture
def wandb(monkeypatch) -> FakeWandb:
    monkeypatch.delenv('WANDB_MODE', raising=False)
    monkeypatch.setitem(sys.modules, 'wandb', fake := FakeWandb())
    return fake


def line_of(step: int) -> dict:
    """Step 0 is a held-out test; in training a line counts its step, and NaN may happen."""
    loss = float('nan') if step == 7 else 1 / (step + 1)
    return {'step': step, 'quality': 0.5} if step == 0 else {'step': step, 'loss': loss}


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), max_size=4))
def test_logs_say_what_metrics_say_whatever_a_run_went_back_to(tmp_path_factory, parts):
    """Each part goes back to a checkpoint, and then on for some steps."""
    directory, fake = tmp_path_factory.mktemp('run'), FakeWandb()
    metrics, notes = directory / 'metrics.jsonl', []
    for back, steps in [(0, 3), *parts]:
        rewind_metrics(metrics, back)
        at = max((m['step'] for m in read_metrics(metrics)), default=-1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(sys.modules, 'wandb', fake)
            patch.delenv('WANDB_MODE', raising=False)
            with open_logs(('tensorboard', 'wandb'), directory, {}, notes.append) as write:
                for step in range(at + 1, at + 1 + steps):
                    append_metrics(metrics, line_of(step))
                    write(line_of(step))
    expected = as_logged(directory)
    np.testing.assert_equal(in_tensorboard(directory), expected)
    np.testing.assert_equal(fake.shown(), expected)
    assert notes == [] and all(run.finished for run in fake.runs)


def test_a_tensorboard_that_is_open_shows_a_run_that_went_back(tmp_path):
    accumulators = 'tensorboard.backend.event_processing.event_accumulator'
    open_board = pytest.importorskip(accumulators).EventAccumulator
    metrics, board, lines = tmp_path / 'metrics.jsonl', None, []
    for begin, end, factor in ((1, 7, 1.0), (3, 5, 2.0)):
        rewind_metrics(metrics, begin)
        with open_logs(('tensorboard',), tmp_path, {}, lines.append) as write:
            for step in range(begin + 1, end):
                append_metrics(metrics, line := {'step': step, 'loss': factor * step})
                write(line)
            board = board or open_board(str(tmp_path / 'tensorboard'))
            board.Reload()  # while the run goes on
    seen = [(event.step, event.value) for event in board.Scalars('train/loss')]
    assert seen == [(2, 2.0), (3, 3.0), (4, 8.0)]


@pytest.mark.slow
def test_an_interrupted_training_has_the_logs_of_an_uninterrupted_one(tmp_path, monkeypatch, wandb):
    with jax.numpy_dtype_promotion('standard'):
        run = tiny_run(log=('tensorboard', 'wandb'))
        trainer.train(tmp_path / 'whole', *run)
        whole = wandb.shown()

        def crash(record):
            if record['step'] == 5:  # after the checkpoint at 4: step 5 is done again
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            trainer.train(tmp_path / 'parts', *run, report=crash)
        assert as_logged(tmp_path / 'parts')[-1][0] == 5 and wandb.runs[-1].finished
        trainer.train(tmp_path / 'parts', *run)

    def without_speed(shown):
        return [entry for entry in shown if entry[1] != SPEED]

    assert in_tensorboard(tmp_path / 'whole') == as_logged(tmp_path / 'whole') == whole
    for shown in (in_tensorboard(tmp_path / 'parts'), wandb.shown()):
        assert shown == as_logged(tmp_path / 'parts')
        assert without_speed(shown) == without_speed(whole)


def test_a_log_that_fails_is_one_warning_and_the_others_go_on(tmp_path, monkeypatch):
    """When it is opened, when it is written to, and when it is closed; in whatever way."""
    full = OSError(errno.ENOSPC, 'No space left on device')

    def failing(moment):
        def fail(*given):
            raise full if moment == 'write' else RuntimeError

        if moment == 'open':
            return fail
        quiet = logs.Log(lambda step, numbers: None, lambda: closed.append(moment))
        return lambda *given: logs.dataclasses.replace(quiet, **{moment: fail})

    kept, closed = [], []
    good = logs.Log(lambda step, numbers: kept.append(step), lambda: kept.append('closed'))
    for moment in ('open', 'write', 'close'):
        opened = {'bad': failing(moment), 'good': lambda *given: good}
        monkeypatch.setattr(logs, 'OPEN', opened)
        notes: list[str] = []
        with open_logs(('bad', 'good'), tmp_path, {}, notes.append) as write:
            for step in range(3):
                write(line_of(step))
        (warning,) = notes
        assert warning.startswith('warning: log bad: ') and '\n' not in warning
        assert ('No space left' if moment == 'write' else 'RuntimeError') in warning
        assert kept == [0, 1, 2, 'closed']
        kept.clear()
    assert closed == ['write']  # what has failed is not kept open


def test_a_full_disk_ends_the_event_file_and_nothing_else(tmp_path, monkeypatch):
    """As the system says it: a file may have no more than so many bytes."""
    pytest.importorskip('tensorboard', reason='no tensorboard, which is part of the dev extra')
    code = f"""
import resource, signal
from pathlib import Path
from cllm_jax.runs.logs import open_logs
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (300, resource.RLIM_INFINITY))
notes = []
with open_logs(('tensorboard',), Path({str(tmp_path)!r}), {{}}, notes.append) as write:
    for step in range(100):
        write({{'step': step, 'loss': 0.5}})
(note,) = notes
print(note)
import sys
print([name for name in ('torch', 'tensorflow') if name in sys.modules])
"""
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == '', done.stderr
    note, heavy = done.stdout.splitlines()
    assert 'File too large' in note and heavy == '[]'


def test_only_the_first_process_writes(tmp_path, monkeypatch, wandb):
    monkeypatch.setattr(logs, 'is_main', lambda: False)
    with open_logs(('tensorboard', 'wandb'), tmp_path, {}, pytest.fail) as write:
        write(line_of(0))
    assert not any(tmp_path.iterdir())


def test_wandb_is_offline_and_one_run_unless_told_otherwise(tmp_path, monkeypatch, wandb):
    directory = tmp_path / 'mine/cllm'
    directory.mkdir(parents=True)
    for mode in (None, None, 'online', 'online'):
        if mode:
            monkeypatch.setenv('WANDB_MODE', mode)
        with open_logs(('wandb',), directory, {'steps': 6, 'seed': 1}, pytest.fail):
            pass
        given = wandb.runs[-1].given
        assert given['mode'] == (mode or 'offline') and given['config'] == {'steps': 6, 'seed': 1}
        assert given['name'] == 'mine/cllm' and given['resume'] == 'allow'
    assert [run.given['id'] for run in wandb.runs] == [None, 'new0', 'new0', 'new0']
    # An offline run takes the place of the one before; what was sent elsewhere stays.
    assert sorted(p.name for p in (directory / 'wandb').iterdir()) == [
        f'offline-run-{n}-new0' for n in (1, 2, 3)
    ]


def wandb_records(file: Path) -> Iterator[Any]:
    """Of a .wandb file: in blocks of 32 KiB, each part of a record after its sum, length and kind.

    Kind 1 is a whole record; others are parts of one, up to the last, 4.
    """
    data, at, whole = file.read_bytes(), 7, b''
    while at + 7 <= len(data):
        if (left := -at % 32768) and left < 7:  # too few bytes for a part are left empty
            at += left
            continue
        length, kind = struct.unpack('<HB', data[at + 4 : at + 7])
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield import_module('wandb.proto.wandb_internal_pb2').Record.FromString(whole)
            whole = b''


def test_wandb_itself_keeps_the_same_numbers(tmp_path, monkeypatch):
    pytest.importorskip('wandb', reason="no wandb; pip install 'cllm_jax[wandb]' (100 MB)")
    monkeypatch.delenv('WANDB_MODE', raising=False)
    for begin, end in ((0, 6), (4, 9)):
        rewind_metrics(tmp_path / 'metrics.jsonl', begin - 1)
        with open_logs(('wandb',), tmp_path, {'steps': 9}, pytest.fail) as write:
            for step in range(begin, end):
                tested = [{'step': step, 'held_out_quality': 1 / (step + 1)}] if step else []
                for line in (line_of(step), *tested):
                    append_metrics(tmp_path / 'metrics.jsonl', line)
                    write(line)
    (file,) = tmp_path.glob('wandb/offline-run-*/*.wandb')
    shown = []
    for record in wandb_records(file):
        items = {(i.key or '/'.join(i.nested_key)): i.value_json for i in record.history.item}
        names = [name for name in items if '/' in name]
        shown += [(record.history.step.num, n, np.float32(json.loads(items[n]))) for n in names]
    np.testing.assert_equal(sorted(shown), sorted(as_logged(tmp_path)))
    assert [step for step, _, _ in shown] == sorted(step for step, _, _ in shown)


@pytest.mark.parametrize('name', ['tensorboard', 'wandb'])
def test_a_missing_library_is_refused_before_anything_is_read(name, tmp_path, monkeypatch):
    """Also where a directory of that name lies around, as the library itself leaves one."""
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'argv', ['train', '--log', name, '--root', str(tmp_path / 'run')])
    monkeypatch.setattr(sys, 'path', [str(tmp_path)])
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(train, 'checked', lambda settings: pytest.fail('too late'))
    with pytest.raises(ConfigError) as e:
        train.run()
    assert str(e.value) == f"log {name}: needs the package {name}; pip install 'cllm_jax[{name}]'"
    assert not (tmp_path / 'run').exists()


def test_a_run_may_go_on_with_other_logs(tmp_path, monkeypatch):
    claimed = []

    def opened(directory, settings, defaults):
        claimed.append(settings)
        raise KeyboardInterrupt

    monkeypatch.setattr(train, 'open_run', opened)
    monkeypatch.setattr(train, 'installed', lambda *given: None)
    arguments = ['train', '--model', 'embedded-target', '--objective', 'spans', '--texts', 'sql']
    for names in ([], ['wandb', 'tensorboard']):
        more = ['--log', *names] if names else []
        monkeypatch.setattr(sys, 'argv', [*arguments, '--examples', '20', *more])
        with pytest.raises(KeyboardInterrupt):
            train.run()
    first, second = claimed
    assert first == second and 'steps' in first
