"""The list of datasets: names, splits, limits, and what Grain needs of a source."""

import json
import pickle

import pytest

from cllm_jax.data.sources import DEFAULT_LIMIT, FORMATS, GENERATED, open_source, rows_fingerprint
from cllm_jax.errors import ConfigError, DataError


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / 'rows.jsonl'
    lines = [json.dumps({'prompt': f'p{i}', 'answer': f'a{i}'}) for i in range(300)]
    path.write_text('\n'.join(lines))
    return path


def ids(source):
    return [source[i].id for i in range(len(source))]


@pytest.mark.parametrize('spec', [*GENERATED, '+'.join(GENERATED)])
@pytest.mark.parametrize('split', ['train', 'heldout'])
def test_generated_tasks_grade_their_own_answers(spec, split):
    source = open_source(spec, split=split, seed=3, limit=12)
    assert len(source) == 12 and len(set(ids(source))) == 12 and source.checkable
    for i in range(12):
        example = source[i]
        assert example == open_source(spec, split=split, seed=3, limit=12)[i]
        assert source.check(example, example.answer) and not source.check(example, ' nonsense')
    assert source[0] != open_source(spec, split=split, seed=4, limit=12)[0]
    assert source[-1] == source[11]
    with pytest.raises(IndexError):
        source[12]


def test_generated_tasks_have_a_default_limit():
    assert len(open_source('sql')) == DEFAULT_LIMIT


def test_mixture_takes_the_tasks_in_turn():
    mixed = open_source('sql+arithmetic', limit=7)
    assert [mixed[i].meta['task'] for i in range(7)] == ['sql', 'arithmetic'] * 3 + ['sql']
    assert mixed[4] == open_source('sql', limit=3)[2]
    assert mixed[5] == open_source('arithmetic', limit=3)[2]


def test_split_of_a_file_is_by_prompt(rows):
    train, heldout = open_source(str(rows)), open_source(str(rows), split='heldout')
    assert set(ids(train)).isdisjoint(ids(heldout))
    assert len(train) + len(heldout) == 300 and 5 <= len(heldout) <= 30
    everything = open_source(f'jsonl:{rows}#all', split='heldout')
    assert ids(everything) == [f'jsonl-{i}' for i in range(1, 301)]
    # The side depends on the prompt only, not on the row's place or id.
    lines = rows.read_text().splitlines()
    rows.write_text('\n'.join(lines[::-1] + lines))
    both = open_source(str(rows), split='heldout')
    assert sorted(r.prompt for r in both.rows) == sorted(2 * [r.prompt for r in heldout.rows])


def test_split_that_is_empty_is_refused(tmp_path):
    path = tmp_path / 'one.jsonl'
    path.write_text('{"prompt": "a"}')
    said = rf"split 'heldout'.*with --task: another file, or '{path}#all'.*trained on"
    with pytest.raises(DataError, match=said):
        open_source(str(path), split='heldout')
    assert len(open_source(f'{path}#all', split='heldout')) == 1
    path.write_text('{"prompt": "p17"}')
    with pytest.raises(DataError, match=rf"split 'train' .*or write '{path}#all'") as caught:
        open_source(str(path))
    assert '--task' not in str(caught.value)


def test_limit_is_a_nested_choice_by_seed(rows):
    spec = f'{rows}#all'
    fifty = ids(open_source(spec, seed=1, limit=50))
    assert len(set(fifty)) == 50 and fifty != ids(open_source(spec, limit=300))[:50]
    assert fifty[:20] == ids(open_source(spec, seed=1, limit=20))
    assert fifty != ids(open_source(spec, seed=2, limit=50))
    assert ids(open_source(spec, seed=1, limit=999)) == ids(open_source(spec))


