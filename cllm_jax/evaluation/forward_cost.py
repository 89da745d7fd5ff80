"""What a forward costs on this machine: c(N), prefill and compilation.

Jacobi pays for `n` tokens per forward and keeps a few of them, so that its speed-up is about
tokens/forward over c(n), the time of a forward with n tokens over that with one. All of it is
measured in the decoding loop itself, with the same compiled functions.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from cllm_jax.decoding.drafter import Draft, Drafter, setting
from cllm_jax.decoding.engine import run_until, start
from cllm_jax.decoding.request import Request, row_keys
from cllm_jax.hf.model import Model

ITERATIONS = 96
"""Forwards per measurement. To start the loop and to wait for it takes as long as several forwards
of a small model with one token, and is not part of their time."""


@struct.dataclass
class NeverRight(Drafter):
    """`size` tokens are verified in every forward, and one is kept."""

    size: int = setting()

    @property
    def nodes(self) -> int:
        return self.size

    def draft(self, state, sequences, sampling):
        tokens_BN = jnp.broadcast_to(sequences.window(1), (len(sequences.length_B), self.nodes))
        return Draft(tokens_BN, jnp.zeros_like(tokens_BN, bool)), state


@dataclasses.dataclass(frozen=True)
class Cost:
    """Medians in seconds; `forward` is one iteration of the decoding loop."""

    forward: float
    prefill: float
    compilation: float


def endless(model: Model) -> Model:
    """The same model without end tokens, so that every row runs to its limit."""
    return dataclasses.replace(model, config=dataclasses.replace(model.config, eos_ids=()))


def costs(
    model: Model,
    nodes: Sequence[int],
    batch: int = 1,
    prompt: int = 64,
    repeats: int = 7,
    progress: Callable[[int], None] = lambda measured: None,
) -> dict[int, Cost]:
    """The cost of a forward for each number of tokens, measured in turn.

    Args:
      model: any model; its end tokens are ignored.
      nodes: how many tokens a forward verifies.
      batch: rows decoded together.
      prompt: length of the random prompts.
      repeats: times each is measured, after one run that compiles.
    """
    model = endless(model)
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, model.config.vocab_size, (batch, prompt)).tolist()
    # One token is AR, which is timed at its best; more are a draft, as it is verified.
    requests = {
        n: Request(NeverRight(n), ITERATIONS + 1, batch=batch, exact='off' if n == 1 else 'auto')
        for n in nodes
    }
    seconds: dict[int, list[tuple[float, float]]] = {n: [] for n in nodes}
    for _ in range(repeats + 1):
        for n, request in requests.items():
            seconds[n].append(time_once(model, request, prompts))
            progress(1)
    found = {}
    for n, ((first_prefill, first_loop), *rest) in seconds.items():
        prefill, loop = (statistics.median(column) for column in zip(*rest, strict=True))
        found[n] = Cost(loop / ITERATIONS, prefill, first_prefill + first_loop - prefill - loop)
    return found


def time_once(
    model: Model, request: Request, prompts: list[list[int]], forwards: int = ITERATIONS
) -> tuple[float, float]:
    """Seconds of the prefill, and of so many forwards after it."""
    keys = row_keys(0, range(len(prompts)))
    begin = time.perf_counter()
    state = jax.block_until_ready(start(model, request, prompts, keys))
    middle = time.perf_counter()
    state = jax.block_until_ready(run_until(model, request, state, forwards + 1))
    end = time.perf_counter()
    assert int(state.iteration) == forwards + 1
    return middle - begin, end - middle
