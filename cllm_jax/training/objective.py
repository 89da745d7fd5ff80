"""What a run trains: one class for each kind of objective that changes a whole model.

An objective says which settings it reads, what its samples and batches look like, and makes of a
model what the run trains (`Learner`).
"""

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from jax.sharding import Mesh

from cllm_jax.decoding.drafter import Drafter
from cllm_jax.drafters.jacobi import Jacobi
from cllm_jax.drafters.trained import TrainedDrafter
from cllm_jax.hf.load import DTYPES, base_name
from cllm_jax.hf.model import Model
from cllm_jax.model.llama import Llama, param_axes
from cllm_jax.training.config import TrainConfig
from cllm_jax.training.held_out import Trained
from cllm_jax.training.lora import Adapter, adapted, factor_axes, first_factors, merged
from cllm_jax.training.noise import Noise, measured
from cllm_jax.training.packing import Samples
from cllm_jax.training.step import (
    Loss,
    LossWeights,
    text_loss,
)


@dataclasses.dataclass(frozen=True)
class Learner:
    """What a run trains, and what it needs for that."""

    params: Any
    """What is trained, as it is at first."""
    axes: Any
    """Names of its axes (`runtime/sharding.py`)."""
    loss: Loss
    trained: Callable[[Any], Trained]
    """What parameters make."""
    frozen: Any = ()
    """What the loss reads but does not train."""
    noise: Noise | None = None
    """Which states a batch has; None for none."""
    faster: bool = True
    """Whether tokens per forward are what is wanted, at the same quality; else quality alone."""
    mesh: Mesh | None = None
    """Devices to train on; None for one."""


@dataclasses.dataclass(frozen=True)
class Objective:
    """A kind of run. What is here suits one that trains all of a model."""

    name: str
    ignored: tuple[str, ...]
    """Settings, and groups of them, that it does not read."""
    reads_trajectories: bool = True
    """Whether it learns from a collection; else from a dataset."""
    keeps_states: bool = False
    """Whether it learns from the states of a collection; else from its answers alone."""
    dataset: str = 'texts'
    """The setting that names the dataset whose answers it learns, if any."""
    drafting: type[TrainedDrafter] | None = None
    """The drafter that is trained, or that a model is trained for."""

    def trains_model(self, settings: TrainConfig) -> bool:
        """Whether the model changes."""
        return True

    def unread(self, settings: TrainConfig) -> Iterator[tuple[str, str]]:
        """Settings that nothing would read, and why."""
        for name in self.ignored:
            yield name, f'with objective {self.name}, which ignores it'
        if self.reads_trajectories and not settings.texts:
            yield 'examples', 'without texts, whose rows they would be'
        if settings.model != 'new':
            yield 'new', f'with model {settings.model or "(default)"}, which is not new'
        if not settings.lora.rank:
            yield 'lora', 'without lora.rank, which asks for an adapter'

    def refused(self, settings: TrainConfig) -> Iterator[tuple[Any, str]]:
        """Whether settings are wrong together, and what then is said."""
        named, model, rank = settings.tokenizer, settings.model, settings.lora.rank
        yield (
            rank and model == 'new',
            f'lora.rank {rank} with model new: random weights are nothing to keep; leave it out',
        )
        yield (
            rank and settings.optimizer.kind == 'muon',
            f'optimizer.kind muon with lora.rank {rank}: the factors of LoRA are trained by AdamW; '
            'set it to adamw',
        )
        yield (
            named and model != 'new',
            f'tokenizer {named} with model {model or "(default)"}, which has its own: only a new '
            'model takes that of another; leave it out, or set model: new',
        )

    def loss_weights(self, settings: TrainConfig) -> LossWeights:
        """The weights of the losses, 0 for those that it does not have."""
        return LossWeights(settings.loss.ar_weight, global_weight=0.0)

    def noise(self, settings: TrainConfig, model: Model) -> Noise | None:
        """Which states a batch has; None for none."""
        return None

    def block(self, settings: TrainConfig) -> int:
        """Tokens of a state that is made by chance."""
        return settings.heads.ahead + 1 if self.drafting else settings.held_out.block

    def drafter(self, settings: TrainConfig, model: Model) -> Drafter:
        """What held-out tests decode with, before it has weights."""
        if self.drafting:
            return self.drafting.of_size(settings.heads, model)
        return Jacobi(settings.held_out.block)

    def learner(
        self, settings: TrainConfig, model: Model, samples: Samples, mesh: Mesh | None = None
    ) -> Learner:
        """What the run trains, starting from a model."""
        drafter, noise = self.drafter(settings, model), self.noise(settings, model)
        learner = Learner(
            params=model.params,
            axes=param_axes(model.config),
            loss=partial(text_loss, module_of(settings, model, mesh), settings.loss),
            trained=lambda params: Trained(dataclasses.replace(model, params=params), drafter),
            frozen=model.params if settings.loss.frozen_weight else (),
            noise=noise and measured(noise, samples),
            faster=noise is not None,
            mesh=mesh,
        )
        return with_adapter(learner, settings, model) if settings.lora.rank else learner


