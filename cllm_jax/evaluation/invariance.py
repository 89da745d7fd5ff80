"""Whose bits depend on what: is a row computed alike, however many others are computed with it?

A draft is verified by a forward of N rows, AR's token by a forward of one. Where both round alike,
drafting returns AR's tokens at any precision; where they do not, a near tie of two tokens may fall
either way. Here one prompt is answered again and again, by the compiled functions that decode, with
one thing changed at a time. What counts are checksums of the bits: of the scores after each token,
and of the keys and values that each leaves in the cache.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from cllm_jax.decoding.drafter import Draft, Drafter, put, setting, windows
from cllm_jax.decoding.engine import decode_batch, decoder_of, programs_of
from cllm_jax.decoding.loop import Buffers
from cllm_jax.decoding.request import Request, cache_slots, pad_prompts, row_keys
from cllm_jax.decoding.sampling import Sampling
from cllm_jax.decoding.state import DecodeState
from cllm_jax.drafters.autoregressive import AutoRegressive
from cllm_jax.evaluation.forward_cost import endless
from cllm_jax.hf.model import Model
from cllm_jax.model.cache import read
from cllm_jax.runtime.backend import Exactness

ANSWER = 48
"""Tokens of the answer that are compared."""
PROMPT = 40
"""Tokens of a prompt."""
TEXTS = 8
"""Prompts whose answers are compared: what sums hang on shows once in some hundred tokens."""
VARIED_TEXT = Sampling(2.0)
"""Answers are sampled: greedy ones to random prompts may repeat a token, which hides faults."""


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
    wrong: int = 0
    """1 if all guesses are wrong, so that a forward keeps one token; they are those of the answer
    otherwise."""
    commit: int = 0
    """Most tokens that a forward keeps (`Request.commit`)."""
    tensor: int = 1
    """Devices that share every layer."""


@dataclasses.dataclass(frozen=True)
class Bits:
    """Checksums of an answer, by position."""

    scores: np.ndarray
    prompt_cache: np.ndarray
    answer_cache: np.ndarray
    forwards: int = 0
    """That it took."""

    def equal_parts(self, other: 'Bits') -> dict[str, bool]:
        names = ('scores', 'prompt_cache', 'answer_cache')
        return {n: bool(np.array_equal(getattr(self, n), getattr(other, n))) for n in names}


@struct.dataclass
class Scripted(Drafter):
    """Drafts an answer that is known, and carries a checksum of the scores at each position."""

    script_BS: jax.Array
    wrong: jax.Array
    """1 to draft what is certainly not the answer."""
    size: int = setting()

    @property
    def nodes(self) -> int:
        return self.size

    def init(self, sequences):  # the script too: the loop may go on with some of the rows
        return self.script_BS, jnp.zeros(sequences.tokens_BS.shape, jnp.uint32)

    def draft(self, state, sequences, sampling):
        known_BN = windows(state[0], sequences.length_B, self.size)
        guesses_BN = known_BN[:, 1:] ^ self.wrong
        return Draft.chain(jnp.concatenate([sequences.window(1), guesses_BN], axis=1)), state

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


BETWEEN = (3, 5, 6, 7, 24)
"""Nodes between the powers of two, where kernels for few rows end."""
WIDTHS = (48, 64, 80, 96, 112, 160, 256)


def setups(
    nodes: Iterable[int],
    batches: Iterable[int],
    slots: Iterable[int],
    tensor: Iterable[int] = (),
) -> dict[str, list[Setup]]:
    """What is varied, one thing at a time, by its name; the first of each is the reference."""

    def each(name: str, values: Iterable[int], base: Setup = Setup()) -> list[Setup]:
        return [dataclasses.replace(base, **{name: value}) for value in values]

    several = Setup(batch=max(4, *batches))
    places = sorted({0, 1, several.batch // 2, several.batch - 1})
    varied = {
        'nodes': each('nodes', nodes),
        'batch': each('batch', batches),
        'batch of one token each': each('batch', batches, Setup(nodes=1)),
        'batch of 64 tokens each': each('batch', batches, Setup(nodes=64)),
        'place in the batch': each('place', places, several),
        'prompt width': each('width', WIDTHS),
        'slots of the cache': each('slots', slots),
        'wrong guesses': each('wrong', (0, 1)),
        'most tokens kept': each('commit', (0, 1, 3)),
        'devices': each('tensor', tensor),
    }
    return {name: some for name, some in varied.items() if some}


def bits_of(
    model: Model,
    prompt: Sequence[int],
    answer: Sequence[int],
    setup: Setup,
    exact: Exactness = 'auto',
) -> Bits:
    """What a setup computes while it writes `answer` after `prompt`; see `Request.exact`."""
    rng, size = np.random.default_rng(1), len(prompt)
    others = rng.integers(0, model.config.vocab_size, (setup.batch, size)).tolist()
    prompts = [*others[: setup.place], list(prompt), *others[setup.place + 1 :]]
    room = cache_slots(setup.width, ANSWER, setup.nodes, exact=True)
    buffers = Buffers(max(setup.slots, room), ANSWER)
    script_BS = np.zeros((setup.batch, buffers.slots), np.int32)
    script_BS[setup.place, : size + ANSWER] = [*prompt, *answer]
    drafter = Scripted(jnp.asarray(script_BS), jnp.int32(setup.wrong), setup.nodes)
    how = {'batch': setup.batch, 'exact': exact, 'commit': setup.commit}
    request = Request(drafter, ANSWER, VARIED_TEXT, **how)
    keys = row_keys(0, [0] * setup.batch)  # the noise is that of the answer, in any place
    batch = pad_prompts(prompts, setup.batch, setup.width, ANSWER, keys)
    run = programs_of(model, request).prefill
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
    parts = scores_S[size:end], cache_XS[:, : size - 1], cache_XS[:, size - 1 : end - 1]
    return Bits(*parts, int(state.forwards_B[setup.place]))


def texts_of(model: Model, exact: Exactness = 'auto') -> list[tuple[list[int], list[int]]]:
    """Prompts of tokens by chance, and the answers that AR writes."""
    texts = []
    for seed in range(TEXTS):
        rng = np.random.default_rng(seed)
        prompt = rng.integers(0, model.config.vocab_size, PROMPT).tolist()
        request = Request(AutoRegressive(), ANSWER, VARIED_TEXT, batch=1, exact=exact)
        texts.append((prompt, decode_batch(model, request, [prompt], row_keys(0, [0])).tokens[0]))
    return texts


def probe(
    models: Mapping[int, Model],
    varied: dict[str, list[Setup]],
    exact: Exactness = 'auto',
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, Any]:
    """For everything that is varied: which values compute the same bits.

    Args:
      models: the model by the number of devices that share it; on one there has to be.

    Returns, by name, `rows` (a value, and for each kind of bits whether it is the reference's) and
    `classes`, the values that agree with each other in everything.
    """
    models = {devices: endless(model) for devices, model in models.items()}
    texts, seen = texts_of(models[1], exact), {}
    found: dict[str, Any] = {}
    for name, some in varied.items():
        for setup in (Setup(), *some):
            if setup not in seen:
                model = models[setup.tensor]
                seen[setup] = [bits_of(model, *text, setup, exact) for text in texts]
            progress(1)
        rows = {_value(name, s): _equal_parts(seen[Setup()], seen[s]) for s in some}
        found[name] = {'rows': rows, 'classes': _classes(name, some, seen)}
    return found


VARIED = {
    'nodes': 'nodes',
    'place in the batch': 'place',
    'prompt width': 'width',
    'slots of the cache': 'slots',
    'wrong guesses': 'wrong',
    'most tokens kept': 'commit',
    'devices': 'tensor',
}


def _value(name: str, setup: Setup) -> int:
    return getattr(setup, VARIED.get(name, 'batch'))


def _equal_parts(some: Sequence[Bits], others: Sequence[Bits]) -> dict[str, bool]:
    each = [one.equal_parts(other) for one, other in zip(some, others, strict=True)]
    return {name: all(part[name] for part in each) for name in each[0]}


def _classes(name: str, some: list[Setup], seen: dict[Setup, list[Bits]]) -> list[list[int]]:
    classes: list[list[Setup]] = []
    for setup in some:
        for known in classes:
            if all(_equal_parts(seen[known[0]], seen[setup]).values()):
                known.append(setup)
                break
        else:
            classes.append([setup])
    return [[_value(name, setup) for setup in known] for known in classes]


def one_class(found: Mapping[str, Any]) -> bool:
    """Whether all that was varied on one device computes the same bits."""
    return all(len(part['classes']) == 1 for name, part in found.items() if name != 'devices')
