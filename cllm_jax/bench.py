"""Measure what decoding, collecting and training cost here, and what each way of decoding gains.

    python -m cllm_jax.bench --json bench.json
    python -m cllm_jax.bench --random-weights configs/shapes/1b.json --dtype bfloat16 --batches 1

The cost of a forward with N tokens over one with a single token is c(N); tokens/forward over c(N)
bounds the speed-up. In the tables `cost` is the time of an iteration, drafting included, over that
of the target's AR, and `parameters` are the drafter's own. Everything is warmed up first, compared
things take turns, and medians count.
"""

import dataclasses
import json
import platform
import resource
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from cllm_jax.cli.console import Console, number, print_plan, size, table
from cllm_jax.cli.settings import can_write, guard, parse, to_json
from cllm_jax.data.sources import Source, open_source
from cllm_jax.decoding.drafter import Drafter
from cllm_jax.decoding.request import Request
from cllm_jax.drafters.autoregressive import AutoRegressive
from cllm_jax.drafters.checkpoint import read_drafter
from cllm_jax.drafters.draft_model import draft_model
from cllm_jax.drafters.jacobi import Jacobi
from cllm_jax.drafters.lookahead import Lookahead
from cllm_jax.drafters.prompt_lookup import PromptLookup
from cllm_jax.drafters.trained import TrainedDrafter
from cllm_jax.errors import at_least, check_seed
from cllm_jax.evaluation.forward_cost import bandwidth, costs, weight_bytes
from cllm_jax.evaluation.pair import model_pair
from cllm_jax.evaluation.profile import milliseconds_by_part
from cllm_jax.evaluation.speed import (
    Method,
    one_by_one,
    plain_methods,
    share_identical,
    tokens_per_forward,
    tokens_per_second,
)
from cllm_jax.evaluation.throughput import collection_speed, step_cost
from cllm_jax.evaluation.torch_generate import generate_speed
from cllm_jax.hf.load import (
    EMBEDDED_ROOT,
    MIXED,
    Model,
    Precision,
    chosen,
    load,
    mixed,
    storage,
)
from cllm_jax.model.config import read_config
from cllm_jax.model.llama import Llama, init_params
from cllm_jax.runs.run_dir import write_atomic
from cllm_jax.tasks.quality import share_right
from cllm_jax.training.packing import Noise
from cllm_jax.training.step import LossWeights
from cllm_jax.trajectories.store import Collection

VERSIONED = ('cllm_jax', 'jax', 'jaxlib', 'flax')
DRAFTED = {
    'medusa': 'Medusa-1',
    'medusa2': 'Medusa-2',
    'redrafter': 'ReDrafter',
    'eagle': 'EAGLE',
    'space': 'SPACE',
}
"""Stages of a recipe that train a drafter."""
BATCH = 16
"""Prompts per call where batches are compared."""


@dataclasses.dataclass(frozen=True)
class BenchConfig:
    """Settings of a benchmark."""

    root: str = EMBEDDED_ROOT
    """Directory of the recipe's runs, runs/NAME of its file."""
    model: str = ''
    """The CLLM; default ROOT/export/cllm, or embedded if runs/embedded has no exports."""
    target: str = ''
    """The target; default ROOT/export/target, or embedded-target likewise."""
    random_weights: str = ''
    """A model directory or config file: measure forwards of that size, with random weights."""
    tasks: tuple[str, ...] = ('sql', 'arithmetic')
    """Datasets whose held-out prompts are decoded."""
    limit: int = 40
    """Prompts per task."""
    seed: int = 0
    """Which held-out prompts are drawn."""
    nodes: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128)
    """Tokens per forward whose cost is measured; one token is measured always."""
    batches: tuple[int, ...] = (1, 4, 16)
    """Batch sizes at which it is measured."""
    prompt: int = 64
    """Length of the random prompts of the cost measurement."""
    parts: tuple[int, ...] = (1, 16)
    """Tokens per forward whose time is divided among the parts of the model."""
    blocks: tuple[int, ...] = (8, 16, 32)
    """Jacobi windows (n)."""
    others: bool = True
    """Also prompt lookup, lookahead, recycling, and the drafters trained in ROOT."""
    draft_model: str = ''
    """A smaller model that drafts for the target; default ROOT/draft if that was trained."""
    max_tokens: int = 128
    """Longest answer."""
    repeats: int = 5
    """Times everything is measured after the first; the median counts."""
    dtype: Precision = 'auto'
    """Of weights and cache; mixed has both in bfloat16 and float32 everywhere else."""
    collected: int = 128
    """Prompts per task whose trajectories are collected, and trained on; 0 leaves this out."""
    torch: bool = True
    """Time `transformers` generate beside it, if torch is installed."""
    json: str = ''
    """Write all results to this file, again after every part."""
    quick: bool = False
    """A tiny version, to see that it works."""

    def __post_init__(self):
        at_least(self, limit=1, prompt=1, max_tokens=1, repeats=1, collected=0)
        check_seed(self)
        at_least(self, nodes=1, batches=1, blocks=1)
        if self.parts:
            at_least(self, parts=1)
        for block in self.blocks:
            Jacobi(block)  # checks it


