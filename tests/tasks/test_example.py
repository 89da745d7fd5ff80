"""What the generated tasks hold out, and that their text never changes."""

import hashlib
import json

import pytest

from cllm_jax.tasks import arithmetic, sql
from cllm_jax.tasks.example import is_held_out


def test_a_tenth_of_all_keys_is_held_out_for_good():
    held_out = [i for i in range(10_000) if is_held_out(f'key {i}')]
    assert 900 < len(held_out) < 1100
    assert held_out[:3] == [5, 16, 20]


@pytest.mark.parametrize(
    ('task', 'split', 'digest'),
    [
        (sql, 'train', 'dc7d4e1c845b6086'),
        (sql, 'heldout', '3f6a48ec0f27b6a3'),
        (arithmetic, 'train', '5b5525c1a5a325f9'),
        (arithmetic, 'heldout', '60ab8631d6f904b6'),
    ],
)
def test_the_examples_of_a_seed_never_change(task, split, digest):
    found = hashlib.sha256()
    for index in range(200):
        row = task.generate(index, seed=7, split=split)
        found.update(json.dumps([row.id, row.prompt, row.answer, row.meta]).encode())
    assert found.hexdigest()[:16] == digest
