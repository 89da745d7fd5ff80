"""What is left out of a collection before training, and what is added; every row is counted.

Consistency training on repetitive or cut answers collapses (users of the original implementation
report it, and its authors advise to clean). What is done depends on the records and a seed alone.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from cllm_jax.decoding.result import Trajectory
from cllm_jax.errors import at_least, shares
from cllm_jax.tasks.quality import is_repetitive

MANY_CUT = 0.2
"""Share of answers that may be cut before a warning."""


@dataclasses.dataclass(frozen=True)
class Cleaning:
    """Which trajectories are trained on."""

    repetitive: bool = True
    """Leave out answers that repeat a few tokens over and over."""
    truncated: bool = True
    """Leave out answers that did not reach a stop token."""
    wrong: bool = False
    """Leave out answers that the task's checker calls wrong."""
    augment: float = 0.0
    """Add, for this share of the states, a copy in which some wrong guesses are corrected."""
    seed: int = 0
    """Of the augmentation."""

    def __post_init__(self):
        at_least(self, seed=0)
        shares(self, 'augment')


def clean(records: Iterable[Trajectory], rules: Cleaning) -> tuple[list[Trajectory], Counter]:
    """The records worth training on, augmented, and the number of records by fate."""
    kept, counts = [], Counter()
    for record in records:
        if rules.truncated and not record.finished:
            counts['truncated'] += 1
        elif rules.repetitive and is_repetitive(record.answer.tolist()):
            counts['repetitive'] += 1
        elif rules.wrong and record.right == 0:
            counts['wrong'] += 1
        elif len(record.states) == 0:
            counts['no states'] += 1
        else:
            counts['kept'] += 1
            kept.append(augment(record, rules, counts) if rules.augment else record)
    return kept, counts


def cut_warning(
    directory: Path, cut: int, total: int, max_tokens: int, positions: int
) -> str | None:
    """What to say of a collection in which many answers did not end within `max_tokens`.

    How long they would have become is not known: twice as long, or half of the model's positions,
    is what is tried next.
    """
    if cut <= MANY_CUT * total:
        return None
    longer = min(2 * max_tokens, positions // 2)
    remedy = f'collect again with --max-tokens {longer}, after removing {directory} or with --out'
    if longer <= max_tokens:
        remedy = f'the model has {positions} positions; choose prompts with shorter answers'
    if cut == total:
        remedy += '; a model that ends no answer has to learn it first (steps of stage target)'
    return (
        f'warning: {cut} of {total} answers were cut, --max-tokens {max_tokens} is short: {remedy}'
    )


def augment(record: Trajectory, rules: Cleaning, counts: Counter) -> Trajectory:
    """Add states like those between two iterations: half of the wrong guesses set right.

    The first wrong guess of a state stays wrong, so that a correct token can follow a wrong one
    (the aim of the augmentation in arXiv 2403.00835). The copy follows its original.
    """
    rng = np.random.default_rng((rules.seed, *record.id.encode()))
    total, width = len(record.answer), record.states.shape[1]
    states, start = [], []
    for state, begin in zip(record.states, record.start, strict=True):
        states.append(state)
        start.append(begin)
        truth = record.answer[np.minimum(begin + np.arange(width), total - 1)]
        wrong = np.flatnonzero((state != truth) & (begin + np.arange(width) < total))[1:]
        if len(wrong) and rng.random() < rules.augment:
            chosen = rng.choice(wrong, (len(wrong) + 1) // 2, replace=False)
            copy = state.copy()
            copy[chosen] = truth[chosen]
            states.append(copy)
            start.append(begin)
            counts['augmented states'] += 1
    return dataclasses.replace(record, states=np.stack(states), start=np.asarray(start, np.int32))
