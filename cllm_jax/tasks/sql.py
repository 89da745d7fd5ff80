"""The text-to-SQL task: a schema and an English question in, one SQL query out.

The text is made by the program, without any data set. Its style follows the cross-domain
text-to-SQL benchmark Spider (Yu et al. 2018, arXiv 1809.08887), as does the idea of a split by
schema. Here training and held-out examples share neither a schema nor a template; a template is
the structure of a query together with the phrasing of its parts.
"""

from random import Random

from cllm_jax.errors import ConfigError
from cllm_jax.tasks.example import Example, Split, is_held_out
from cllm_jax.tasks.sql_check import check
from cllm_jax.tasks.sql_question import Draft, compose
from cllm_jax.tasks.sql_schema import describe, draw_schema, schema_key

__all__ = ['CUE', 'KINDS', 'check', 'generate']

CUE = 'SQL:'

# (source, selection, nesting) and how often each is drawn.
KINDS = {
    ('one', 'list', 'plain'): 5,
    ('one', 'total', 'plain'): 3,
    ('one', 'group', 'plain'): 7,
    ('one', 'list', 'average'): 7,
    ('one', 'list', 'member'): 8,
    ('one', 'total', 'member'): 4,
    ('one', 'group', 'member'): 8,
    ('join', 'list', 'plain'): 14,
    ('join', 'list', 'average'): 9,
    ('join', 'total', 'plain'): 6,
    ('join', 'group', 'plain'): 40,
    ('link', 'list', 'plain'): 3,
    ('link', 'group', 'plain'): 5,
}


def generate(index: int, *, seed: int, split: Split) -> Example:
    """Make example number `index` of a split; equal arguments give equal examples.

    Raises ConfigError if `split` is neither 'train' nor 'heldout'.
    """
    if split not in ('train', 'heldout'):
        raise ConfigError(f"split '{split}' is unknown; use 'train' or 'heldout'")
    held_out = split == 'heldout'
    rng = Random(f'sql {seed} {split} {index}')
    kind = rng.choices(tuple(KINDS), tuple(KINDS.values()))[0]
    while True:
        tables = draw_schema(rng, 3 if kind[0] == 'link' else 2)
        if is_held_out(schema_key(tables)) == held_out:
            break
    while True:
        draft = Draft(rng)
        question, query = compose(draft, tables, *kind)
        structure = ' '.join((*kind, *draft.parts))
        template = ' '.join((structure, *draft.choices))
        if is_held_out(template) == held_out:
            break
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
