"""Evaluate a CLLM and its target: quality, tokens/forward, speed-up, identity.

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
from typing import Any

import jax
from jax.sharding import Mesh

from cllm_jax.cli.console import Console, print_plan, table
from cllm_jax.cli.guard import guard
from cllm_jax.cli.settings import can_write, parse
from cllm_jax.data.sources import Source, open_source
from cllm_jax.data.tokenizer import drop_prompts_without_room
from cllm_jax.decoding.engine import decode_all
from cllm_jax.decoding.request import Request
from cllm_jax.decoding.result import DecodeResult
from cllm_jax.drafters.autoregressive import AutoRegressive
from cllm_jax.drafters.jacobi import Jacobi
from cllm_jax.drafters.open import open_drafter
from cllm_jax.drafters.registry import DrafterConfig
from cllm_jax.errors import at_least, check_seed
from cllm_jax.evaluation.speed import (
    Method,
    plain_methods,
    share_identical,
    tokens_per_forward,
    tokens_per_second,
)
from cllm_jax.hf.load import Precision, chosen, load, with_tokenizer
from cllm_jax.runs.atomic import write_atomic
from cllm_jax.runs.recipe import to_json
from cllm_jax.runs.stages import EMBEDDED_ROOT, output_of, pair_of
from cllm_jax.runtime.mesh import tensor_mesh
from cllm_jax.tasks.quality import is_repetitive, share_right, token_agreement

REPEATED = ('drafter', 'block', 'mode', 'recycle', 'branches', 'lookup')
"""Settings that the results repeat."""
VERSIONED = ('cllm_jax', 'jax', 'jaxlib', 'flax', 'transformers')


@dataclasses.dataclass(frozen=True)
class EvaluateConfig(DrafterConfig):
    """Settings of an evaluation."""

    root: str = EMBEDDED_ROOT
    """Directory of the recipe's runs, runs/NAME of its file."""
    model: str = ''
    """The CLLM; default ROOT/export/cllm, or embedded if runs/embedded has no exports."""
    target: str = ''
    """The target; default ROOT/export/target, or embedded-target likewise."""
    task: str = ''
    """Dataset (see docs/data.md); default is sql and arithmetic, one after the other."""
    limit: int = 200
    """Held-out prompts per task."""
    seed: int = 0
    """Which held-out prompts are drawn."""
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


Measured = tuple[dict[str, DecodeResult], dict[str, float], float]
"""What each method decoded, its tokens per second, and those of AR at its best."""


def measure(
    settings: EvaluateConfig,
    source: Source,
    methods: dict[str, Method],
    mesh: Mesh | None,
    console: Console,
) -> Measured:
    """Decode all prompts with every method, and time some of them."""
    prompts, results = [source[i].prompt for i in range(len(source))], {}
    for key, method in methods.items():
        with console.status(f'{source.name}: {key}, {len(prompts)} prompts'):
            results[key] = decode_all(method.model, method.request, prompts)
    timed = prompts[: settings.timed]
    with console.progress(f'{source.name}: timing', len(timed)) as bar:
        plain = plain_methods('target AR', methods['target AR'], mesh)
        speed = tokens_per_second(methods | plain, timed, settings.repeats, bar)
    return results, speed, max(speed[key] for key in plain)


def qualities(source: Source, results: dict[str, DecodeResult]) -> dict[str, Any]:
    """Shares of right and of exactly equal answers; None where nobody can tell."""
    judged = results if source.checkable else {}
    right = {key: share_right(source, result.texts) for key, result in judged.items()}
    exact = {}
    for key, result in judged.items():
        pairs = ((text or '').strip() for text in result.texts)
        same = [text == source[i].answer.strip() for i, text in enumerate(pairs)]
        exact[key] = sum(same) / len(same)
    return {
        'quality': {
            'target': right.get('target AR'),
            'target_jacobi': right.get('target Jacobi'),
            'cllm_ar': right.get('CLLM AR'),
            'cllm': right.get('CLLM Jacobi'),
        },
        'exact_match': {'target': exact.get('target AR'), 'cllm': exact.get('CLLM Jacobi')},
    }


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
    plain = {'target': Method(target, ar), 'CLLM': Method(cllm, ar)}
    drafter = open_drafter(settings, cllm, dtype, mesh)
    methods = {
        'target AR': plain['target'],
        'target Jacobi': plain['target'].with_drafter(Jacobi(settings.block, settings.mode)),
        'CLLM AR': plain['CLLM'],
        'CLLM Jacobi': plain['CLLM'].with_drafter(drafter),
    }
    results, speed, base = measure(settings, source, methods, mesh, console)
    forward = {key: tokens_per_forward(result) for key, result in results.items()}
    jacobi = results['CLLM Jacobi']
    return {
        'task': source.name,
        'n': len(source),
        'seed': settings.seed,
        **qualities(source, results),
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
            key.partition(', ')[2] or chosen(dtype): value
            for key, value in speed.items()
            if key.startswith('target AR')
        },
        'identical': share_identical(jacobi, results['CLLM AR']),
        'identical_target': share_identical(results['target Jacobi'], results['target AR']),
        'agreement_with_target': token_agreement(jacobi.tokens, results['target AR'].tokens),
        'repetitive': sum(map(is_repetitive, jacobi.tokens)) / len(source),
        'mean_tokens': sum(map(len, jacobi.tokens)) / len(source),
        **{k: getattr(settings, k) for k in REPEATED},
        'timed': min(settings.timed, len(source)),
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
    base, name = speed['ar'], DrafterConfig(found['drafter']).drafter_title
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
    settings.check_drafter()
    given, path = settings.model or settings.target, settings.json
    own = not given and Path(output_of('export', settings.root)).is_dir()
    if not path and own and not settings.quick:
        path = output_of('evaluate', settings.root)
    can_write('json', path)
    cllm, target = pair_of(settings.root, settings.model, settings.target)
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
