"""Evaluate a CLLM beside its target: quality, tokens/forward, speed-up, identity.

    python -m cllm_jax.evaluate --task sql --limit 200 --seed 0 --json result.json

The speed-up is Jacobi with the CLLM over autoregressive decoding of the target, in tokens per
second at batch 1, both in the same compiled loop and in one run. Quality is measured on the text
that Jacobi produced, where there is a right answer. With --dtype mixed on a CPU the target is timed
in float32 too, and the faster of the two is the baseline.
"""

import dataclasses
import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import jax

from cllm_jax.cli.console import Console, print_plan, table
from cllm_jax.cli.settings import can_write, guard, parse, to_json
from cllm_jax.data.sources import Source, open_source
from cllm_jax.data.tokenizer import drop_prompts_without_room
from cllm_jax.decoding.engine import decode_all
from cllm_jax.decoding.request import Request
from cllm_jax.drafters.autoregressive import AutoRegressive
from cllm_jax.drafters.jacobi import Jacobi
from cllm_jax.drafters.registry import TITLES, Named, open_drafter
from cllm_jax.errors import at_least, check_seed
from cllm_jax.evaluation.pair import model_pair
from cllm_jax.evaluation.speed import (
    Way,
    ar_ways,
    share_identical,
    tokens_per_forward,
    tokens_per_second,
)
from cllm_jax.hf.load import EMBEDDED_ROOT, Precision, chosen, load, with_tokenizer
from cllm_jax.runs.run_dir import write_atomic
from cllm_jax.runtime.mesh import tensor_mesh
from cllm_jax.tasks.quality import is_repetitive, share_right, token_agreement

VERSIONED = ('cllm_jax', 'jax', 'jaxlib', 'flax', 'transformers')


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """Settings of an evaluation."""

    root: str = EMBEDDED_ROOT
    """Directory of the recipe's runs, runs/NAME of its file."""
    model: str = ''
    """The CLLM; default ROOT/export/cllm, or embedded if runs/embedded has no exports."""
    target: str = ''
    """The target; default ROOT/export/target, or embedded-target likewise."""
    task: str = ''
    """Dataset (see the README); default is sql and arithmetic, one after the other."""
    limit: int = 200
    """Held-out prompts per task."""
    seed: int = 0
    """Which held-out prompts are drawn."""
    drafter: str = 'jacobi'
    """How the model is decoded; or NAME:DIR of a drafter trained for it (see decode)."""
    block: int = 16
    """Jacobi window (n)."""
    mode: Literal['sliding', 'block'] = 'sliding'
    """Jacobi schedule."""
    recycle: int = 0
    """Chains of dropped guesses that are tried again in the same forward."""
    branches: int = 0
    """Branches with second choices that are tried in the same forward."""
    lookup: bool = False
    """Also try what followed the last time in the prompt or answer, in the same forward."""
    max_tokens: int = 128
    """Longest answer."""
    batch: int = 32
    """Prompts decoded together where only tokens are wanted."""
    timed: int = 40
    """Prompts whose decoding is timed, at batch 1."""
    repeats: int = 3
    """Times each of them is timed; the median counts."""
    tensor: int = 1
    """Devices that share every layer of the models."""
    dtype: Precision = 'auto'
    """Of weights and cache; mixed has both in bfloat16 and float32 everywhere else."""
    json: str = ''
    """Write the results to this file, one object, or a list of them for several tasks; default
    ROOT/evaluate.json for ROOT's own exports, and no file with quick."""
    quick: bool = False
    """A tiny version, to see that it works."""

    def __post_init__(self):
        at_least(self, limit=1, max_tokens=1, batch=1, timed=1, repeats=1, tensor=1)
        at_least(self, recycle=0, branches=0)
        check_seed(self)


def drafter_named(settings: EvaluateConfig) -> Named:
    return Named(
        settings.drafter,
        settings.block,
        settings.mode,
        settings.recycle,
        settings.branches,
        settings.lookup,
    )


