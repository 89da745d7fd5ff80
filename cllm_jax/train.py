"""Train a model, autoregressively or for consistency, or a drafter for one.

    python -m cllm_jax.train --config configs/embedded.yaml --stage target
    python -m cllm_jax.train --config configs/embedded.yaml --stage cllm
    python -m cllm_jax.train --config configs/embedded.yaml --stage medusa

The first trains a target model from scratch (or fine-tunes one), the second turns a target into a
CLLM, the third trains heads that draft for a target. All can be stopped at any moment; the same
command continues.
"""

import dataclasses
import random
from pathlib import Path
from typing import Literal

import jax
import numpy as np
from jax.sharding import Mesh

from cllm_jax.console import Console, print_plan, size, table
from cllm_jax.datasets.example import Example
from cllm_jax.datasets.sources import open_source
from cllm_jax.datasets.tokens import encode_examples, train_tokenizer
from cllm_jax.decoding.request import cache_slots
from cllm_jax.drafters.heads import borrow
from cllm_jax.errors import ConfigError
from cllm_jax.models.config import LlamaConfig
from cllm_jax.models.hf import abstract_params
from cllm_jax.models.llama import Llama, init_params
from cllm_jax.models.load import DTYPES, Model, load, named_or, peek, tokenizer_fingerprint
from cllm_jax.parallel.mesh import MeshConfig, make_mesh, pretend
from cllm_jax.parallel.rules import check_batch
from cllm_jax.rundir import open_run
from cllm_jax.settings import guard, parse, to_json
from cllm_jax.training.batches import Noise, Sample, make_batch
from cllm_jax.training.heads import HeadsConfig, drafter_of, of_heads
from cllm_jax.training.needs import StepShape, compiled_needs, needs
from cllm_jax.training.objective import Objective, of_text
from cllm_jax.training.run import HeldOut, RunPlan, train
from cllm_jax.training.step import LossWeights, OptimizerConfig, check_accumulation
from cllm_jax.trajectories.clean import Cleaning, clean
from cllm_jax.trajectories.store import read_manifest, read_records

STAGES = ('target', 'cllm', 'refine', 'medusa', 'medusa2', 'redrafter', 'eagle', 'space')
CALIBRATION = 64
"""Samples by which Medusa's tree is chosen."""
TOKENIZER_ROWS = 8000
"""Rows of the dataset that a new tokenizer is trained on."""


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


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run."""

    root: str = 'runs/embedded'
    """Directory of the recipe's runs; this run is ROOT/STAGE."""
    objective: Literal['ar', 'consistency', 'medusa', 'redrafter', 'eagle', 'space'] = 'consistency'
    """Learn texts; or learn to jump from any Jacobi state to its fixed point; or train a drafter
    of that kind on the answers of a model."""
    model: str = ''
    """Model to start from or to draft for; 'new' for random weights. Default: embedded-target, or
    but for objective ar ROOT/target where there is one (stage refine: ROOT/cllm, else embedded)."""
    new: NewModel = NewModel()
    """The architecture if model is 'new'."""
    data: str = ''
    """Dataset (see the README) for ar; else a trajectory directory, default ROOT/trajectories
    (stage refine: ROOT/retrajectories). Drafters learn from its answers."""
    texts: str = ''
    """A dataset whose answers are trained on beside the trajectories; for consistency with states
    of right and random tokens. It keeps the quality up, and costs no collection."""
    examples: int | None = None
    """Rows of the dataset (of ar, or of texts) to use; all of a file if not given."""
    max_length: int = 512
    """Longer samples are left out, and counted."""
    task: str = 'sql+arithmetic'
    """Held-out prompts come from this dataset."""
    dtype: Literal['float32', 'bfloat16'] = 'float32'
    """Of weights, gradients and optimiser state."""
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
    optimizer: OptimizerConfig = OptimizerConfig()
    """AdamW or Muon."""
    loss: LossWeights = LossWeights()
    """How the losses are added up."""
    noise: Noise = Noise()
    """Which trajectory states are trained on."""
    heads: HeadsConfig = HeadsConfig()
    """Sizes of the drafter, if one is trained."""
    cleaning: Cleaning = Cleaning()
    """Which trajectories are left out."""
    held_out: HeldOut = HeldOut()
    """The test that chooses the checkpoint."""
    remat: bool = False
    """Compute each layer again in the backward pass instead of keeping its activations."""
    mesh: MeshConfig = MeshConfig()
    """Devices along data, fsdp and tensor. A run may continue on another mesh."""
    quick: bool = False
    """A tiny version of everything, to see that it works."""


