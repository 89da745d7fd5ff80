"""Pictures show the numbers of the results, say what they are, and come out the same again."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cllm_jax import bench, evaluate
from cllm_jax.cli import settings as cli
from cllm_jax.errors import ConfigError, DataError
from cllm_jax.evaluation import plots
from cllm_jax.evaluation.plots import draw_bench, draw_evaluation, roofline
from tests.evaluation.results import (
    WAYS,
    axes_of,
    bench_results,
    evaluation,
    needs_matplotlib,
    text_of,
)
from tests.evaluation.test_curves import write_run


def call(monkeypatch, module, *arguments: object) -> None:
    monkeypatch.setattr(sys, 'argv', [module.__name__, *map(str, arguments)])
    module.run()


@needs_matplotlib
def test_a_benchmark_is_drawn_with_its_numbers_and_where_they_come_from(tmp_path):
    drawn = draw_bench(bench_results(), tmp_path / 'new')
    assert [path.name for path in drawn] == [
        'forward-cost.svg', 'speedup-data_my_1__task_2_.jsonl.svg',
        'acceptance-data_my_1__task_2_.jsonl.svg',
    ]  # fmt: skip
    cost, speedup, right = map(text_of, drawn)
    for text in (cost, speedup, right):
        assert 'a model' in text and 'a target' in text and 'times are medians' in text
        assert '1 x thing, mixed, jax 9.8.7' in text
    assert 'batch 4: 0.6 ms with one token' in cost and 'limit: ' in cost and 'bandwidth' in cost
    for name, (_, gain, shares) in WAYS.items():
        assert f'{name}: {gain:.2f}x' in speedup
        assert (name in right) == bool(shares)
    assert 'limit: ' in speedup and '40 held-out prompts, 40 of them timed at batch 1' in speedup
    assert (
        'data/my $1_ task $2_.jsonl' in right and '100 %' in right and 'slot of the draft' in right
    )


@needs_matplotlib
def test_points_are_where_the_results_say(tmp_path):
    found = bench_results()
    with axes_of(plots) as axes:
        draw_bench(found, tmp_path)
    *costs, speedup, right = axes
    for ax, rows in zip(costs, found['cost']['per_batch'].values(), strict=True):
        np.testing.assert_array_equal(
            ax.lines[0].get_xydata(), [(int(n), row['c']) for n, row in rows.items()]
        )
    points = [tuple(line.get_xydata()[0]) for line in speedup.lines[2:]]
    assert points == sorted(((f, s) for f, s, _ in WAYS.values()), key=lambda p: -p[1])
    numbers = [(note.get_text(), tuple(note.xy)) for note in speedup.texts]
    assert numbers == [(str(k), point) for k, point in enumerate(points, 1)]
    assert [list(line.get_ydata()) for line in right.lines] == [w[2] for w in WAYS.values() if w[2]]
    assert list(right.lines[0].get_xdata()) == [1, 2, 3]


times = st.lists(st.floats(0.01, 100), min_size=4, max_size=4)


@given(st.lists(times, min_size=1, max_size=3), st.floats(0.001, 200))
def test_no_forward_is_below_the_roof(rows, weights):
    """And the best one is on it; a bandwidth that some forward has beaten is no roof."""
    batches = {2**b: dict(zip((1, 2, 8, 32), row, strict=True)) for b, row in enumerate(rows)}
    token = min(ms / n / batch for batch, row in batches.items() for n, ms in row.items())
    gaps = []
    for batch, row in batches.items():
        roof = roofline(row, weights, batch * token)
        assert roof.keys() == row.keys()
        gaps += [ms / roof[n] for n, ms in row.items()]
        assert (min(roof.values()) >= weights) == (weights <= min(row.values()))
    assert min(gaps) == pytest.approx(1)


@needs_matplotlib
@pytest.mark.parametrize('weights', [0.4, 0.7])
def test_a_roof_says_what_it_is_of(weights, tmp_path):
    """A forward with one token takes 0.5 and 0.6 ms here, in its two batches."""
    with axes_of(plots) as axes:
        draw_bench(bench_results(weight_limit=weights) | {'tasks': ()}, tmp_path)
    gaps = []
    for ax in axes:
        (label,) = (t.get_text() for t in ax.get_legend().get_texts() if 'limit' in t.get_text())
        assert 'tokens/s measured' in label and ('bandwidth' in label) == (weights == 0.4)
        gaps.append(min(ax.lines[0].get_ydata() / ax.lines[1].get_ydata()))
    assert min(gaps) == pytest.approx(1)  # the forward with the most tokens/s, of all batches


@needs_matplotlib
def test_an_evaluation_is_drawn_like_a_benchmark(tmp_path):
    names = []
    for found in (evaluation(), [evaluation('sql', 'medusa:DIR'), evaluation('arithmetic')]):
        drawn = draw_evaluation(found, tmp_path)
        names.append([path.name for path in drawn])
        speedup, right = map(text_of, drawn[:2])
        way = 'CLLM, Medusa' if isinstance(found, list) else 'CLLM, Jacobi'
        assert all(x in speedup for x in ('target, Jacobi: 0.74x', f'{way}', ': 3.64x', '0.95x'))
        assert way in right and 'mine; target: yours' in right
        assert '500 held-out prompts, 40 of them timed' in speedup
    both = ['speedup-sql.svg', 'acceptance-sql.svg']
    assert names == [both, [*both, 'speedup-arithmetic.svg', 'acceptance-arithmetic.svg']]


@needs_matplotlib
def test_the_same_results_give_the_same_bytes(tmp_path, monkeypatch):
    """Whenever they are drawn, and however somebody likes pictures."""
    import matplotlib

    first = [path.read_bytes() for path in draw_bench(bench_results(), tmp_path / 'a')]
    monkeypatch.setenv('SOURCE_DATE_EPOCH', '1')
    with matplotlib.rc_context({'axes.linewidth': 9, 'font.size': 20, 'svg.fonttype': 'path'}):
        again = [path.read_bytes() for path in draw_bench(bench_results(), tmp_path / 'b')]
    assert first == again
    assert not any(b'<dc:date>' in drawn for drawn in first)


@needs_matplotlib
def test_what_was_measured_is_drawn_and_can_be_drawn_again(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / 'mine/cllm')
    monkeypatch.setattr(evaluate, 'evaluate', lambda settings, source, console: evaluation())
    monkeypatch.setattr(evaluate, 'report', lambda console, found: None)
    named = ('--model', 'embedded', '--target', 'embedded-target')
    rest = ('--task', 'sql', '--limit', '1', '--root', 'mine', '--json', 'found.json')
    call(monkeypatch, evaluate, *named, *rest, '--plots', 'first')
    of_results = {'speedup-sql.svg', 'acceptance-sql.svg'}
    assert {path.name for path in Path('first').iterdir()} == of_results  # ROOT is another model's
    Path('found.json').rename('mine/evaluate.json')

    monkeypatch.setattr(evaluate, 'evaluate', lambda *given: pytest.fail('measured again'))
    call(monkeypatch, evaluate, '--root', 'mine', '--plots', 'again', '--redraw')
    assert {p.name for p in Path('again').iterdir()} == of_results | {'training-cllm.svg'}
    for name in of_results:
        assert Path('first', name).read_bytes() == Path('again', name).read_bytes()
    assert 'drew again/speedup-sql.svg, ' in capsys.readouterr().err

    Path('bench.json').write_text(json.dumps(bench_results()))
    call(monkeypatch, bench, '--json', 'bench.json', '--plots', 'none', '--redraw', '--plan')
    call(monkeypatch, evaluate, '--root', 'mine', '--plots', 'none', '--redraw', '--plan')
    assert not Path('none').exists()
    call(monkeypatch, bench, '--json', 'bench.json', '--plots', 'bench', '--redraw')
    assert len(list(Path('bench').iterdir())) == 3


@needs_matplotlib
def test_a_benchmark_that_was_cut_short_is_drawn_as_far_as_it_went(tmp_path):
    whole = bench_results()
    del whole['target']  # random weights have none
    for part, count in (('cost', 1), ('tasks', 2)):
        found = {k: v for k, v in whole.items() if k == part or k not in ('cost', 'tasks')}
        assert len(draw_bench(found, tmp_path)) == count


@pytest.mark.parametrize(
    ('module', 'arguments', 'told', 'kind'),
    [
        (bench, '--redraw', '--plots', ConfigError),
        (evaluate, '--redraw', '--plots', ConfigError),
        (bench, '--redraw --plots p', "redraw ''", ConfigError),
        (bench, '--redraw --plots p --json none', "redraw 'none'", ConfigError),
        (bench, '--redraw --plots p --json cut', 'cut: not results of this command', DataError),
        (bench, '--redraw --plots p --json other', 'other: not results', DataError),
        (evaluate, '--redraw --plots p --json other', 'other: not results', DataError),
        (evaluate, '--redraw --plots p --root none', 'nothing is measured in none', ConfigError),
        (bench, '--plots cut', "plots 'cut/", ConfigError),
        (evaluate, '--plots cut', "plots 'cut/", ConfigError),
        (bench, '--invariance --plots p', 'nothing to draw', ConfigError),
    ],
)
@needs_matplotlib
def test_plots_that_cannot_be_drawn_are_refused_first(
    module, arguments, told, kind, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    Path('cut').write_text('{"model": ')
    Path('other').write_text('{"model": "x", "tasks": 3}')
    monkeypatch.setattr(module, 'open_source', lambda *given, **named: pytest.fail('too late'))
    with pytest.raises(kind) as e:
        call(monkeypatch, module, *arguments.split())
    assert told in str(e.value) and '\n' not in str(e.value)


@pytest.mark.parametrize('module', [bench, evaluate])
def test_without_matplotlib_nothing_is_measured(module, tmp_path, monkeypatch):
    monkeypatch.setattr(cli, 'find_spec', lambda name: None)
    monkeypatch.setattr(module, 'open_source', lambda *given, **named: pytest.fail('too late'))
    with pytest.raises(ConfigError) as e:
        call(monkeypatch, module, '--plots', tmp_path / 'p')
    assert str(e.value).endswith("needs the package matplotlib; pip install 'cllm_jax[plots]'")
