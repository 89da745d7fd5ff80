"""Consistency LLMs in JAX: decode in parallel, collect trajectories, train for consistency.

>>> import cllm_jax as cllm
>>> model = cllm.load('embedded')
>>> result = cllm.decode(model, ['Question: ...'], drafter=cllm.Jacobi(block=16), max_tokens=64)
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from cllm_jax.data.chat import LONGEST, check_chat
from cllm_jax.decoding.drafter import Drafter
from cllm_jax.decoding.engine import decode_all
from cllm_jax.decoding.promise import promise as _promise
from cllm_jax.decoding.request import Request, Texts, bucket, encode, token_array
from cllm_jax.decoding.result import DecodeResult, Trajectory
from cllm_jax.decoding.sampling import Sampling
from cllm_jax.decoding.steps import Step, decode_steps
from cllm_jax.decoding.stream import stream as _stream
from cllm_jax.drafters.autoregressive import AutoRegressive
from cllm_jax.drafters.checkpoint import read_drafter
from cllm_jax.drafters.draft_model import draft_model
from cllm_jax.drafters.jacobi import Jacobi
from cllm_jax.drafters.jacobi_tree import JacobiTree
from cllm_jax.drafters.lookahead import Lookahead
from cllm_jax.drafters.open import own_drafter
from cllm_jax.drafters.prompt_lookup import PromptLookup, with_references
from cllm_jax.drafters.registry import TRAINED
from cllm_jax.errors import CllmError, ConfigError, DataError
from cllm_jax.evaluation.window import choose, learn
from cllm_jax.hf.load import load
from cllm_jax.hf.model import Model
from cllm_jax.model.config import LlamaConfig
from cllm_jax.model.llama import forward as _plain_forward
from cllm_jax.runtime.backend import Exactness
from cllm_jax.runtime.programs import bounded
from cllm_jax.tasks.example import Messages

__all__ = [
    'AutoRegressive', 'CllmError', 'ConfigError', 'DataError', 'DecodeResult', 'Drafter', 'Jacobi',
    'JacobiTree', 'LlamaConfig', 'Lookahead', 'Model', 'PromptLookup', 'Sampling', 'Step',
    'Trajectory',
    'chat', 'decode', 'draft_model', 'forward', 'load', 'load_drafter', 'promise',
    'stream', 'with_references',
]  # fmt: skip

_forward = jax.jit(_plain_forward, static_argnums=0)


def forward(model: Model, tokens_BT: ArrayLike) -> jax.Array:
    """Plain causal forward: float32 logits `[B, T, V]` for token ids `[B, T]`.

    Inside `jax.jit` the ids cannot be looked at: there those outside the vocabulary go unnoticed.

    Raises:
      ConfigError: not two axes of whole numbers, no token, or an id outside the vocabulary.
    """
    tokens_BT = token_array(model, tokens_BT)
    length = tokens_BT.shape[1]
    padded_BT = jnp.pad(tokens_BT, ((0, 0), (0, bucket(length) - length)))  # few shapes to compile
    return bounded(_forward)(model.module, model.params, padded_BT)[:, :length]


def decode(
    model: Model,
    prompts: Texts,
    drafter: Drafter | None = None,
    max_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: Sequence[str] = (),
    batch: int = 32,
    trace: bool = False,
    typical: float = 0.0,
    exact: Exactness = 'auto',
    commit: int = 0,
    on_step: Callable[[Step], object] | None = None,
) -> DecodeResult:
    """Decode prompts, in the given order, whatever the drafter.

    Args:
      prompts: texts as they stand, lists of token ids, or chats: lists of messages such as
        `{'role': 'user', 'content': 'Hello'}`, to which the model's chat template is applied.
      drafter: how tokens are proposed, `Jacobi(block=16)` by default. It changes the number of
        forwards, never the answer: greedy and sampled, the tokens are those of `AutoRegressive()`
        with the same seed; `exact` says how far rounding can matter.
      max_tokens: longest answer.
      temperature, top_k, top_p: sampling; temperature 0 is greedy.
      seed: of the sampling noise and the initial guesses. Prompt i has its own noise, whatever
        the batch.
      stop: the answer ends before the first of these strings.
      batch: prompts decoded together; the cores of a CPU share them if the model is small.
      trace: report the Jacobi states of every iteration (`DecodeResult.trajectories`).
      typical: LOSSY, for Medusa and a temperature above 0: the epsilon of its typical acceptance
        (the paper has 0.09). The answer is then no longer that of `AutoRegressive()`.
      exact: how far tokens hang on rounding (docs/exactness.md, `promise`). 'class': a token's bits
        do not depend on how many are computed with it. 'program': as the same drafter, batch and
        length with `commit=1`. 'off': each as fast as it can, equal up to rounding at near ties.
        'auto': 'class' where that is known to hold, else 'off'.
      commit: most tokens that a forward commits, 0 for all that are right; 1 decodes
        autoregressively, by the drafter's own program.
      on_step: is called with a `Step` after every call of the model, which then runs one iteration
        at a time. That is slower; the answers are the same.

    Raises:
      ConfigError: a setting or a prompt that cannot be decoded.
    """
    sampling = Sampling(temperature, top_k, top_p, typical)
    how = (max_tokens, sampling, seed, _stops(stop), batch, trace, exact, commit)
    asked = Request(drafter or Jacobi(), *how)
    request = choose(model, asked, prompts).request
    if on_step is None:
        result = decode_all(model, request, prompts)
    else:
        result = decode_steps(model, request, prompts, on_step)
    learn(model, asked, request, result)
    return result


def chat(model: Model, messages: Messages, drafter: Drafter | None = None, **options: Any) -> str:
    """The answer to a chat, a list of messages such as `{'role': 'user', 'content': 'Hello'}`.

    The last one is the user's. Options are those of `decode`; answers have at most 512 tokens, or
    as many as there is room for.

    >>> model.chat([{'role': 'user', 'content': 'Hello'}])

    Raises ConfigError for messages that are not a chat, and a model without a chat template.
    """
    check_chat(messages)
    ids = encode(model, messages)
    room = max(1, model.config.max_positions - len(ids))
    return decode(model, [ids], drafter, **{'max_tokens': min(LONGEST, room), **options}).texts[0]


Model.chat = chat  # what decodes a model is above it, so its own file cannot have the method


def promise(model: Model, drafter: Drafter | None = None, exact: Exactness = 'auto') -> str:
    """What makes the tokens of `decode` those of AR in spite of rounding (docs/exactness.md).

    'class': they are those of `AutoRegressive()` with the same `exact`, whatever the batch.
    'program': they are those of the same call with `commit=1`. '': nothing does, and where two
    scores are nearly equal a token may be another.
    """
    return _promise(model, Request(drafter or Jacobi(), exact=exact))[0]


def stream(
    model: Model,
    prompt: str | Messages | Sequence[int],
    drafter: Drafter | None = None,
    **options: Any,
):
    """Yield the answer to one prompt in pieces that are never taken back; see `decode`."""
    chosen = {f.name for f in dataclasses.fields(Sampling)} & options.keys()
    sampling = Sampling(**{name: options.pop(name) for name in chosen})
    options['stop'] = _stops(options.get('stop', ()))
    request = Request(drafter or Jacobi(), sampling=sampling, **options)
    return _stream(model, choose(model, request, [prompt], sample=False).request, prompt)


def load_drafter(model: Model, directory: str) -> Drafter:
    """A drafter that was trained for `model` (Medusa, ReDrafter, EAGLE, SPACE), with its weights.

    Args:
      directory: where `train` wrote it: a run directory or the `drafter` directory in it; or the
        method, such as 'medusa', of one that lies in the model's own directory or next to it.

    Raises:
      ConfigError, DataError: there is none, it is damaged, or it does not fit the model: another
        tokenizer or size. One of another model that fits is useless and does no harm.
    """
    path = own_drafter(model, directory) if directory in TRAINED else Path(directory)
    return read_drafter(path, model)


def _stops(stop: Sequence[str]) -> Sequence[str]:
    """As a tuple; a single string, which `Request` refuses, as it is."""
    return stop if isinstance(stop, str) else tuple(stop)
