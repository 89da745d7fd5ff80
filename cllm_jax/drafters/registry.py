"""Every drafter by the name that commands take: `jacobi`, `lookup`, `model:DIR`, `medusa:DIR`, ...

A new method is its file and its line in `DRAFTERS`.
"""

import dataclasses
from typing import Literal

from cllm_jax.decoding.drafter import Drafter
from cllm_jax.drafters.autoregressive import AutoRegressive
from cllm_jax.drafters.draft_model import DraftModel
from cllm_jax.drafters.eagle import Eagle
from cllm_jax.drafters.jacobi import Jacobi
from cllm_jax.drafters.lookahead import Lookahead
from cllm_jax.drafters.medusa import Medusa
from cllm_jax.drafters.prompt_lookup import PromptLookup
from cllm_jax.drafters.redrafter import ReDrafter
from cllm_jax.drafters.space import Space
from cllm_jax.drafters.trained import TrainedDrafter
from cllm_jax.errors import ConfigError
from cllm_jax.runs.recipe import no_such

DRAFTERS: dict[str, type[Drafter]] = {
    'jacobi': Jacobi,
    'ar': AutoRegressive,
    'lookup': PromptLookup,
    'lookahead': Lookahead,
    'model': DraftModel,
    'medusa': Medusa,
    'redrafter': ReDrafter,
    'eagle': Eagle,
    'space': Space,
}
TRAINED: dict[str, type[TrainedDrafter]] = {
    name: known for name, known in DRAFTERS.items() if issubclass(known, TrainedDrafter)
}
"""Those that `train` makes, each an objective of its name."""


def register(name: str, drafter: type[Drafter]) -> None:
    """Add a drafter of another package, under the name by which `DrafterConfig` asks for it.

    Raises ConfigError for a trained one of another `kind`.
    """
    if issubclass(drafter, TrainedDrafter):
        if drafter.kind != name:
            raise ConfigError(f'drafter {name!r}: its kind is {drafter.kind!r}; name it like that')
        TRAINED[name] = drafter
    DRAFTERS[name] = drafter


@dataclasses.dataclass(frozen=True)
class DrafterConfig:
    """Which drafter decodes, as every command that decodes takes it."""

    drafter: str = 'jacobi'
    """jacobi; ar: one token per forward; lookup: prompt lookup; lookahead, with a Jacobi window;
    model:DIR: a smaller model drafts; or a trained one, medusa, redrafter, eagle, space: NAME:DIR,
    or NAME where it was trained with the model or lies next to it."""
    reference: tuple[str, ...] = ()
    """With drafter lookup: text files that answers may quote (LLMA)."""
    block: int | Literal['auto'] = 16
    """Tokens of the window or guess (n). auto: of Jacobi what is fastest on this machine, one token
    per forward if no window is; of others their own."""
    mode: Literal['sliding', 'block'] = 'sliding'
    """Keep the window full, or let each block converge before the next (the paper's schedule)."""
    recycle: int = 0
    """Chains of dropped guesses that are tried again in the same forward."""
    branches: int = 0
    """Branches with second choices that are tried in the same forward."""
    lookup: bool = False
    """Also try what followed the last time in the prompt or answer, in the same forward."""

    @property
    def drafter_title(self) -> str:
        """What tables call it."""
        return DRAFTERS[self.drafter.partition(':')[0]].title

    def check_drafter(self) -> None:
        """Raise ConfigError unless there is such a drafter, with a directory where it needs one."""
        name, colon, directory = self.drafter.partition(':')
        given = f'with drafter {self.drafter!r}'
        if self.reference and name != 'lookup':
            raise ConfigError(f'reference {given}: only lookup reads references')
        if name not in DRAFTERS:
            raise ConfigError(f'drafter: {no_such("drafter", name, DRAFTERS)}')
        options = {'lookup': self.lookup, 'recycle': self.recycle, 'mode': self.mode != 'sliding'}
        used = [option for option, is_on in options.items() if is_on]
        if self.branches and (name != 'jacobi' or used):
            rule = 'only Jacobi with a sliding window and neither recycling nor lookup has branches'
            raise ConfigError(f'branches {self.branches}: {rule}; leave one of them out')
        if name != 'jacobi' and used:
            raise ConfigError(f'{used[0]} {given}: it is an option of jacobi')
        Jacobi(self.block)  # checks it
        needs_nothing = name not in TRAINED and name != 'model'
        wrong = directory if needs_nothing else name == 'model' and not directory
        if wrong or (colon and not directory):
            right = name if needs_nothing else f'{name}:DIR'
            raise ConfigError(f'drafter {self.drafter!r}: write {right}')
