"""Answer text: decoding tokens, finding stop strings, and what a stream may already show."""

from bisect import bisect_left
from collections.abc import Sequence

from cllm_jax.models.load import Model


def text_of(model: Model, tokens: Sequence[int]) -> str:
    """The text of answer tokens, without a stop token at the end.

    Other special tokens stay visible, so that one the config forgot can be a stop string. Bytes
    that are no UTF-8, such as a character cut off by `max_tokens`, become U+FFFD.
    """
    if tokens and tokens[-1] in model.config.eos_ids:
        tokens = tokens[:-1]
    return model.tokenizer.decode(tokens, clean_up_tokenization_spaces=False)


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

    Held back are an incomplete character at the end (decoded as U+FFFD) and what could be the
    beginning of a stop string.
    """
    text = text.rstrip('\ufffd')
    held = (n for s in stop for n in range(1, len(s)) if text.endswith(s[:n]))
    return text[: len(text) - max(held, default=0)]