def random_model(path: Path, dtype: str) -> Model:
    """Random weights of the size that a config describes."""
    config = read_config(path)
    module = Llama(config, storage(dtype))
    params = jax.jit(lambda key: init_params(module, key))(jax.random.key(0))
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
        base = measured[1].forward
        found['per_batch'][str(batch)] = {
            str(n): {
                'forward_ms': cost.forward * 1e3,
                'c': cost.forward / base,
                'prefill_ms': cost.prefill * 1e3,
                'compile_s': cost.compilation,
            }
            for n, cost in measured.items()
        }
    weights = weight_bytes(model.params)
    speed = bandwidth(weights)
    first = found['per_batch'][str(settings.batches[0])]['1']
    return found | {
        'prompt': settings.prompt,
        'weight_bytes': weights,
        'bandwidth_bytes_per_s': speed,
        'weight_limit_ms': weights / speed * 1e3,
        'share_of_limit': weights / speed * 1e3 / first['forward_ms'],
        'parts': {str(n): milliseconds_by_part(model, n, settings.prompt) for n in settings.parts},
    }


def methods_of(settings: BenchConfig, target: Model, cllm: Model) -> dict[str, Method]:
    """Every method that is compared; a name begins with its model's."""
    ar = Request(AutoRegressive(), settings.max_tokens)
    plain, own = Method(target, ar), Method(cllm, ar)
    methods = plain_methods('target, AR', plain) | {'CLLM, AR': own}
    for block in settings.blocks:
        methods[f'target, Jacobi {block}'] = plain.with_drafter(Jacobi(block))
        methods[f'CLLM, Jacobi {block}'] = own.with_drafter(Jacobi(block))
    if not settings.others:
        return methods
    block = max(settings.blocks)
    name = f'CLLM, Jacobi {block}'
    methods |= {
        'target, prompt lookup': plain.with_drafter(PromptLookup()),
        'target, lookahead': plain.with_drafter(Lookahead()),
        f'{name}, recycling': own.with_drafter(Jacobi(block, recycle=2)),
        f'{name}, prompt lookup': own.with_drafter(Jacobi(block, lookup=True)),
        f'{name}, lookahead': own.with_drafter(Lookahead(5, 4, 5, block)),
    }
    small = settings.draft_model
    if not small and (Path(settings.root) / 'draft/model').is_dir():
        small = f'{settings.root}/draft'
    if small:
        drafter = draft_model(target, load(small, settings.dtype))
        methods['target, draft model'] = plain.with_drafter(drafter)
    for stage, title in DRAFTED.items():
        directory = Path(settings.root) / stage
        if not (directory / 'drafter').is_dir():
            continue
        joint = (directory / 'model').is_dir()  # trained with its drafter
        base = Method(load(str(directory), settings.dtype), ar) if joint else plain
        name = title if joint else 'target'
        methods[f'{name}, {title}'] = base.with_drafter(read_drafter(directory, base.model))
        if joint:
            methods[f'{name}, AR'] = base
    return methods


def decoding(
    settings: BenchConfig, source: Source, target: Model, cllm: Model, console: Console
) -> dict[str, Any]:
    """Every method on the held-out prompts of one task."""
    prompts = [source[i].prompt for i in range(len(source))]
    methods, results = methods_of(settings, target, cllm), {}
    for name, method in methods.items():
        with console.status(f'{source.name}: {name}'):
            results[name] = one_by_one(method, prompts)
    with console.progress(f'{source.name}: timing', len(prompts)) as bar:
        speed = tokens_per_second(methods, prompts, settings.repeats, bar)
    plain = [name for name in methods if name.startswith('target, AR')]
    base = max(speed[name] for name in plain)
    with console.status(f'{source.name}: {BATCH} at a time'):
        names = plain + [f'CLLM, Jacobi {block}' for block in settings.blocks]
        together = {name: methods[name] for name in names}
        batched = tokens_per_second(together, prompts, settings.repeats, batch=BATCH)
    rows = {}
    for name, result in results.items():
        same = results[f'{name.split(",")[0]}, AR']
        forward = tokens_per_forward(result)
        rows[name] = {
            'extra_parameters': extra_parameters(methods[name].request.drafter),
            'tokens_per_forward': forward,
            'cost_of_forward': forward * base / speed[name],
            'tokens_per_second': speed[name],
            'speedup': speed[name] / base,
            'conversion': speed[name] / base / forward,
            'identical': share_identical(result, same),
            'quality': share_right(source, result.texts) if source.checkable else None,
        }
    found = {'task': source.name, 'n': len(prompts), 'ways': rows, 'batched': batched}
    if settings.torch and find_spec('torch'):
        with console.status(f'{source.name}: transformers generate'):
            found['transformers'] = generate_speed(target, prompts, settings.max_tokens)
            others = generate_speed(target, prompts, settings.max_tokens, BATCH)
            batched |= {f'transformers, {name}': value for name, value in others.items()}
    return found


