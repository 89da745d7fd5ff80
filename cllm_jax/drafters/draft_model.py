"""Speculative decoding with a smaller model (arXiv 2211.17192, 2302.01318).

The draft model writes a few tokens one by one, and the target verifies them in one forward. It
chooses with the target's own noise (`decoding/sampling.py`), so at any temperature a draft is
accepted as far as both models choose alike.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from cllm_jax.decoding.drafter import Draft, Drafter, Sequences, setting, windows
from cllm_jax.decoding.sampling import choose
from cllm_jax.decoding.tree import causal_mask
from cllm_jax.errors import ConfigError, at_least
from cllm_jax.hf.model import Model
from cllm_jax.hf.tokenizer import vocabulary_fingerprint
from cllm_jax.model.cache import Cache
from cllm_jax.model.llama import Llama, take_rows


@struct.dataclass
class DraftModel(Drafter):
    """Propose what another model would write next."""

    model: Llama = struct.field(pytree_node=False)
    params: Any
    block: int = setting(5)
    """Tokens verified per forward: the pending one, and `block - 1` of the draft model."""
    shared: int = setting(0)
    """The first so many tokens may be drafted; 0: all of the draft model's."""
    title = 'draft model'

    def __post_init__(self):
        at_least(self, block=1)

    @property
    def nodes(self) -> int:
        return self.block

    def init(self, sequences: Sequences) -> Cache:
        (batch, slots), width = sequences.tokens_BS.shape, sequences.prompt_width
        prompt_BP, start_B = sequences.tokens_BS[:, :width], jnp.zeros(batch, jnp.int32)
        return self._forward(prompt_BP, start_B, self.model.new_cache(batch, slots), width)[1]

    def draft(self, cache: Cache, sequences: Sequences, sampling) -> tuple[Draft, Cache]:
        length_B = sequences.length_B
        pending_BN = sequences.window(1)
        if self.block == 1:
            return Draft.chain(pending_BN), cache
        # Of a draft that was accepted as a whole the last token has not been seen yet: begin there.
        start_B = jnp.maximum(length_B - 1, 0)
        last_B2 = windows(sequences.tokens_BS, start_B, 2)
        hidden_BND, cache = self._forward(last_B2, start_B, cache, cache.slots)
        choose_next = partial(self._choose, sequences, sampling)
        token_B1 = choose_next(take_rows(hidden_BND, (length_B - start_B)[:, None]), length_B)

        def step(carry, ahead):
            token_B1, cache = carry
            hidden_B1D, cache = self._forward(token_B1, length_B + ahead, cache, cache.slots)
            return (choose_next(hidden_B1D, length_B + ahead), cache), token_B1

        ahead = jnp.arange(1, self.block - 1, dtype=jnp.int32)
        (token_B1, cache), first = jax.lax.scan(step, (token_B1, cache), ahead)
        tokens_BN = jnp.concatenate([pending_BN, first[:, :, 0].T, token_B1], axis=1)
        return Draft.chain(tokens_BN), cache

    def _forward(self, tokens_BT, start_B, cache, slots):
        # The target may choose a token that is not in this table: what follows is only a guess.
        tokens_BT = jnp.minimum(tokens_BT, self.model.config.vocab_size - 1)
        steps_1T = jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None]
        positions_BT = start_B[:, None] + steps_1T
        rows = (tokens_BT, positions_BT, causal_mask(positions_BT, slots), cache, start_B)
        return self.model.apply({'params': self.params}, *rows)

    def _choose(self, sequences, sampling, hidden_B1D, length_B):
        logits_B1V = self.model.apply({'params': self.params}, hidden_B1D, method='logits')
        if self.shared:  # the noise of a token is the same, however many there are
            logits_B1V = logits_B1V[:, :, : self.shared]
        return choose(logits_B1V, sequences.keys_B, length_B[:, None] + 1, sampling)


def draft_model(target: Model, small: Model, block: int = 5) -> DraftModel:
    """`small` as the draft model of `target`.

    Their tables may be padded to different sizes: rows above the tokens of the tokenizer that they
    share are never drafted.

    Raises:
      ConfigError: other tokenizers, or tables of other sizes without a tokenizer that tells what
        they share.
    """
    sizes = [model.config.vocab_size for model in (small, target)]
    both = [model.tokenizer for model in (small, target) if model.tokenizer is not None]
    if len(both) == 2 and len(set(map(vocabulary_fingerprint, both))) == 2:
        other = f'{small.source} has another tokenizer than {target.source}'
        raise ConfigError(f'{other}; a draft model shares it')
    if sizes[0] != sizes[1] and len(both) < 2:
        other = f'{small.source} has {sizes[0]} tokens, {target.source} {sizes[1]}'
        remedy = 'where only the padding differs, put the tokenizer into both directories'
        raise ConfigError(f'{other}: a draft model shares the vocabulary of its target; {remedy}')
    known = [1 + max(tokenizer.get_vocab().values()) for tokenizer in both]
    # What is only drafted need not round like anything.
    module, params = small.decoding_on(small.backend.exactly('off'))
    return DraftModel(module, params, block, min(*sizes, *known))
