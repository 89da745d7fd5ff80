"""Export the models of a run in Hugging Face format, with a model card.

    python -m cllm_jax.export --root runs/embedded --out my_models

writes my_models/target and my_models/cllm: config.json, model.safetensors, tokenizer files and a
README.md that states the recipe and its held-out numbers. `--runs medusa` writes my_models/medusa,
heads that were trained for the target, for `decode --drafter medusa:my_models/medusa`.
`--gguf bf16` writes model-bf16.gguf into the directory of each model too, for llama.cpp.
"""

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import yaml

from cllm_jax.cli.console import Console, print_plan, size
from cllm_jax.cli.guard import guard
from cllm_jax.cli.settings import Switch, parse
from cllm_jax.drafters.checkpoint import copy_drafter, drafter_arrays
from cllm_jax.errors import ConfigError, DataError
from cllm_jax.hf.config import read_config
from cllm_jax.hf.gguf_write import GGUF_DTYPES, gguf_name, write_gguf
from cllm_jax.hf.load import DTYPES, load, resolve
from cllm_jax.hf.model import Model
from cllm_jax.hf.write import write_model
from cllm_jax.runs.run_dir import read_metrics
from cllm_jax.runs.stages import EMBEDDED_ROOT, exported_run, output_of


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """Settings of an export."""

    root: str = EMBEDDED_ROOT
    """Directory of the recipe's runs, runs/NAME of its file."""
    runs: tuple[str, ...] = ('target', 'cllm')
    """Which runs below ROOT to export. Of cllm its refinement, ROOT/refine, if there is one."""
    out: str = ''
    """Where the model directories go; default ROOT/export."""
    dtype: Literal['bfloat16', 'float32', 'float16'] = 'bfloat16'
    """Of the exported weights."""
    gguf: tuple[Literal['f32', 'bf16'], ...] = ()
    """Write model-f32.gguf or model-bf16.gguf too, or both, with the weights of the run."""
    gguf_without_tokenizer: Switch = False
    """Leave the tokenizer out of them: the only way for one that GGUF cannot express."""

    def __post_init__(self):
        if self.gguf_without_tokenizer and not self.gguf:
            rule = 'without gguf there is no file to leave it out of'
            raise ConfigError(f'gguf_without_tokenizer: {rule}; add --gguf bf16')


def best_numbers(run: Path) -> dict[str, Any]:
    """The held-out test that chose the exported weights: of equal ones the last.

    Of a run without tests only the last step.
    """
    logged = read_metrics(run / 'metrics.jsonl')
    tests = [m for m in logged if 'held_out_score' in m]
    if not tests and any((run / kept).is_dir() for kept in ('model', 'drafter')):
        return {'step': max((m['step'] for m in logged), default=0)}
    if not tests:
        raise DataError(f'{run}: no held-out test yet, so no model; let the training reach one')
    return max(tests, key=lambda m: (m['held_out_score'], m['step']))


def has_model(run: Path) -> bool:
    """Whether the run is to give a model: what trained heads alone has none."""
    return (run / 'model').is_dir() or not (run / 'drafter').is_dir()


def parameter_count(run: Path) -> int:
    """Of what the run gives: its model, its heads, or both."""
    own = read_config(resolve(str(run))).parameters if has_model(run) else 0
    heads = drafter_arrays(run).values() if (run / 'drafter').is_dir() else ()
    return own + sum(array.size for array in heads)


def card(name: str, run: Path, dtype: str, parameters: int) -> str:
    """The model card: what it is, how it was made, how it did."""
    settings = json.loads((run / 'settings.json').read_text('utf-8'))
    settings.pop('root', None)
    best = best_numbers(run)
    numbers = ''.join(
        f'| {k.removeprefix("held_out_").replace("_", " ")} | {v:.4g} |\n'
        for k, v in best.items()
        if k.startswith('held_out_')
    )
    chosen, test = 'the last.', settings['held_out']
    if numbers:
        chosen = f"""chosen by the held-out
test during training:

| held-out test ({test['prompts']} prompts, seed {test['seed']}) | |
| --- | ---: |
{numbers.rstrip()}"""
    return f"""---
library_name: cllm_jax
---
# {name}

A model of {parameters / 1e6:.2f}M parameters ({dtype}), trained by `cllm_jax` with the command
`python -m cllm_jax.train --config RECIPE --stage {run.name}` and exported by
`python -m cllm_jax.export`. The weights are those of step {best['step']}, {chosen}

The settings, seed included:

```yaml
{yaml.safe_dump(settings, sort_keys=False).rstrip()}
```
"""


def gguf_files(model: Model, settings: ExportConfig) -> dict[str, Callable[[Path], None] | None]:
    """What writes each GGUF file that is asked for; one that is not would be of old weights."""
    found = dict.fromkeys(map(gguf_name, GGUF_DTYPES))
    for kind in settings.gguf:
        found[gguf_name(kind)] = functools.partial(
            write_gguf, model=model, kind=kind, without_tokenizer=settings.gguf_without_tokenizer
        )
    return found


def run() -> None:
    settings, flags = parse(ExportConfig, stage='export', description=__doc__)
    console = Console()
    out = Path(settings.out or output_of('export', settings.root))
    runs = {name: exported_run(name, settings.root) for name in settings.runs}
    if settings.gguf and not any(map(has_model, runs.values())):
        names = ', '.join(runs)
        raise ConfigError(f'gguf: no model is exported, only heads ({names}); leave it out')
    if flags.plan:
        width = DTYPES[settings.dtype].itemsize
        more = sum(GGUF_DTYPES[kind].itemsize for kind in set(settings.gguf))
        total = sum(parameter_count(run) * (width + more * has_model(run)) for run in runs.values())
        print_plan(console, settings, {'writes to': out, 'bytes': size(total)})
        return
    for name, run_dir in runs.items():
        heads = {'drafter': None} if (run_dir / 'drafter').is_dir() else {}
        if has_model(run_dir):
            model = load(str(run_dir), 'float32')
            console.opened(model)
            text = card(name, run_dir, settings.dtype, model.config.parameters)
            extra = heads | gguf_files(model, settings)
            write_model(out / name, model, dtype=settings.dtype, card=text, sums=True, extra=extra)
        if heads:
            place = out / name / 'drafter' if has_model(run_dir) else out / name
            copy_drafter(run_dir, place, DTYPES[settings.dtype])
        console.note(f'{out / name}: {parameter_count(run_dir) / 1e6:.2f}M parameters')


def main() -> None:
    guard(run)


if __name__ == '__main__':
    main()