def quick(settings: TrainConfig) -> TrainConfig:
    """The same run, tiny."""
    return dataclasses.replace(
        settings,
        examples=400,
        steps=6,
        batch=8,
        save_every=3,
        log_every=2,
        new=dataclasses.replace(settings.new, dim=64, layers=2, mlp_dim=128),
        held_out=dataclasses.replace(settings.held_out, every=3, prompts=4, max_tokens=48),
    )


def new_model(settings: TrainConfig, texts: list[str]) -> Model:
    """Random weights and a tokenizer trained on the texts."""
    config = architecture(settings)
    tokenizer = train_tokenizer(texts, config.vocab_size)
    special = {'eos_ids': (tokenizer.eos_token_id,), 'pad_id': tokenizer.pad_token_id}
    config = dataclasses.replace(config, **special)
    dtype = DTYPES[settings.dtype]
    params = jax.jit(lambda key: init_params(Llama(config, dtype), key))(
        jax.random.key(settings.seed)
    )
    return Model(config, params, tokenizer, 'new')


def trajectory_samples(settings: TrainConfig, model: Model, console: Console) -> list[Sample]:
    """The cleaned trajectories of a collection; refused if made with another tokenizer."""
    directory = Path(settings.data)
    made_with = read_manifest(directory)['identity']['tokenizer']
    if made_with != tokenizer_fingerprint(model.tokenizer):
        raise ConfigError(
            f'{directory}: collected with another tokenizer than that of {model.source}; '
            'collect again with this model'
        )
    with console.status(f'reading {directory}'):
        records, counts = clean(read_records(directory), settings.cleaning)
    console.note('trajectories: ' + ', '.join(f'{v} {k}' for k, v in sorted(counts.items())))
    return [Sample(r.prompt, r.answer, r.states, r.start) for r in records]


def read_examples(settings: TrainConfig, data: str, console: Console) -> list[Example]:
    """The training rows of a dataset."""
    source = open_source(data, split='train', seed=settings.seed, limit=settings.examples)
    with console.status(f'reading {len(source)} examples of {source.name}'):
        return [source[i] for i in range(len(source))]


def text_samples(
    model: Model, examples: list[Example], console: Console, block: int = 0
) -> list[Sample]:
    """Prompts with their reference answers, and no states of `block` tokens."""
    if not model.config.eos_ids:
        raise ConfigError(f'{model.source} has no end token; set eos_token_id in its config.json')
    with console.status('tokenising'):
        pairs = encode_examples(model.tokenizer, examples, model.config.eos_ids[0])
    states = np.zeros((0, block), np.int32)
    start = np.zeros(0, np.int32)
    return [Sample(prompt, answer, states, start) for prompt, answer in pairs]


def check_losses(settings: TrainConfig) -> TrainConfig:
    """The settings with the losses that the objective has.

    Raises:
      ConfigError: consistency without a consistency loss, or texts with noise.pairs.
    """
    loss = settings.loss
    if settings.objective != 'consistency':
        state = (loss.state_weight or 1.0) if settings.objective == 'space' else 0.0
        alone = dataclasses.replace(loss, global_weight=0.0, local_weight=0.0, state_weight=state)
        return dataclasses.replace(settings, loss=alone)
    if not (loss.global_weight or loss.local_weight):
        raise ConfigError(
            'objective consistency with loss.global_weight and loss.local_weight 0: '
            'set one of them, or use objective ar'
        )
    if settings.texts and settings.noise.pairs:
        raise ConfigError(
            'texts with noise.pairs: states made by chance have no successor; leave one of them out'
        )
    return settings


def with_names(settings: TrainConfig, stage: str) -> TrainConfig:
    """The settings with the model and the trajectories that a stage takes if none are named."""
    if settings.objective == 'ar':
        return dataclasses.replace(settings, model=settings.model or 'embedded-target')
    run, shipped, collected = (
        ('cllm', 'embedded', 'retrajectories')
        if stage == 'refine'
        else ('target', 'embedded-target', 'trajectories')
    )
    return dataclasses.replace(
        settings,
        model=named_or(settings.model, f'{settings.root}/{run}', shipped),
        data=settings.data or f'{settings.root}/{collected}',
    )


