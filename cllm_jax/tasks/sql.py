"""The text-to-SQL task: a schema and an English question in, one SQL query out.

The program makes the text. Its style, and the split by schema, follow the cross-domain benchmark
Spider (Yu et al. 2018, arXiv 1809.08887). Training and held-out examples share neither a schema nor
a template, which is the structure of a query together with the phrasing of its parts.
"""

from random import Random

from cllm_jax.tasks.example import Example, Split, holds_out, is_held_out
from cllm_jax.tasks.sql_check import check
from cllm_jax.tasks.sql_question import Draft, compose
from cllm_jax.tasks.sql_schema import SQL, describe, draw_schema, schema_key

__all__ = ['CUE', 'KINDS', 'check', 'generate']

CUE = 'SQL:'
# (source, selection, nesting) and how often each is drawn.
KINDS = {tuple(kind.split()): weight for kind, weight in SQL['kinds'].items()}


def generate(index: int, *, seed: int, split: Split) -> Example:
    """Example `index` of a split: a pure function of its arguments; see `arithmetic.generate`."""
    held_out = holds_out(split)
    rng = Random(f'sql {seed} {split} {index}')
    kind = rng.choices(tuple(KINDS), tuple(KINDS.values()))[0]
    tables = ()
    while not tables or is_held_out(schema_key(tables)) != held_out:
        tables = draw_schema(rng, 3 if kind[0] == 'link' else 2)
    template = ''
    while not template or is_held_out(template) != held_out:
        draft = Draft(rng)
        question, query = compose(draft, tables, *kind)
        structure = ' '.join((*kind, *draft.parts))
        template = ' '.join((structure, *draft.choices))
    return Example(
        id=f'sql-{split}-{seed}-{index}',
        prompt=f'{describe(tables)}\n{question}\n{CUE}',
        answer=f' {query}',
        meta={
            'tables': {table.name: list(table.columns) for table in tables},
            'filters': draft.filters,
            'having': draft.having,
            'rows_seed': rng.getrandbits(32),
            'structure': structure,
            'template': template,
            'schema': schema_key(tables),
        },
    )
