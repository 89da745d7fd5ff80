"""Decodes with every drafter and prints a report as JSON; started by test_identity_as_users_run.py.

`python -m tests.decoding.as_users_run` in a process of its own, with the flags that users have.
"""

import json
import os
import sys
import time
from collections.abc import Callable

import jax

import cllm_jax as cllm
from cllm_jax.data.sources import open_source
from cllm_jax.decoding.drafter import Drafter
from cllm_jax.drafters.space import Space
from cllm_jax.hf.load import SHIPPED
from cllm_jax.hf.model import Model
from cllm_jax.runtime.threads import side_by_side

GREEDY, HOT = 0.0, 2.0
"""Temperatures; at 0.8 the embedded models answer what they answer greedily."""
BOTH = (GREEDY, HOT)
TOKENS = 24
RUNS = {
    ('embedded', 'ar'): BOTH,
    ('embedded', 'jacobi sliding'): BOTH,
    # Variants of one drafter share the temperatures: compiling is nearly all that a run takes.
    ('embedded', 'jacobi block'): (GREEDY,),
    ('embedded', 'jacobi recycle and lookup'): (HOT,),
    ('embedded', 'jacobi tree'): (HOT,),
    ('embedded', 'lookup'): (GREEDY,),
    ('embedded', 'references'): (HOT,),
    ('embedded', 'lookahead'): BOTH,
    ('embedded-target', 'ar'): BOTH,
    ('embedded-target', 'draft model'): BOTH,
    ('embedded-target', 'space'): BOTH,
    ('embedded-target', 'medusa'): BOTH,
    ('embedded-target', 'redrafter'): BOTH,
    ('embedded-target', 'eagle'): BOTH,
}
"""The temperatures at which each model decodes with each drafter."""
MAKE: dict[str, Callable[[Model, list[str]], Drafter]] = {
    'ar': lambda model, prompts: cllm.AutoRegressive(),
    'jacobi sliding': lambda model, prompts: cllm.Jacobi(16),
    'jacobi block': lambda model, prompts: cllm.Jacobi(16, 'block'),
    'jacobi recycle and lookup': lambda model, prompts: cllm.Jacobi(16, recycle=2, lookup=True),
    'jacobi tree': lambda model, prompts: cllm.JacobiTree(16, 4),
    'lookup': lambda model, prompts: cllm.PromptLookup(8),
    'references': lambda model, prompts: cllm.with_references(model, prompts),
    'lookahead': lambda model, prompts: cllm.Lookahead(block=16),
    'draft model': lambda model, prompts: cllm.draft_model(model, cllm.load('embedded')),
    'space': lambda model, prompts: Space(mask_id=7),  # untrained: its mask is a token like others
    'medusa': lambda model, prompts: cllm.load_drafter(model, SHIPPED / 'medusa'),
    'redrafter': lambda model, prompts: cllm.load_drafter(model, SHIPPED / 'redrafter'),
    # A level less to compile.
    'eagle': lambda model, prompts: cllm.load_drafter(model, SHIPPED / 'eagle').replace(depth=3),
}


def key_of(model: str, drafter: str, temperature: float) -> str:
    """How the report calls a run."""
    return f'{model}, {drafter}, {temperature}'


def main() -> None:
    source = open_source('sql+arithmetic', split='heldout', seed=3, limit=4)
    prompts = [source[i].prompt for i in range(4)]
    models = {name: cllm.load(name) for name in ('embedded', 'embedded-target')}
    kinds = set()

    def run(job: tuple[str, str, float]) -> dict:
        name, title, temperature = job
        model, begin = models[name], time.perf_counter()
        drafter = MAKE[title](model, prompts)
        kinds.add(type(drafter).__name__)
        result = cllm.decode(model, prompts, drafter, TOKENS, temperature, seed=1)
        seconds = time.perf_counter() - begin
        return {'tokens': result.tokens, 'forwards': result.forwards, 'seconds': seconds}

    jobs = [(*who, temperature) for who, ts in RUNS.items() for temperature in ts]
    jobs.reverse()  # the longest first
    found = dict(zip((key_of(*job) for job in jobs), side_by_side(run, jobs, 2), strict=True))
    flags = {
        'optimised': not jax.config.values['jax_disable_most_optimizations'],
        'xla': os.environ.get('XLA_FLAGS', ''),
        'devices': len(jax.devices()),
        'precision': jax.config.jax_default_matmul_precision,
        'promotion': jax.config.jax_numpy_dtype_promotion,
    }
    json.dump({'flags': flags, 'kinds': sorted(kinds), 'runs': found}, sys.stdout)


if __name__ == '__main__':
    main()
