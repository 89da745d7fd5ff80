"""Train a model, autoregressively or for consistency, or a drafter for one.

    python -m cllm_jax.train --config configs/embedded.yaml --stage target
    python -m cllm_jax.train --config configs/embedded.yaml --stage cllm
    python -m cllm_jax.train --config configs/embedded.yaml --stage medusa

The first trains a target model from scratch (or fine-tunes one), the second turns a target into a
CLLM, the third trains heads that draft for a target. All can be stopped at any moment; the same
command continues.
"""

from pathlib import Path

import jax
from jax.sharding import Mesh

from cllm_jax.cli.console import Console, print_plan, size, table
from cllm_jax.cli.guard import guard
from cllm_jax.cli.settings import MeshFlags, installed, parse
from cllm_jax.data.sources import Source, rows_fingerprint
from cllm_jax.data.tokenizer import drop_prompts_without_room
from cllm_jax.decoding.request import cache_slots
from cllm_jax.drafters.trained import tables_of
from cllm_jax.errors import ConfigError
from cllm_jax.hf.load import DTYPES
from cllm_jax.hf.model import Model
from cllm_jax.hf.weights import abstract_params
from cllm_jax.runs.recipe import to_json
from cllm_jax.runs.run_dir import claim, open_run
from cllm_jax.runs.stages import output_of
from cllm_jax.runtime.backend import pretend
from cllm_jax.runtime.keys import prng_key
from cllm_jax.runtime.mesh import make_mesh
from cllm_jax.runtime.sharding import check_batch
from cllm_jax.training.config import TrainConfig, architecture, check_architecture, with_names
from cllm_jax.training.data import held_out_rows, inputs_of, prepare, trained_on_too
from cllm_jax.training.memory import compiled_step, longest, memory_per_device
from cllm_jax.training.objectives import checked, objective_of
from cllm_jax.training.packing import Samples


