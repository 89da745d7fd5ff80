"""Evaluate a CLLM and its target: quality, tokens/forward, speed-up, identity.

    python -m cllm_jax.evaluate --task sql --limit 200 --seed 0 --json result.json

The speed-up is Jacobi with the CLLM over autoregressive decoding of the target, in tokens per
second at batch 1, both in the same compiled loop and in one run. Quality is measured on the text
that Jacobi produced, where there is a right answer. On a CPU the target is timed in other
precisions too where its own is not float32, and the fastest is the baseline.
"""

import dataclasses
from pathlib import Path
from typing import Any

from cllm_jax.cli.console import Console, print_plan, table
from cllm_jax.cli.guard import guard
from cllm_jax.cli.settings import can_write, parse
from cllm_jax.data.sources import Source, open_source
from cllm_jax.data.tokenizer import drop_prompts_without_room
from cllm_jax.decoding.engine import decode_all
from cllm_jax.decoding.promise import promise, reference
from cllm_jax.decoding.request import Request
from cllm_jax.decoding.result import (
    DecodeResult,
    acceptance,
    loop_free,
    share_identical,
    tokens_per_forward,
)
from cllm_jax.drafters.autoregressive import AutoRegressive
from cllm_jax.drafters.jacobi import AUTO, Jacobi
from cllm_jax.drafters.open import open_drafter
from cllm_jax.drafters.registry import DrafterConfig
from cllm_jax.errors import ConfigError, at_least, check_seed
from cllm_jax.evaluation.ablations import draw_ablations
from cllm_jax.evaluation.curves import draw_trainings
from cllm_jax.evaluation.plots import draw_evaluation, redraw
from cllm_jax.evaluation.settings import ComparisonConfig
from cllm_jax.evaluation.speed import Method, plain_methods, tokens_per_second
from cllm_jax.evaluation.verdict import judged
from cllm_jax.evaluation.window import FIRST, choose, learn
from cllm_jax.hf.load import load
from cllm_jax.hf.model import with_tokenizer
from cllm_jax.runs.atomic import write_json
from cllm_jax.runs.stages import output_of
from cllm_jax.runtime.mesh import tensor_mesh
from cllm_jax.tasks.quality import is_repetitive, share_right, token_agreement

SLOTS = (1, 2, 4, 8, 15)
"""Slots of a draft whose conditional acceptance is printed."""


@dataclasses.dataclass(frozen=True)
class EvaluateConfig(DrafterConfig, ComparisonConfig):
    """Settings of an evaluation."""

    task: str = ''
    """Dataset (see docs/data.md); default is sql and arithmetic, one after the other."""
    limit: int = 200
    """Held-out prompts per task."""
    batch: int = 32
    """Prompts decoded together where only tokens are wanted."""
    timed: int = 40
    """Prompts whose decoding is timed, at batch 1."""
    repeats: int = 3
    """Times each of them is timed; the median counts."""
    tensor: int = 1
    """Devices that share every layer of the models."""
    json: str = ''
    """Write the results to this file, one object, or a list of them for several tasks; default
    ROOT/evaluate.json for ROOT's own exports, and no file with quick."""

    def __post_init__(self):
        at_least(self, limit=1, max_tokens=1, batch=1, timed=1, repeats=1, tensor=1)
        at_least(self, recycle=0, branches=0)
        check_seed(self)


def measure(
    settings: EvaluateConfig, source: Source, methods: dict[str, Method], console: Console
) -> tuple[dict[str, DecodeResult], dict[str, float], float]:
    """What each method decodes, its tokens per second, and those of AR at its best."""
    prompts, results = [row.prompt for row in source.rows], {}
    for key, method in methods.items():
        if key.endswith('AR'):  # timed at its best, it may round otherwise than what is drafted
            drafted = methods[key.replace('AR', 'Jacobi')].request
            method = Method(method.model, reference(drafted, AutoRegressive()))
        with console.status(f'{source.name}: {key}, {len(prompts)} prompts'):
            results[key] = decode_all(method.model, method.request, prompts)
    timed = prompts[: settings.timed]
    with console.progress(f'{source.name}: timing', len(timed)) as bar:
        plain = plain_methods('target AR', methods['target AR'])
        speed = tokens_per_second(methods | plain, timed, settings.repeats, bar)
    return results, speed, max(speed[key] for key in plain)