def extra_parameters(drafter: Drafter) -> int:
    """Parameters of the drafter alone."""
    own = drafter.own if isinstance(drafter, TrainedDrafter) else drafter
    return sum(leaf.size for leaf in jax.tree.leaves(own))


def pipeline(
    settings: BenchConfig, source: Source, target: Model, console: Console
) -> dict[str, Any]:
    """Collection and training on one task, with the losses of `configs/embedded.yaml`."""
    plans = {
        mode: Collection(
            16, mode, settings.max_tokens, settings.seed, min(16, len(source)), len(source)
        )
        for mode in ('sliding', 'block')
    }
    with console.status(f'{source.name}: collecting {len(source)} prompts'):
        collection, records = collection_speed(
            target, source, plans, min(8, len(source)), settings.repeats
        )
    weights, noise = LossWeights(ar_weight=6.0, global_weight=1.0), Noise(decay=8.0, fresh=0.15)
    compute = target.module.compute or target.module.dtype
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), target.params)
    model, batch = dataclasses.replace(target, params=params), min(16, len(records))
    with console.status(f'{source.name}: training steps'):
        step = step_cost(model, records, batch, weights, noise, compute, settings.repeats)
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
        columns = ['', 'parameters', 'tokens/forward', 'cost', 'tokens/s', 'speed-up']
        columns += ['conversion', 'identical', 'quality']
        rows = [[name, *row.values()] for name, row in task['ways'].items()]
        ar = task['ways']['target, AR']
        base = ar['tokens_per_second'] / ar['speedup']
        rows += [
            [f'transformers, {name}', '', '', '', value, value / base, '', '', '']
            for name, value in task.get('transformers', {}).items()
        ]
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
    return dataclasses.replace(
        settings,
        tasks=settings.tasks[:1],
        limit=2,
        nodes=(1, 4),
        batches=(1,),
        prompt=16,
        parts=(4,),
        blocks=(4,),
        others=False,
        max_tokens=24,
        repeats=1,
        collected=min(settings.collected, 4),
    )


def run() -> None:
    settings, flags = parse(
        BenchConfig, program='python -m cllm_jax.bench', description=__doc__, stage='bench'
    )
    if settings.quick:
        settings = tiny(settings)
    console = Console()
    dtype = chosen(settings.dtype)
    can_write('json', settings.json)
    sources: dict[str, list[Source]] = {}
    if not settings.random_weights:
        cllm, target = model_pair(settings.root, settings.model, settings.target)
        settings = dataclasses.replace(settings, model=cllm, target=target)
        sources = {
            split: [
                open_source(task, split=split, seed=settings.seed, limit=limit)
                for task in (settings.tasks if limit else ())
            ]
            for split, limit in (('heldout', settings.limit), ('train', settings.collected))
        }
    if flags.plan:
        print_plan(console, to_json(settings), {'dtype': dtype})
        return
    found: dict[str, Any] = {
        'device': f'{len(jax.devices())} x {jax.devices()[0].device_kind} ({platform.machine()})',
        'dtype': dtype,
        'versions': {name: version(name) for name in VERSIONED},
    }
    if settings.random_weights:
        model = random_model(Path(settings.random_weights), dtype)
        found |= {'model': model.source, 'cost': forward_costs(settings, model, console)}
        keep(settings, found)
    else:
        cllm, target = (load(name, dtype) for name in (settings.model, settings.target))
        found |= {'model': cllm.source, 'target': target.source}
        found['cost'] = forward_costs(settings, target, console)
        keep(settings, found)
        for source in sources['heldout']:
            found.setdefault('tasks', []).append(decoding(settings, source, target, cllm, console))
            keep(settings, found)
        for source in sources['train']:
            found.setdefault('pipeline', []).append(pipeline(settings, source, target, console))
            keep(settings, found)
    report(console, found)


def keep(settings: BenchConfig, found: dict[str, Any]) -> None:
    """Write what has been measured so far: a long run that is cut short keeps its parts."""
    found['peak_memory_bytes'] = peak_memory()
    if settings.json:
        path = Path(settings.json)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, (json.dumps(found, indent=2) + '\n').encode())


def main() -> None:
    guard(run)


if __name__ == '__main__':
    main()