def facts_of(settings: TrainConfig, mesh: Mesh) -> dict[str, object]:
    """What training needs; every sample is taken to be as long as can be."""
    config, objective = architecture(settings), objective_of(settings)
    model = Model(config, abstract_params(config), None, settings.model)
    drafter, itemsize = objective.drafter(settings, model), DTYPES[settings.dtype].itemsize
    work = {'steps': settings.steps, 'samples seen': settings.steps * settings.batch}
    if not objective.trains_model(settings):
        own = jax.eval_shape(drafter.new_weights, prng_key(0), tables_of(model.params))
        count = sum(leaf.size for leaf in jax.tree.leaves(own))
        return {
            'parameters of the model, frozen': f'{config.parameters:,}',
            'weights of the model': size(config.parameters * itemsize),
            'parameters of the drafter': f'{count:,}',
            'weights, gradients, optimiser state of the drafter': size(16 * count),
            'tokens verified per forward': drafter.nodes,
            **work,
        }
    slots = cache_slots(longest(settings)[0], settings.held_out.max_tokens, drafter.nodes)
    found = memory_per_device(settings, config, mesh)
    states, every = settings.noise.windows or 'cover the answer once', settings.held_out.every
    return {
        'mesh': ', '.join(f'{axis} {size}' for axis, size in mesh.shape.items()),
        'parameters': f'{config.parameters:,}',
        **{f'{name} per device': size(count) for name, count in found.items()},
        'sum per device': size(sum(found.values())),
        'KV cache per prompt (held-out tests)': size(config.cache_values * itemsize * slots),
        'global batch': f'{settings.batch} samples of at most {settings.max_length} tokens',
        'states per answer': states if objective.noise(settings, model) else 'none',
        **work,
        'checkpoints': -(-settings.steps // settings.save_every),
        'held-out tests': max(1, -(-settings.steps // every)) if every else 'none',
    }


def plan(settings: TrainConfig, directory: Path, compiled: bool, console: Console) -> None:
    """What the run would need; with `compiled`, also as the compiler counts it."""
    mesh = make_mesh(settings.mesh)
    check_batch(settings.batch // settings.optimizer.accumulate, mesh)
    whole = objective_of(settings).trains_model(settings)
    writes = directory if whole else directory / 'drafter'
    print_plan(console, settings, {'writes to': writes} | facts_of(settings, mesh))
    if compiled and whole:
        with console.status('compiling the step'):
            counted = compiled_step(settings, architecture(settings), mesh)
        told = counted.collectives.items()
        sizes = counted.sizes | {f'{kind}: {count},': got for kind, (count, got) in told}
        rows = [[f'{name} per device', size(count)] for name, count in sizes.items()]
        title = f'the compiled step, {counted.seconds:.0f} s of compilation'
        console.out.print(table(title, ['', ''], rows))


def tested_rows(
    held_out: Source, settings: TrainConfig, model: Model, samples: Samples, console: Console
) -> Source:
    """The held-out rows that a model has room for, and what there is to say of them."""
    room = model.config.max_positions - settings.held_out.max_tokens
    held_out = drop_prompts_without_room(held_out, model.tokenizer, model.config.bos_id, room)
    console.dropped(held_out)
    if known := trained_on_too(samples, held_out, model):
        console.note(
            f'warning: {known} of {len(held_out)} held-out prompts are trained on too, so that '
            'the tests say little of others; name another file for task'
        )
    return held_out


def train_in(
    directory: Path, settings: TrainConfig, claimed: dict, held_out: Source | None, console: Console
) -> None:
    """Train in a run directory that is open."""
    from cllm_jax.training.trainer import train  # brings Orbax, which no --help waits for

    mesh = make_mesh(settings.mesh) if jax.device_count() > 1 else None
    model, samples = prepare(settings, mesh, console, directory)
    console.opened(model)
    inputs = inputs_of(settings, model, samples, directory)
    if held_out is not None:
        held_out = tested_rows(held_out, settings, model, samples, console)
        inputs |= {'held_out': rows_fingerprint(held_out)}
    claim(directory, claimed, inputs)
    adapter = f', LoRA of rank {settings.lora.rank}' if settings.lora.rank else ''
    console.note(
        f'{directory}: {model.config.parameters / 1e6:.2f}M parameters{adapter}, {settings.steps} '
        f'steps of {settings.batch} on {jax.device_count()} {jax.devices()[0].platform} device(s), '
        f'learning rate {settings.optimizer.learning_rate:g}'
    )
    learner = objective_of(settings).learner(settings, model, samples, mesh)
    train(directory, learner, samples, held_out, settings, console.metrics, console.note)
    kept = [name for name in ('model', 'adapter', 'drafter') if (directory / name).is_dir()]
    best = 'best' if settings.held_out.every else 'last'
    console.note(f'done; the {best} is in {" and ".join(str(directory / k) for k in kept)}')


def run() -> None:
    settings, flags = parse(TrainConfig, stage='cllm', description=__doc__, flags=MeshFlags)
    if (flags.devices or flags.compile) and not flags.plan:
        raise ConfigError('devices and compile are for planning; add --plan, or leave them out')
    for name in settings.log:
        installed(f'log {name}', name, name)
    if flags.devices:
        pretend(flags.devices)
    settings = checked(settings)
    directory, console = Path(output_of(flags.stage, settings.root)), Console()
    # Devices may change, where the directory is, and whether a run that collapsed goes on.
    free = ('mesh', 'remat', 'root', 'log', 'on_collapse')
    claimed = {k: v for k, v in to_json(settings).items() if k not in free}
    settings = with_names(settings, flags.stage)
    check_architecture(settings)
    if flags.plan:
        plan(settings, directory, flags.compile, console)
        return
    check_batch(settings.batch // settings.optimizer.accumulate, make_mesh(settings.mesh))
    held_out = held_out_rows(settings)
    said_later = (settings.data, settings.texts)  # when they are read
    if held_out is not None and held_out.name not in said_later:
        console.dropped(held_out)
    with open_run(directory, claimed, to_json(TrainConfig())):
        train_in(directory, settings, claimed, held_out, console)


def main() -> None:
    guard(run, stop_together=True)


if __name__ == '__main__':
    main()
