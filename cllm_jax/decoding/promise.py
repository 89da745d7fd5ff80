"""Under which promise a drafter returns AR's tokens: which AR, and what rounds alike.

The rule of verification is exact (`loop.py`); the scores that it looks at are rounded, and one row
may be rounded otherwise than many. docs/exactness.md says where that cannot happen.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from cllm_jax.decoding.drafter import Drafter, Sequences
from cllm_jax.decoding.request import Request, padded_batch
from cllm_jax.decoding.sampling import Sampling, scores
from cllm_jax.hf.model import Model
from cllm_jax.model.llama import forward
from cllm_jax.runtime.backend import MOST_ROWS
from cllm_jax.runtime.keys import prng_key

BUFFER = 1024
"""Slots of the buffer on which a draft is shaped, more than any has nodes."""


def drafts_chains(drafter: Drafter) -> bool:
    """Whether all that a drafter proposes is a chain, whose keys lie in the order of positions."""

    def draft(tokens_BS, length_B):
        keys_B = jax.vmap(prng_key)(length_B.astype(jnp.uint32))
        sequences = Sequences(tokens_BS, length_B, length_B, keys_B, prompt_width=16)
        return drafter.draft(drafter.init(sequences), sequences, Sampling())[0]

    shapes = ((1, BUFFER), (1,))
    made = jax.eval_shape(draft, *(jax.ShapeDtypeStruct(shape, jnp.int32) for shape in shapes))
    return made.parent_BN is None


def reference(request: Request, plain: Drafter) -> Request:
    """AR as a request is compared with: `plain`, or the drafter's program, a token at a time."""
    exact = dataclasses.replace(request.sampling, typical=0.0)
    if request.exact == 'program':
        return dataclasses.replace(request, sampling=exact, commit=1)
    return dataclasses.replace(request, sampling=exact, drafter=plain)


def promise(model: Model, request: Request) -> tuple[str, str]:
    """What guarantees that a request's tokens are those of its `reference`, and why nothing does.

    Returns 'class' or 'program' and '', or '' and the reason.
    """
    if not drafts_chains(request.drafter):
        return '', "a tree's keys lie in another order than AR's"
    how = request.exact
    if how == 'auto':
        how = 'class' if model.backend.exact else 'off'
    if how == 'off':
        return '', 'one row may round otherwise than several'
    if how == 'class' and not model.has_class:
        return '', 'no class is known for this dtype and hardware'
    rows = padded_batch(request.batch) * request.drafter.nodes
    if how == 'class' and rows > MOST_ROWS:
        return '', f'of the {rows} rows of a forward at most {MOST_ROWS} were looked at'
    return how, ''


@dataclasses.dataclass(frozen=True)
class Difference:
    """Where two answers to a prompt part."""

    prompt: int
    token: int
    """Index in the answer."""
    ids: tuple[int | None, int | None]
    """None for an answer that ends where the other goes on."""
    units: float | None
    """How far the scores of the two tokens are from each other, in units of the last place that
    the products' dtype has for them; those of a plain forward, noise included."""


def first_difference(
    model: Model,
    request: Request,
    prompts: list[list[int]],
    keys_B: jax.Array,
    answers: tuple[list[list[int]], list[list[int]]],
) -> Difference | None:
    """The first token that differs in the first answer that does; None if all are equal."""
    for i, both in enumerate(zip(*answers, strict=True)):
        if both[0] == both[1]:
            continue
        pairs = list(itertools.zip_longest(*both))
        at = next(k for k, (a, b) in enumerate(pairs) if a != b)
        if None in pairs[at]:
            return Difference(i, at, pairs[at], None)
        text = [*prompts[i], *both[0][:at]]
        logits_11V = forward(model.module, model.params, jnp.asarray([text], jnp.int32))[:, -1:]
        place_11 = jnp.full((1, 1), len(text), jnp.int32)
        found_V = np.asarray(scores(logits_11V, keys_B[i : i + 1], place_11, request.sampling))[
            0, 0
        ]
        a, b = (float(found_V[token]) for token in pairs[at])
        last = float(jnp.finfo(model.products).eps) * 2.0 ** np.floor(np.log2(max(abs(a), abs(b))))
        return Difference(i, at, pairs[at], abs(a - b) / last)
    return None