def prepare(
    settings: TrainConfig, mesh: Mesh | None, console: Console
) -> tuple[Model, list[Sample]]:
    """The model to start from and its training samples."""
    if settings.objective != 'ar':
        model = load(settings.model, settings.dtype, mesh)
        samples = trajectory_samples(settings, model, console)
        block = samples[0].states.shape[1] if samples else 0
        if settings.objective != 'consistency':  # only the answers count
            block = settings.heads.ahead + 1
            states, start = np.zeros((0, block), np.int32), np.zeros(0, np.int32)
            samples = [Sample(s.prompt, s.answer, states, start) for s in samples]
        if settings.texts and samples:
            examples = read_examples(settings, settings.texts, console)
            samples += text_samples(model, examples, console, block)
    else:
        if not settings.data:
            raise ConfigError("objective 'ar' without data; name a dataset, such as data: sql")
        examples = read_examples(settings, settings.data, console)
        if settings.model == 'new':
            # A random choice: a regular one could miss a task of a mixture altogether.
            rows = min(len(examples), TOKENIZER_ROWS)
            chosen = random.Random(settings.seed).sample(examples, rows)
            model = new_model(settings, [e.prompt + e.answer for e in chosen])
        else:
            model = load(settings.model, settings.dtype, mesh)
        samples = text_samples(model, examples, console)
    kept = [s for s in samples if len(s) <= settings.max_length]
    console.note(f'{len(kept)} samples, {len(samples) - len(kept)} too long left out')
    return model, kept


def architecture(settings: TrainConfig) -> LlamaConfig:
    """That of the model to train; of a hub id only the config is fetched."""
    if settings.model != 'new':
        return peek(settings.model)
    new = settings.new
    if new.dim % new.heads:
        raise ConfigError(f'dim {new.dim}: must be a multiple of the {new.heads} heads')
    return LlamaConfig(
        vocab_size=new.vocab_size,
        dim=new.dim,
        layers=new.layers,
        heads=new.heads,
        kv_heads=new.kv_heads,
        head_dim=new.dim // new.heads,
        mlp_dim=new.mlp_dim,
        tied=True,
        max_positions=new.max_positions,
    )


def objective_of(settings: TrainConfig, model: Model, samples: list[Sample]) -> Objective:
    """What the run trains."""
    compute, loss = DTYPES[settings.compute], settings.loss
    if settings.objective in ('ar', 'consistency'):
        return of_text(model, loss, settings.held_out.block, compute, settings.remat)
    calibration = make_batch(samples, min(len(samples), CALIBRATION), settings.seed, 0, None)
    return of_heads(
        settings.objective,
        settings.heads,
        model,
        loss,
        calibration,
        settings.seed,
        compute,
        settings.remat,
    )


def noise_of(settings: TrainConfig, model: Model) -> Noise | None:
    """Which states a batch has; None if none."""
    if settings.objective == 'space':
        mask = drafter_of('space', settings.heads, model).mask_id
        return dataclasses.replace(settings.noise, fresh=1.0, mask=mask)
    return settings.noise if settings.objective == 'consistency' else None


