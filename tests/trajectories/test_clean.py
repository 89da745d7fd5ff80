"""Every record is kept or counted, and corrections are what the augmentation says."""

from pathlib import Path

import numpy as np

from cllm_jax.trajectories.clean import Cleaning, clean, cut_warning
from tests.trajectories.examples import trajectory

RECORDS = [
    trajectory([4, 5, 6], id='right', right=1),
    trajectory([4, 5, 6], id='unknown'),
    trajectory([4, 5, 6], id='wrong', right=0),
    trajectory([4, 5, 6], id='cut', finished=False),
    trajectory([5, 6] * 12, id='loop'),
    trajectory([4], states=np.zeros((0, 2)), start=(), id='short'),
]


def test_cleaning_counts_every_record():
    def kept(**rules):
        records, counts = clean(RECORDS, Cleaning(**rules))
        assert sum(counts.values()) == len(RECORDS) and counts['kept'] == len(records)
        return [record.id for record in records], dict(counts)

    left_out = {'truncated': 1, 'repetitive': 1, 'no states': 1}
    assert kept() == (['right', 'unknown', 'wrong'], left_out | {'kept': 3})
    assert kept(wrong=True) == (['right', 'unknown'], left_out | {'kept': 2, 'wrong': 1})
    everything = ['right', 'unknown', 'wrong', 'cut', 'loop']
    assert kept(repetitive=False, truncated=False) == (everything, {'kept': 5, 'no states': 1})


def test_many_cut_answers_are_reported_with_a_longer_limit():
    def said(cut, total=24, limit=128, positions=2048):
        return cut_warning(Path('runs/x'), cut, total, limit, positions)

    assert said(0) is said(4) is said(0, 0) is None
    text = '22 of 24 answers were cut, --max-tokens 128 is short: collect again with --max-tokens '
    assert text + '256, after removing runs/x or with --out' in said(22)
    assert '--max-tokens 200,' in said(5, positions=400)  # at most half of the positions
    assert 'the model has 200 positions; choose' in said(5, positions=200)
    assert 'stage target' in said(24) and 'stage target' not in said(23)


def test_augmented_states_correct_some_wrong_guesses_but_not_the_first():
    truth = np.arange(10, 22, dtype=np.int32)
    state = np.asarray([14, 15, 0, 17, 1, 2, 3, 4], np.int32)
    record = trajectory(truth, states=[truth[:8], state], start=[0, 4], id='row')
    (more,), counts = clean([record], Cleaning(augment=1.0))
    assert counts['augmented states'] == 1 and more.start.tolist() == [0, 4, 4]
    assert (more.states[:2] == record.states).all()
    changed = np.flatnonzero(more.states[2] != state)
    assert set(changed) < {4, 5, 6, 7} and len(changed) == 2
    assert (more.states[2][changed] == truth[4:][changed]).all()
    (again,), _ = clean([record], Cleaning(augment=1.0))
    assert (again.states == more.states).all()
    (same,), _ = clean([record], Cleaning())
    assert same is record
