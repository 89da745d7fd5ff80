"""The one record every dataset yields."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


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
