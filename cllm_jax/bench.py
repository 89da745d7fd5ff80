"""Measure what decoding, collecting and training cost here, and what each way of decoding gains.

    python -m cllm_jax.bench --json bench.json
    python -m cllm_jax.bench --random-weights configs/shapes/1b.json --dtype bfloat16 --batches 1
    python -m cllm_jax.bench --invariance --dtype bfloat16

The cost of a forward with N tokens over one with a single token is c(N); tokens/forward over c(N)
bounds the speed-up. In the tables `cost` is the time of an iteration, drafting included, over that
of the target's AR, and `parameters` are the drafter's own. Everything is warmed up first, compared
things take turns, and medians count.
"""

import dataclasses
import platform
import resource
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from cllm_jax.cli.console import Console, number, print_plan, size, table
from cllm_jax.cli.guard import guard
from cllm_jax.cli.settings import can_write, parse
from cllm_jax.data.sources import Source, open_source
from cllm_jax.evaluation.bandwidth import bytes_per_token, memory_bandwidth
from cllm_jax.evaluation.comparison import BATCH, BenchConfig, compare_methods
from cllm_jax.evaluation.forward_cost import costs
from cllm_jax.evaluation.invariance import BETWEEN, one_class, probe, setups
from cllm_jax.evaluation.plots import draw_bench, redraw
from cllm_jax.evaluation.profile import milliseconds_by_part
from cllm_jax.evaluation.throughput import collection_speed
from cllm_jax.hf.config import read_config
from cllm_jax.hf.load import MIXED, chosen, load, mixed, storage
from cllm_jax.hf.model import CLASS_NOTE, Model
from cllm_jax.model.llama import Llama, init_params
from cllm_jax.runs.atomic import write_json
from cllm_jax.runs.notes import write_note
from cllm_jax.runtime.keys import prng_key
from cllm_jax.runtime.mesh import tensor_mesh
from cllm_jax.training.step_cost import step_cost
from cllm_jax.trajectories.store import Collection

COLUMNS = {
    'parameters': 'extra_parameters',
    'tokens/forward': 'tokens_per_forward',
    'loop-free': 'loop_free_tokens_per_forward',
    'cost': 'cost_of_forward',
    'tokens/s': 'tokens_per_second',
    'speed-up': 'speedup',
    'conversion': 'conversion',
    'identical': 'identical',
    'quality': 'quality',
}
"""What is printed of each method, by its title."""


def random_model(path: Path, dtype: str) -> Model:
    """Random weights of the size that a config describes."""
    config = read_config(path)
    module = Llama(config, storage(dtype))
    params = jax.jit(lambda key: init_params(module, key))(prng_key(0))
    params = mixed(params) if dtype == MIXED else params
    return Model(config, params, None, f'random weights of {path}')


def forward_costs(settings: BenchConfig, model: Model, console: Console) -> dict[str, Any]:
    """c(N) per batch size, prefill and compilation, and the bandwidth limit."""
    found: dict[str, Any] = {'per_batch': {}}
    nodes = sorted({1, *settings.nodes})
    for batch in settings.batches:
        total = len(nodes) * (settings.repeats + 1)
        with console.progress(f'forwards, batch {batch}', total) as bar:
            measured = costs(model, nodes, batch, settings.prompt, settings.repeats, bar)
        found['per_batch'][str(batch)] = {
            str(n): {
                'forward_ms': cost.forward * 1e3,
                'c': cost.forward / measured[1].forward,
                'prefill_ms': cost.prefill * 1e3,
                'compile_s': cost.compilation,
            }
            for n, cost in measured.items()
        }
    weights, speed = bytes_per_token(model.params), memory_bandwidth(model.backend)
    first = found['per_batch'][str(settings.batches[0])]['1']
    return found | {
        'prompt': settings.prompt,
        'weight_bytes': weights,
        'bandwidth_bytes_per_s': speed,
        'weight_limit_ms': weights / speed * 1e3,
        'share_of_limit': weights / speed * 1e3 / first['forward_ms'],
        'parts': {str(n): milliseconds_by_part(model, n, settings.prompt) for n in settings.parts},
    }


