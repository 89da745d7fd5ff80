"""Runs that continue where they stopped, and damaged ones that do not."""

import dataclasses
import os
import re
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cllm_jax.errors import DataError, Interrupted, NumericalError
from cllm_jax.hf.load import load
from cllm_jax.runs.checksums import SUMS
from cllm_jax.runs.run_dir import read_metrics
from cllm_jax.training import trainer
from cllm_jax.training.checkpoint import open_checkpoints, restore
from cllm_jax.training.held_out import HeldOut
from cllm_jax.training.optimizer import make_optimizer
from cllm_jax.training.step import new_state
from cllm_jax.training.trainer import train
from tests.tiny_training import SHALLOW, tiny_run


def without_speed(directory):
    drop = ('tokens_per_second',)
    lines = read_metrics(directory / 'metrics.jsonl')
    return [{k: v for k, v in line.items() if k not in drop} for line in lines]


@pytest.mark.slow
def test_an_interrupted_run_ends_like_an_uninterrupted_one(mixed_dtypes, tmp_path):
    run = tiny_run()
    train(tmp_path / 'whole', *run)

    calls = {'n': 0}

    def crash(record):
        calls['n'] += 1
        if calls['n'] in (2, 5, 9):  # before the first checkpoint, twice, and after it
            raise KeyboardInterrupt

    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / 'parts', *run, report=crash)
    train(tmp_path / 'parts', *run)
    assert without_speed(tmp_path / 'parts') == without_speed(tmp_path / 'whole')
    parts, whole = (tmp_path / name / 'model/model.safetensors' for name in ('parts', 'whole'))
    assert parts.read_bytes() == whole.read_bytes()
    assert load(str(tmp_path / 'whole')).config == SHALLOW


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_says_how_to_go_on(usual_signals, mixed_dtypes, tmp_path, number):
    run = tiny_run()

    def stop(record):
        if record['step'] == 1:
            os.kill(os.getpid(), number)

    with pytest.raises(Interrupted, match='saved at step 1') as e:
        train(tmp_path, *run, report=stop)
    assert e.value.exit_code == 75
    train(tmp_path, *run)
    steps = [m['step'] for m in without_speed(tmp_path) if 'loss' in m]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_signals_that_were_ignored_stay_ignored(usual_signals, mixed_dtypes, tmp_path):
    numbers = (signal.SIGTERM, signal.SIGINT)
    for number in numbers:
        signal.signal(number, signal.SIG_IGN)

    def stop(record):
        for number in numbers:
            os.kill(os.getpid(), number)

    train(tmp_path, *tiny_run(), report=stop)
    assert [m['step'] for m in without_speed(tmp_path) if 'loss' in m] == [1, 2, 3, 4, 5, 6]
    assert [signal.getsignal(number) for number in numbers] == [signal.SIG_IGN] * 2


def damage(checkpoint) -> None:
    for path in checkpoint.rglob('*'):
        if path.is_file() and path.stat().st_size and path.name != SUMS:
            path.write_bytes(path.read_bytes()[:-1] + b'!')


def test_a_damaged_checkpoint_is_set_aside_and_training_goes_on_from_the_one_before(
    mixed_dtypes, tmp_path
):
    run = tiny_run()
    train(tmp_path / 'whole', *run)
    train(tmp_path / 'bad', *run)
    damage(tmp_path / 'bad/checkpoints/6')
    notes = []
    train(tmp_path / 'bad', *run, note=notes.append)
    assert (tmp_path / 'bad/damaged-checkpoint-6').is_dir() and 'going back' in notes[0]
    assert without_speed(tmp_path / 'bad') == without_speed(tmp_path / 'whole')


