"""Run by test_exactness.py with the flags that users have: whose bits depend on what, as JSON.

The model is the embedded one. `bits_of` decodes a known answer with one thing changed at a time;
what is reported is which of the setups compute exactly the bits of the first.
"""

import dataclasses
import json
import sys

import cllm_jax as cllm
from cllm_jax.data.sources import open_source
from cllm_jax.decoding.engine import decode_all, programs_of
from cllm_jax.decoding.promise import promise, reference
from cllm_jax.decoding.request import Request
from cllm_jax.decoding.sampling import Sampling
from cllm_jax.drafters.autoregressive import AutoRegressive
from cllm_jax.drafters.jacobi import Jacobi
from cllm_jax.evaluation.forward_cost import endless
from cllm_jax.evaluation.invariance import ANSWER, Setup, bits_of, texts_of
from cllm_jax.runtime.backend import Backend

TEXTS = 4
"""Without the class's order of sums, two of these differ from others."""
FIRST = Setup()
CHANGED = {
    'one node': {'nodes': 1},
    '5 nodes': {'nodes': 5},
    '24 nodes': {'nodes': 24},
    '64 nodes': {'nodes': 64},
    'worst guesses': {'wrong': 1},
    'in a batch': {'batch': 4},
    'in a batch, rolled': {'batch': 4, 'place': 3},
    'wider prompts': {'width': 160},
    'longer cache': {'slots': 1024},
}


def with_backend(model, change):
    other = dataclasses.replace(model)
    vars(other)['backend'] = change(model.backend)
    return other


def without_a_least_number(backend: Backend) -> Backend:
    return dataclasses.replace(backend.exactly('class'), exact_rows=1, exact_queries=1)


def with_single_queries(backend: Backend) -> Backend:
    return dataclasses.replace(backend.exactly('class'), exact_queries=1)


def with_any_sums(backend: Backend) -> Backend:
    return dataclasses.replace(backend.exactly('class'), sums=())


def same_bits(model, exact: str, some: dict[str, Setup]) -> dict[str, bool]:
    """Which setups compute the bits of the first, which accepts most of what it drafts."""
    texts = texts_of(model, exact)[:TEXTS]
    found = {
        name: [bits_of(model, *text, setup, exact) for text in texts]
        for name, setup in some.items()
    }
    first = found.pop('')
    assert max(bits.forwards for bits in first) <= ANSWER // 4, 'nothing is accepted'
    assert min(len(set(answer)) for _, answer in texts) > ANSWER // 4, 'it repeats itself'
    return {
        name: all(all(a.equal_parts(b).values()) for a, b in zip(first, bits, strict=True))
        for name, bits in found.items()
    }


def changed(*names: str) -> dict[str, Setup]:
    return {'': FIRST} | {name: dataclasses.replace(FIRST, **CHANGED[name]) for name in names}


def in_class(model, *names: str) -> dict[str, bool]:
    return same_bits(model, 'class', changed(*names))


def broken(model) -> dict[str, bool]:
    """The class with one of its parts taken out."""
    parts = {
        'rows': (without_a_least_number, 'one node'),
        'queries': (with_single_queries, 'one node'),
        'sums': (with_any_sums, '24 nodes'),
    }
    return {
        part: all(same_bits(with_backend(model, change), 'auto', changed(name)).values())
        for part, (change, name) in parts.items()
    }


def by_program(model) -> dict[str, bool]:
    """AR by the program of a draft, in a batch, whose size is no multiple of anything."""
    first = Setup(nodes=7, batch=4, place=2)
    one = dataclasses.replace(first, commit=1)
    return same_bits(model, 'program', {'': first, 'one token by the program': one})


def programs_compiled(model, prompts: list[str]) -> list[int]:
    """Entries in the cache of jit after the draft, and after AR by its program."""
    request = Request(Jacobi(16), 24, exact='program')
    counts = []
    for asked in (request, reference(request, AutoRegressive())):
        decode_all(model, asked, prompts)
        counts.append(sum(run._cache_size() for run in programs_of(model, request)))
    return counts


def answers(model, prompts: list[str]) -> bool:
    """Whether whole answers are AR's: sampled, in a batch that is refilled."""
    request = Request(Jacobi(16), 40, Sampling(0.8), batch=4, exact='class')
    plain = dataclasses.replace(reference(request, AutoRegressive()), batch=1)
    drafted, written = (decode_all(model, asked, prompts).tokens for asked in (request, plain))
    return drafted == written


def main() -> None:
    rows = open_source('sql+arithmetic', split='heldout', limit=8).rows
    prompts, found = [row.prompt for row in rows], {}
    models = {d: endless(cllm.load('embedded', d)) for d in ('float32', 'bfloat16', 'mixed')}
    some = ('one node', '64 nodes')
    for dtype, model in models.items():
        found[dtype] = {'program': by_program(model)} if dtype != 'mixed' else {}
        if dtype == 'float32':
            continue
        names = CHANGED if dtype == 'bfloat16' else some
        found[dtype] |= {'promise': promise(model, Request(Jacobi(16), exact='class'))[0]}
        found[dtype] |= {'class': in_class(model, *names)}
    found['broken'] = broken(models['bfloat16'])
    found['answers'] = answers(models['bfloat16'], prompts)
    found['programs'] = programs_compiled(models['bfloat16'], prompts[:2])
    json.dump(found, sys.stdout)


if __name__ == '__main__':
    main()
