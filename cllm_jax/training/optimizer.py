"""AdamW or Muon, with linear warm-up, cosine decay and clipping."""

import dataclasses
from typing import Any, Literal

import jax
import optax
from optax.contrib import MuonDimensionNumbers, muon

from cllm_jax.errors import ConfigError, at_least, shares


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW or Muon, with linear warm-up and cosine decay."""

    kind: Literal['adamw', 'muon'] = 'adamw'
    """Muon orthogonalises the updates of matrices; norms and embeddings stay with AdamW."""
    learning_rate: float | None = None
    """Its peak. By default that of the kind and of what is trained (docs/training.md)."""
    warmup: float | None = None
    """Share of the steps in which the learning rate rises. By default that of what is trained."""
    final: float = 0.1
    """Learning rate at the end, as a share of its peak."""
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.0
    clip: float = 1.0
    """Largest global gradient norm."""
    accumulate: int = 1
    """Micro-batches per step; divides the batch."""

    def __post_init__(self):
        at_least(self, learning_rate=0, weight_decay=0)
        shares(self, 'warmup', 'final')
        for name in ('beta1', 'beta2'):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f'{name} {getattr(self, name)}: must be from 0 to below 1')
        if not self.clip > 0:
            raise ConfigError(f'clip {self.clip}: must be above 0; 1e9 clips nothing')


USUAL = {
    ('new', 'adamw'): (1.0e-3, 0.03),
    ('new', 'muon'): (2.0e-3, 0.03),
    ('pretrained', 'adamw'): (2.0e-5, 0.1),
    ('pretrained', 'muon'): (4.0e-5, 0.1),
    ('adapter', 'adamw'): (2.0e-4, 0.03),
}
"""Learning rate and warm-up where none are named, by what is trained and the optimiser's kind.

New is a model or a drafter that starts from random weights, pretrained all of any other model. 2e-5
is the rate of the CLLM paper (arXiv 2403.00835) and usual for fine-tuning; one that suits a new
model makes another forget. An adapter is LoRA's, at ten times that rate, as is usual for it. Muon's
are twice as large, as in the recipes here.
"""


def with_usual(config: OptimizerConfig, trained: str = 'new') -> OptimizerConfig:
    """The same with the usual values of what is `trained` where none are named."""
    rate, warmup = USUAL[trained, config.kind]
    return dataclasses.replace(
        config,
        learning_rate=rate if config.learning_rate is None else config.learning_rate,
        warmup=warmup if config.warmup is None else config.warmup,
    )


def matrices(params: Any) -> Any:
    """Which axes of each parameter are a matrix's inputs and outputs; None for other arrays."""
    axes = {name: MuonDimensionNumbers(0, (1, 2)) for name in 'qkv'}
    axes |= {name: MuonDimensionNumbers(0, 1) for name in ('gate', 'up', 'down')}
    axes['o'] = MuonDimensionNumbers((0, 1), 2)
    return jax.tree_util.tree_map_with_path(lambda path, _: axes.get(path[-1].key), params)


def decayed(params: Any) -> Any:
    """Which parameters decay: not the vectors, of which biases have heads as a second axis."""
    return jax.tree_util.tree_map_with_path(
        lambda path, p: p.ndim > 1 and not str(path[-1].key).endswith('bias'), params
    )


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Clipped AdamW or Muon; an update with NaN or Inf is skipped and counted in the state.

    Muon (arXiv 2502.16982) is scaled to AdamW's update size, so one learning rate serves both the
    matrices and the rest. What a config leaves open is as for a new model.
    """
    config = with_usual(config)
    peak, warmup = config.learning_rate, int(config.warmup * steps)
    betas, decay = (config.beta1, config.beta2), config.weight_decay
    schedule = optax.warmup_cosine_decay_schedule(
        0.0 if warmup else peak, peak, warmup, max(steps, warmup + 1), peak * config.final
    )
    if config.kind == 'muon':
        rule = muon(
            schedule,
            ns_steps=4,
            preconditioning='aol',
            consistent_rms=0.2,
            weight_decay=decay,
            adam_b1=betas[0],
            adam_b2=betas[1],
            adam_weight_decay=0.0,
            muon_weight_dimension_numbers=matrices,
        )
    else:
        rule = optax.adamw(schedule, *betas, weight_decay=decay, mask=decayed)
    return optax.apply_if_finite(
        optax.chain(optax.clip_by_global_norm(config.clip), rule), max_consecutive_errors=1 << 30
    )
