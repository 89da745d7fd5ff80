"""One of each trained drafter for a tiny model, with random weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from cllm_jax.decoding.drafter import Sequences
from cllm_jax.decoding.engine import decode_all
from cllm_jax.decoding.request import Request, row_keys
from cllm_jax.decoding.result import DecodeResult
from cllm_jax.decoding.sampling import Sampling
from cllm_jax.drafters.autoregressive import AutoRegressive
from cllm_jax.drafters.eagle import Eagle
from cllm_jax.drafters.medusa import Medusa, tree_of, usual
from cllm_jax.drafters.redrafter import ReDrafter
from cllm_jax.drafters.space import Space
from cllm_jax.drafters.trained import tables_of
from tests.tiny import ragged_prompts, random_model, tiny_config

MODEL = random_model(config=tiny_config(layers=1, eos_ids=(3, 20)))
PROMPTS = ragged_prompts(0, (1, 2, 9, 5, 14))
GREEDY, FREE = Sampling(), Sampling(1.0)
DRAFTERS = {
    'medusa': Medusa(3, tree_of(usual(3), 9)),
    'medusa, shared table': Medusa(3, tree_of(usual(3), 9), own_tables=False),
    'redrafter': ReDrafter(3, 4, 8),
    'redrafter, shared table': ReDrafter(4, 3, 16, layers=1, own_table=False),
    'eagle': Eagle(MODEL.module.config, MODEL.backend, 3, 3, 10),
    'eagle, chain': Eagle(MODEL.module.config, MODEL.backend, 4, 1, 5),
    'eagle, two levels': Eagle(MODEL.module.config, MODEL.backend, 2, 4, 8),
    'space': Space(28, 2),
    'space, three masks': Space(28, 3),
}


def with_random_weights(drafter, model=MODEL, seed=0):
    """The drafter with weights that say nothing of use."""
    own = drafter.new_weights(jax.random.key(seed), tables_of(model.params))
    noise = np.random.default_rng(seed)
    own = jax.tree.map(lambda x: x + jnp.asarray(noise.normal(0, 0.1, x.shape), x.dtype), own)
    return drafter.with_weights(own, model.params)


def decoded(drafter, sampling: Sampling, batch: int = 8) -> DecodeResult:
    """Ragged prompts, with end tokens and limits inside of a path."""
    return decode_all(MODEL, Request(drafter, 20, sampling, seed=1, batch=batch), PROMPTS)


@functools.cache
def plain(sampling: Sampling) -> list[list[int]]:
    """What AR answers to the same prompts."""
    return decoded(AutoRegressive(), sampling).tokens


def sequences_of(prompts, slots: int) -> Sequences:
    """Prompts of one length whose last token is pending."""
    tokens_BS = jnp.pad(jnp.asarray(prompts, jnp.int32), ((0, 0), (0, slots - len(prompts[0]))))
    length_B = jnp.full(len(prompts), len(prompts[0]), jnp.int32)
    keys_B = row_keys(0, range(len(prompts)))
    return Sequences(tokens_BS, length_B - 1, length_B, keys_B, prompt_width=len(prompts[0]))