@pytest.mark.parametrize('how', ['damaged', 'emptied', 'gone'])
def test_a_run_whose_checkpoints_are_lost_is_left_as_it_is(mixed_dtypes, tmp_path, how):
    run = tiny_run()
    train(tmp_path, *run)
    kept = [tmp_path / 'metrics.jsonl', tmp_path / 'model/model.safetensors']
    before = [(path.read_bytes(), path.stat().st_mtime_ns) for path in kept]
    for step in (tmp_path / 'checkpoints').iterdir():
        damage(step)
    if how != 'damaged':
        shutil.rmtree(tmp_path / 'checkpoints')
    if how == 'emptied':
        (tmp_path / 'checkpoints').mkdir()
    for _ in range(2):
        with pytest.raises(DataError, match='damaged or gone; it is left as it is'):
            train(tmp_path, *run)
    assert [(path.read_bytes(), path.stat().st_mtime_ns) for path in kept] == before


def test_a_finished_run_whose_model_is_gone_makes_it_again(mixed_dtypes, tmp_path):
    run = tiny_run(held_out=HeldOut(every=6, prompts=3, max_tokens=8))
    train(tmp_path, *run)
    model, checkpoint = tmp_path / 'model/model.safetensors', tmp_path / 'checkpoints/6'
    before, saved = model.read_bytes(), checkpoint.stat().st_mtime_ns
    shutil.rmtree(model.parent)
    notes = []
    train(tmp_path, *run, note=notes.append)
    assert model.read_bytes() == before and checkpoint.stat().st_mtime_ns == saved
    assert 'what was kept is gone' in notes[0]


def test_nan_stops_the_run_and_keeps_the_last_good_checkpoint(mixed_dtypes, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, 'MAX_SKIPPED', 2)
    learner, data, source, settings = tiny_run(steps=4)
    train(tmp_path, learner, data, source, settings)

    def newest():
        state = new_state(make_optimizer(settings.optimizer, settings.steps), learner.params)
        with open_checkpoints(tmp_path / 'checkpoints', lambda text: None) as checkpoints:
            return restore(checkpoints, state)[0]

    def broken(*arguments):
        loss, metrics = learner.loss(*arguments)
        return loss * jnp.nan, metrics

    good, failing = newest(), dataclasses.replace(learner, loss=broken)
    test = dataclasses.replace(settings.held_out, every=40)
    # Noticed where a line is logged, and where a checkpoint would be saved.
    for step, every in ((7, {'log_every': 1}), (8, {'log_every': 40, 'save_every': 4})):
        longer = dataclasses.replace(settings, steps=40, held_out=test, **every)
        said = rf'step {step}: .*NaN.*--model {re.escape(str(tmp_path))}'
        with pytest.raises(NumericalError, match=said):
            train(tmp_path, failing, data, source, longer)
        kept = newest()
        assert int(good.step) == int(kept.step) == 4
        for a, b in zip(jax.tree.leaves(good.params), jax.tree.leaves(kept.params), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ('broken', 'skipped'), [(range(6), 6), (range(2, 6), 4), (range(5, 6), 1), (range(1, 5), 0)]
)
def test_a_run_that_ends_in_nan_is_not_done(mixed_dtypes, broken, skipped, tmp_path, monkeypatch):
    """Also one of fewer steps than may be left out, whose last ones are; some in between may be."""
    make = trainer.make_step

    def spoilt(loss, *arguments):
        def nan(*given):
            value, metrics = loss(*given)
            return jax.lax.stop_gradient(value) * jnp.nan, metrics

        good, bad = make(loss, *arguments), make(nan, *arguments)
        return lambda state, *rest: (bad if int(state.step) in broken else good)(state, *rest)

    monkeypatch.setattr(trainer, 'make_step', spoilt)
    run = tiny_run()
    if skipped:
        with pytest.raises(NumericalError, match=rf'step 6: {skipped} updates in a row .* NaN'):
            train(tmp_path, *run)
    else:
        train(tmp_path, *run)
    logged = [line for line in read_metrics(tmp_path / 'metrics.jsonl') if 'skipped' in line]
    assert [np.isnan(line['loss']) for line in logged] == [step in broken for step in range(6)]
    assert logged[-1]['skipped'] == skipped
    assert (tmp_path / 'checkpoints/6').exists() == (not skipped)