def invariance(settings: BenchConfig, model: Model, console: Console) -> dict[str, Any]:
    """Which numbers of rows and sizes compute the same bits, in a class or as `exact` says.

    Whether all do in a class is noted, and decides from then on whether 'class' is the default of
    this model on this machine.
    """
    names = ('nodes', 'batches', 'slots')
    whole = all(set(getattr(BenchConfig, n)) <= set(getattr(settings, n)) for n in names)
    nodes = sorted({*settings.nodes, *BETWEEN}) if whole else settings.nodes
    varied = setups(nodes, settings.batches, settings.slots, settings.tensor)
    models = {1: model} | {
        devices: load(settings.model, model.precision, tensor_mesh(devices))
        for devices in settings.tensor
        if devices > 1
    }
    exact = settings.exact
    if exact == 'auto':
        exact = 'class' if model.products == jnp.bfloat16 else 'off'
    with console.progress('probing', sum(1 + len(some) for some in varied.values())) as bar:
        found = probe(models, varied, exact, bar)
    noted = None
    if whole and exact == 'class':
        noted = write_note(CLASS_NOTE, model.rounding, one_class(found))
    return {'exact': exact, 'noted': str(noted or ''), 'varied': found}


def report_invariance(console: Console, found: dict[str, Any]) -> None:
    """What computes the bits of the reference, and what agrees with each other."""
    probed = found['invariance']
    console.result(f'model: {found["model"]}, {found["dtype"]}, exact: {probed["exact"]}')
    shown = {True: 'same', False: 'other'}
    for name, part in probed['varied'].items():
        bits, classes = part['rows'].values(), part['classes']
        columns = [name, 'scores', 'keys and values of the prompt', 'of the answer']
        rows = [[value, *(shown[b] for b in row.values())] for value, row in part['rows'].items()]
        title = (
            'bits, against 16 tokens per forward, batch 1, 64 columns, 256 slots, no wrong guess'
        )
        if not all(all(row.values()) for row in bits):
            console.out.print(table(title, columns, rows))
        listed = '; '.join(', '.join(map(str, some)) for some in classes)
        console.result(f'{name}: {"one class" if len(classes) == 1 else "classes"}: {listed}')
    console.result(_concluded(probed))


def _concluded(probed: dict[str, Any]) -> str:
    """What follows from a probe."""
    is_one = one_class(probed['varied'])
    found = 'one class' if is_one else 'NOT one class: some sizes round otherwise'
    if 'devices' in probed['varied']:
        found = f'on one device: {found}'
    if probed['noted']:
        default = '' if is_one else ' not'
        return f'{found}; class is{default} the default of this model here, by {probed["noted"]}'
    if probed['exact'] == 'class':
        least = 'the default nodes, batches and slots, and a cache directory to write to'
        return f'{found}; not noted, which needs {least}'
    return found


def pipeline(
    settings: BenchConfig, source: Source, target: Model, console: Console
) -> dict[str, Any]:
    """Collection and training on one task."""
    count, repeats = len(source), settings.repeats
    rows = (settings.max_tokens, settings.seed, min(16, count), count)
    plans = {mode: Collection(16, mode, *rows) for mode in ('sliding', 'block')}
    with console.status(f'{source.name}: collecting {count} prompts'):
        collection, records = collection_speed(target, source, plans, min(8, count), repeats)
    with console.status(f'{source.name}: training steps'):
        step = step_cost(target, records, repeats=repeats)
    return {'task': source.name, 'collect': collection, 'train': step}


def report(console: Console, found: dict[str, Any]) -> None:
    """The measurements as tables."""
    target = f'; target: {found["target"]}' if 'target' in found else ''
    console.result(f'model: {found["model"]}{target}')
    cost = found['cost']
    for batch, rows in cost['per_batch'].items():
        title = f'a forward with N tokens, batch {batch}, {cost["prompt"]} prompt tokens'
        columns = ['N', 'ms', 'c(N)', 'prefill ms', 'compile s']
        console.out.print(table(title, columns, [[n, *row.values()] for n, row in rows.items()]))
    share = f'{cost["share_of_limit"]:.0%} of the time of a forward with one token'
    if cost['share_of_limit'] > 1:
        share = 'more than a forward with one token, so this is no limit here'
    console.result(
        f'reading the weights ({size(cost["weight_bytes"])}) takes {cost["weight_limit_ms"]:.3g} '
        f'ms at {size(cost["bandwidth_bytes_per_s"])}/s: {share}'
    )
    if parted := cost['parts']:
        columns = ['N', *next(iter(parted.values()))]
        rows = [[n, *row.values()] for n, row in parted.items()]
        console.out.print(table('where the ms of a forward go (profiled), batch 1', columns, rows))
    for task in found.get('tasks', ()):
        columns = ['', *COLUMNS]
        rows = [[name, *(row[k] for k in COLUMNS.values())] for name, row in task['ways'].items()]
        ar = task['ways']['target, AR']
        base = ar['tokens_per_second'] / ar['speedup']
        for name, value in task.get('transformers', {}).items():
            timed = {'tokens_per_second': value, 'speedup': value / base}
            rows.append([f'transformers, {name}', *(timed.get(k, '') for k in COLUMNS.values())])
        console.out.print(table(f'{task["task"]}: {task["n"]} prompts, batch 1', columns, rows))
        batched = task['batched']
        base = max(value for name, value in batched.items() if name.startswith('target, AR'))
        rows = [[name, value, value / base] for name, value in batched.items()]
        title = f'{task["task"]}: the same prompts, {BATCH} at a time'
        console.out.print(table(title, ['', 'tokens/s', 'speed-up'], rows))
    for part in found.get('pipeline', ()):
        train = part['train']
        for mode, collect in part['collect'].items():
            console.result(
                f'{part["task"]}: collects {number(collect["prompts_per_second"])} prompts/s with '
                f'{mode} states, {number(collect["tokens_per_second"])} tokens/s, '
                f'{collect["ratio"]:.2f}x of one at a time'
            )
        console.result(
            f'{part["task"]}: a consistency step takes {train["ratio"]:.2f}x the time of an '
            f'autoregressive one, {number(train["clean_tokens_per_second"])} clean tokens/s'
        )
    console.result(f'peak memory of this process: {size(found["peak_memory_bytes"])}')


