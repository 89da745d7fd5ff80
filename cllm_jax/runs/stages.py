"""The stages of a recipe: which command runs each, what it reads, and what it writes.

All names are directories below ROOT, the directory of a recipe's runs.
"""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from cllm_jax.errors import ConfigError
from cllm_jax.runs.run_dir import has_begun

EMBEDDED_ROOT = 'runs/embedded'
"""Where the embedded models would be trained again; until then they stand in for its runs."""


@dataclass(frozen=True)
class Stage:
    """A row of the table. What a stage reads is named by the stages that write it."""

    command: str
    """The module of `cllm_jax` that runs it."""
    writes: str
    """Its directory below ROOT, or its file; '' if it writes nothing there."""
    objective: str = ''
    """What it trains, if its recipe does not say."""
    model: str = ''
    """Whose model it starts from; '' for embedded-target, whatever ROOT has."""
    trajectories: str = ''
    """Whose trajectories it learns from."""
    tokenizer: str = ''
    """Whose model gives a new one its tokenizer."""
    others: tuple[str, ...] = ()
    """Whose models or exports it reads otherwise."""
    embedded: str = ''
    """The embedded model that stands in for its own."""
    exported_as: str = ''
    """Whose export its model is, once it has one."""
    drafter: str = ''
    """What tables call the drafter that it trains."""

    @property
    def reads(self) -> set[str]:
        """All stages whose results it reads."""
        return {self.model, self.trajectories, self.tokenizer, *self.others} - {''}


STAGES = {
    'target': Stage('train', 'target', 'ar', embedded='embedded-target'),
    'collect': Stage('collect', 'trajectories', model='target'),
    'cllm': Stage('train', 'cllm', 'consistency', 'target', 'collect', embedded='embedded'),
    'recollect': Stage('collect', 'retrajectories', model='cllm'),
    'refine': Stage('train', 'refine', 'consistency', 'cllm', 'recollect', exported_as='cllm'),
    'export': Stage('export', 'export', others=('target', 'cllm')),
    'evaluate': Stage('evaluate', 'evaluate.json', others=('export',)),
    'draft': Stage('train', 'draft', 'ar', tokenizer='target'),
    'medusa': Stage('train', 'medusa', 'medusa', 'target', 'collect', drafter='Medusa-1'),
    'medusa2': Stage('train', 'medusa2', 'medusa', 'target', 'collect', drafter='Medusa-2'),
    'redrafter': Stage('train', 'redrafter', 'redrafter', 'target', 'collect', drafter='ReDrafter'),
    'eagle': Stage('train', 'eagle', 'eagle', 'target', 'collect', drafter='EAGLE'),
    'space': Stage('train', 'space', 'space', 'target', 'collect', drafter='SPACE'),
    'bench': Stage('bench', '', others=('export', 'draft')),
    'decode': Stage('decode', ''),
    'view': Stage('view', ''),
}
"""In an order in which they can run. Bench also reads every stage with a `drafter`."""


def output_of(stage: str, root: str) -> str:
    """Where a stage writes."""
    return f'{root}/{STAGES[stage].writes}'


def model_of(stage: str, root: str, given: str = '') -> str:
    """The model that a stage starts from: as given, else that of the run it reads.

    Raises:
      ConfigError: no model is given, and there is none.
    """
    return given or _made_by(STAGES[stage].model, root)


def tokenizer_of(stage: str, root: str, given: str = '') -> str:
    """The model whose tokenizer a new model takes, or '' for one of its own; see `model_of`."""
    return given or (STAGES[stage].tokenizer and _made_by(STAGES[stage].tokenizer, root))


def trajectories_of(stage: str, root: str, given: str = '') -> str:
    """The trajectories that a stage learns from: as given, else those of the stage it reads."""
    return given or output_of(STAGES[stage].trajectories, root)


def pair_of(root: str, cllm: str, target: str) -> tuple[str, str]:
    """Names of the CLLM and of its target: as given, else the exports of the runs in `root`.

    Only where `root` is `EMBEDDED_ROOT`, and has no exports at all, the embedded models take their
    place.

    Raises:
      ConfigError: a model is not given, and `root` has no export of it.
    """
    exports, pair = Path(output_of('export', root)), []
    embedded = Path(root) == Path(EMBEDDED_ROOT) and not exports.exists()
    for stage, given in (('cllm', cllm), ('target', target)):
        export = exports / stage
        if not (given or embedded or export.is_dir()):
            raise ConfigError(
                f'{export}: no such directory; train and export first, or name --model and --target'
            )
        pair.append(given or (STAGES[stage].embedded if embedded else str(export)))
    return pair[0], pair[1]


def exported_run(name: str, root: str) -> Path:
    """The run that is exported as `name`: the run itself, or what refined it if that has a model.

    Raises:
      ConfigError: there is no such run.
    """
    refined = (Path(root, about.writes) for about in STAGES.values() if about.exported_as == name)
    run = next((run for run in refined if (run / 'model').is_dir()), Path(root, name))
    if not run.is_dir():
        raise ConfigError(f'{run}: no such directory; run that stage first, or name other runs')
    return run


def pipeline(recipe: Collection[str]) -> list[tuple[str, str]]:
    """The commands and stages that lead to an evaluation, refined if the recipe has that."""
    wanted = {'evaluate'} | ({'refine'} & set(recipe))
    for name in reversed(STAGES):
        if name in wanted:
            wanted |= STAGES[name].reads
    return [(stage.command, name) for name, stage in STAGES.items() if name in wanted]


def _made_by(stage: str, root: str) -> str:
    """The model of a run; embedded ones stand in for those of `EMBEDDED_ROOT` until they begin."""
    if not stage:
        return STAGES['target'].embedded
    run = output_of(stage, root)
    if any(Path(run, made).exists() for made in ('model', 'config.json')):
        return run
    if has_begun(Path(run)):
        raise ConfigError(
            f'{run}: has no model yet; run that stage to its first test, or name another model'
        )
    if Path(root) == Path(EMBEDDED_ROOT):
        return STAGES[stage].embedded
    raise ConfigError(f'{run}: has no model; run that stage first, or name another model')
