"""The record that every dataset yields, and what the generated tasks share."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any, Literal

import yaml

from cllm_jax.errors import ConfigError

Split = Literal['train', 'heldout']
Messages = Sequence[Mapping[str, Any]]
"""A chat: messages with a role and a content, as `apply_chat_template` takes them."""
Prompt = str | Messages


@dataclass(frozen=True)
class Example:
    """One prompt and its reference answer.

    `prompt + answer` is the training text: the prompt ends exactly where the answer begins. The
    end-of-sequence token is not part of the text. A prompt may be a chat instead; the answer is
    then what the assistant says next, '' if nothing. `meta` holds JSON values that the task's
    checker needs, such as a database schema or the right number.
    """

    id: str
    prompt: Prompt
    answer: str
    meta: Mapping[str, Any] = field(default_factory=dict)


def holds_out(split: Split) -> bool:
    """Whether a split is the held-out one; ConfigError if it is neither that nor 'train'."""
    if split not in ('train', 'heldout'):
        raise ConfigError(f"split {split!r} is unknown; there are 'train' and 'heldout'")
    return split == 'heldout'


def is_held_out(key: str) -> bool:
    """Whether a template, a schema or a cast is in the tenth that training never sees.

    The hash of the key decides, so the choice is the same for every seed and on every machine.
    """
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], 'big') % 10 == 0


def read_words(name: str, package: str = __package__) -> dict[str, Any]:
    """The words, wordings and ranges of a task, from the YAML file of its name in the package."""
    text = files(package).joinpath(f'{name}.yaml').read_text(encoding='utf-8')
    return yaml.load(text, Loader=getattr(yaml, 'CSafeLoader', yaml.SafeLoader))