def qualities(source: Source, results: dict[str, DecodeResult]) -> dict[str, Any]:
    """Shares of right and of exactly equal answers; None where nobody can tell."""
    names = ('target AR', 'target Jacobi', 'CLLM AR', 'CLLM Jacobi')
    right = exact = [None] * len(names)
    if source.checkable:
        texts = [results[name].texts for name in names]
        same = dataclasses.replace(source, check=lambda row, t: t.strip() == row.answer.strip())
        right, exact = ([share_right(judge, t) for t in texts] for judge in (source, same))
    return {
        'quality': dict(zip(('target', 'target_jacobi', 'cllm_ar', 'cllm'), right, strict=True)),
        'exact_match': {'target': exact[0], 'cllm': exact[-1]},
    }


def speeds(speed: dict[str, float], base: float, dtype: str) -> dict[str, dict[str, float]]:
    """Tokens per second of what is compared, and of AR in every precision."""
    plain = {key.partition(', ')[2] or dtype: key for key in speed if key.startswith('target AR')}
    return {
        'tokens_per_second': {
            'ar': base,
            'jacobi': speed['CLLM Jacobi'],
            'target_jacobi': speed['target Jacobi'],
            'cllm_ar': speed['CLLM AR'],
        },
        'ar_tokens_per_second': {name: speed[key] for name, key in plain.items()},
    }


def evaluate(settings: EvaluateConfig, source: Source, console: Console) -> dict[str, Any]:
    """Everything about one task, of the models that the settings name."""
    dtype, mesh = settings.dtype, tensor_mesh(settings.tensor)
    cllm, target = (load(name, dtype, mesh) for name in (settings.model, settings.target))
    room = min(m.config.max_positions for m in (cllm, target)) - settings.max_tokens
    tokenizer = with_tokenizer(cllm).tokenizer
    source = drop_prompts_without_room(source, tokenizer, cllm.config.bos_id, room)
    console.dropped(source)
    ar = Request(AutoRegressive(), settings.max_tokens, batch=settings.batch, exact=settings.exact)
    plain, own = Method(target, ar), Method(cllm, ar)
    asked = own.with_drafter(open_drafter(settings, cllm, dtype, mesh))
    choice = choose(cllm, asked.request, [row.prompt for row in source.rows])
    if choice.why:
        console.note(choice.why)
    chosen_block = getattr(choice.request.drafter, 'block', FIRST)
    block = chosen_block if settings.block == AUTO else settings.block
    methods = {
        'target AR': plain,
        'target Jacobi': plain.with_drafter(Jacobi(block, settings.mode)),
        'CLLM AR': Method(cllm, dataclasses.replace(ar, exact='off')),
        'CLLM Jacobi': Method(cllm, choice.request),
    }
    results, speed, base = measure(settings, source, methods, console)
    forward = {key: tokens_per_forward(result) for key, result in results.items()}
    jacobi = results['CLLM Jacobi']
    learn(cllm, asked.request, choice.request, jacobi)
    return {
        'task': source.name,
        'n': len(source),
        'seed': settings.seed,
        **qualities(source, results),
        'tokens_per_forward': {'target': forward['target Jacobi'], 'cllm': forward['CLLM Jacobi']},
        'loop_free_tokens_per_forward': loop_free(jacobi),
        'acceptance': acceptance(jacobi),
        'speedup': speed['CLLM Jacobi'] / base,
        'speedup_vanilla_jacobi': speed['target Jacobi'] / base,
        **speeds(speed, base, target.precision),
        'identical': share_identical(jacobi, results['CLLM AR']),
        'exact': settings.exact,
        'identical_by': promise(cllm, methods['CLLM Jacobi'].request)[0],
        'identical_target': share_identical(results['target Jacobi'], results['target AR']),
        'agreement_with_target': token_agreement(jacobi.tokens, results['target AR'].tokens),
        'repetitive': sum(map(is_repetitive, jacobi.tokens)) / len(source),
        'mean_tokens': sum(map(len, jacobi.tokens)) / len(source),
        **{f.name: getattr(settings, f.name) for f in dataclasses.fields(DrafterConfig)},
        'block': block,
        'timed': min(settings.timed, len(source)),
        'models': {'cllm': cllm.title, 'target': target.title},
        'tensor': settings.tensor,
        **settings.environment(cllm.precision, 'transformers'),
    }


