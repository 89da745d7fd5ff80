"""Running the same function on several jobs at a time, one thread each."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor


def side_by_side(function: Callable, jobs: Sequence, threads: int) -> Iterator:
    """Yield the result of each job in order; once one raises or the caller stops, none begins."""
    if threads == 1 or len(jobs) < 2:
        yield from map(function, jobs)
        return
    pool = ThreadPoolExecutor(threads)
    try:
        yield from pool.map(function, jobs)
    finally:
        pool.shutdown(wait=False)
