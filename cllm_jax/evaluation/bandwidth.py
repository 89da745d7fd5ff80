"""How fast this machine reads memory, which is how fast a token at a time can be decoded at best.

A forward of one token reads every weight once and does little else. So the bytes of the weights
over the bandwidth is the least time that it takes, unless they lie in a cache.
"""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cllm_jax.cli import console
from cllm_jax.hf.load import products_of, storage
from cllm_jax.hf.model import Model
from cllm_jax.hf.weights import abstract_params
from cllm_jax.model.config import LlamaConfig
from cllm_jax.runtime.backend import Backend, backend_of, cores

SIZE = 1 << 30
"""Bytes that are read: more than any cache holds."""
PASSES = 16
"""Times that an accelerator reads them per call, lest the call be what is timed."""


def memory_bandwidth(backend: Backend, size: int = SIZE, repeats: int = 7) -> float:
    """Bytes per second that can be read from memory: the fastest of `repeats` runs.

    Where weights lie in the host's memory every core looks for the maximum of a part of it, with
    NumPy, so that XLA's products are not judged by themselves. An accelerator's memory is read by
    a sum of XLA's.
    """
    read = _by_numpy(size) if backend.weights_in_host_memory else _by_xla(size)
    seconds = []
    for _ in range(1 + repeats):
        begin = time.perf_counter()
        read_bytes = read()
        seconds.append(time.perf_counter() - begin)
    return read_bytes / min(seconds[1:])


def _by_numpy(size: int) -> Callable[[], int]:
    count = cores()
    parts = np.ones((count, max(size // 4 // count, 1)), np.float32)
    threads = ThreadPoolExecutor(count)

    def read() -> int:
        list(threads.map(np.max, parts))
        return parts.nbytes

    return read


def _by_xla(size: int) -> Callable[[], int]:
    array = jnp.ones((max(size // 4096, 1), 1024), jnp.float32)

    @jax.jit
    def passes(array):
        def once(_, mean):  # each waits for the one before, so that none is left out
            return jnp.mean(array * mean)

        return jax.lax.fori_loop(0, PASSES, once, jnp.float32(1))

    def read() -> int:
        jax.block_until_ready(passes(array))
        return array.nbytes * PASSES

    return read


def weight_bytes(params: Any) -> int:
    """Bytes of all arrays of a tree, or of those that its shapes stand for."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))


def bytes_per_token(params: Any) -> int:
    """Bytes of the weights that a forward of one token reads: of an embedding table that is not the
    output's too, a row, which is left out here."""
    table = weight_bytes(params['embed']) if 'head' in params else 0
    return weight_bytes(params) - table


def bytes_of_weights(config: LlamaConfig, precision: str, tensor: int) -> tuple[int, int]:
    """Bytes of a model's weights, and of what the decoding loop has of them once more."""
    weights = abstract_params(config, storage(precision), products_of(precision))
    layers = [leaf for name, leaf in weights.items() if name.startswith('layers_')]
    left = backend_of((), tensor).weights_left and products_of(precision) == jnp.bfloat16
    return weight_bytes(weights), weight_bytes(layers) if left else 0


def read_per_second(name: str, model: Model, tokens_per_second: float) -> str:
    """How near autoregressive decoding comes to its limit, which is to read all weights."""
    weights, limit = bytes_per_token(model.params), memory_bandwidth(model.backend)
    read = weights * tokens_per_second
    share = f'{read / limit:.0%}' if read < limit else 'less, for they lie in a cache'
    return (
        f'{name} reads {console.size(weights)} of weights per token, {console.size(read)}/s, '
        "prefills included in the time; this machine's memory gives "
        f'{console.size(limit)}/s: {share}'
    )