def peak_memory() -> int:
    """Most bytes in use so far: of the accelerator where it tells, else of this process."""
    stats = jax.local_devices()[0].memory_stats() or {}
    unit = 1 if platform.system() == 'Darwin' else 1024
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return int(stats.get('peak_bytes_in_use', used))


def tiny(settings: BenchConfig) -> BenchConfig:
    """The same benchmark, tiny."""
    forwards = {'nodes': (1, 4), 'batches': (1,), 'prompt': 16, 'parts': (4,), 'repeats': 1}
    answers = {'tasks': settings.tasks[:1], 'limit': 2, 'max_tokens': 24}
    answers |= {'blocks': (4,), 'others': False, 'collected': min(settings.collected, 4)}
    return dataclasses.replace(settings, **forwards, **answers)


def run() -> None:
    settings, flags = parse(BenchConfig, stage='bench', description=__doc__)
    if settings.quick:
        settings = tiny(settings)
    console = Console()
    dtype = chosen(settings.dtype)
    settings.check_plots()
    if settings.redraw and flags.plan:
        print_plan(console, settings, {'draws into': settings.plots})
        return
    if settings.redraw:
        console.drawn(redraw(settings.json, draw_bench, Path(settings.plots)))
        return
    can_write('json', settings.json)
    sources: dict[str, list[Source]] = {}
    if not settings.random_weights:
        settings = settings.with_models()
        sources = {
            split: [
                open_source(task, split=split, seed=settings.seed, limit=limit)
                for task in (settings.tasks if limit else ())
            ]
            for split, limit in (('heldout', settings.limit), ('train', settings.collected))
        }
    if flags.plan:
        print_plan(console, settings, {'dtype': dtype})
        return
    found = settings.environment(dtype)
    if settings.invariance:
        random = settings.random_weights
        model = random_model(Path(random), dtype) if random else load(settings.model, dtype)
        found |= {'model': model.title, 'dtype': dtype}
        found['invariance'] = invariance(settings, model, console)
        keep(settings, found)
        report_invariance(console, found)
        return
    if settings.random_weights:
        model = random_model(Path(settings.random_weights), dtype)
        found |= {'model': model.source, 'cost': forward_costs(settings, model, console)}
        keep(settings, found)
    else:
        cllm, target = (load(name, dtype) for name in (settings.model, settings.target))
        console.opened(cllm, target)
        found |= {'model': cllm.title, 'target': target.title}
        found['cost'] = forward_costs(settings, target, console)
        keep(settings, found)
        for source in sources['heldout']:
            task = compare_methods(settings, source, target, cllm, console)
            found.setdefault('tasks', []).append(task)
            keep(settings, found)
        for source in sources['train']:
            found.setdefault('pipeline', []).append(pipeline(settings, source, target, console))
            keep(settings, found)
    report(console, found)
    if settings.plots:
        console.drawn(draw_bench(found, Path(settings.plots)))


def keep(settings: BenchConfig, found: dict[str, Any]) -> None:
    """Write what has been measured so far: a long run that is cut short keeps its parts."""
    found['peak_memory_bytes'] = peak_memory()
    if settings.json:
        write_json(Path(settings.json), found)


def main() -> None:
    guard(run)


if __name__ == '__main__':
    main()
