"""Questions of the text-to-SQL task and their queries."""

import re
from random import Random

from cllm_jax.tasks.sql import KINDS
from cllm_jax.tasks.sql_question import Draft, compose
from cllm_jax.tasks.sql_schema import Table


class PlainWords(Draft):
    """A draft that always takes the first wording, except where wordings differ in meaning."""

    def pick(self, part, options):
        return self.rng.choice(options) if isinstance(options[0], tuple) else options[0]


def test_a_question_never_has_two_answers():
    # A narrow schema, few wordings and masked values, so that questions do come up repeatedly.
    tables = (
        Table('singer', ('name', 'city', 'age')),
        Table('song', ('singer_id', 'genre', 'year')),
    )
    rng = Random(0)
    answers, repeated = {}, 0
    for _ in range(4000):
        kind = rng.choice([kind for kind in KINDS if kind[0] == 'one' and kind[2] == 'plain'])
        question, query = compose(PlainWords(rng), tables, *kind)
        for value in re.findall(r'\d+', question) + re.findall(r"'(\w+)'", query):
            question = re.sub(rf'\b{value}\b', '_', question)
            query = re.sub(rf'\b{value}\b', '_', query)
        repeated += question in answers
        assert answers.setdefault(question, query) == query
    assert repeated > 100
