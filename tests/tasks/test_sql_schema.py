"""The words of the text-to-SQL task."""

from cllm_jax.tasks.sql_schema import NAMES, NUMBERS, PLURALS, WORDS


def test_pools_do_not_overlap():
    pools = [*PLURALS, *PLURALS.values(), *NUMBERS, *WORDS, *NAMES]
    pools += [value for pool in set(WORDS.values()) for value in pool]
    assert len(pools) == len(set(pools))
