"""What a decode reports, per prompt."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """The drafts one row verified: `states[i]` starts at answer offset `start[i]`.

    Slot 0 of a state is the pending token, the rest are guesses. `states` is int32 `[I, N]`.
    """

    states: np.ndarray
    start: np.ndarray


@dataclasses.dataclass(frozen=True)
class DecodeResult:
    """Answers and their cost; every list has one entry per prompt.

    `tokens` ends with the stop token where one was produced; `texts` leaves it out. A forward is
    one call of the model while the prompt's row was unfinished, prefill included, so that
    `sum(accepted[i]) == len(tokens[i])` and `len(accepted[i]) == forwards[i]`.
    """

    texts: list[str | None]
    """None where the model has no tokenizer."""
    tokens: list[list[int]]
    accepted: list[list[int]]
    """Tokens committed by each forward."""
    seconds: list[float]
    """Wall-clock from the prompt's prefill to its end, and of a compilation in between."""
    trajectories: list[Trajectory] | None = None

    @property
    def forwards(self) -> list[int]:
        return [len(a) for a in self.accepted]

    @property
    def tokens_per_forward(self) -> list[float]:
        pairs = zip(self.tokens, self.forwards, strict=True)
        return [len(tokens) / forwards for tokens, forwards in pairs]