def with_adapter(learner: Learner, settings: TrainConfig, model: Model) -> Learner:
    """What a run trains that would train all of a model: LoRA factors in its place."""
    config, base = settings.lora, base_name(model)
    factors = first_factors(config, model.params, settings.seed)

    def trained(factors: Any) -> Trained:
        whole = learner.trained(merged(config, model.params, factors))
        return dataclasses.replace(whole, adapter=Adapter(factors, config, base))

    return dataclasses.replace(
        learner,
        params=factors,
        axes=factor_axes(factors),
        loss=adapted(learner.loss, config),
        trained=trained,
        frozen=model.params,
    )


class LearnTexts(Objective):
    """A model learns the answers of a dataset."""

    def refused(self, settings):
        yield from super().refused(settings)
        ar, texts = settings.loss.ar_weight, settings.texts
        yield not ar, 'objective ar with loss.ar_weight 0: it has no other loss; set a weight'
        yield texts, f'texts {texts} with objective ar, which learns data alone; leave texts out'


class LearnConsistency(Objective):
    """A model learns to jump from any state of a trajectory to its fixed point."""

    def refused(self, settings):
        yield from super().refused(settings)
        loss, noise = settings.loss, settings.noise
        yield (
            not loss.of_states,
            'objective consistency without a loss of states: set loss.global_weight, '
            'loss.forced_weight or another of them, or use objective ar',
        )
        yield (
            loss.local_weight and not noise.pairs,
            f'loss.local_weight {loss.local_weight} without noise.pairs: a state is taught by its '
            'successor; add noise.pairs',
        )
        yield (
            noise.measured and not settings.texts,
            'noise.measured without texts, whose states it is about; leave it out',
        )
        yield (
            settings.texts and noise.pairs,
            'texts with noise.pairs: states made by chance have no successor; '
            'leave one of them out',
        )
        yield (
            noise.pairs and noise.shortest,
            'noise.shortest with noise.pairs: a state and its successor have one length; leave one '
            'of them out',
        )
        yield (
            noise.pairs and (noise.fresh or noise.corruption or noise.mask >= 0),
            'noise.fresh, noise.corruption or noise.mask with noise.pairs: a state that is changed '
            'has no successor; leave them out, or noise.pairs',
        )

    def loss_weights(self, settings):
        return settings.loss

    def noise(self, settings, model):
        return settings.noise


class LearnSpans(Objective):
    """A model learns the answers of texts past spans of random tokens, by cross-entropy alone.

    Make Some Noise (arXiv 2406.17404), which needs no trajectories. Its spans are part of the text;
    here they stand beside it, as states do, so that the text itself stays clean.
    """

    def refused(self, settings):
        yield from super().refused(settings)
        yield (
            settings.noise.pairs,
            ('noise.pairs with objective spans: a span has no successor; leave it out'),
        )
        yield (
            settings.data,
            f'data {settings.data} with objective {self.name}, which learns texts alone; name it '
            'as texts',
        )

    def loss_weights(self, settings):
        state = settings.loss.state_weight or 1.0
        return LossWeights(settings.loss.ar_weight, global_weight=0.0, state_weight=state)

    def noise(self, settings, model):
        return settings.noise


class LearnMasks(Objective):
    """A model learns to draft by reading mask tokens (SPACE)."""

    def refused(self, settings):
        yield from super().refused(settings)
        reason = f'noise.pairs with objective {self.name}: masks have no successor; leave it out'
        yield settings.noise.pairs, reason

    def loss_weights(self, settings):
        state = settings.loss.state_weight or 1.0
        return dataclasses.replace(super().loss_weights(settings), state_weight=state)

    def noise(self, settings, model):
        mask = self.drafter(settings, model).mask_id
        return dataclasses.replace(settings.noise, fresh=1.0, mask=mask)


def module_of(settings: TrainConfig, model: Model, mesh: Mesh | None) -> Llama:
    """The module of a model as a training step computes it."""
    dtype, compute = model.params['norm'].dtype, DTYPES[settings.compute]
    return Llama(model.config, dtype, compute, settings.remat, mesh, model.backend)
