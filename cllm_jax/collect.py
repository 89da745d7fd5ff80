"""Collect Jacobi trajectories of a target model, the training data of consistency training.

    python -m cllm_jax.collect --config configs/embedded.yaml
    python -m cllm_jax.collect --model DIR --data gsm8k:train.jsonl --out runs/mine/trajectories

Can be stopped at any moment; the same command continues and ends with the same bytes.
"""

import dataclasses
import time
from pathlib import Path

import jax

from cllm_jax.cli.console import Console, print_plan, size
from cllm_jax.cli.guard import guard
from cllm_jax.cli.settings import parse
from cllm_jax.data.sources import Source, open_source, rows_fingerprint
from cllm_jax.errors import ConfigError
from cllm_jax.hf.load import MIXED, Precision, chosen, load, peek, storage
from cllm_jax.hf.model import fingerprint, with_tokenizer
from cllm_jax.hf.tokenizer import noted_or_new
from cllm_jax.model.config import LlamaConfig
from cllm_jax.runs.run_dir import claim, noted, open_run
from cllm_jax.runs.stages import EMBEDDED_ROOT, model_of, output_of
from cllm_jax.runtime.mesh import MeshConfig, make_mesh
from cllm_jax.trajectories.clean import cut_warning
from cllm_jax.trajectories.collector import collect
from cllm_jax.trajectories.store import Collection


@dataclasses.dataclass(frozen=True)
class CollectConfig(Collection):
    """Settings of a collection."""

    root: str = EMBEDDED_ROOT
    """Directory of the recipe's runs, runs/NAME of its file."""
    out: str = ''
    """Where trajectories go; default ROOT/trajectories, of stage recollect ROOT/retrajectories."""
    model: str = ''
    """The model whose trajectories these are; default ROOT/target, of stage recollect ROOT/cllm.
    For the embedded recipe, until it has begun, embedded-target and embedded."""
    data: str = 'sql+arithmetic'
    """Dataset whose prompts are answered (see docs/data.md)."""
    prompts: int | None = None
    """Number of prompts; all of a file if not given."""
    tensor: int = 1
    """Devices that share every layer of the model; each such group has its own prompts."""
    dtype: Precision = 'auto'
    """Of weights and cache; mixed has both in bfloat16 and float32 everywhere else. auto: bfloat16
    on an accelerator, float32 on a CPU, and mixed on a CPU with AMX."""
    quick: bool = False
    """A tiny version, to see that it works."""


def plan(
    settings: CollectConfig, directory: Path, source: Source, config: LlamaConfig, console: Console
) -> None:
    """What the collection would need."""
    dtype = chosen(settings.dtype, settings.tensor)
    width = 2 if dtype == MIXED else storage(dtype).itemsize
    facts = {
        'writes to': directory,
        'prompts': len(source),
        'shards': -(-len(source) // settings.shard),
        'weights': size(config.parameters * width),
        'KV cache per prompt (at most)': size(config.cache_values * width * config.max_positions),
        'trajectories (at most)': size(len(source) * settings.max_tokens * settings.block * 2),
    }
    print_plan(console, settings, facts)


def run() -> None:
    settings, flags = parse(CollectConfig, stage='collect', description=__doc__)
    if settings.quick:
        settings = dataclasses.replace(settings, prompts=32, max_tokens=48, batch=8, shard=16)
    console = Console()
    directory = Path(settings.out or output_of(flags.stage, settings.root))
    name = model_of(flags.stage, settings.root, settings.model)
    source = open_source(settings.data, split='train', seed=settings.seed, limit=settings.prompts)
    config = peek(name)
    if settings.max_tokens + 1 > config.max_positions:
        raise ConfigError(
            f'max_tokens {settings.max_tokens}: leaves no room for a prompt in the '
            f'{config.max_positions} positions of {name}; use fewer'
        )
    if flags.plan:
        plan(settings, directory, source, config, console)
        return
    groups = MeshConfig(tensor=settings.tensor)
    mesh = None if settings.tensor == 1 else make_mesh(groups, jax.local_devices())
    dtype = settings.dtype
    if dtype == 'auto':  # as it was when the collection began, which another machine may have done
        dtype = noted(directory / 'inputs.json', 'dtype') or dtype
    model = with_tokenizer(load(name, dtype, mesh))
    console.opened(model)
    identity = settings.identity | {
        'data': source.name,
        'prompts': len(source),
        'model': fingerprint(model),
        'tokenizer': noted_or_new(noted(directory / 'settings.json', 'tokenizer'), model.tokenizer),
    }
    console.dropped(source)
    with open_run(directory, identity), console.progress('collect', len(source)) as bar:
        inputs = {'prompts': rows_fingerprint(source), 'dtype': model.precision}
        claim(directory, identity, inputs)
        begin, done = time.perf_counter(), 0

        def advance(prompts: int, tokens: int) -> None:
            nonlocal done
            done += tokens
            bar(prompts, f'{done / (time.perf_counter() - begin):.0f} tokens/s')

        counts = collect(directory, model, source, settings, identity, advance)
    collected = ', '.join(f'{v} {k}' for k, v in counts.items())
    mean = counts['tokens'] / max(counts['forwards'], 1)
    console.note(f'{directory}: {collected}; {mean:.2f} tokens/forward')
    answers = counts['prompts'] - counts['too long'] - counts['empty']
    cut = (directory, counts['truncated'], answers, settings.max_tokens, config.max_positions)
    if (warning := cut_warning(*cut)) and not settings.quick:
        console.note(warning)


def main() -> None:
    guard(run)


if __name__ == '__main__':
    main()