def plan(settings: TrainConfig, directory: Path, compiled: bool, console: Console) -> None:
    """What the run would need; with `compiled`, also as the compiler counts it.

    Every sample is taken to be as long as `max_length` allows, an answer of held_out.max_tokens
    at most.
    """
    config, mesh = architecture(settings), make_mesh(settings.mesh)
    check_batch(settings.batch // settings.optimizer.accumulate, mesh)
    if settings.objective in ('medusa', 'redrafter', 'eagle') and not settings.heads.joint:
        plan_of_heads(settings, directory, config, console)
        return
    answer = min(settings.held_out.max_tokens, settings.max_length // 2)
    consistency = settings.objective == 'consistency'
    shape = StepShape(
        config,
        DTYPES[settings.dtype],
        DTYPES[settings.compute],
        settings.remat,
        settings.optimizer,
        settings.loss,
        settings.noise if consistency else None,
        settings.batch,
        settings.max_length - answer,
        answer,
        settings.held_out.block,
    )
    test = settings.held_out
    slots = cache_slots(settings.max_length - answer, test.max_tokens, test.block)
    cache = config.cache_values * DTYPES[settings.dtype].itemsize * slots
    found = needs(shape, mesh)
    states = settings.noise.windows or 'cover the answer once'
    print_plan(
        console,
        to_json(settings),
        {
            'writes to': directory,
            'mesh': ', '.join(f'{axis} {size}' for axis, size in mesh.shape.items()),
            'parameters': f'{config.parameters:,}',
            **{f'{name} per device': size(count) for name, count in found.items()},
            'sum per device': size(sum(found.values())),
            'KV cache per prompt (held-out tests)': size(cache),
            'global batch': f'{settings.batch} samples of at most {settings.max_length} tokens',
            'states per answer': states if consistency else 'none',
            'steps': settings.steps,
            'samples seen': settings.steps * settings.batch,
            'checkpoints': settings.steps // settings.save_every,
            'held-out tests': settings.steps // settings.held_out.every,
        },
    )
    if compiled:
        with console.status('compiling the step'):
            seconds = (counted := compiled_needs(shape, mesh)).pop('seconds')
        rows = [[f'{name} per device', size(count)] for name, count in counted.items()]
        title = f'the compiled step, {seconds:.0f} s of compilation'
        console.out.print(table(title, ['', ''], rows))


def plan_of_heads(
    settings: TrainConfig, directory: Path, config: LlamaConfig, console: Console
) -> None:
    """What training a drafter of a frozen model would need."""
    model = Model(config, abstract_params(config), None, settings.model)
    drafter, tables = drafter_of(settings.objective, settings.heads, model), borrow(model, None)
    own = jax.eval_shape(drafter.new_weights, jax.random.key(0), tables.embed_VD, tables.head_VD)
    count = sum(leaf.size for leaf in jax.tree.leaves(own))
    width = DTYPES[settings.dtype].itemsize
    print_plan(
        console,
        to_json(settings),
        {
            'writes to': directory / 'drafter',
            'parameters of the model, frozen': f'{config.parameters:,}',
            'weights of the model': size(config.parameters * width),
            'parameters of the drafter': f'{count:,}',
            'weights, gradients, optimiser state of the drafter': size(16 * count),
            'tokens verified per forward': drafter.nodes,
            'steps': settings.steps,
            'samples seen': settings.steps * settings.batch,
        },
    )


def run() -> None:
    settings, flags = parse(
        TrainConfig,
        program='python -m cllm_jax.train',
        description=__doc__,
        stage='cllm',
        stages=STAGES,
        meshed=True,
    )
    if (flags.devices or flags.compile) and not flags.plan:
        raise ConfigError('devices and compile are for planning; add --plan, or leave them out')
    if flags.devices:
        pretend(flags.devices)
    if settings.quick:
        settings = quick(settings)
    settings = check_losses(settings)
    check_accumulation(settings.batch, settings.optimizer.accumulate)
    directory, console = Path(settings.root) / flags.stage, Console()
    claimed = {k: v for k, v in to_json(settings).items() if k not in ('mesh', 'remat')}
    settings = with_names(settings, flags.stage)
    if flags.plan:
        plan(settings, directory, flags.compile, console)
        return
    mesh = make_mesh(settings.mesh) if jax.device_count() > 1 else None
    if mesh:
        check_batch(settings.batch // settings.optimizer.accumulate, mesh)
    test = settings.held_out
    held_out = open_source(settings.task, split='heldout', seed=test.seed, limit=test.prompts)
    with open_run(directory, claimed):
        model, samples = prepare(settings, mesh, console)
        console.note(
            f'{directory}: {model.config.parameters / 1e6:.2f}M parameters, {settings.steps} steps '
            f'of {settings.batch} on {jax.device_count()} {jax.default_backend()} device(s)'
        )
        run_plan = RunPlan(
            steps=settings.steps,
            batch=settings.batch,
            seed=settings.seed,
            optimizer=settings.optimizer,
            noise=noise_of(settings, model),
            held_out=test,
            mesh=mesh,
            log_every=settings.log_every,
            save_every=settings.save_every,
        )
        objective = objective_of(settings, model, samples)
        train(directory, objective, samples, held_out, run_plan, console.metrics, console.note)
        kept = [name for name in ('model', 'drafter') if (directory / name).is_dir()]
        console.note(f'done; the best is in {" and ".join(str(directory / k) for k in kept)}')


def main() -> None:
    guard(run)


if __name__ == '__main__':
    main()
