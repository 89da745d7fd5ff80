"""Write a page that plays decodes: the window or tree of every forward, and what became of it.

    python -m cllm_jax.view --output view.html                        the embedded models
    python -m cllm_jax.view --output view.html --drafter jacobi eagle medusa
    python -m cllm_jax.view --output view.html --model DIR --prompts 'Once upon'
    python -m cllm_jax.view --output view.html --trace trace.json     what `decode --trace` wrote
    python -m cllm_jax.view --output view.html --trajectories runs/embedded/trajectories

The page is one file, which any browser opens from the disk; it loads nothing from anywhere.
"""

import dataclasses
from pathlib import Path

from cllm_jax.cli.console import Console, print_plan
from cllm_jax.cli.guard import guard
from cllm_jax.cli.settings import can_write_all, parse
from cllm_jax.data.sources import open_source
from cllm_jax.decoding.request import Request
from cllm_jax.drafters.autoregressive import AutoRegressive
from cllm_jax.drafters.open import open_drafter
from cllm_jax.drafters.registry import TRAINED, DrafterConfig
from cllm_jax.errors import ConfigError, at_least, check_seed
from cllm_jax.evaluation.page import page
from cllm_jax.evaluation.recording import trace_all, trace_of_record
from cllm_jax.evaluation.speed import Method
from cllm_jax.evaluation.trace import DecodeTrace, read_traces
from cllm_jax.hf.load import EMBEDDED, Precision, load, open_tokenizer, peek, resolve
from cllm_jax.hf.model import Model, with_tokenizer
from cllm_jax.hf.tokenizer import same_tokenizer
from cllm_jax.runs.atomic import write_atomic
from cllm_jax.trajectories.store import read_manifest, read_records

DEMO_PROMPTS = 2
"""One of each embedded task."""


@dataclasses.dataclass(frozen=True)
class ViewConfig:
    """Settings of a page."""

    output: str = ''
    """The HTML file to write."""
    model: tuple[str, ...] = tuple(EMBEDDED)
    """One or more models: embedded, embedded-target, a model or run directory, a GGUF file, or a
    hub id owner/name. Each decodes with AR and with the drafters; one with weights of its own
    (medusa, eagle, model:DIR) drafts for the last model."""
    prompts: tuple[str, ...] = ()
    """Prompts; without any, held-out prompts of the embedded tasks."""
    drafter: tuple[str, ...] = ('jacobi',)
    """What is shown next to AR: names as `decode --drafter` takes them."""
    block: int = 16
    """Tokens of the window or guess (n)."""
    branches: int = 0
    """Branches with second choices that Jacobi's window has."""
    max_tokens: int = 128
    """Longest answer."""
    seed: int = 0
    """Of initial guesses and demonstration prompts."""
    repeats: int = 3
    """Times every decode is timed after the first; the median counts."""
    dtype: Precision = 'auto'
    """Of weights and cache; mixed has both in bfloat16 and float32 everywhere else. auto: bfloat16
    on an accelerator, float32 on a CPU, and mixed on a CPU with AMX."""
    trace: tuple[str, ...] = ()
    """Show what `decode --trace` wrote to these files; nothing is decoded."""
    trajectories: str = ''
    """Show records of a collection; nothing is decoded. The last model gives the tokenizer."""
    records: tuple[int, ...] = (0, 1, 2, 3)
    """With trajectories: which, counted from 0."""

    def __post_init__(self):
        at_least(self, max_tokens=1, repeats=1, records=0)
        check_seed(self)

    def drafters(self) -> list[DrafterConfig]:
        """What decodes next to AR; ConfigError for what is not a drafter."""
        found = []
        for name in dict.fromkeys(self.drafter):
            branches = self.branches if name == 'jacobi' else 0
            found.append(DrafterConfig(name, block=self.block, branches=branches))
            found[-1].check_drafter()
        return [config for config in found if config.drafter != 'ar']


def check(settings: ViewConfig) -> None:
    """Raise ConfigError for what cannot be shown together, or a page that cannot be written."""
    if not settings.output:
        raise ConfigError('output: no file is named; write --output view.html')
    can_write_all({'output': settings.output}, settings.trace)
    if not settings.model:
        raise ConfigError('model: no model is named; name one, or leave it out')
    given = [name for name in ('prompts', 'trace', 'trajectories') if getattr(settings, name)]
    if len(given) > 1:
        raise ConfigError(f'both {given[0]} and {given[1]} are given; give one of them')
    settings.drafters()


def methods_of(settings: ViewConfig, models: list[Model]) -> list[tuple[str, Method]]:
    """AR and every drafter with each model that it is for."""
    methods = []
    for model in models:
        plain = Method(model, Request(AutoRegressive(), settings.max_tokens, seed=settings.seed))
        methods.append((AutoRegressive.title, plain))
        for config in settings.drafters():
            kind, _, directory = config.drafter.partition(':')
            if (kind in TRAINED or kind == 'model') and model is not models[-1]:
                continue
            drafter = open_drafter(config, model, settings.dtype)
            name = f'{drafter.title} of {directory}' if directory else drafter.title
            methods.append((name, plain.with_drafter(drafter)))
    return methods


def decoded(settings: ViewConfig, console: Console) -> list[DecodeTrace]:
    """The prompts, decoded by every method."""
    prompts = settings.prompts
    if not prompts:
        choice = {'split': 'heldout', 'seed': settings.seed, 'limit': DEMO_PROMPTS}
        prompts = [row.prompt for row in open_source('sql+arithmetic', **choice).rows]
    models = [with_tokenizer(load(name, settings.dtype)) for name in settings.model]
    console.opened(*models)
    methods = methods_of(settings, models)
    with console.progress(f'{len(methods)} methods', len(prompts)) as bar:
        return trace_all(methods, prompts, settings.repeats, bar)


def collected(settings: ViewConfig) -> list[DecodeTrace]:
    """Records of a collection."""
    directory, name = Path(settings.trajectories), settings.model[-1]
    manifest = read_manifest(directory)
    tokenizer = open_tokenizer(resolve(name))
    model = with_tokenizer(Model(peek(name), None, tokenizer, str(directory)))
    if not same_tokenizer(manifest['identity'].get('tokenizer'), model.tokenizer):
        raise ConfigError(
            f'{directory}: collected with another tokenizer than that of {name}; '
            'name the model of this collection with --model'
        )
    records, mode = read_records(directory), manifest['identity'].get('mode', 'block')
    if max(settings.records) >= len(records):
        raise ConfigError(f'records {max(settings.records)}: {directory} has 0..{len(records) - 1}')
    return [trace_of_record(records[i], mode, model) for i in dict.fromkeys(settings.records)]


def written(settings: ViewConfig) -> list[DecodeTrace]:
    """What some files hold; methods of several files have the file in their names."""
    found = []
    for path in dict.fromkeys(settings.trace):
        traces = read_traces(Path(path))
        if len(settings.trace) > 1:
            traces = [dataclasses.replace(each, name=f'{each.name}, {path}') for each in traces]
        found += traces
    return found


def run() -> None:
    settings, flags = parse(ViewConfig, stage='view', description=__doc__)
    console = Console()
    check(settings)
    if flags.plan:
        print_plan(console, settings, {'writes to': settings.output})
        return
    if settings.trace:
        traces = written(settings)
    else:
        traces = collected(settings) if settings.trajectories else decoded(settings, console)
    path = Path(settings.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, page(traces).encode())
    console.note(f'{path}: {len(traces)} decodes; open it in a browser')


def main() -> None:
    guard(run)


if __name__ == '__main__':
    main()
