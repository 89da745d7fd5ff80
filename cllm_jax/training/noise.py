"""Which states of an answer a batch has: those of its trajectory, or right tokens mixed with wrong.

A trajectory's states are what decoding guessed. Of a text there are none; its states are made by
chance: a right token first, then right ones and tokens of the prompt.
"""

import dataclasses
from collections.abc import Iterable

import numpy as np

from cllm_jax.decoding.result import Trajectory
from cllm_jax.errors import at_least, shares


@dataclasses.dataclass(frozen=True)
class Noise:
    """Which states of an answer a batch takes."""

    windows: int = 0
    """States per answer; 0 takes as many as cover the longest answer of the batch once."""
    shortest: int = 0
    """Tokens of the shortest state; how many one has is drawn from here to n. 0: all have n. No
    token sees a later one, so that this chooses what is learnt and not what is seen."""
    fresh: float = 0.0
    """Share of states replaced by a true random start: one right token, then random ones."""
    corruption: float = 0.0
    """Share of the guesses of the other states replaced by random tokens of the prompt."""
    measured: bool = False
    """States of texts are right as often, at each slot, as those of the trajectories; else by a
    share drawn anew for each, the same at all slots."""
    decay: float = 0.0
    """Weight exp(-k / decay) for the k-th guess after the first wrong one; 0: equal weights."""
    pairs: bool = False
    """Take states with their successors, for local consistency."""
    mask: int = -1
    """Token that stands for every random one (SPACE); -1 draws tokens of the prompt."""

    def __post_init__(self):
        at_least(self, windows=0, shortest=0, decay=0, mask=-1)
        shares(self, 'fresh', 'corruption')


@dataclasses.dataclass(frozen=True)
class MeasuredNoise(Noise):
    """Noise with what was measured."""

    right: tuple[float, ...] = ()
    """Share of right guesses at each slot, the first for the second token of a state."""


def measured(noise: Noise, samples: Iterable[Trajectory]) -> Noise:
    """The noise with the share of right guesses at each slot of the states of these samples."""
    if not noise.measured:
        return noise
    found = [_right(s, i) for s in samples for i in range(len(s.states))]
    if not found:
        return noise
    right_KW, known_KW = (np.stack(part) for part in zip(*found, strict=True))
    share_W = (right_KW & known_KW).sum(0) / np.maximum(known_KW.sum(0), 1)
    fields = {f.name: getattr(noise, f.name) for f in dataclasses.fields(Noise)}
    return MeasuredNoise(**fields, right=tuple(share_W[1:].tolist()))


def _right(sample: Trajectory, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Which tokens of a state are those of the answer, and which have one."""
    offsets, total = sample.start[index] + np.arange(sample.states.shape[1]), len(sample.answer)
    truth = sample.answer[np.minimum(offsets, total - 1)]
    return sample.states[index] == truth, offsets < total


def pick(sample: Trajectory, noise: Noise, rng: np.random.Generator, count: int) -> list[int]:
    """Indices of `count` states, spread over the answer: one from each of `count` equal parts.

    Where states are made by chance, these are the offsets at which they start.
    """
    total = len(sample.states) or len(sample.answer)
    drawn = count // 2 if noise.pairs else count
    edges = np.linspace(0, total, drawn + 1)
    low = np.floor(edges[:-1]).astype(int)
    high = np.maximum(np.ceil(edges[1:]).astype(int), low + 1)
    picked = np.minimum(rng.integers(low, high), total - 1).tolist()
    return [i for s in picked for i in (s, min(s + 1, total - 1))] if noise.pairs else picked


def state_of(
    sample: Trajectory, noise: Noise, rng: np.random.Generator, index: int, truth: np.ndarray
) -> tuple[np.ndarray, int]:
    """The tokens of a state that was picked, and how many of them it is.

    Args:
      truth: the answer's tokens at their places.
    """
    width, has_states = len(truth), len(sample.states) > 0
    state = (sample.states[index] if has_states else truth).copy()
    if noise.pairs:
        return state, width
    guess = rng.choice(sample.prompt, width) if noise.mask < 0 else noise.mask
    share = noise.corruption if has_states else rng.random()
    if not has_states and isinstance(noise, MeasuredNoise):
        share = 1 - np.asarray((1.0, *noise.right))
    share = 1.0 if rng.random() < noise.fresh else share
    state[1:] = np.where(rng.random(width) < share, guess, state)[1:]
    shortest = min(noise.shortest, width)
    return state, int(rng.integers(shortest, width + 1)) if shortest else width
