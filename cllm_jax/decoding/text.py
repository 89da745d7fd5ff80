"""Answer text: decoding tokens, finding stop strings, and what a stream may already show."""

import itertools
import re
from bisect import bisect_left
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from cllm_jax.data.encoding import plain_ids, text_of_ids
from cllm_jax.hf.model import Model

BYTE = re.compile('<0x([0-9A-F]{2})>')
"""A token that is one byte, in vocabularies that fall back to bytes (LLaMA 1 and 2, Mistral)."""


def text_of(model: Model, tokens: Sequence[int]) -> str:
    """The text of answer tokens as it stands after the prompt, without a stop token at the end.

    Other special tokens stay visible, so that one the config forgot can be a stop string. Bytes
    that are not UTF-8, such as a character cut off by `max_tokens`, become U+FFFD; what comes
    before them does not depend on how the answer goes on.
    """
    if tokens and tokens[-1] in model.config.eos_ids:
        tokens = tokens[:-1]
    names = model.tokenizer.convert_ids_to_tokens(tokens)
    each = zip(tokens, (BYTE.fullmatch(name or '') for name in names), strict=True)
    text = ''
    # A tokenizer gives up all bytes in a row where one of them is wrong or the last one is missing.
    for are_bytes, run in itertools.groupby(each, key=lambda one: one[1] is not None):
        ids, found = zip(*run, strict=True)
        if are_bytes:
            data = bytes(int(byte[1], 16) for byte in found)
            text += data.decode('utf-8', errors='replace')
        else:
            text += _after_a_word(model.tokenizer, ids)
    return text


def _after_a_word(tokenizer: Any, tokens: Sequence[int]) -> str:
    """The text of tokens that are not the first: some tokenizers drop the first one's space."""
    word, text = _word(tokenizer)
    whole = text_of_ids(tokenizer, [*word, *tokens])
    return whole[len(text) :] if whole.startswith(text) else text_of_ids(tokenizer, tokens)


@lru_cache
def _word(tokenizer: Any) -> tuple[list[int], str]:
    [ids] = plain_ids(tokenizer, ['a'])
    return ids, text_of_ids(tokenizer, ids)


def cut(text: str, stop: Sequence[str]) -> str | None:
    """`text` before the leftmost stop string, or None if it has none."""
    found = [at for s in stop if (at := text.find(s)) >= 0]
    return text[: min(found)] if found else None


def find_stop(model: Model, tokens: Sequence[int], stop: Sequence[str]) -> tuple[str, int] | None:
    """Text before the stop string that is completed first, and the tokens that complete it.

    The answer is the same however many tokens were decoded beyond.
    """

    def cut_of(size: int) -> str | None:
        return cut(text_of(model, tokens[:size]), stop)

    if cut_of(len(tokens)) is None:
        return None
    size = bisect_left(range(len(tokens) + 1), True, key=lambda n: cut_of(n) is not None)
    return cut_of(size), size


def settled(text: str, stop: Sequence[str]) -> str:
    """The part of `text` that can be shown although more will follow.

    Not an incomplete character at the end (U+FFFD), nor a possible beginning of a stop string.
    """
    text = text.rstrip('\ufffd')
    held = (n for s in stop for n in range(1, len(s)) if text.endswith(s[:n]))
    return text[: len(text) - max(held, default=0)]
