"""SQL answers are judged by running them: what is right, wrong, and harmless."""

import re
from dataclasses import replace

import pytest

from cllm_jax.tasks.sql import generate
from cllm_jax.tasks.sql_check import DATABASES, check, is_informative, open_database, run_query

TRAIN = [generate(i, seed=0, split='train') for i in range(3000)]
SAMPLE = TRAIN[:150] + [generate(i, seed=0, split='heldout') for i in range(150)]


def results(example, query):
    """The rows of a query in each database of an example."""
    found = []
    for number in range(DATABASES):
        connection = open_database(example.meta, number)
        found.append(run_query(connection, query))
        connection.close()
    return found


def test_references_run_and_mostly_find_something():
    full = 0
    for example in SAMPLE:
        found = results(example, example.answer)
        full += all(map(is_informative, found[:2]))
        # A copy in other letters is not accepted as text, so that it is the rows that agree.
        copy = example.answer.replace(' FROM ', ' from ')
        assert check(example, example.answer) and check(example, f'{example.answer}\n')
        assert check(example, copy) == any(map(is_informative, found))
    assert full >= 0.8 * len(SAMPLE)


def mutations(example):
    """Queries that ask for something else than the reference does."""
    answer = example.answer
    swaps = [(' > ', ' < '), (' < ', ' > '), (" = '", " != '"), ("!= '", "= '")]
    swaps += [
        ('DESC', 'ASC'),
        ('ASC', 'DESC'),
        ('AVG(', 'MAX('),
        ('NOT IN', 'IN'),
        (' OR ', ' AND '),
    ]
    for old, new in swaps:
        if old in answer:
            yield answer.replace(old, new, 1)
    for clause in (r' WHERE [^(]*?(?= GROUP| ORDER|$)', r' HAVING .*?(?= ORDER|$)', r' LIMIT \d'):
        dropped = re.sub(clause, '', answer)
        if dropped != answer:
            yield dropped
    first = re.match(r' SELECT (?:T\d\.)?(\w+),', answer)
    for columns in example.meta['tables'].values():
        if first and first[1] in columns:
            other = next(column for column in columns if column != first[1])
            yield answer.replace(first[1], other, 1)
            break


def test_wrong_queries_fail():
    verdicts = [check(example, text) for example in SAMPLE[::2] for text in mutations(example)]
    assert len(verdicts) > len(SAMPLE)
    assert sum(verdicts) <= 0.1 * len(verdicts)


def test_sharp_limits_are_told_from_blunt_ones():
    verdicts = []
    for example in TRAIN:
        if ' list plain where1' in example.meta['structure'] and 'LIMIT' not in example.answer:
            for sharp, blunt in ((' >= ', ' > '), (' <= ', ' < ')):
                if sharp in example.answer:
                    verdicts.append(check(example, example.answer.replace(sharp, blunt)))
    assert len(verdicts) >= 10
    assert sum(verdicts) <= 0.1 * len(verdicts)


def case(answer, prompt_tables=None, filters=()):
    """An example with two tables of ten or more rows each and the reference `answer`."""
    tables = prompt_tables or {
        'singer': ['name', 'country', 'age'],
        'song': ['singer_id', 'title', 'year', 'genre'],
    }
    meta = {'tables': tables, 'filters': list(filters), 'having': [], 'rows_seed': 3}
    return replace(TRAIN[0], answer=answer, meta=meta)


def test_order_of_rows_counts_only_if_the_reference_orders():
    unordered = case(' SELECT name, age FROM singer')
    assert check(unordered, ' SELECT name, age FROM singer ORDER BY age DESC')
    assert not check(unordered, ' SELECT age, name FROM singer')
    assert not check(unordered, ' SELECT name, age FROM singer LIMIT 4')
    ordered = case(' SELECT name, age FROM singer ORDER BY age ASC')
    assert check(ordered, ' SELECT name, age FROM singer ORDER BY singer.age')
    assert not check(ordered, ' SELECT name, age FROM singer')
    assert not check(ordered, ' SELECT name, age FROM singer ORDER BY age DESC')


def test_repeated_rows_count():
    example = case(' SELECT genre FROM song')
    assert check(example, ' SELECT song.genre FROM song')
    assert not check(example, ' SELECT DISTINCT genre FROM song')


