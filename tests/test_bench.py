"""The benchmark measures what it says, on the code that decodes."""

import dataclasses
import json
import sys
from pathlib import Path

import jax
import pytest

from cllm_jax import bench
from cllm_jax.cli.console import Console, number
from cllm_jax.evaluation import comparison
from cllm_jax.evaluation.comparison import BenchConfig
from cllm_jax.evaluation.forward_cost import Cost
from cllm_jax.evaluation.speed import Method
from cllm_jax.hf.config import config_json, read_config
from cllm_jax.runtime.backend import CPU, Class
from tests.evaluation.results import needs_matplotlib
from tests.tiny import model_directory, random_model, tiny_config

MODEL = random_model()


def call(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, 'argv', ['bench', *map(str, arguments)])
    bench.run()


def and_negated(name: str, plain: Method) -> dict[str, Method]:
    """AR of a model, and of one that answers otherwise."""
    params = jax.tree.map(lambda leaf: -leaf, plain.model.params)
    negated = dataclasses.replace(plain.model, params=params)
    return {name: plain, f'{name}, float32': dataclasses.replace(plain, model=negated)}


@pytest.mark.slow
@needs_matplotlib
def test_the_command_reports_every_part(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(comparison, 'plain_methods', and_negated)
    with jax.numpy_dtype_promotion('standard'):  # optax relies on it
        model = model_directory(tmp_path / 'tiny')
        models = ('--model', model, '--target', model)
        results = ('--json', 'out/bench.json', '--plots', 'plots')
        call(monkeypatch, '--quick', '--no-torch', *models, *results)
    found = json.loads((tmp_path / 'out/bench.json').read_text())
    assert found['cost']['per_batch']['1']['1']['c'] == 1
    parts = found['cost']['parts']['4']
    assert min(parts['layer matrices'], parts['attention'], parts['vocabulary']) > 0
    assert parts.pop('whole') == pytest.approx(sum(parts.values()))
    (task,) = found['tasks']
    assert task['ways'].keys() == {
        'target, AR', 'target, AR, float32', 'CLLM, AR', 'target, Jacobi 4', 'CLLM, Jacobi 4',
    }  # fmt: skip
    for name, way in task['ways'].items():
        # To the AR of the very model, in the same precision.
        assert (way['identical'] == 1) == (name != 'target, AR, float32')
        product = way['tokens_per_forward'] * way['conversion']
        assert way['speedup'] == pytest.approx(product)
    slower, faster = sorted(
        task['ways'][name]['speedup'] for name in ('target, AR', 'target, AR, float32')
    )
    assert slower < faster == 1
    (part,) = found['pipeline']
    assert set(part['collect']) == {'sliding', 'block'}
    assert all(one['prompts_per_second'] > 0 for one in part['collect'].values())
    assert part['train']['ratio'] > 0
    out = capsys.readouterr().out
    assert 'c(N)' in out
    line = next(x for x in out.splitlines() if x.startswith(' CLLM, Jacobi 4 '))
    drawn = {path.name for path in (tmp_path / 'plots').iterdir()}
    assert {'forward-cost.svg', 'speedup-sql.svg'} <= drawn
    shown = [cell.strip() for cell in line.split('\u2502')[1:]]
    way = task['ways']['CLLM, Jacobi 4']
    assert shown == [number(way[key]) for key in bench.COLUMNS.values()]


def test_costs_count_from_a_forward_with_one_token(monkeypatch):
    """Also where it was not asked for; and what no limit is, is not given as a share."""
    settings = BenchConfig(nodes=(4, 2), batches=(1,), parts=(), prompt=5, repeats=1)
    monkeypatch.setattr(bench, 'costs', lambda model, nodes, *_: {n: Cost(n, 1, 1) for n in nodes})
    for speed, words in ((1e9, '0% of the time of'), (1e-9, 'this is no limit here')):
        monkeypatch.setattr(bench, 'memory_bandwidth', lambda backend, speed=speed: speed)
        cost = bench.forward_costs(settings, random_model(), Console())
        assert {n: row['c'] for n, row in cost['per_batch']['1'].items()} == {
            '1': 1,
            '2': 2,
            '4': 4,
        }
        console = Console()
        with console.out.capture() as shown:
            bench.report(console, {'model': 'm', 'cost': cost, 'peak_memory_bytes': 1})
        (line,) = (x for x in shown.get().splitlines() if x.startswith('reading'))
        assert line.endswith('here') == (speed < 1) and words in line


def test_what_was_measured_before_an_interruption_is_kept(tmp_path, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, 'compare_methods', interrupted)
    with jax.numpy_dtype_promotion('standard'):
        model = model_directory(tmp_path / 'tiny')
        models = ('--model', model, '--target', model)
        with pytest.raises(KeyboardInterrupt):
            call(monkeypatch, '--quick', *models, '--json', tmp_path / 'bench.json')
    found = json.loads((tmp_path / 'bench.json').read_text())
    assert found['cost']['per_batch']['1']['1']['c'] == 1 and found['peak_memory_bytes'] > 0


@pytest.mark.parametrize('is_one', [True, False])
def test_what_a_probe_has_seen_decides_the_default_from_then_on(is_one, tmp_path, monkeypatch):
    """Where it has looked at everything, and against the table too."""
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    classes = [[1, 4]] if is_one else [[1], [4]]
    rows = {n: dict.fromkeys(('scores', 'prompt', 'answer'), is_one or n == 1) for n in (1, 4)}
    found = {'nodes': {'rows': rows, 'classes': classes}}
    monkeypatch.setattr(bench, 'probe', lambda *arguments: found)
    seen = Class(dtypes=() if is_one else ('float32',))
    known = dataclasses.replace(CPU, rounding_class=seen)
    monkeypatch.setattr('cllm_jax.hf.model.backend_of', lambda params: known)
    settings, console = BenchConfig(exact='class'), Console()

    def has_class():
        return dataclasses.replace(MODEL).has_class  # without what it remembers

    few = dataclasses.replace(settings, nodes=(1, 4))
    assert bench.invariance(few, MODEL, console)['noted'] == ''
    assert has_class() != is_one
    probed = bench.invariance(settings, MODEL, console)
    assert Path(probed['noted']).parent.parent == tmp_path and has_class() == is_one
    with console.out.capture() as shown:
        bench.report_invariance(console, {'model': 'm', 'dtype': 'float32', 'invariance': probed})
    text = ' '.join(shown.get().split())
    assert ('class is the default' if is_one else 'class is not the default') in text
    assert ('other' in text) != is_one  # a table only where something differs


def test_random_weights_need_only_a_config(tmp_path, monkeypatch):
    (tmp_path / 'tiny.json').write_text(json.dumps(config_json(tiny_config(), 'float32')))
    for dtype in ('float32', 'mixed'):
        flags = ('--quick', '--dtype', dtype, '--json', tmp_path / 'bench.json')
        with jax.numpy_dtype_promotion('standard'):
            call(monkeypatch, '--random-weights', tmp_path / 'tiny.json', *flags)
        found = json.loads((tmp_path / 'bench.json').read_text())
        assert found['dtype'] == dtype and 'tasks' not in found


@pytest.mark.parametrize(
    'name, parameters',
    [
        ('4m', 3.80e6),
        ('7m', 7.05e6),
        ('27m', 27.5e6),
        ('110m', 110e6),
        ('1b', 1.10e9),
        ('7b', 6.74e9),
    ],
)
def test_shapes_to_benchmark_have_the_size_of_their_name(name, parameters):
    config = read_config(Path(__file__).parents[1] / f'configs/shapes/{name}.json')
    assert config.parameters == pytest.approx(parameters, rel=0.01)
