"""Traces made by hand."""

from cllm_jax.evaluation.trace import DecodeTrace, Forward

PIECES = {i: f'<{i}>' for i in range(10)}


def chain(start: int, tokens: list[int], accepted: int, committed: list[int]) -> Forward:
    """A window of Jacobi decoding; of the prefill, too."""
    parents = tuple(range(-1, len(tokens) - 1))
    path = tuple(range(1, accepted + 1))
    return Forward(start, tuple(tokens), parents, len(tokens), path, tuple(committed))


def jacobi(**changes) -> DecodeTrace:
    """The answer 1 2 ... 8 in five forwards with a window of 4."""
    forwards = (
        chain(-1, [9, 8, 8, 8], 0, [1]),
        chain(0, [1, 7, 3, 4], 0, [2]),  # 3 and 4 are right already
        chain(1, [2, 7, 4, 5], 0, [3]),  # 3 is lost again, 4 is still there
        chain(2, [3, 4, 5, 8], 2, [4, 5, 6]),
        chain(5, [6, 7, 9, 9], 1, [7, 8]),  # the last forward did not reach the places of these 9
    )
    return DecodeTrace(**{'name': 'Jacobi', 'model': 'm', 'prompt': 'p', 'pieces': PIECES} | {
        'forwards': forwards, 'seconds': 0.5} | changes)  # fmt: skip


def tree(**changes) -> DecodeTrace:
    """The answer 1 2 3 4 in two forwards, of which the second has a tree.

    1 ┬ 2 ┬ 9
      │   └ 3 ─ 8
      └ 5 ┬ 3
          └ 6 ─ 4
    """
    tokens, parents = (1, 2, 5, 9, 3, 3, 6, 8, 4), (-1, 0, 0, 1, 1, 2, 2, 4, 6)
    forwards = (
        Forward(-1, (9,), (-1,), 0, (), (1,)),
        Forward(0, tokens, parents, 0, (1, 4), (2, 3, 4)),
    )
    return DecodeTrace(**{'name': 'EAGLE', 'model': 'm', 'prompt': 'p', 'pieces': PIECES} | {
        'forwards': forwards, 'seconds': 0.25} | changes)  # fmt: skip


def plain(**changes) -> DecodeTrace:
    """AR, with the answer of `jacobi`."""
    forwards = tuple(Forward(i - 1, (i or 9,), (-1,), 0, (), (i + 1,)) for i in range(8))
    return jacobi(**{'name': 'AR', 'forwards': forwards, 'seconds': 1.0} | changes)
