"""What every comparison of a CLLM with its target is asked, and what it depends on besides."""

import dataclasses
import platform
from importlib.metadata import version
from typing import Any, Self

import jax

from cllm_jax.cli.settings import can_write, installed
from cllm_jax.errors import ConfigError
from cllm_jax.hf.load import Precision
from cllm_jax.runs.stages import EMBEDDED_ROOT, pair_of
from cllm_jax.runtime.backend import Exactness, hardware


@dataclasses.dataclass(frozen=True)
class ComparisonConfig:
    """Which models are compared, on which answers."""

    root: str = EMBEDDED_ROOT
    """Directory of the recipe's runs, runs/NAME of its file."""
    model: str = ''
    """The CLLM; default ROOT/export/cllm, or embedded if runs/embedded has no exports."""
    target: str = ''
    """The target; default ROOT/export/target, or embedded-target likewise."""
    seed: int = 0
    """Which held-out prompts are drawn."""
    max_tokens: int = 128
    """Longest answer."""
    dtype: Precision = 'auto'
    """Of weights and cache; mixed has both in bfloat16 and float32 everywhere else. auto: bfloat16
    on an accelerator, float32 on a CPU, and mixed on a CPU with AMX."""
    exact: Exactness = 'auto'
    """How far tokens hang on rounding (docs/exactness.md): class: on the token alone, whatever the
    window and the batch; program: AR runs the drafter's program; off: each as fast as it can. auto:
    class where that is known to hold. With bench --invariance: which of them is probed."""
    quick: bool = False
    """A tiny version, to see that it works."""
    plots: str = ''
    """Draw the results into this directory too, as SVG files; evaluate also draws the trainings and
    ablations in ROOT, if no model is named."""
    redraw: bool = False
    """Measure nothing: draw what the file of results (json) and the runs hold already."""

    def check_plots(self) -> None:
        """Raise ConfigError, before the work, for plots that cannot be drawn."""
        if self.redraw and not self.plots:
            raise ConfigError('redraw: draws what was measured before; name a directory: --plots')
        if self.plots:
            installed(f'plots {self.plots!r}', 'matplotlib', 'plots')
            can_write('plots', f'{self.plots}/x.svg')

    def with_models(self) -> Self:
        """The same settings with the names of both models, as given or of the exports in `root`."""
        model, target = pair_of(self.root, self.model, self.target)
        return dataclasses.replace(self, model=model, target=target)

    def environment(self, dtype: str, *packages: str) -> dict[str, Any]:
        """The devices, a precision, and the versions of these and our own packages."""
        devices, packages = jax.devices(), ('cllm_jax', 'jax', 'jaxlib', 'flax', *packages)
        return {
            'device': f'{len(devices)} x {devices[0].device_kind} ({platform.machine()})',
            'multiplies': hardware()[0],
            'dtype': dtype,
            'versions': {name: version(name) for name in packages},
        }
