"""What a decode reports, per prompt."""

import dataclasses
import html
import itertools
from collections.abc import Sequence

import numpy as np

from cllm_jax.tasks.quality import is_repetitive

SHOWN, LETTERS, ROWS = 3, 40, 20
"""Texts that a `repr` shows and how much of each, and rows of a notebook's table."""
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

    def __repr__(self) -> str:
        more = ', ...' if len(self.tokens) > SHOWN else ''
        texts = ', '.join(
            repr(_cut(self._text(i), LETTERS)) for i in range(len(self.tokens))[:SHOWN]
        )
        return f'<DecodeResult: {self._summary()}: {texts}{more}>'

    def _repr_html_(self) -> str:
        """A table for notebooks."""
        rows = []
        columns = zip(self.tokens, self.forwards, self.tokens_per_forward, strict=True)
        for i, (tokens, forwards, each) in itertools.islice(enumerate(columns), ROWS):
            text = html.escape(self._text(i))
            cells = f'<td style="text-align: left; white-space: pre-wrap">{text}</td>'
            cells += ''.join(f'<td>{cell}</td>' for cell in (len(tokens), forwards, f'{each:.2f}'))
            rows.append(f'<tr><th>{i}</th>{cells}</tr>')
        names = ('', 'text', 'tokens', 'forwards', 'tokens/forward')
        head = ''.join(f'<th>{name}</th>' for name in names)
        more = f', of which the first {ROWS}' if len(self.tokens) > ROWS else ''
        return f'<p>{self._summary()}{more}</p><table><tr>{head}</tr>{"".join(rows)}</table>'

    def _summary(self) -> str:
        count, tokens, forwards = len(self.tokens), sum(map(len, self.tokens)), sum(self.forwards)
        prompts = '1 prompt' if count == 1 else f'{count} prompts'
        each = tokens_per_forward(self)
        return f'{prompts}, {tokens} tokens in {forwards} forwards, {each:.2f} tokens/forward'

    def _text(self, i: int) -> str:
        """The text of an answer; of a model without a tokenizer its token ids."""
        text = self.texts[i]
        return ' '.join(map(str, self.tokens[i])) if text is None else text


def _cut(text: str, letters: int) -> str:
    return text if len(text) <= letters else text[: letters - 3] + '...'


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
