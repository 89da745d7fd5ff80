"""Results as `bench` and `evaluate` write them, and a look at what is drawn of them."""

from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

WHY = 'no matplotlib, which is part of the dev extra'
needs_matplotlib = pytest.mark.skipif(not find_spec('matplotlib'), reason=WHY)

FACTS = {'device': '1 x thing', 'dtype': 'mixed', 'versions': {'jax': '9.8.7'}}
MILLISECONDS = {1: {1: 0.5, 4: 0.6, 64: 2.5}, 4: {1: 0.6, 4: 1.0, 64: 8.0}}
"""Of a forward, by batch and tokens."""
WAYS = {
    'target, AR': (1.0, 1.0, []),
    'target, AR, float32': (1.0, 0.75, []),
    'CLLM, Jacobi 16': (6.26, 3.64, [0.6, 0.9, 0.95]),
    'target, Medusa-1': (2.12, 1.31, [0.7, 0.5]),
}
"""Tokens/forward, speed-up and acceptance."""


def bench_results(milliseconds=MILLISECONDS, weight_limit: float = 0.4) -> dict[str, Any]:
    batches = {
        str(batch): {str(n): {'forward_ms': ms, 'c': ms / row[1]} for n, ms in row.items()}
        for batch, row in milliseconds.items()
    }
    keys = ('tokens_per_forward', 'speedup', 'acceptance')
    ways = {name: dict(zip(keys, way, strict=True)) for name, way in WAYS.items()}
    return {
        **FACTS,
        'model': 'a model',
        'target': 'a target',
        'cost': {'prompt': 48, 'weight_limit_ms': weight_limit, 'per_batch': batches},
        'tasks': [{'task': 'data/my $1_ task $2_.jsonl', 'n': 40, 'ways': ways}],
    }


def evaluation(task: str = 'sql', drafter: str = 'jacobi') -> dict[str, Any]:
    return {
        **FACTS,
        'task': task,
        'n': 500,
        'timed': 40,
        'drafter': drafter,
        'tokens_per_forward': {'target': 1.05, 'cllm': 6.26},
        'loop_free_tokens_per_forward': 6.13,
        'quality': {'cllm': 0.982},
        'speedup': 3.64,
        'speedup_vanilla_jacobi': 0.74,
        'tokens_per_second': {'ar': 200.0, 'cllm_ar': 190.0},
        'acceptance': [0.59, 0.95],
        'identical': 1.0,
        'models': {'cllm': 'mine', 'target': 'yours'},
    }


def text_of(path: Path) -> str:
    """What can be read in a picture, which has to be an SVG."""
    root = ElementTree.fromstring(path.read_text('utf-8'))
    assert root.tag == '{http://www.w3.org/2000/svg}svg'
    return '\n'.join(''.join(e.itertext()) for e in root.iter('{http://www.w3.org/2000/svg}text'))


@contextmanager
def axes_of(module: Any):
    """Yields a list that fills with the axes of all pictures that a module draws."""
    seen, usual = [], module.picture

    @contextmanager
    def picture(*given, **named):
        with usual(*given, **named) as axes:
            yield axes
        seen.extend(axes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, 'picture', picture)
        yield seen
