"""Every record is kept or counted, and corrections are what the augmentation says."""

import numpy as np

from cllm_jax.trajectories.clean import Cleaning, clean
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
