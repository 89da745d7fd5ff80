"""Drafters by name, as commands take them: `jacobi`, `lookup`, `model:DIR`, `medusa:DIR`, ..."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from jax.sharding import Mesh

from cllm_jax.decoding.drafter import Loaded
from cllm_jax.decoding.sampling import Sampling
from cllm_jax.drafters.autoregressive import AutoRegressive
from cllm_jax.drafters.checkpoint import KINDS, read_drafter
from cllm_jax.drafters.draft_model import draft_model
from cllm_jax.drafters.jacobi import Jacobi
from cllm_jax.drafters.jacobi_tree import JacobiTree
from cllm_jax.drafters.lookahead import Lookahead
from cllm_jax.drafters.prompt_lookup import PromptLookup, with_references
from cllm_jax.errors import ConfigError
from cllm_jax.hf.load import Model, Precision, load, resolve
from cllm_jax.runs.recipe import no_such

UNTRAINED = {
    'jacobi': 'Jacobi',
    'ar': 'AR',
    'lookup': 'prompt lookup',
    'lookahead': 'lookahead',
}
TRAINED = {
    'model': 'draft model',
    'medusa': 'Medusa',
    'redrafter': 'ReDrafter',
    'eagle': 'EAGLE',
    'space': 'SPACE',
}
TITLES = UNTRAINED | TRAINED


@dataclasses.dataclass(frozen=True)
class Named:
    """What the options of a command say about a drafter."""

    text: str = 'jacobi'
    """NAME, or NAME:DIR of a trained one; by default what was trained with the model, or
    NAME beside it."""
    block: int = 16
    mode: Literal['sliding', 'block'] = 'sliding'
    recycle: int = 0
    branches: int = 0
    lookup: bool = False
    references: tuple[str, ...] = ()
    """Files that prompt lookup reads too."""

    @property
    def name(self) -> str:
        return self.text.partition(':')[0]

    def check(self) -> None:
        """Raise ConfigError unless there is such a drafter, with a directory where it needs one."""
        name, colon, directory = self.text.partition(':')
        if self.references and name != 'lookup':
            raise ConfigError(f'reference with drafter {self.text!r}: only lookup reads references')
        if name not in TITLES:
            raise ConfigError(f'drafter: {no_such("drafter", name, TITLES)}')
        chains = self.recycle or self.lookup
        if self.branches and (name != 'jacobi' or self.mode != 'sliding' or chains):
            raise ConfigError(
                f'branches {self.branches}: only Jacobi with a sliding window has branches, and no '
                'recycling or lookup beside them; leave one of them out'
            )
        options = {'lookup': self.lookup, 'recycle': self.recycle, 'mode': self.mode != 'sliding'}
        if name != 'jacobi' and (used := [option for option, is_on in options.items() if is_on]):
            raise ConfigError(f'{used[0]} with drafter {self.text!r}: it is an option of jacobi')
        Jacobi(self.block)  # checks it
        wrong = directory if name in UNTRAINED else name == 'model' and not directory
        if wrong or (colon and not directory):
            right = name if name in UNTRAINED else f'{name}:DIR'
            raise ConfigError(f'drafter {self.text!r}: write {right}')


def open_drafter(
    named: Named,
    model: Model,
    sampling: Sampling,
    dtype: Precision = 'auto',
    mesh: Mesh | None = None,
) -> Loaded:
    """The drafter of that name, for a model that decodes with `sampling`.

    Raises:
      ConfigError: there is none, or it does not fit the model.
      DataError: its files are damaged.
    """
    named.check()
    name, _, directory = named.text.partition(':')
    if name == 'model':
        return draft_model(model, load(directory, dtype, mesh), named.block, sampling)
    if name in KINDS:
        path = Path(directory).expanduser() if directory else own_drafter(model, name)
        return read_drafter(path, model, sampling, name)
    if named.references:
        return with_references(model, _texts(named.references), named.block)
    if named.branches:
        return Loaded(JacobiTree(named.block, named.branches, sampling=sampling), ())
    drafters = {
        'jacobi': lambda: Jacobi(named.block, named.mode, named.recycle, named.lookup),
        'lookup': lambda: PromptLookup(named.block),
        'lookahead': lambda: Lookahead(block=named.block),
        'ar': AutoRegressive,
    }
    return Loaded(drafters[name](), ())


def own_drafter(model: Model, name: str) -> Path:
    """The drafter that was trained with the model, else the one of that name beside it."""
    path = resolve(model.source)
    run = path.parent if path.name == 'model' else path
    trained = next((p / 'drafter' for p in (path, run) if (p / 'drafter').is_dir()), None)
    return trained or run.parent / name


def _texts(paths: Sequence[str]) -> list[str]:
    return [Path(path).read_text('utf-8', errors='replace') for path in paths]
