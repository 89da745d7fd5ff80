"""The record that every dataset yields, and how the generated tasks choose what they hold out."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Split = Literal['train', 'heldout']


@dataclass(frozen=True)
class Example:
    """One prompt and its reference answer.

    `prompt + answer` is the training text: the prompt ends exactly where the answer begins. The
    end-of-sequence token is not part of the text. `meta` holds JSON values that the task's
    checker needs, such as a database schema or the right number.
    """

    id: str
    prompt: str
    answer: str
    meta: Mapping[str, Any] = field(default_factory=dict)


def is_held_out(key: str) -> bool:
    """Whether a template, a schema or a cast is in the tenth that training never sees.

    The hash of the key decides, so the choice is the same for every seed and on every machine.
    """
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], 'big') % 10 == 0
