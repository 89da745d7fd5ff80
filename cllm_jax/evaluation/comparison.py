"""Every method on the same prompts, in one run: cost, speed-up, identity and quality of each."""

import dataclasses
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax

from cllm_jax.cli.console import Console
from cllm_jax.data.sources import Source
from cllm_jax.decoding.drafter import Drafter
from cllm_jax.decoding.promise import reference
from cllm_jax.decoding.request import Request
from cllm_jax.decoding.result import (
    DecodeResult,
    acceptance,
    loop_free,
    share_identical,
    tokens_per_forward,
)
from cllm_jax.drafters.autoregressive import AutoRegressive
from cllm_jax.drafters.checkpoint import read_drafter
from cllm_jax.drafters.draft_model import draft_model
from cllm_jax.drafters.jacobi import Jacobi
from cllm_jax.drafters.lookahead import Lookahead
from cllm_jax.drafters.prompt_lookup import PromptLookup
from cllm_jax.drafters.trained import TrainedDrafter
from cllm_jax.errors import ConfigError, at_least, check_seed
from cllm_jax.evaluation.settings import ComparisonConfig
from cllm_jax.evaluation.speed import (
    IN_CLASS,
    Method,
    one_by_one,
    plain_methods,
    tokens_per_second,
)
from cllm_jax.evaluation.torch_generate import generate_speed
from cllm_jax.hf.load import load
from cllm_jax.hf.model import Model
from cllm_jax.runs.stages import STAGES, output_of
from cllm_jax.tasks.quality import share_right

MOST_SLOTS = 1 << 17
BATCH = 16
"""Prompts per call where batches are compared."""


@dataclasses.dataclass(frozen=True)
class BenchConfig(ComparisonConfig):
    """Settings of a benchmark."""

    random_weights: str = ''
    """A model directory or config file: measure forwards of that size, with random weights."""
    tasks: tuple[str, ...] = ('sql', 'arithmetic')
    """Datasets whose held-out prompts are decoded."""
    limit: int = 40
    """Prompts per task."""
    nodes: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128)
    """Tokens per forward whose cost is measured; one token is measured always."""
    batches: tuple[int, ...] = (1, 4, 16)
    """Batch sizes at which it is measured."""
    prompt: int = 64
    """Length of the random prompts of the cost measurement."""
    slots: tuple[int, ...] = (128, 192, 256, 512, 1024, 4096)
    """Sizes of the cache that --invariance compares."""
    tensor: tuple[int, ...] = ()
    """Numbers of devices that share every layer, which --invariance compares too."""
    invariance: bool = False
    """In place of all else: for which numbers of tokens (--nodes), batches, places, widths and
    caches are a row's bits the same? Without a random model, those of --model."""
    parts: tuple[int, ...] = (1, 16)
    """Tokens per forward whose time is divided among the parts of the model."""
    blocks: tuple[int, ...] = (8, 16, 32)
    """Jacobi windows (n)."""
    others: bool = True
    """Also prompt lookup, lookahead, recycling, and the drafters trained in ROOT."""
    draft_model: str = ''
    """A smaller model that drafts for the target; default ROOT/draft if that was trained."""
    repeats: int = 5
    """Times everything is measured after the first; the median counts."""
    collected: int = 128
    """Prompts per task whose trajectories are collected, and trained on; 0 leaves this out."""
    torch: bool = True
    """Time `transformers` generate too, if torch is installed."""
    json: str = ''
    """Write all results to this file, again after every part."""

    def __post_init__(self):
        at_least(self, limit=1, prompt=1, max_tokens=1, repeats=1, collected=0)
        if self.invariance and self.plots:
            raise ConfigError('plots: --invariance has nothing to draw; leave out one of them')
        at_least(
            self, nodes=1, batches=1, blocks=1, slots=1, **({'parts': 1} if self.parts else {})
        )
        at_least(self, **({'tensor': 1} if self.tensor else {}))
        if max(self.slots) > MOST_SLOTS:
            raise ConfigError(f'slots {max(self.slots)}: must be at most {MOST_SLOTS}')
        if self.tensor and (self.random_weights or not self.invariance):
            raise ConfigError('tensor: is compared with --invariance, of a model that is loaded')
        check_seed(self)
        for block in self.blocks:
            Jacobi(block)  # checks it


def methods_of(settings: BenchConfig, target: Model, cllm: Model) -> dict[str, Method]:
    """Every method that is compared; a name begins with its model's."""
    ar = Request(AutoRegressive(), settings.max_tokens, exact=settings.exact)
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
    trained = output_of('draft', settings.root)
    if small := settings.draft_model or (Path(trained, 'model').is_dir() and trained):
        drafter = draft_model(target, load(small, settings.dtype))
        methods['target, draft model'] = plain.with_drafter(drafter)
    for run, stage in STAGES.items():
        directory, title = Path(output_of(run, settings.root)), stage.drafter
        if not (title and (directory / 'drafter').is_dir()):
            continue
        joint = (directory / 'model').is_dir()  # trained with its drafter
        base = Method(load(str(directory), settings.dtype), ar) if joint else plain
        name = title if joint else 'target'
        methods[f'{name}, {title}'] = base.with_drafter(read_drafter(directory, base.model))
        if joint:
            methods[f'{name}, AR'] = base
    return methods


def compare_methods(
    settings: BenchConfig, source: Source, target: Model, cllm: Model, console: Console
) -> dict[str, Any]:
    """Every method on the held-out prompts of one task."""
    prompts = [row.prompt for row in source.rows]
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
        same = _reference(name, methods, results, prompts)
        forward = tokens_per_forward(result)
        rows[name] = {
            'extra_parameters': extra_parameters(methods[name].request.drafter),
            'tokens_per_forward': forward,
            'loop_free_tokens_per_forward': loop_free(result),
            'acceptance': acceptance(result),
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


def _reference(
    name: str, methods: dict[str, Method], results: dict[str, DecodeResult], prompts: list[str]
) -> DecodeResult:
    """What AR says to which a method's answers are compared."""
    method, model = methods[name], name.split(',')[0]
    if method.request.exact == 'program':
        by_program = reference(method.request, AutoRegressive())
        return one_by_one(Method(method.model, by_program), prompts)
    in_class = results.get(f'{model}, AR, {IN_CLASS}')
    return in_class or results[f'{model}, AR']


def extra_parameters(drafter: Drafter) -> int:
    """Parameters of the drafter alone."""
    own = drafter.own if isinstance(drafter, TrainedDrafter) else drafter
    return sum(leaf.size for leaf in jax.tree.leaves(own))
