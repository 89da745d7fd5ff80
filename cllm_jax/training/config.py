"""The settings of a training run, and what follows from them before anything is loaded."""

import dataclasses
from typing import Literal

import jax

from cllm_jax.data.tokenizer import check_vocabulary
from cllm_jax.drafters.trained import HeadsConfig
from cllm_jax.errors import ConfigError, at_least, check_seed
from cllm_jax.hf.load import peek
from cllm_jax.model.config import LlamaConfig
from cllm_jax.runs.logs import LogName
from cllm_jax.runs.stages import EMBEDDED_ROOT, STAGES, model_of, tokenizer_of, trajectories_of
from cllm_jax.runtime.mesh import MeshConfig
from cllm_jax.training.held_out import HeldOut
from cllm_jax.training.lora import LoraConfig
from cllm_jax.training.noise import Noise
from cllm_jax.training.optimizer import OptimizerConfig
from cllm_jax.training.step import LossWeights
from cllm_jax.trajectories.clean import Cleaning


@dataclasses.dataclass(frozen=True)
class NewModel:
    """The architecture of a model that starts from random weights."""

    vocab_size: int = 1536
    """Tokens of the BPE vocabulary, trained on the dataset."""
    dim: int = 192
    """Width of the residual stream."""
    layers: int = 4
    """Transformer blocks."""
    heads: int = 4
    """Query heads."""
    kv_heads: int = 4
    """Key and value heads."""
    mlp_dim: int = 640
    """Width of the gated MLP."""
    max_positions: int = 1024
    """Longest prompt plus answer."""

    def __post_init__(self):
        at_least(self, heads=1)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run."""

    root: str = EMBEDDED_ROOT
    """Directory of the recipe's runs, runs/NAME of its file; this run is ROOT/STAGE."""
    objective: Literal['ar', 'consistency', 'spans', 'medusa', 'redrafter', 'eagle', 'space'] = (
        'consistency'
    )
    """Learn texts; or learn to jump from any Jacobi state to its fixed point, or past spans of
    random tokens; or train a drafter of that kind on the answers of a model. By default that of the
    stage."""
    model: str = ''
    """Model to start from or to draft for; 'new' for random weights. Default of objective ar is
    embedded-target, of others ROOT/target, of stage refine ROOT/cllm; for the embedded recipe,
    until it has begun, embedded-target and embedded."""
    new: NewModel = NewModel()
    """The architecture if model is 'new'."""
    tokenizer: str = ''
    """Model whose tokenizer a new one takes, as a draft model must: default of stage draft is that
    of ROOT/target (for the embedded recipe, until it has begun, embedded-target). Else one
    is trained on the dataset."""
    data: str = ''
    """Dataset (see the README) for ar; else a trajectory directory, by default
    ROOT/trajectories (stage refine: ROOT/retrajectories). Drafters learn from its answers."""
    texts: str = ''
    """A dataset whose answers are trained on too, for consistency with states of right and random
    tokens. It keeps the quality up, and costs no collection. For spans the only one."""
    examples: int | None = None
    """Rows of the dataset (data, or texts) to use; all of a file if not given."""
    max_length: int = 512
    """Longer samples are left out, and counted."""
    task: str = ''
    """Held-out prompts come from this dataset: by default data where it is one, else texts, else
    that of the trajectories."""
    dtype: Literal['float32', 'bfloat16'] = 'float32'
    """Of weights, gradients and optimiser state. In bfloat16 an update below 1/512 of a weight is
    lost; at the rates at which large models are tuned most are: then keep float32 here."""
    compute: Literal['float32', 'bfloat16'] = 'float32'
    """Precision of matrix products; bfloat16 is faster on chips with matrix units."""
    steps: int = 2000
    """Optimisation steps."""
    batch: int = 32
    """Samples per step."""
    seed: int = 0
    """Of initialisation, data order and noise."""
    save_every: int = 200
    """Steps between checkpoints."""
    log_every: int = 20
    """Steps between lines of metrics.jsonl."""
    log: tuple[LogName, ...] = ()
    """Other logs of the same numbers, in the run's directory: tensorboard, wandb (offline, unless
    WANDB_MODE says otherwise). May change when a run goes on."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """AdamW or Muon."""
    loss: LossWeights = LossWeights()
    """How the losses are added up."""
    noise: Noise = Noise()
    """Which trajectory states are trained on."""
    lora: LoraConfig = LoraConfig()
    """An adapter, trained in place of the whole model."""
    heads: HeadsConfig = HeadsConfig()
    """Sizes of the drafter, if one is trained."""
    cleaning: Cleaning = Cleaning()
    """Which trajectories are left out."""
    held_out: HeldOut = HeldOut()
    """The test that chooses the checkpoint."""
    on_collapse: Literal['stop', 'warn'] = 'stop'
    """Whether a run ends when two tests in a row find that the model collapsed; that of a new model
    never does. A run that has ended so goes on with the other."""
    remat: bool = False
    """Compute each layer again in the backward pass instead of keeping its activations."""
    mesh: MeshConfig = MeshConfig()
    """Devices along data, fsdp and tensor. A run may continue on another mesh."""
    quick: bool = False
    """A tiny version of everything, to see that it works."""

    def __post_init__(self):
        at_least(self, examples=1, max_length=3, steps=0, batch=1, save_every=1, log_every=1)
        check_seed(self)


def quick(settings: TrainConfig) -> TrainConfig:
    """The same run, tiny; its batch can be divided among the devices."""
    devices = jax.device_count()
    return dataclasses.replace(
        settings,
        examples=400,
        steps=min(settings.steps, 6),
        batch=-(-8 // devices) * devices,
        save_every=3,
        log_every=2,
        optimizer=dataclasses.replace(settings.optimizer, accumulate=1),
        on_collapse='warn',
        # After six steps no answer is right, and few end.
        cleaning=Cleaning(repetitive=False, truncated=False),
        new=dataclasses.replace(settings.new, dim=16 * settings.new.heads, layers=2, mlp_dim=128),
        held_out=dataclasses.replace(
            settings.held_out, every=settings.held_out.every and 3, prompts=4, max_tokens=48
        ),
    )


def check_architecture(settings: TrainConfig) -> None:
    """Raises ConfigError if noise.mask is not a token of the model, or samples do not fit it."""
    config, mask = architecture(settings), settings.noise.mask
    if mask >= config.vocab_size:
        raise ConfigError(
            f'mask {mask}: outside the vocabulary 0..{config.vocab_size - 1}; name a token of it'
        )
    if settings.max_length > config.max_positions:
        raise ConfigError(
            f'max_length {settings.max_length}: the model has {config.max_positions} positions; '
            'use at most as many'
        )


def with_names(settings: TrainConfig, stage: str) -> TrainConfig:
    """The settings with the model and the trajectories that a stage takes if none are named."""
    root, model, tokenizer = settings.root, settings.model, settings.tokenizer
    if settings.objective == 'ar':
        if model == 'new':
            tokenizer = tokenizer_of(stage, root, tokenizer)
        model = model_of('target', root, model)
        return dataclasses.replace(settings, model=model, tokenizer=tokenizer)
    if settings.objective == 'spans':
        return dataclasses.replace(settings, model=model_of(stage, root, model))
    if not STAGES[stage].trajectories:  # target or draft, with an objective of another stage
        stage = 'cllm'
    data = trajectories_of(stage, root, settings.data)
    return dataclasses.replace(settings, model=model_of(stage, root, model), data=data)


def architecture(settings: TrainConfig) -> LlamaConfig:
    """That of the model to train; of a hub id only the config is fetched."""
    if settings.model != 'new':
        return peek(settings.model)
    new = settings.new
    if not settings.tokenizer:
        check_vocabulary(new.vocab_size)
    if new.dim % new.heads:
        raise ConfigError(f'dim {new.dim}: must be a multiple of the {new.heads} heads')
    return LlamaConfig(**dataclasses.asdict(new), head_dim=new.dim // new.heads, tied=True)
