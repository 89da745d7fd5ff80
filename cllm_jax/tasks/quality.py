"""How good answers are: the share that is right, and agreement with other answers."""

from collections.abc import Sequence
from typing import Any


def share_right(source: Any, texts: Sequence[str | None]) -> float:
    """Share of `texts[i]` that answer row i of a `data.sources.Source` correctly, 0..1."""
    right = [source.check(source[i], text or '') for i, text in enumerate(texts)]
    return sum(right) / max(len(right), 1)


def token_agreement(answers: Sequence[Sequence[int]], others: Sequence[Sequence[int]]) -> float:
    """Share of the tokens of `others` that `answers` has at the same place, 0..1."""
    pairs = list(zip(answers, others, strict=True))
    same = sum(sum(a == b for a, b in zip(x, y, strict=False)) for x, y in pairs)
    return same / max(sum(len(y) for _, y in pairs), 1)


def is_repetitive(tokens: Sequence[int], period: int = 8, times: int = 6) -> bool:
    """Does the answer contain the same 1..period tokens at least `times` in a row?

    The collapse that users of the original implementation report looks like this.
    """
    for size in range(1, period + 1):
        run = size
        for i in range(size, len(tokens)):
            run = run + 1 if tokens[i] == tokens[i - size] else size
            if run >= size * times and run >= 12:
                return True
    return False
