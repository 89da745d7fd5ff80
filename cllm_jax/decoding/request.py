"""What is asked for: prompts as token ids, how they are decoded, and the shapes that gives."""

import dataclasses
import operator
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from cllm_jax.data.chat import check_chat, check_template, is_chat
from cllm_jax.data.encoding import prompt_ids
from cllm_jax.decoding.drafter import Drafter
from cllm_jax.decoding.loop import Prompts
from cllm_jax.decoding.sampling import Sampling
from cllm_jax.errors import CllmError, ConfigError, at_least, check_seed, one_line
from cllm_jax.hf.model import Model, with_tokenizer
from cllm_jax.runtime.backend import Exactness
from cllm_jax.runtime.keys import prng_key
from cllm_jax.runtime.processes import fetch
from cllm_jax.tasks.example import Messages

Texts = Sequence[str | Messages | Sequence[int]]
"""Prompts as texts, chats (lists of messages), or lists of token ids."""


@dataclasses.dataclass(frozen=True)
class Request:
    """How to decode; the same for every prompt of a call."""

    drafter: Drafter
    max_tokens: int = 128
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    seed: int = 0
    stop: tuple[str, ...] = ()
    """The answer ends before the first of these strings."""
    batch: int = 32
    trace: bool = False
    """Report the drafts of every iteration."""
    exact: Exactness = 'auto'
    """How drafts round like AR (`Backend.exactly`); 'auto' is 'class' where that is known."""
    commit: int = 0
    """Most tokens that a forward commits, 0 for all that are right. With 1 a drafter's own program
    decodes autoregressively, whose answers are those of 'program'."""

    def __post_init__(self):
        if not isinstance(self.drafter, Drafter):
            raise ConfigError(f'drafter {self.drafter!r}: must be one, such as Jacobi(block=16)')
        for name in ('max_tokens', 'batch', 'seed', 'commit'):
            if not isinstance(value := getattr(self, name), int | np.integer):
                raise ConfigError(f'{name} {value}: must be a whole number')
        at_least(self, max_tokens=1, batch=1, commit=0)
        if self.exact not in get_args(Exactness):
            rule = "must be 'auto', 'class', 'program' or 'off'"
            raise ConfigError(f'exact {self.exact!r}: {rule}; leave it out')
        check_seed(self)
        if self.sampling.typical and not self.drafter.typical:
            rule = f'a lossy rule of Medusa, not of {type(self.drafter).__name__}'
            raise ConfigError(f'typical {self.sampling.typical}: {rule}; leave it out')
        if isinstance(self.stop, str):
            raise ConfigError(f'stop {self.stop!r}: must be a tuple; write ({self.stop!r},)')
        if '' in self.stop:
            raise ConfigError("stop string '': must not be empty; leave it out")


def padded_batch(size: int) -> int:
    """Rows of a batch that is computed for so many prompts: the next power of two."""
    return 1 << (size - 1).bit_length()


