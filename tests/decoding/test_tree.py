"""Trees of drafts: what nodes see, what is accepted, and that every path is a plain text."""

from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cllm_jax.decoding.drafter import Draft
from cllm_jax.decoding.tree import accept, layout, mask
from cllm_jax.model.cache import init_cache
from cllm_jax.model.llama import Llama, forward
from tests.tiny import random_model, tiny_config

ROWS, NODES, SLOTS = 4, 11, 24


@st.composite
def trees(draw):
    """Parents, tokens of a vocabulary of three, and which nodes may be accepted."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    back = draw(st.integers(1, NODES))
    parent_BN = np.full((ROWS, NODES), -1, np.int32)
    for i in range(1, NODES):
        parent_BN[:, i] = rng.integers(max(0, i - back), i, ROWS)
    tokens_BN, y_BN = rng.integers(0, 3, (2, ROWS, NODES)).astype(np.int32)
    return parent_BN, tokens_BN, rng.random((ROWS, NODES)) < 0.9, y_BN


def paths(parents) -> list[list[int]]:
    """For each node the way to it, from node 0 on."""
    found = [[0]]
    for i, parent in enumerate(parents[1:], 1):
        found.append([*found[parent], i])
    return found


def draft_of(parent_BN, tokens_BN, valid_BN) -> Draft:
    arrays = (jnp.asarray(x) for x in (tokens_BN, valid_BN, parent_BN))
    return Draft(*arrays, depth=NODES - 1)


@jax.jit
def everything(draft, y_BN, length_B):
    where = layout(draft)
    return where, mask(where, length_B, SLOTS), accept(draft, where, y_BN)


@given(trees())
def test_nodes_see_the_cache_and_what_they_follow(tree):
    parent_BN, tokens_BN, valid_BN, y_BN = tree
    length_B = np.arange(ROWS, dtype=np.int32) * 3
    draft = draft_of(parent_BN, tokens_BN, valid_BN)
    where, mask_BNS, (count_B, chosen_BP, path_BP) = jax.device_get(
        everything(draft, y_BN, length_B)
    )
    for b in range(ROWS):
        ways = paths(parent_BN[b].tolist())
        longest = []
        for i, way in enumerate(ways):
            assert where.depth_BN[b, i] == len(way) - 1
            seen = {*range(length_B[b]), *(length_B[b] + np.array(way))}
            assert set(np.flatnonzero(mask_BNS[b, i])) == seen
            right = all(
                valid_BN[b, node] and tokens_BN[b, node] == y_BN[b, parent]
                for parent, node in pairwise(way)
            )
            if right and len(way) > len(longest):
                longest = way
        assert count_B[b] == len(longest) - 1
        assert path_BP[b, : len(longest)].tolist() == longest
        assert chosen_BP[b, : len(longest)].tolist() == y_BN[b, longest].tolist()


def test_a_chain_written_as_a_tree_is_the_chain():
    rng = np.random.default_rng(0)
    tokens_BN, y_BN = rng.integers(0, 2, (2, ROWS, NODES)).astype(np.int32)
    parent_BN = np.broadcast_to(np.arange(NODES, dtype=np.int32) - 1, (ROWS, NODES))
    valid_BN, length_B = np.ones((ROWS, NODES), bool), np.arange(ROWS, dtype=np.int32)
    chain = Draft(jnp.asarray(tokens_BN), jnp.asarray(valid_BN))
    tree = draft_of(parent_BN, tokens_BN, valid_BN)
    (plain, mask_a, a), (where, mask_b, b) = (everything(x, y_BN, length_B) for x in (chain, tree))
    assert plain.sees_BNN is None
    assert (plain.depth_BN == where.depth_BN).all() and (mask_a == mask_b).all()
    for of_chain, of_tree in zip(a, b, strict=True):
        assert (of_chain == of_tree).all()


def test_every_path_has_the_logits_of_a_plain_text():
    model = random_model()
    module, config = Llama(tiny_config()), tiny_config()
    rng = np.random.default_rng(1)
    parents = [-1, 0, 0, 1, 1, 2, 3, 5]
    prompt = rng.integers(0, config.vocab_size, (1, 6)).astype(np.int32)
    tokens = rng.integers(0, config.vocab_size, (1, len(parents))).astype(np.int32)
    draft = Draft(
        jnp.asarray(tokens), jnp.ones(tokens.shape, bool), jnp.asarray([parents], jnp.int32), 3
    )
    variables = {'params': model.params}
    call, whole = jax.jit(module.apply), jax.jit(partial(forward, module))
    steps = jnp.arange(6, dtype=jnp.int32)[None]
    seen = jnp.arange(16, dtype=jnp.int32)[None, None] <= steps[:, :, None]
    cache = init_cache(config, 1, 16, jnp.float32)
    _, cache = call(variables, prompt, steps, seen, cache, jnp.zeros(1, jnp.int32))
    where, length = layout(draft), jnp.full(1, 6, jnp.int32)
    hidden, _ = call(
        variables, tokens, length[:, None] + where.depth_BN, mask(where, length, 16), cache, length
    )
    logits = module.apply(variables, hidden, method='logits')
    for i, way in enumerate(paths(parents)):
        text = np.zeros((1, 16), np.int32)  # one length compiles once; what follows changes nothing
        text[0, : 6 + len(way)] = np.concatenate([prompt[0], tokens[0, way]])
        plain = whole(model.params, text)[0, 6 + len(way) - 1]
        assert np.abs(np.asarray(logits[0, i] - plain)).max() < 1e-4
