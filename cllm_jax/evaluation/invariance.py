"""Whose bits depend on what: is a row computed alike, however many others are computed with it?

A draft is verified by a forward of N rows, AR's token by a forward of one. Where both round alike,
drafting returns AR's tokens at any precision; where they do not, a near tie of two tokens may fall
either way. Here one prompt is answered again and again, by the compiled functions that decode, with
one thing changed at a time. What counts are checksums of the bits: of the scores after each token,
and of the keys and values that each leaves in the cache.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from cllm_jax.decoding.drafter import Draft, Drafter, put, setting, windows
from cllm_jax.decoding.engine import decode_batch, decoder_of
from cllm_jax.decoding.loop import Buffers, programs
from cllm_jax.decoding.request import Request, cache_slots, pad_prompts, row_keys
from cllm_jax.decoding.state import DecodeState
from cllm_jax.drafters.autoregressive import AutoRegressive
from cllm_jax.evaluation.forward_cost import endless
from cllm_jax.hf.load import Model
from cllm_jax.model.cache import read

ANSWER = 48
"""Tokens of the answer that are compared."""


@dataclasses.dataclass(frozen=True)
class Setup:
    """One way to compute the same answer."""

    nodes: int = 16
    """Tokens verified by a forward of the loop."""
    batch: int = 1
    place: int = 0
    """The row of the batch that is looked at; the others have other prompts."""
    width: int = 64
    """Columns to which prompts are padded."""
    slots: int = 256
    """Slots of the cache."""


@dataclasses.dataclass(frozen=True)
class Bits:
    """Checksums of an answer, by position."""

    scores: np.ndarray
    prompt_cache: np.ndarray
    answer_cache: np.ndarray

    def equal_parts(self, other: 'Bits') -> dict[str, bool]:
        names = (field.name for field in dataclasses.fields(self))
        return {n: bool(np.array_equal(getattr(self, n), getattr(other, n))) for n in names}


@struct.dataclass
class Scripted(Drafter):
    """Drafts an answer that is known, and carries a checksum of the scores at each position."""

    script_BS: jax.Array
    size: int = setting()

    @property
    def nodes(self) -> int:
        return self.size

    def init(self, sequences):  # the script too: the loop may go on with some of the rows
        return self.script_BS, jnp.zeros(sequences.tokens_BS.shape, jnp.uint32)

    def draft(self, state, sequences, sampling):
        known_BN = windows(state[0], sequences.length_B, self.size)
        return Draft.chain(jnp.concatenate([sequences.window(1), known_BN[:, 1:]], axis=1)), state

    def update(self, state, draft, verdict, sequences, sampling):
        is_new_BN = jnp.arange(self.size, dtype=jnp.int32)[None] < verdict.count_B[:, None]
        sums_BN = checksum(verdict.logits_BNV)
        return state[0], put(state[1], sequences.length_B + 1, sums_BN, is_new_BN)


def checksum(x: jax.Array) -> jax.Array:
    """A sum over the bits along the last axis, uint32; whole numbers add up in any order."""
    bits = x.astype(jnp.float32).view(jnp.uint32)
    weight = 2 * jnp.arange(x.shape[-1], dtype=jnp.uint32) + 1
    mixed = (bits ^ (bits >> 15)) * jnp.uint32(2654435761)
    return (mixed * weight.reshape((1,) * (x.ndim - 1) + (-1,))).sum(axis=-1, dtype=jnp.uint32)


def setups(
    nodes: Iterable[int], batches: Iterable[int], slots: Iterable[int]
) -> dict[str, list[Setup]]:
    """What is varied, one thing at a time, by its name; the first of each is the reference."""
    first = Setup()
    several = dataclasses.replace(first, batch=max(4, *batches))
    places = sorted({0, 1, several.batch // 2, several.batch - 1})
    return {
        'nodes': [dataclasses.replace(first, nodes=n) for n in nodes],
        'batch': [dataclasses.replace(first, batch=b) for b in batches],
        'batch of one token each': [dataclasses.replace(first, nodes=1, batch=b) for b in batches],
        'place in the batch': [dataclasses.replace(several, place=p) for p in places],
        'prompt width': [dataclasses.replace(first, width=w) for w in (48, 64, 96, 160)],
        'slots of the cache': [dataclasses.replace(first, slots=s) for s in slots],
    }


def bits_of(model: Model, prompt: Sequence[int], answer: Sequence[int], setup: Setup) -> Bits:
    """What a setup computes while it writes `answer` after `prompt`."""
    rng, size = np.random.default_rng(1), len(prompt)
    others = rng.integers(0, model.config.vocab_size, (setup.batch, size)).tolist()
    prompts = [*others[: setup.place], list(prompt), *others[setup.place + 1 :]]
    room = cache_slots(setup.width, ANSWER, setup.nodes)
    buffers = Buffers(max(setup.slots, room), ANSWER)
    script_BS = np.zeros((setup.batch, buffers.slots), np.int32)
    script_BS[setup.place, : size + ANSWER] = [*prompt, *answer]
    request = Request(Scripted(jnp.asarray(script_BS), setup.nodes), ANSWER, batch=setup.batch)
    keys = row_keys(0, range(setup.batch))
    batch = pad_prompts(prompts, setup.batch, setup.width, ANSWER, keys)
    run = programs(model.backend).prefill
    state = run(decoder_of(model, request), batch, buffers=buffers, to_the_end=True)
    return _bits(state, setup, size)


def _bits(state: DecodeState, setup: Setup, size: int) -> Bits:
    def of_row(x_RSH: jax.Array) -> jax.Array:
        x_KBSH = read(x_RSH).reshape(-1, setup.batch, *x_RSH.shape[1:])
        return checksum(x_KBSH[:, setup.place])

    layers = [of_row(x_RSH) for x_RSH in (*state.cache.k_RSH, *state.cache.v_RSH)]
    cache_XS = np.asarray(jnp.concatenate(layers))
    scores_S = np.asarray(state.drafter[1][setup.place])
    end = size + ANSWER
    # The last token of a prompt is the first pending one, and that of an answer is never cached.
    return Bits(scores_S[size:end], cache_XS[:, : size - 1], cache_XS[:, size - 1 : end - 1])


def probe(
    model: Model,
    varied: dict[str, list[Setup]],
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, Any]:
    """For everything that is varied: which values compute the same bits.

    Returns, by name, `rows` (a value, and for each kind of bits whether it is the reference's) and
    `classes`, the values that agree with each other in everything.
    """
    model = endless(model)
    prompt = np.random.default_rng(0).integers(0, model.config.vocab_size, 40).tolist()
    request = Request(AutoRegressive(), ANSWER, batch=1)
    [answer] = decode_batch(model, request, [prompt], row_keys(0, [0])).tokens
    seen: dict[Setup, Bits] = {}
    found: dict[str, Any] = {}
    for name, some in varied.items():
        for setup in (Setup(), *some):
            if setup not in seen:
                seen[setup] = bits_of(model, prompt, answer, setup)
            progress(1)
        rows = {_value(name, s): seen[Setup()].equal_parts(seen[s]) for s in some}
        found[name] = {'rows': rows, 'classes': _classes(name, some, seen)}
    return found


def _value(name: str, setup: Setup) -> int:
    fields = {'nodes': setup.nodes, 'place in the batch': setup.place}
    fields |= {'prompt width': setup.width, 'slots of the cache': setup.slots}
    return fields.get(name, setup.batch)


def _classes(name: str, some: list[Setup], seen: dict[Setup, Bits]) -> list[list[int]]:
    classes: list[list[Setup]] = []
    for setup in some:
        for known in classes:
            if all(seen[known[0]].equal_parts(seen[setup]).values()):
                known.append(setup)
                break
        else:
            classes.append([setup])
    return [[_value(name, setup) for setup in known] for known in classes]
