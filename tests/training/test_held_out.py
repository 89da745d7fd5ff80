"""Which checkpoint a run keeps, and when it warns."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cllm_jax.errors import NumericalError
from cllm_jax.export import best_numbers
from cllm_jax.hf.load import load
from cllm_jax.runs.run_dir import read_metrics
from cllm_jax.training import held_out, trainer
from cllm_jax.training.held_out import HeldOut, alarm, score
from cllm_jax.training.step import TrainState
from cllm_jax.training.trainer import train
from tests.tiny_training import tiny_run

SOUND = {'repetitive': 0.1, 'agreement': 1.0, 'quality': 0.5}
REPEATS, STRAYS = SOUND | {'repetitive': 0.9}, SOUND | {'agreement': 0.05, 'quality': 0.1}


def test_repetition_that_grows_is_reported():
    def said(faster=True, **found):
        return alarm(SOUND | found, SOUND, faster, HeldOut(tolerance=0.02))

    assert said() is said(repetitive=0.3) is None
    assert '31% of the held-out answers repeat' in said(repetitive=0.31)
    assert said(faster=False, repetitive=0.31)


def test_answers_that_are_others_and_worse_are_reported():
    """Others alone may be better ones, and a model that learns texts is to say something else."""

    def said(agreement, quality, faster=True):
        found = SOUND | {'agreement': agreement, 'quality': quality}
        return alarm(found, SOUND, faster, HeldOut(tolerance=0.02))

    text = '9% of the held-out answers are as before training, and their quality is 47%, 50% before'
    assert said(0.09, 0.47) == text
    assert said(0.1, 0.0) is said(0.0, 0.48) is said(0.0, 0.9) is said(0.0, 0.0, False) is None


@pytest.fixture
def light(monkeypatch):
    """Steps that cost nothing: each adds one to every weight."""

    def step(state, batch, frozen):
        params = jax.tree.map(lambda x: x + 1, state.params)
        moved = TrainState(params, state.opt_state, state.step + 1)
        return moved, {'loss': jnp.ones(()), 'skipped': jnp.zeros(())}

    monkeypatch.setattr(trainer, 'make_step', lambda *_: step)


def find(monkeypatch, bad: dict[int, dict]) -> None:
    """The tests of some steps find what is given; all others, also before training, no fault."""
    good = SOUND | {'tokens': [[1]], 'loop_free_tokens_per_forward': 1.0}
    keep = trainer._test_and_keep

    def testing(run, state, progress):
        found = good | bad.get(int(state.step), {})
        monkeypatch.setattr(trainer, 'held_out_test', lambda *_: found)
        try:
            keep(run, state, progress)
        finally:
            monkeypatch.setattr(trainer, 'held_out_test', lambda *_: good)

    monkeypatch.setattr(trainer, 'held_out_test', lambda *_: good)
    monkeypatch.setattr(trainer, '_test_and_keep', testing)


EVERY = HeldOut(every=1, prompts=2, max_tokens=4, block=4)


@pytest.mark.parametrize('bad', [REPEATS, STRAYS])
def test_a_run_that_collapses_ends_and_does_not_come_there_again(light, tmp_path, monkeypatch, bad):
    """What is sound is kept; alone one bad test is a warning, and to go on takes a setting."""
    find(monkeypatch, {2: bad, 4: bad, 5: bad})
    run, notes = tiny_run(held_out=EVERY), []
    kept, log = tmp_path / 'model/model.safetensors', tmp_path / 'metrics.jsonl'

    def kill(record):  # the number of bad tests outlives that
        if record['step'] == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, *run, report=kill, note=notes.append)
    said = rf'^step 5: .*collapsed, and the best one is in {tmp_path}/model; .*--on-collapse warn$'
    with pytest.raises(NumericalError, match=said) as stopped:
        train(tmp_path, *run, note=notes.append)
    assert stopped.value.exit_code == 4 and [n[:15] for n in notes] == [
        'warning: step 2',
        'warning: step 4',
    ]
    assert best_numbers(tmp_path)['step'] == 3
    assert sorted(p.name for p in (tmp_path / 'checkpoints').iterdir()) == ['2', '4']
    before = log.read_bytes(), kept.read_bytes(), kept.stat().st_mtime_ns
    monkeypatch.setattr(trainer, 'make_step', None)  # the same command does nothing
    with pytest.raises(NumericalError, match=r'step 5: this run ended here before: .*best one is'):
        train(tmp_path, *run)
    assert before == (log.read_bytes(), kept.read_bytes(), kept.stat().st_mtime_ns)


def test_a_run_that_ended_in_collapse_can_go_on(light, tmp_path, monkeypatch):
    find(monkeypatch, {4: REPEATS, 5: REPEATS})
    learner, data, source, settings = tiny_run(held_out=EVERY)
    anyway = dataclasses.replace(settings, on_collapse='warn')
    train(tmp_path / 'whole', learner, data, source, anyway)
    with pytest.raises(NumericalError):
        train(tmp_path / 'parts', learner, data, source, settings)
    train(tmp_path / 'parts', learner, data, source, anyway)
    drop = ('tokens_per_second',)
    whole, parts = (
        [{k: v for k, v in line.items() if k not in drop} for line in read_metrics(path)]
        for path in (tmp_path / 'whole/metrics.jsonl', tmp_path / 'parts/metrics.jsonl')
    )
    assert whole == parts and best_numbers(tmp_path / 'parts')['step'] in (1, 2, 3, 6)
    train(tmp_path / 'parts', learner, data, source, settings)  # it is done


def test_a_collapse_before_the_first_test_leaves_nothing_sound(light, tmp_path, monkeypatch):
    find(monkeypatch, {1: REPEATS, 2: REPEATS})
    with pytest.raises(NumericalError, match=r'step 2: .*collapsed, and none was sound;'):
        train(tmp_path, *tiny_run(held_out=EVERY))


def test_a_new_model_is_never_stopped(light, tmp_path, monkeypatch):
    find(monkeypatch, dict.fromkeys(range(7), REPEATS))
    notes = []
    train(tmp_path, *tiny_run(held_out=EVERY, model='new'), note=notes.append)
    tests = [m for m in read_metrics(tmp_path / 'metrics.jsonl') if 'held_out_score' in m]
    assert len(tests) == len(notes) == 6 and all(m['held_out_score'] >= 0 for m in tests)


def test_a_model_that_repeats_itself_is_not_kept_for_its_speed(mixed_dtypes, tmp_path):
    test = HeldOut(every=1, prompts=3, max_tokens=8, block=4)
    quick = {'quality': 0.9, 'tokens_per_forward': 9.0, 'loop_free_tokens_per_forward': 2.0}
    slow = {'quality': 0.9, 'tokens_per_forward': 3.0, 'loop_free_tokens_per_forward': 3.0}
    assert score(quick, 0.9, True, True, test) == 2 < score(slow, 0.9, True, True, test) == 3
    train(tmp_path, *tiny_run(held_out=test))
    logged = [m for m in read_metrics(tmp_path / 'metrics.jsonl') if 'held_out_score' in m]
    names = ('loop_free_tokens_per_forward', 'acceptance_of_slot_1', 'acceptance_of_slot_8')
    assert all(f'held_out_{name}' in m for m in logged for name in names)


def test_the_best_few_models_are_kept(mixed_dtypes, tmp_path, monkeypatch):
    test = HeldOut(every=1, prompts=3, max_tokens=8, block=4, keep=2)
    scores = iter([0.2, 0.5, 0.1, 0.5, 0.3, 0.4])
    monkeypatch.setattr(trainer, 'score', lambda *_: next(scores))
    train(tmp_path, *tiny_run(held_out=test))
    assert sorted(p.name for p in (tmp_path / 'best').iterdir()) == ['2', '4']
    best = load(str(tmp_path / 'best' / '4')).params['norm']  # the later of equals
    np.testing.assert_array_equal(best, load(str(tmp_path)).params['norm'])


@pytest.mark.parametrize('steps', [0, 6])
def test_without_tests_the_last_state_is_kept(light, tmp_path, monkeypatch, steps):
    """Also by a run that was killed, and by one whose model went away."""

    def no_test(*_):
        raise AssertionError('a test')

    monkeypatch.setattr(trainer, 'held_out_test', no_test)
    learner, samples, _, settings = tiny_run(steps=steps, held_out=HeldOut(every=0))
    run, states = (learner, samples, None, settings), []
    keep = trainer.save
    monkeypatch.setattr(trainer, 'save', lambda *a: states.append(a[2].params) or keep(*a))

    def kill(record):
        if record['step'] == 3:
            raise KeyboardInterrupt

    if steps:
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path, *run, report=kill)
        assert not (tmp_path / 'model').exists() and (tmp_path / 'checkpoints/2').is_dir()
    train(tmp_path, *run)
    kept = tmp_path / 'model/model.safetensors'
    last = states[-1] if steps else learner.params
    np.testing.assert_array_equal(load(str(tmp_path)).params['norm'], last['norm'])
    logged = read_metrics(tmp_path / 'metrics.jsonl')
    assert not any(key.startswith('held_out') for line in logged for key in line)
    assert best_numbers(tmp_path) == {'step': steps}
    before = kept.read_bytes()
    shutil.rmtree(kept.parent)
    train(tmp_path, *run)
    assert kept.read_bytes() == before


@pytest.mark.parametrize('quality', ['check', 'agreement'])
def test_a_model_that_learns_texts_is_kept_by_its_right_answers_or_else_the_last(
    mixed_dtypes, tmp_path, monkeypatch, quality
):
    """Agreement with the model before training would keep the one that learnt least."""
    test = HeldOut(every=1, prompts=3, max_tokens=8, block=4, quality=quality)
    right, kept = iter([0.2, 0.5, 0.1, 0.5, 0.3, 0.4]), []
    monkeypatch.setattr(held_out, 'share_right', lambda *_: next(right, 0.2))
    monkeypatch.setattr(held_out, 'write_trained', lambda *what: kept.append(what))
    train(tmp_path, *tiny_run(objective='ar', held_out=test))
    tests = [m for m in read_metrics(tmp_path / 'metrics.jsonl') if 'held_out_score' in m]
    assert len(kept) == (6 if quality == 'agreement' else 2)
    assert best_numbers(tmp_path)['step'] == (6 if quality == 'agreement' else 3)
    assert len(tests) == 6
