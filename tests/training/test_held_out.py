"""Which checkpoint a run keeps, and when it warns."""

import shutil

import numpy as np
import pytest

from cllm_jax.export import best_numbers
from cllm_jax.hf.load import load
from cllm_jax.runs.run_dir import read_metrics
from cllm_jax.training import held_out, trainer
from cllm_jax.training.held_out import HeldOut, alarm, score
from cllm_jax.training.trainer import train
from tests.tiny_training import tiny_run


def test_repetition_that_grows_is_reported():
    before = {'repetitive': 0.1}
    assert alarm({'repetitive': 0.3}, before) is None
    assert '31% of the held-out answers repeat' in alarm({'repetitive': 0.31}, before)


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
def test_without_tests_the_last_state_is_kept(mixed_dtypes, tmp_path, monkeypatch, steps):
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
