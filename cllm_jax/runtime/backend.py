"""What suits a small model on a CPU: a thread per core, and products by Eigen.

XLA divides a single operation among cores, and those of a small model are too small for that: one
core computes, the others wait. Two threads with half of a batch each keep two busy.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib

CACHED = 32 << 20
"""Bytes that a CPU's last cache holds. Weights above that come from memory, whose speed the threads
would have to share, each for its own reading of them."""


EIGEN = (
    {'xla_cpu_experimental_ynn_fusion_type': ''} if jaxlib.__version__.startswith('0.10.') else {}
)
"""How to compile what XLA's CPU backend shall multiply with Eigen in place of YNNPACK: there is no
kind of operation for which it may use that. Another jaxlib may refuse the option as unknown."""


def by_eigen(weights: Any) -> bool:
    """Whether decoding with these weights is faster when Eigen multiplies.

    With 16 float32 rows it is, as long as the weights lie in the cache of a CPU (docs/benchmarks.md
    has both sides). It has no bfloat16 products.
    """
    return _in_the_cache(weights) and all(
        leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(weights)
    )


def _in_the_cache(weights: Any) -> bool:
    """Whether the weights, as float32, lie on a single CPU device and in its cache."""
    leaves = [leaf for leaf in jax.tree.leaves(weights) if isinstance(leaf, jax.Array)]
    devices = {device for leaf in leaves for device in leaf.devices()}
    on_one_cpu = len(devices) == 1 and next(iter(devices)).platform == 'cpu'
    return on_one_cpu and 4 * sum(leaf.size for leaf in leaves) <= CACHED


def useful_threads(weights: Any) -> int:
    """How many threads can decode with these weights side by side and be the faster for it.

    The cores of this process if the weights lie in the cache of a CPU, else 1.
    """
    if not _in_the_cache(weights):
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def side_by_side(function: Callable, jobs: Sequence, threads: int) -> Iterator:
    """Yield what `function` returns for each job, in order; so many of them run at a time.

    If one raises, or the caller stops here, no further job begins.
    """
    if threads == 1 or len(jobs) < 2:
        yield from map(function, jobs)
        return
    pool = ThreadPoolExecutor(threads)
    try:
        yield from pool.map(function, jobs)
    finally:
        pool.shutdown(wait=False)
