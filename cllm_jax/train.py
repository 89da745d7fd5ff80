"""Train a model, autoregressively or for consistency, or a drafter for one.

    python -m cllm_jax.train --config configs/embedded.yaml --stage target
    python -m cllm_jax.train --config configs/embedded.yaml --stage cllm
    python -m cllm_jax.train --config configs/embedded.yaml --stage medusa

The first trains a target model from scratch (or fine-tunes one), the second turns a target into a
CLLM, the third trains heads that draft for a target. All can be stopped at any moment; the same
command continues.
"""

import dataclasses
from pathlib import Path

import jax
from jax.sharding import Mesh

from cllm_jax.cli.console import Console, print_plan, size, table
from cllm_jax.cli.guard import guard
from cllm_jax.cli.settings import parse
from cllm_jax.data.sources import rows_fingerprint
from cllm_jax.data.tokenizer import drop_prompts_without_room
from cllm_jax.decoding.request import cache_slots
from cllm_jax.drafters.trained import borrow
from cllm_jax.errors import ConfigError
from cllm_jax.hf.load import DTYPES, Model
from cllm_jax.hf.weights import abstract_params
from cllm_jax.model.config import LlamaConfig
from cllm_jax.runs.recipe import to_json
from cllm_jax.runs.run_dir import claim, open_run
from cllm_jax.runs.stages import OBJECTIVES, output_of
from cllm_jax.runtime.mesh import make_mesh, pretend
from cllm_jax.runtime.sharding import check_batch
from cllm_jax.training.config import (
    TrainConfig,
    architecture,
    check_ignored,
    check_length,
    check_losses,
    check_mask,
    check_tokenizer,
    quick,
    with_names,
)
from cllm_jax.training.data import held_out_rows, inputs_of, prepare, trained_on_too
from cllm_jax.training.heads import drafter_of, of_heads
from cllm_jax.training.memory import StepShape, compiled_needs, needs
from cllm_jax.training.objective import Objective, of_text
from cllm_jax.training.packing import Noise, Sample, make_batch
from cllm_jax.training.step import check_accumulation
from cllm_jax.training.trainer import RunPlan, train

CALIBRATION = 64
"""Samples by which Medusa's tree is chosen."""


def objective_of(
    settings: TrainConfig, model: Model, samples: list[Sample], mesh: Mesh | None
) -> Objective:
    """What the run trains."""
    compute, loss = DTYPES[settings.compute], settings.loss
    if settings.objective in ('ar', 'consistency'):
        return of_text(model, loss, settings.held_out.block, compute, settings.remat, mesh)
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
        mesh,
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
    model, test = Model(config, None, None, settings.model), settings.held_out
    noise, block, nodes = noise_of(settings, model), test.block, test.block
    if settings.objective == 'space':
        block, nodes = settings.heads.ahead + 1, drafter_of('space', settings.heads, model).nodes
    shape = StepShape(
        config,
        DTYPES[settings.dtype],
        DTYPES[settings.compute],
        settings.remat,
        settings.optimizer,
        settings.loss,
        noise,
        settings.batch,
        settings.max_length - answer,
        answer,
        block,
    )
    slots = cache_slots(settings.max_length - answer, test.max_tokens, nodes)
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
            'states per answer': states if noise else 'none',
            'steps': settings.steps,
            'samples seen': settings.steps * settings.batch,
            'checkpoints': -(-settings.steps // settings.save_every),
            'held-out tests': max(1, -(-settings.steps // settings.held_out.every)),
        },
    )
    if compiled:
        with console.status('compiling the step'):
            counted = compiled_needs(shape, mesh)
        rows = [[f'{name} per device', size(count)] for name, count in counted.sizes.items()]
        rows += [
            [f'{kind}: {count}, per device', size(got)]
            for kind, (count, got) in counted.collectives.items()
        ]
        title = f'the compiled step, {counted.seconds:.0f} s of compilation'
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
        stages={name: {'objective': objective} for name, objective in OBJECTIVES.items()},
        meshed=True,
    )
    if (flags.devices or flags.compile) and not flags.plan:
        raise ConfigError('devices and compile are for planning; add --plan, or leave them out')
    if flags.devices:
        pretend(flags.devices)
    check_ignored(settings)
    if settings.quick:
        settings = quick(settings)
    check_tokenizer(settings)
    settings = check_losses(settings)
    check_accumulation(settings.batch, settings.optimizer.accumulate)
    directory, console = Path(output_of(flags.stage, settings.root)), Console()
    free = ('mesh', 'remat', 'root')  # devices may change, and where the directory is
    claimed = {k: v for k, v in to_json(settings).items() if k not in free}
    settings = with_names(settings, flags.stage)
    check_mask(settings)
    check_length(settings)
    if flags.plan:
        plan(settings, directory, flags.compile, console)
        return
    mesh = make_mesh(settings.mesh)
    check_batch(settings.batch // settings.optimizer.accumulate, mesh)
    mesh = mesh if jax.device_count() > 1 else None
    test, held_out = settings.held_out, held_out_rows(settings)
    if held_out.name not in (settings.data, settings.texts):  # else said when it is read
        console.dropped(held_out)
    with open_run(directory, claimed):
        model, samples = prepare(settings, mesh, console, directory)
        room = model.config.max_positions - test.max_tokens
        held_out = drop_prompts_without_room(held_out, model.tokenizer, model.config.bos_id, room)
        console.dropped(held_out)
        if known := trained_on_too(samples, held_out, model):
            console.note(
                f'warning: {known} of {len(held_out)} held-out prompts are trained on too, so that '
                'the tests say little of others; name another file for task'
            )
        inputs = inputs_of(settings, model, samples)
        claim(directory, claimed, inputs | {'held_out': rows_fingerprint(held_out)})
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
        objective = objective_of(settings, model, samples, mesh)
        train(directory, objective, samples, held_out, run_plan, console.metrics, console.note)
        kept = [name for name in ('model', 'drafter') if (directory / name).is_dir()]
        console.note(f'done; the best is in {" and ".join(str(directory / k) for k in kept)}')


def main() -> None:
    guard(run, stop_together=True)


if __name__ == '__main__':
    main()
