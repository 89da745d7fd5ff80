"""Prompt lookup (github.com/apoorvumang/prompt-lookup-decoding): what followed the last time.

The last few committed tokens are searched for in the prompt and the answer so far, and what came
after them there is proposed again. Nothing is trained. Reference documents are searched too (LLMA,
arXiv 2304.04487): what an answer quotes of them is copied many tokens at a time.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from cllm_jax.decoding.drafter import Draft, Drafter, setting
from cllm_jax.decoding.request import Texts, bucket, encode_each
from cllm_jax.errors import at_least
from cllm_jax.hf.model import Model
from cllm_jax.model.llama import take_rows

BETWEEN = -1
"""What stands between two references; no token equals it."""


@struct.dataclass
class PromptLookup(Drafter):
    """Propose the `block - 1` tokens after the latest place that matches the longest suffix.

    A match of `ngram` tokens is preferred to one of fewer, down to a single token, and one in the
    text so far to one in a reference. Where the match is closer than `block` tokens, the text from
    it on is taken as a pattern that goes on.
    """

    block: int = setting(8)
    ngram: int = setting(3)
    references: jax.Array | None = None
    """Tokens of the references, if any: `[R]` for all prompts, or `[B, R]`, a row for each of a
    batch that is not refilled."""
    title = 'prompt lookup'

    def __post_init__(self):
        at_least(self, block=1, ngram=1)

    @property
    def nodes(self) -> int:
        return self.block

    def init(self, sequences):
        if self.references is None:
            return ()
        shape = (len(sequences.tokens_BS), self.references.shape[-1])
        return jnp.broadcast_to(self.references, shape)

    def draft(self, state, sequences, sampling):
        tokens_BS, length_B1 = sequences.tokens_BS, sequences.length_B[:, None]
        if self.references is not None:
            tokens_BS = jnp.concatenate([state, tokens_BS], axis=1)
            length_B1 = length_B1 + state.shape[1]
        slots_1S = jnp.arange(tokens_BS.shape[1], dtype=jnp.int32)[None]
        same_BS = slots_1S < length_B1
        matched_BS = jnp.zeros_like(tokens_BS)
        for back in range(self.ngram):
            last_B1 = take_rows(tokens_BS, jnp.maximum(length_B1 - back, 0))
            same_BS &= (jnp.roll(tokens_BS, back, axis=1) == last_B1) & (slots_1S >= back)
            matched_BS += same_BS.astype(jnp.int32)
        rank_BS = jnp.where(matched_BS > 0, matched_BS * tokens_BS.shape[1] + slots_1S, -1)
        start_B1 = jax.lax.argmax(rank_BS, 1, jnp.int32)[:, None]
        found_B1 = rank_BS.max(axis=1, keepdims=True) >= 0

        steps_1N = jnp.arange(self.block - 1, dtype=jnp.int32)[None]
        period_B1 = jnp.maximum(length_B1 - start_B1, 1)
        guess_BN = take_rows(tokens_BS, start_B1 + 1 + steps_1N % period_B1)
        tokens_BN = jnp.concatenate([sequences.window(1), guess_BN], axis=1)
        return Draft(jnp.maximum(tokens_BN, 0), found_B1 & (tokens_BN >= 0)), state


def with_references(
    model: Model, references: Texts, block: int = 8, ngram: int = 3
) -> PromptLookup:
    """Prompt lookup in texts (or token ids) too, the same for every prompt of a call.

    Raises ConfigError for a reference that is empty or not made of tokens of this model.
    """
    encoded = encode_each(model, references, 'references')
    ids = [i for text in encoded for i in (*text, BETWEEN)][:-1]
    (padded,) = reference_rows([ids], 1, bucket(len(ids) + 1))  # few lengths to compile
    return PromptLookup(block, ngram, jnp.asarray(padded))


def reference_rows(texts: Sequence[Sequence[int]], rows: int, width: int) -> np.ndarray:
    """A reference per prompt for `PromptLookup`, int32 `[rows, width]`; rows beyond have none.

    Args:
      texts: token ids. With the end of its prompt before it, a reference is found from the start.
      rows: at least as many.
      width: more than the longest has.
    """
    reference_BR = np.full((rows, width), BETWEEN, np.int32)
    for row, text in zip(reference_BR, texts, strict=False):
        # Nothing stands before a short prompt either, which makes it a longer match.
        row[width - 1 - len(text) : -1] = text
    return reference_BR