def report(console: Console, found: dict[str, Any]) -> None:
    """The numbers of one task as a table."""
    parts = ('quality', 'tokens_per_forward', 'tokens_per_second')
    quality, forward, speed = (found[part] for part in parts)
    name = DrafterConfig(found['drafter']).drafter_title
    rows = [
        ['target, AR', quality['target'], 1.0, speed['ar']],
        ['target, Jacobi', quality['target_jacobi'], forward['target'], speed['target_jacobi']],
        ['CLLM, AR', quality['cllm_ar'], 1.0, speed['cllm_ar']],
        [f'CLLM, {name}', quality['cllm'], forward['cllm'], speed['jacobi']],
    ]
    columns = ['', 'quality', 'tokens/forward', 'tokens/s', 'speed-up']
    title = f'{found["task"]}: {found["n"]} prompts, n = {found["block"]}, batch 1'
    console.out.print(table(title, columns, [[*row, row[-1] / speed['ar']] for row in rows]))
    console.result(f'CLLM: {found["models"]["cllm"]}; target: {found["models"]["target"]}')
    shares = dict(enumerate(found['acceptance'], 1))
    shown = ', '.join(f'slot {slot} {shares[slot]:.0%}' for slot in SLOTS if slot in shares)
    console.result(
        f'{name}: {found["loop_free_tokens_per_forward"]:.2f} tokens/forward without answers that '
        f'repeat themselves; guesses that are right where all before them are: {shown or "none"}'
    )
    word, same = judged(found['identical'] == 1, found['identical_by']), found['identical']
    console.result(
        f"{word}: {name} and the CLLM's AR agree token for token on {same:.1%} of the prompts; "
        f'the CLLM and its target on {found["agreement_with_target"]:.1%} of the tokens'
    )


def draw(settings: EvaluateConfig, named: str, found: list | None, console: Console) -> None:
    """Draw what was found, or else what a file of results says, and what ROOT's trainings left.

    ROOT's own results and trainings belong to ROOT's models, not to others that are `named`.
    """
    root, plots, path = Path(settings.root), Path(settings.plots), settings.json
    own = output_of('evaluate', settings.root)
    if not (path or named) and Path(own).is_file():
        path = own
    if found is None:
        drawn = redraw(path, draw_evaluation, plots) if path else []
    else:
        drawn = draw_evaluation(found, plots)
    if not named:
        drawn += draw_trainings(root, plots) + draw_ablations(root, plots)
    if not drawn:
        raise ConfigError(f'redraw: nothing is measured in {root}; name results with --json')
    console.drawn(drawn)


def run() -> None:
    settings, flags = parse(EvaluateConfig, stage='evaluate', description=__doc__)
    if settings.quick:
        settings = dataclasses.replace(settings, limit=4, timed=1, repeats=1, max_tokens=48)
    settings.check_drafter()
    given, path = settings.model or settings.target, settings.json
    own = not given and Path(output_of('export', settings.root)).is_dir()
    if not path and own and not settings.quick:
        path = output_of('evaluate', settings.root)
    can_write('json', path)
    settings.check_plots()
    console = Console()
    if settings.redraw and flags.plan:
        print_plan(console, settings, {'draws into': settings.plots})
        return
    if settings.redraw:
        draw(settings, given, None, console)
        return
    settings = settings.with_models()
    tasks = [settings.task] if settings.task else ['sql', 'arithmetic']
    sources = [
        open_source(task, split='heldout', seed=settings.seed, limit=settings.limit)
        for task in tasks
    ]
    if flags.plan:
        facts = {'tasks': ', '.join(tasks), 'prompts': sum(map(len, sources))}
        print_plan(console, settings, facts)
        return
    found = []
    for source in sources:
        console.dropped(source)
        found.append(evaluate(settings, source, console))
        report(console, found[-1])
    if path:
        write_json(Path(path), found[0] if settings.task else found)
    if settings.plots:
        draw(settings, given, found, console)


def main() -> None:
    guard(run)


if __name__ == '__main__':
    main()
