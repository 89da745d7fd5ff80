"""How many compiled programs are kept."""

from typing import Any

MOST = 64
"""A compiled program of a CPU takes some hundred mappings of memory, of which a process may have
65,530 on Linux; with more, compilation ends the process."""


def bounded(compiled: Any) -> Any:
    """The function that `jax.jit` gave; where it has become too many programs, all are dropped."""
    if compiled._cache_size() >= MOST:
        compiled.clear_cache()
    return compiled
