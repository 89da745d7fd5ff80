"""What a decode reports, per prompt."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from cllm_jax.tasks.quality import is_repetitive

UNKNOWN = -1
"""`Trajectory.right` where nobody can tell."""


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """How a model answered one prompt: from the collector to the batch of a training step.

    Row s of `states` (int32 `[S, n]`) is a state of the Jacobi iteration and holds guesses for the
    answer offsets `start[s] .. start[s] + n`; its first slots are already right. In block mode the
    states of a block begin with its random start and end with its fixed point; those of a decode
    are the drafts that its forwards verified. With S = 0 training makes states by chance.
    """

    states: np.ndarray
    start: np.ndarray
    prompt: np.ndarray
    answer: np.ndarray
    """The fixed point, the stop token included if it was reached (`finished`)."""
    forwards: int = 0
    """Calls of the model, prefill included."""
    id: str = ''
    finished: bool = True
    right: int = UNKNOWN
    """Whether the answer is correct: 1, 0, or -1 where the task cannot tell."""

    @property
    def length(self) -> int:
        """Tokens of prompt and answer."""
        return len(self.prompt) + len(self.answer)


@dataclasses.dataclass(frozen=True)
class Answer:
    """One prompt's share of a `DecodeResult`."""

    text: str | None
    tokens: list[int]
    accepted: list[int]
    seconds: float
    trajectory: Trajectory | None


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

    @classmethod
    def of(cls, answers: Sequence[Answer]) -> 'DecodeResult':
        """The answers to several prompts, with trajectories if all have one."""
        names = [field.name for field in dataclasses.fields(Answer)]
        *columns, traced = ([getattr(one, name) for one in answers] for name in names)
        return cls(*columns, None if None in traced else traced)

    @property
    def forwards(self) -> list[int]:
        return [len(a) for a in self.accepted]

    @property
    def tokens_per_forward(self) -> list[float]:
        return [len(t) / len(a) for t, a in zip(self.tokens, self.accepted, strict=True)]


def tokens_per_forward(result: DecodeResult) -> float:
    """Committed tokens over calls of the model, prefill included, over all prompts."""
    return sum(map(len, result.tokens)) / max(sum(result.forwards), 1)


def loop_free(result: DecodeResult) -> float:
    """Tokens/forward of the answers that do not repeat themselves; 0 if all do.

    A loop is easy to guess, so a model that collapses would look fast.
    """
    sound = [not is_repetitive(tokens) for tokens in result.tokens]
    tokens = sum(len(t) for t, ok in zip(result.tokens, sound, strict=True) if ok)
    return tokens / max(sum(n for n, ok in zip(result.forwards, sound, strict=True) if ok), 1)


def acceptance(result: DecodeResult) -> list[float]:
    """Conditional acceptance of each slot of a draft: how often it is right if all before it are.

    The pending token has no slot. Up to the last slot that was ever right. A forward that ends an
    answer does not tell whether the slot after its last token was right, and does not count there.
    Nor does the prefill, whose draft has nothing to go by.
    """
    later = [accepted[1:] for accepted in result.accepted]
    inner = [count for accepted in later for count in accepted[:-1]]
    final = [accepted[-1] for accepted in later if accepted]
    shares = []
    for slot in range(1, max(inner + final, default=1)):
        right = sum(count > slot for count in inner + final)
        shares.append(right / (right + sum(count == slot for count in inner)))
    return shares


def share_identical(a: DecodeResult, b: DecodeResult) -> float:
    """Share of prompts whose tokens are the same in both, 0..1."""
    same = [x == y for x, y in zip(a.tokens, b.tokens, strict=True)]
    return sum(same) / max(len(same), 1)
