"""SPACE (arXiv 2402.11809): mask tokens guess what comes next, in the forward that verifies.

The model itself is fine-tuned to read a row of mask tokens as "what comes after this?". Every
forward verifies the guesses so far, with masks after each: whichever guess turns out to be the last
right one, the masks after it have already drafted what follows.
"""

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from cllm_jax.decoding.drafter import Draft, setting
from cllm_jax.decoding.request import check_ids
from cllm_jax.decoding.tree import chains
from cllm_jax.drafters.trained import TrainedDrafter, last_of
from cllm_jax.errors import ConfigError, at_least
from cllm_jax.model.llama import take_rows


@struct.dataclass
class Masked:
    """What the masks after the last accepted token said."""

    guess_BM: jax.Array
    known_B: jax.Array


@struct.dataclass
class Space(TrainedDrafter):
    """`masks` guesses per forward, of a model trained with `mask_id` (`objective: space`)."""

    mask_id: int = setting()
    masks: int = setting(3)
    own: ClassVar[dict] = {}
    title = 'SPACE'
    kind = 'space'
    trains_model = True

    def __post_init__(self):
        at_least(self, masks=1)
        if self.mask_id < 0:
            raise ConfigError(f'mask_id {self.mask_id}: must be a token id')

    @classmethod
    def of_size(cls, sizes, model):
        """The mask is the padding token, else BOS; raises ConfigError if there is neither."""
        mask = model.config.pad_id if model.config.pad_id is not None else model.config.bos_id
        if mask is None:
            rule = 'neither pad_token_id nor bos_token_id, one of which would be the mask of SPACE'
            raise ConfigError(f'{model.source}: {rule}; set pad_token_id in its config.json')
        drafter = cls(mask, sizes.ahead)
        drafter.check_model(model, f'{model.source}: pad_token_id, else bos_token_id')
        return drafter

    @property
    def nodes(self) -> int:
        return (self.masks + 1) ** 2

    def check_model(self, model, where):
        check_ids(model, self.mask_id, f'{where}: mask ')

    def with_weights(self, own, params):
        return self  # the model's weights are all that it has

    def init(self, sequences):
        rows = len(sequences.length_B)
        return Masked(jnp.zeros((rows, self.masks), jnp.int32), jnp.zeros(rows, bool))

    def draft(self, state, sequences, sampling):
        chain_BN = jnp.concatenate([sequences.window(1), state.guess_BM], axis=1)
        rest = ((0, 0), (0, self.nodes - self.masks - 1))
        tokens_BN = jnp.pad(chain_BN, rest, constant_values=self.mask_id)
        valid_BN = state.known_B[:, None] & (
            jnp.arange(self.nodes, dtype=jnp.int32)[None] <= self.masks
        )
        chain = self.masks + 1
        after = chains(0, [-1], chain), chains(chain, range(chain), self.masks)
        return Draft.tree(tokens_BN, valid_BN, np.concatenate(after)), state

    def update(self, state, draft, verdict, sequences, sampling):
        # The first mask after the last accepted node stands where the new pending token is.
        first_B1 = self.masks + 1 + last_of(verdict) * self.masks
        at_BM = first_B1 + jnp.arange(self.masks, dtype=jnp.int32)[None]
        return Masked(take_rows(verdict.y_BN, at_BM), jnp.ones_like(state.known_B))