@pytest.mark.parametrize(
    'spec, near',
    [
        ('sqll', "'sql'"),
        ('sql+arithmetik', "'sql\\+arithmetic'"),
        ('gsm8l:x.jsonl', "'gsm8k'"),
        ('wikisq:data/x', "'wikisql'"),
        ('shargpt:x', "'sharegpt'"),
        ('data/x.json', 'a dataset is sql'),
        ('', 'a dataset is sql'),
        ('sql#all', "^'sql#all': .*; write 'sql'$"),
        ('sql+arithmetic#all', "^'sql\\+arithmetic#all': .*; write 'sql\\+arithmetic'$"),
        ('sqll#all', "^dataset 'sqll#all' is unknown; did you mean 'sql'"),
        ('gsm8k', "write 'gsm8k:PATH'"),
        ('gsm8k:', "write 'gsm8k:PATH'"),
        ('gsm8k:#all', "^'gsm8k:#all' names no file; write 'gsm8k:PATH'"),
        ('sql+sql', 'twice'),
    ],
)
def test_unknown_specs_are_refused_with_the_nearest_name(spec, near):
    with pytest.raises(ConfigError, match=near) as caught:
        open_source(spec)
    assert '\n' not in str(caught.value)


def test_bad_split_and_limit():
    with pytest.raises(ConfigError, match="'test'"):
        open_source('sql', split='test')
    with pytest.raises(ConfigError, match='limit 0'):
        open_source('sql', limit=0)


def test_a_path_with_a_colon_is_a_path(tmp_path):
    path = tmp_path / 'a:b.jsonl'
    path.write_text('{"prompt": "a"}')
    assert len(open_source(f'{path}#all')) == len(open_source(f'jsonl:{path}#all')) == 1


def test_every_format_reports_a_missing_file(tmp_path):
    for kind in FORMATS:
        with pytest.raises(DataError):
            open_source(f'{kind}:{tmp_path / "absent"}')


def test_checkable_says_whether_a_check_means_something(rows, tmp_path):
    assert open_source(str(rows)).checkable
    rows.write_text('{"prompt": "a", "answer": "b"}\n{"prompt": "c"}')
    assert not open_source(f'{rows}#all').checkable
    code = tmp_path / 'code.jsonl'
    code.write_text('{"docstring": "a", "code": "b"}')
    assert not open_source(f'codesearchnet:{code}#all').checkable


def test_chats_that_begin_alike_are_on_the_same_side(tmp_path):
    path, said = tmp_path / 'chats.jsonl', []
    for i in range(200):
        first = {'role': 'user', 'content': f'question {i}'}
        answers = [{'role': 'assistant', 'content': f'answer {j}'} for j in range(2)]
        said += [[first], [first, answers[0]], [first, answers[1], first]]
    path.write_text(''.join(json.dumps({'messages': chat}) + '\n' for chat in said))
    sides = {side: open_source(str(path), split=side) for side in ('train', 'heldout')}
    firsts = {k: {row.prompt[0]['content'] for row in rows} for k, rows in sides.items()}
    assert firsts['train'].isdisjoint(firsts['heldout'])
    assert [len(sides[k]) for k in sides] == [3 * len(firsts[k]) for k in sides]
    assert len(firsts['heldout']) > 2
    assert len({rows_fingerprint(source) for source in sides.values()}) == 2


def test_dropped_rows_are_counted(tmp_path):
    turns = [{'from': 'human', 'value': 'a'}, {'from': 'gpt', 'value': 'b'}]
    path = tmp_path / 'chats.json'
    path.write_text(json.dumps([{'conversations': turns}, {'conversations': turns[1:]}]))
    source = open_source(f'sharegpt:{path}#all')
    assert len(source) == 1 and source.dropped == {'no human turn': 1}
    chats = open_source(f'sharegpt-chat:{path}#all')
    assert len(chats) == 1 and chats.dropped == {'no human turn': 1} and not chats.checkable


def test_gsm8k_plain_has_no_marks(tmp_path):
    path = tmp_path / 'g.jsonl'
    path.write_text(json.dumps({'question': 'q', 'answer': '<<1+1=2>>2\n#### 2'}))
    assert open_source(f'gsm8k-plain:{path}#all')[0].answer == '2\n#### 2'
    assert open_source(f'gsm8k:{path}#all')[0].answer == '<<1+1=2>>2\n#### 2'


def test_grain_reads_a_source(rows):
    grain = pytest.importorskip('grain')
    for source in (open_source(f'{rows}#all'), open_source('sql+arithmetic', limit=8)):
        read = list(grain.MapDataset.source(source).shuffle(seed=1))
        assert sorted(row.id for row in read) == sorted(ids(source))
        assert len(repr(source)) < 200  # Grain keeps the repr in its checkpoints
        copy = pickle.loads(pickle.dumps(source))  # what worker processes get
        assert copy[0] == source[0] and copy.check(copy[0], copy[0].answer)