def test_any_order_of_ties_is_right():
    example = case(' SELECT singer_id, title FROM song ORDER BY singer_id ASC')
    for tie_break in ('id', 'id DESC', 'year', 'title DESC'):
        assert check(example, f' SELECT singer_id, title FROM song ORDER BY singer_id, {tie_break}')
    assert not check(example, ' SELECT singer_id, title FROM song ORDER BY singer_id DESC')
    assert not check(example, ' SELECT singer_id, title FROM song ORDER BY title')
    limited = case(' SELECT title FROM song ORDER BY singer_id ASC LIMIT 3')
    assert check(limited, ' SELECT title FROM song ORDER BY singer_id, id DESC LIMIT 3')
    assert not check(limited, ' SELECT title FROM song ORDER BY singer_id, id DESC LIMIT 2')
    assert not check(limited, ' SELECT title FROM song ORDER BY singer_id DESC LIMIT 3')


def test_an_empty_result_is_no_proof():
    example = case(' SELECT name FROM singer WHERE age > 900')
    assert check(example, ' SELECT name  FROM singer WHERE age > 900 ')
    assert not check(example, ' SELECT name FROM singer WHERE age > 901')
    zero = case(' SELECT COUNT(*) FROM singer WHERE age > 900')
    assert not check(zero, ' SELECT COUNT(*) FROM singer WHERE age > 901')


HOSTILE = {
    'empty': '',
    'words': ' the answer is 42',
    'broken': ' SELECT ((((',
    'comment': ' -- SELECT name FROM singer',
    'unknown column': ' SELECT nothing FROM singer',
    'parameter': ' SELECT ? FROM singer',
    'attach': " ATTACH DATABASE '{path}' AS other",
    'vacuum into': " VACUUM INTO '{path}'",
    'drop': ' DROP TABLE singer',
    'delete': ' DELETE FROM singer RETURNING name',
    'insert': " INSERT INTO singer (name) VALUES ('x') RETURNING name",
    'create': ' CREATE TABLE other AS SELECT name FROM singer',
    'temporary': ' CREATE TEMP TABLE other (a)',
    'transaction': ' BEGIN',
    'pragma': ' PRAGMA query_only = OFF',
    'pragma function': " SELECT name FROM pragma_table_info('singer')",
    'extension': " SELECT load_extension('{path}')",
    'file': " SELECT readfile('/etc/passwd')",
    'two statements': ' SELECT name FROM singer; SELECT name FROM singer',
    'hidden drop': ' SELECT name FROM singer; DROP TABLE singer',
    'endless': ' WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT x FROM n',
    'endless sum': ' WITH n(x) AS (SELECT 1 UNION ALL SELECT x FROM n) SELECT SUM(x) FROM n',
    'cross join': ' SELECT name FROM ' + ', '.join(f'song AS s{i}' for i in range(9)) + ', singer',
    'cross count': ' SELECT COUNT(*) FROM ' + ', '.join(f'song AS s{i}' for i in range(9)),
    'cross sort': ' SELECT s0.title FROM song s0, song s1, song s2, song s3 ORDER BY s3.title',
    'many joins': ' SELECT 1 FROM ' + ' JOIN '.join(f'song s{i}' for i in range(64)),
    'many natural joins': ' SELECT 1 FROM song ' + 'NATURAL JOIN song ' * 60,
    'deep': ' SELECT ' + '(' * 900 + '1' + ')' * 900,
    'deep not': ' SELECT ' + 'NOT ' * 400 + '1',
    'big string': " SELECT printf('%.*c', 2000000000, 'x')",
    'big blob': ' SELECT zeroblob(2000000000)',
    'nul': ' SELECT name FROM singer\0; DROP TABLE singer',
    'surrogate': ' SELECT \ud800 FROM singer',
    'long': ' SELECT name FROM singer' + ' ' * 1_000_000,
    'long garbage': 'x' * 1_000_000,
}


@pytest.mark.parametrize('name', HOSTILE)
def test_hostile_text_is_wrong_and_harmless(name, tmp_path):
    path = tmp_path / 'file.db'
    example = case(' SELECT name FROM singer')
    assert not check(example, HOSTILE[name].replace('{path}', str(path)))
    assert not path.exists()
    assert check(example, ' SELECT singer.name FROM singer;')


def test_work_of_a_query_is_bounded():
    # Joins of 28 rows each: without a bound this one takes longer than the universe has existed.
    example = case(' SELECT name FROM singer')
    tables = ', '.join(f'song AS s{i}' for i in range(20))
    assert not check(example, f' SELECT COUNT(*) FROM {tables} WHERE s0.year + s19.year = 1')