def bucket(size: int) -> int:
    """The next of 16, 24, 32, 48, 64, 80, 96, 112, ...: few shapes, and at most a third wasted."""
    power = 16
    while 2 * power < size:
        power *= 2
    step = max(power // (2 if power < 64 else 4), 8)
    return max(power, -(-size // step) * step)


FIRST_ROOM = 128
"""Tokens of an answer for which a cache has room at first: attention reads all slots in every
forward, the empty ones too, so an answer that ends early should not find many."""


def cache_slots(width: int, steps: int, nodes: int, exact: bool = False) -> int:
    """Slots for a padded prompt, an answer and a draft: fewer sizes than prompts have.

    With `exact` (`Backend.exact`) a multiple of 64, of which sums are taken in one order.
    """
    unit = 64 if exact else 32
    return -(-(width + steps + nodes) // unit) * unit


def encode_each(model: Model, prompts: Texts, name: str = 'prompts') -> list[list[int]]:
    """Token ids of several texts; raises ConfigError like `encode`, and for a single text."""
    if isinstance(prompts, str):
        raise ConfigError(f'{name} {prompts[:40]!r}: must be a list of texts; write [{name}]')
    encoded = []
    for i, prompt in enumerate(prompts):
        try:
            encoded.append(encode(model, prompt))
        except ConfigError as e:
            raise ConfigError(f'{name}[{i}]: {e}') from None
    return encoded


def encode(model: Model, prompt: str | Messages | Sequence[int]) -> list[int]:
    """Token ids of a prompt; a list of ids is only checked, a chat is written by its template.

    Raises ConfigError for text without a tokenizer or that is not Unicode, a chat that the model
    has no template for or that nobody can answer, no token at all, or an id that is not a whole
    number of the vocabulary.
    """
    if isinstance(prompt, Mapping):
        rule = 'is a message, and a chat is a list of them; write [[...]]'
        raise ConfigError(f'prompt {one_line(repr(prompt), 40)}: {rule}')
    if is_chat(prompt):
        check_chat(prompt)
        check_template(with_tokenizer(model).tokenizer, model.source)
        [ids] = prompt_ids(model.tokenizer, [prompt])
    elif not isinstance(prompt, str):
        try:
            ids = list(prompt)
        except TypeError:
            raise ConfigError(f'prompt {prompt!r}: must be a text or a list of token ids') from None
        try:
            ids = [operator.index(i) for i in ids]
        except TypeError:
            raise ConfigError(f'token ids {ids[:4]!r}: must be whole numbers') from None
    else:
        with_tokenizer(model, 'pass lists of token ids')
        try:
            prompt.encode()
        except UnicodeEncodeError as e:
            rule = f'{prompt[e.start]!r} is not a character; pass UTF-8'
            raise ConfigError(f'prompt {prompt[:40]!r}: {rule}') from None
        [ids] = prompt_ids(model.tokenizer, [prompt], model.config.bos_id)
    if not ids:
        raise ConfigError('empty prompt: decoding starts from at least one token; pass a BOS token')
    check_ids(model, ids)
    return ids


def token_array(model: Model, tokens_BT: ArrayLike) -> jax.Array:
    """Token ids `[B, T]` as int32. Of traced ones, inside `jax.jit`, only the shape is checked.

    Raises ConfigError if they are not rows of whole numbers, of one length, of the vocabulary.
    """
    traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tokens_BT))
    try:
        if traced:
            ids_BT = jnp.asarray(tokens_BT)
        else:  # NumPy keeps every integer, where int32 would take 2**32 for 0
            here = fetch(tokens_BT) if isinstance(tokens_BT, jax.Array) else tokens_BT
            ids_BT = np.asarray(here)
        if not (ids_BT.ndim == 2 and ids_BT.size and jnp.issubdtype(ids_BT.dtype, jnp.integer)):
            raise ValueError(f'{ids_BT.dtype} {list(ids_BT.shape)}')
    except (TypeError, ValueError) as e:
        rule = 'must be rows of whole numbers, all of one length'
        raise ConfigError(f'tokens_BT ({one_line(e)}): {rule}; pass integers [B, T]') from None
    if not traced:
        check_ids(model, ids_BT)
    return jnp.asarray(ids_BT, jnp.int32)


def check_ids(
    model: Model, ids: Any, where: str = '', error: type[CllmError] = ConfigError
) -> None:
    """Raise `error` for a token id that has no row in the model's table; `where` begins its line.

    XLA would read another row instead, or NaN. A tokenizer may have more tokens than the table:
    it is the ids that count.

    Args:
      ids: whole numbers in an array of any shape, or lists of them.
    """
    ids, size = np.asarray(ids), model.config.vocab_size
    wrong = (ids < 0) | (ids >= size)
    if not wrong.any():
        return
    first, remedy = int(ids[wrong][0]), 'was it made with another tokenizer?'
    vocabulary = model.tokenizer.get_vocab() if model.tokenizer else {}
    token = next((f' ({name!r})' for name, i in vocabulary.items() if i == first), '')
    if token:
        remedy = 'its tokenizer has more tokens; leave this one out, or enlarge its embeddings'
    rule = f'outside the vocabulary 0..{size - 1} of {model.source}'
    raise error(f'{where}token id {first}{token}: {rule}; {remedy}')


def pad_prompts(
    prompts: Sequence[Sequence[int]], rows: int, width: int, max_tokens: int, keys: jax.Array
) -> Prompts:
    """A batch of `rows` prompts of `width` tokens; rows after the last prompt never run."""
    tokens_BP, length_B = np.zeros((rows, width), np.int32), np.ones(rows, np.int32)
    for i, ids in enumerate(prompts):
        tokens_BP[i, : len(ids)], length_B[i] = ids, len(ids)
    max_tokens_B = np.where(np.arange(rows) < len(prompts), max_tokens, 0).astype(np.int32)
    if rows > len(prompts):
        keys = keys[np.minimum(np.arange(rows), len(prompts) - 1)]
    return Prompts(tokens_BP, length_B, max_tokens_B, keys)


def check(model: Model, request: Request, prompts: Sequence[Sequence[int]]) -> None:
    """Raise ConfigError for stop strings without a tokenizer, or too long a prompt and answer."""
    if request.stop:
        with_tokenizer(model, 'leave out stop strings, which need one')
    limit = model.config.max_positions
    for i, ids in enumerate(prompts):
        if len(ids) + request.max_tokens > limit:
            raise ConfigError(
                f'prompt {i}: {len(ids)} tokens + max_tokens {request.max_tokens} exceed the '
                f"model's {limit} positions; shorten one of them"
            )


def stop_ids(model: Model) -> np.ndarray:
    """The ids that end an answer, and -1, which is not a token, up to a multiple of eight."""
    ids = model.config.eos_ids
    ends_E = np.full(max(8, -(-len(ids) // 8) * 8), -1, np.int32)  # few shapes to compile
    ends_E[: len(ids)] = ids
    return ends_E


def row_keys(seed: int, rows: Sequence[int]) -> jax.Array:
    """One PRNG key per prompt, by its index in the call: batching does not change an answer."""
    return _fold_in_each(prng_key(seed), np.asarray(rows, np.uint32))


_fold_in_each = jax.jit(jax.vmap(jax.random.fold_in, (None, 0)))