def evaluate(settings: EvaluateConfig, source: Source, console: Console) -> dict[str, Any]:
    """Everything about one task, of the models that the settings name."""
    dtype, mesh = settings.dtype, tensor_mesh(settings.tensor)
    cllm, target = (load(name, dtype, mesh) for name in (settings.model, settings.target))
    room = min(m.config.max_positions for m in (cllm, target)) - settings.max_tokens
    source = drop_prompts_without_room(
        source, with_tokenizer(cllm).tokenizer, cllm.config.bos_id, room
    )
    console.dropped(source)
    ar = Request(AutoRegressive(), settings.max_tokens, batch=settings.batch)
    named = drafter_named(settings)
    loaded = open_drafter(named, cllm, ar.sampling, dtype, mesh)
    vanilla = dataclasses.replace(ar, drafter=Jacobi(settings.block, settings.mode))
    drafted = dataclasses.replace(ar, drafter=loaded.drafter)
    ways = {
        'target AR': Way(target, ar),
        'target Jacobi': Way(target, vanilla),
        'CLLM AR': Way(cllm, ar),
        'CLLM Jacobi': Way(cllm, drafted, loaded.weights),
    }
    prompts = [source[i].prompt for i in range(len(source))]
    results = {}
    for key, way in ways.items():
        with console.status(f'{source.name}: {key}, {len(prompts)} prompts'):
            results[key] = decode_all(way.model, way.request, prompts, way.weights)
    timed = prompts[: settings.timed]
    with console.progress(f'{source.name}: timing', len(timed)) as bar:
        plain = ar_ways('target AR', target, ar, mesh)
        speed = tokens_per_second(ways | plain, timed, settings.repeats, bar)
    base = max(speed[key] for key in plain)
    judged = results if source.checkable else {}
    quality = {key: share_right(source, r.texts) for key, r in judged.items()}
    exact = {
        key: sum((t or '').strip() == source[i].answer.strip() for i, t in enumerate(r.texts))
        / len(prompts)
        for key, r in judged.items()
    }
    forward = {key: tokens_per_forward(r) for key, r in results.items()}
    return {
        'task': source.name,
        'n': len(prompts),
        'seed': settings.seed,
        'quality': {
            'target': quality.get('target AR'),
            'target_jacobi': quality.get('target Jacobi'),
            'cllm_ar': quality.get('CLLM AR'),
            'cllm': quality.get('CLLM Jacobi'),
        },
        'exact_match': {'target': exact.get('target AR'), 'cllm': exact.get('CLLM Jacobi')},
        'tokens_per_forward': {
            'target': forward['target Jacobi'],
            'cllm': forward['CLLM Jacobi'],
        },
        'speedup': speed['CLLM Jacobi'] / base,
        'speedup_vanilla_jacobi': speed['target Jacobi'] / base,
        'tokens_per_second': {
            'ar': base,
            'jacobi': speed['CLLM Jacobi'],
            'target_jacobi': speed['target Jacobi'],
            'cllm_ar': speed['CLLM AR'],
        },
        'ar_tokens_per_second': {
            key.partition(', ')[2] or chosen(dtype): speed[key] for key in plain
        },
        'identical': share_identical(results['CLLM Jacobi'], results['CLLM AR']),
        'identical_target': share_identical(results['target Jacobi'], results['target AR']),
        'agreement_with_target': token_agreement(
            results['CLLM Jacobi'].tokens, results['target AR'].tokens
        ),
        'repetitive': sum(map(is_repetitive, results['CLLM Jacobi'].tokens)) / len(prompts),
        'mean_tokens': sum(map(len, results['CLLM Jacobi'].tokens)) / len(prompts),
        'drafter': settings.drafter,
        'block': settings.block,
        'mode': settings.mode,
        'recycle': settings.recycle,
        'branches': settings.branches,
        'lookup': settings.lookup,
        'timed': len(timed),
        'models': {'cllm': cllm.source, 'target': target.source},
        'dtype': chosen(dtype),
        'tensor': settings.tensor,
        'device': f'{len(jax.devices())} x {jax.devices()[0].device_kind} ({platform.machine()})',
        'versions': {name: version(name) for name in VERSIONED},
    }


def report(console: Console, found: dict[str, Any]) -> None:
    """The numbers of one task as a table."""
    quality, forward, speed = (
        found[k] for k in ('quality', 'tokens_per_forward', 'tokens_per_second')
    )
    base, name = speed['ar'], TITLES[found['drafter'].partition(':')[0]]
    rows = [
        ['target, AR', quality['target'], 1.0, speed['ar'], 1.0],
        [
            'target, Jacobi',
            quality['target_jacobi'],
            forward['target'],
            speed['target_jacobi'],
            speed['target_jacobi'] / base,
        ],
        ['CLLM, AR', quality['cllm_ar'], 1.0, speed['cllm_ar'], speed['cllm_ar'] / base],
        [f'CLLM, {name}', quality['cllm'], forward['cllm'], speed['jacobi'], found['speedup']],
    ]
    columns = ['', 'quality', 'tokens/forward', 'tokens/s', 'speed-up']
    title = f'{found["task"]}: {found["n"]} prompts, n = {found["block"]}, batch 1'
    console.out.print(table(title, columns, rows))
    console.result(f'CLLM: {found["models"]["cllm"]}; target: {found["models"]["target"]}')
    console.result(
        f'{name} = AR of the CLLM, token for token: {found["identical"]:.1%} of prompts; '
        f'agreement with the target: {found["agreement_with_target"]:.1%} of tokens'
    )


def run() -> None:
    settings, flags = parse(
        EvaluateConfig, program='python -m cllm_jax.evaluate', description=__doc__, stage='evaluate'
    )
    if settings.quick:
        settings = dataclasses.replace(settings, limit=4, timed=1, repeats=1, max_tokens=48)
    drafter_named(settings).check()
    given, path = settings.model or settings.target, settings.json
    own = not given and Path(settings.root, 'export').is_dir()
    if not path and own and not settings.quick:
        path = f'{settings.root}/evaluate.json'
    can_write('json', path)
    cllm, target = model_pair(settings.root, settings.model, settings.target)
    settings = dataclasses.replace(settings, model=cllm, target=target)
    console = Console()
    tasks = [settings.task] if settings.task else ['sql', 'arithmetic']
    sources = [
        open_source(task, split='heldout', seed=settings.seed, limit=settings.limit)
        for task in tasks
    ]
    if flags.plan:
        facts = {'tasks': ', '.join(tasks), 'prompts': sum(map(len, sources))}
        print_plan(console, to_json(settings), facts)
        return
    found = []
    for source in sources:
        console.dropped(source)
        found.append(evaluate(settings, source, console))
        report(console, found[-1])
    if path:
        text = json.dumps(found[0] if settings.task else found, indent=2) + '\n'
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_atomic(Path(path), text.encode())


def main() -> None:
    guard(run)


if __name__ == '__main__':
    main()
