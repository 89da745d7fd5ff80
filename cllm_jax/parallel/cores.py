"""Work for the cores of a CPU side by side: threads that each call compiled functions.

XLA divides a single operation among cores, and those of a small model are too small for that: one
core computes, the others wait. Two threads with half of a batch each keep two busy.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax

CACHED = 32 << 20
"""Bytes that a CPU's last cache holds. Weights above that come from memory, whose speed the threads
would have to share, each for its own reading of them."""


def useful_threads(weights: Any) -> int:
    """How many threads can decode with these weights side by side and be the faster for it.

    The cores of this process if the weights, as float32, lie on a single CPU device and in its
    cache; else 1.
    """
    leaves = [leaf for leaf in jax.tree.leaves(weights) if isinstance(leaf, jax.Array)]
    devices = {device for leaf in leaves for device in leaf.devices()}
    on_one_cpu = len(devices) == 1 and next(iter(devices)).platform == 'cpu'
    if not on_one_cpu or 4 * sum(leaf.size for leaf in leaves) > CACHED:
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
