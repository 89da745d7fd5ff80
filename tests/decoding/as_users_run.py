"""Decodes with every drafter and prints a report as JSON; started by test_identity_as_users_run.py.

`python -m tests.decoding.as_users_run` in a process of its own, with the flags that users have.
"""

import json
import os
import sys
from collections.abc import Callable

import jax

import cllm_jax as cllm
from cllm_jax.data.sources import open_source
from cllm_jax.decoding.drafter import Drafter
from cllm_jax.drafters.registry import TRAINED
from cllm_jax.drafters.space import Space
from cllm_jax.hf.load import SHIPPED, Model

TEMPERATURES = (0.0, 0.8)
TOKENS = 24
CLLM: dict[str, Callable[[Model, list[str]], Drafter]] = {
    'jacobi sliding': lambda model, prompts: cllm.Jacobi(16),
    'jacobi block': lambda model, prompts: cllm.Jacobi(16, 'block'),
    'jacobi recycle': lambda model, prompts: cllm.Jacobi(16, recycle=2),
    'jacobi lookup': lambda model, prompts: cllm.Jacobi(16, lookup=True),
    'jacobi tree': lambda model, prompts: cllm.JacobiTree(16, 4),
    'lookup': lambda model, prompts: cllm.PromptLookup(8),
    'references': lambda model, prompts: cllm.with_references(model, prompts),
    'lookahead': lambda model, prompts: cllm.Lookahead(block=16),
}
"""Drafters of the embedded CLLM, by name."""
TARGET: dict[str, Callable[[Model, list[str]], Drafter]] = {
    'draft model': lambda model, prompts: cllm.draft_model(model, cllm.load('embedded')),
    'space': lambda model, prompts: Space(mask_id=7),  # untrained: a token like any other
} | {
    name: lambda model, prompts, name=name: cllm.load_drafter(model, SHIPPED / name)
    for name in TRAINED
    if name != 'space'
}
"""Drafters of the embedded target."""


def decoded(model: Model, prompts: list[str], drafter: Drafter, temperature: float) -> dict:
    """What a drafter answers, in how many forwards."""
    result = cllm.decode(model, prompts, drafter, TOKENS, temperature, seed=1)
    return {'tokens': result.tokens, 'forwards': result.forwards}


def main() -> None:
    source = open_source('sql+arithmetic', split='heldout', seed=3, limit=4)
    prompts = [source[i].prompt for i in range(4)]
    flags = {
        'optimised': not jax.config.values['jax_disable_most_optimizations'],
        'xla': os.environ.get('XLA_FLAGS', ''),
        'devices': len(jax.devices()),
        'precision': jax.config.jax_default_matmul_precision,
        'promotion': jax.config.jax_numpy_dtype_promotion,
    }
    report = {'flags': flags, 'drafters': [], 'runs': {}}
    for name, drafters in (('embedded', CLLM), ('embedded-target', TARGET)):
        model = cllm.load(name)
        everyone = {f'ar of {name}': lambda model, prompts: cllm.AutoRegressive()} | drafters
        for title, make in everyone.items():
            drafter = make(model, prompts)
            report['drafters'].append(type(drafter).__name__)
            for temperature in TEMPERATURES:
                run = decoded(model, prompts, drafter, temperature)
                report['runs'][f'{title} {temperature}'] = run
    json.dump(report, sys.stdout)


if __name__ == '__main__':
    main()
