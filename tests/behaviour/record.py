"""Record what the package does, and compare it with what it did when that was recorded.

    python tests/behaviour/record.py record tests/behaviour/recorded.json.gz
    python tests/behaviour/record.py compare tests/behaviour/recorded.json.gz --only decode/jacobi

Decoding, collecting, batches and training are computed with the embedded models. Tokens, counts,
records and batches must be equal, numbers of training equal up to `TOLERANCE`. Whatever the package
is called with (prompts, weights, settings) is made here, from files and seeds alone; what calls it
is in the section ADAPTER, the only one that may follow another API. `compare` ends with exit code 1
if anything differs. Rounding, and so ties, can differ on another machine: record and compare on the
same one, with the same number of cores and the same XLA flags.
"""

import argparse
import dataclasses
import gzip
import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import ml_dtypes  # noqa: F401  (safetensors reads bfloat16 with it)
import numpy as np
from safetensors.numpy import load_file, save_file

# ---------------------------------------------------------------------------------------- ADAPTER
# From here to END OF ADAPTER is everything that touches the API of the package. Settings come as
# plain dictionaries with the names of the commands' options, arrays as NumPy's.
import cllm_jax
from cllm_jax.data.sources import open_source
from cllm_jax.decoding.engine import decode_all
from cllm_jax.decoding.request import Request
from cllm_jax.decoding.result import Trajectory
from cllm_jax.decoding.sampling import Sampling
from cllm_jax.drafters.autoregressive import AutoRegressive
from cllm_jax.drafters.checkpoint import read_drafter
from cllm_jax.drafters.draft_model import draft_model
from cllm_jax.drafters.jacobi import Jacobi
from cllm_jax.drafters.jacobi_tree import JacobiTree
from cllm_jax.drafters.lookahead import Lookahead
from cllm_jax.drafters.prompt_lookup import PromptLookup, with_references
from cllm_jax.drafters.trained import HeadsConfig
from cllm_jax.hf.load import load
from cllm_jax.training.config import TrainConfig
from cllm_jax.training.held_out import HeldOut
from cllm_jax.training.noise import Noise
from cllm_jax.training.objectives import objective_of
from cllm_jax.training.optimizer import OptimizerConfig, make_optimizer
from cllm_jax.training.packing import make_batch
from cllm_jax.training.step import LossWeights, make_step, new_state
from cllm_jax.trajectories.collector import collect, collect_rows
from cllm_jax.trajectories.store import Collection, read_manifest

SHIPPED = Path(cllm_jax.__file__).parent / 'embedded'
"""Where the directories `target`, `medusa`, `redrafter` and `eagle` are."""


def load_model(name: str) -> Any:
    """A model by name or directory, in float32."""
    return load(name, 'float32')


def untrained_drafter(name: str, model: Any, how: dict, references: list[str]) -> Any:
    """A drafter without weights."""
    makers = {
        'ar': AutoRegressive,
        'jacobi': lambda: Jacobi(16),
        'jacobi-block': lambda: Jacobi(16, 'block'),
        'jacobi-recycle': lambda: Jacobi(16, recycle=2),
        'jacobi-lookup': lambda: Jacobi(16, lookup=True),
        'jacobi-tree': lambda: JacobiTree(16),
        'lookup': PromptLookup,
        'lookup-references': lambda: with_references(model, references),
        'lookahead': Lookahead,
        'lookahead-jacobi': lambda: Lookahead(5, 4, 5, 16),
    }
    return makers[name]()


def trained_drafter(directory: Path, model: Any, how: dict) -> Any:
    """The drafter of a directory with drafter.json and drafter.safetensors."""
    return read_drafter(directory, model)


def small_model_drafter(directory: str, model: Any, how: dict) -> Any:
    """The model of another directory as the draft model, 5 tokens per forward."""
    return draft_model(model, load_model(directory), 5)


def decode(model: Any, drafter: Any, prompts: list[str], how: dict) -> tuple[list, list, list]:
    """Tokens, forwards and accepted counts of each prompt; 16 prompts at a time, seed 0."""
    request = Request(drafter, MAX_TOKENS, Sampling(**how), seed=0, batch=16)
    result = decode_all(model, request, prompts)
    return result.tokens, result.forwards, result.accepted


def collected(model: Any, source: Any, mode: str, directory: Path) -> tuple[list, dict, list]:
    """The records of all rows, with the fields `FIELDS`; the counts, and the files' sums."""
    settings = Collection(16, mode, MAX_TOKENS, seed=1, batch=16, shard=32)
    records, left_out = collect_rows(model, source, settings, range(len(source)))
    counts = collect(directory, model, source, settings, {'block': 16, 'mode': mode})
    sums = [shard['sha256'] for shard in read_manifest(directory)['shards']]
    return records, {'left out': left_out, 'collected': dict(counts)}, sums


def sample_of(prompt: np.ndarray, answer: np.ndarray, states: np.ndarray, start: np.ndarray) -> Any:
    return Trajectory(states, start, prompt, answer)


def batch_of(samples: list, step: int, noise: dict | None) -> dict[str, Any]:
    """The fields of a batch by the names that they had when this was recorded."""
    made = make_batch(samples, BATCH, 0, step, None if noise is None else Noise(**noise))
    return {f.name: getattr(made, f.name) for f in dataclasses.fields(made)}


def train_metrics(
    kind: str, model: Any, samples: list, noise: dict | None, loss: dict, optimizer: dict,
    heads: dict,
) -> tuple[list[dict[str, float]], list | None]:  # fmt: skip
    """The metrics of every step, and the tree that Medusa has after them."""
    rule = OptimizerConfig(**optimizer)
    settings = TrainConfig(
        objective=kind, seed=0, batch=BATCH, steps=STEPS, loss=LossWeights(**loss),
        optimizer=rule, heads=HeadsConfig(**heads), held_out=HeldOut(block=16),
    )  # fmt: skip
    learner = objective_of(settings).learner(settings, model, samples)
    transformation = make_optimizer(rule, STEPS)
    step = make_step(learner.loss, transformation, rule.accumulate)
    state, found = new_state(transformation, learner.params), []
    states = None if noise is None else Noise(**noise)
    for i in range(STEPS):
        batch = make_batch(samples, BATCH, 0, i, states)
        state, metrics = step(state, batch, learner.frozen)
        found.append({name: float(value) for name, value in metrics.items()})
    if kind != 'medusa':
        return found, None
    return found, [list(path) for path in learner.trained(state.params).drafter.choices]


# --------------------------------------------------------------------------------- END OF ADAPTER

TOLERANCE = 1e-6
"""By which numbers of training may differ, absolutely or relatively."""
MAX_TOKENS = 96
STEPS, BATCH = 20, 8
TASKS = ('sql', 'arithmetic')
HOW = {'greedy': {}, 'sampled': {'temperature': 0.8}}
TYPICAL = {'temperature': 0.8, 'typical': 0.09}
HOT = {'hot': {'temperature': 5.0, 'top_k': 50, 'top_p': 0.95}}
HOT_TYPICAL = {'hot-typical': {'temperature': 5.0, 'typical': 0.09}}
"""The embedded models are so sure of their tokens that 0.8 changes few of them."""
PROMPTS = 64
"""Of each task."""
SOME, FEW = slice(26, 38), slice(28, 36)
"""Out of the prompts of each task by length, those that all drafters but AR and Jacobi get, which
is more than a batch, and those that drafters get which do not ship, one batch. They are decoded in
one call and have few lengths, since most of the time goes into compiling for other lengths."""
FIELDS = ('id', 'prompt', 'answer', 'states', 'start', 'finished', 'right', 'forwards')
SEVERAL = ('ar', 'jacobi', 'jacobi-block', 'jacobi-recycle', 'jacobi-lookup', 'jacobi-tree')
UNTRAINED = (*SEVERAL, 'lookup', 'lookup-references', 'lookahead', 'lookahead-jacobi')
PAD = 1
"""The padding token of the embedded models, which is the mask of SPACE."""


def digest_of(value: Any) -> str:
    """sha256 (its first 32 digits) of an array, with its shape and type, or of a plain value."""
    if hasattr(value, 'shape'):
        value = np.asarray(value)
        data = f'{value.dtype} {value.shape} '.encode() + value.tobytes()
    else:
        data = json.dumps(value).encode()
    return hashlib.sha256(data).hexdigest()[:32]


def random_leaf(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Normal random numbers that depend on a name and a shape alone, float32."""
    seed = hashlib.sha256(f'{name} {shape}'.encode()).digest()
    rng = np.random.default_rng(int.from_bytes(seed[:8], 'big'))
    return rng.standard_normal(shape, np.float32)


def noisy(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Arrays with a little noise."""
    return {k: (v + 0.01 * random_leaf(k, v.shape)).astype(np.float32) for k, v in arrays.items()}


def write_drafter_files(
    directory: Path, kind: str, settings: dict, arrays: dict[str, np.ndarray]
) -> Path:
    """A directory that `read_drafter` opens, for the embedded target."""
    directory.mkdir(parents=True)
    about = {'kind': kind, 'settings': settings, 'vocab_size': 1536, 'dim': 192, 'tokenizer': None}
    (directory / 'drafter.json').write_text(json.dumps(about))
    save_file(arrays, directory / 'drafter.safetensors')
    return directory


def write_small_model(directory: Path) -> Path:
    """A model of one layer in Hugging Face's format, with random weights."""
    config = json.loads((SHIPPED / 'target/config.json').read_text())
    config |= {'hidden_size': 32, 'num_hidden_layers': 1, 'head_dim': 16, 'intermediate_size': 64}
    config |= {'num_attention_heads': 2, 'num_key_value_heads': 2, 'dtype': 'float32'}
    layer, shapes = 'model.layers.0', {'model.embed_tokens.weight': (1536, 32)}
    shapes |= {f'{layer}.self_attn.{name}_proj.weight': (32, 32) for name in 'qkvo'}
    shapes |= {f'{layer}.mlp.{name}_proj.weight': (64, 32) for name in ('gate', 'up')}
    shapes[f'{layer}.mlp.down_proj.weight'] = (32, 64)
    arrays = {k: 0.2 * random_leaf(k, shape) for k, shape in shapes.items()}
    norms = ('model.norm', f'{layer}.input_layernorm', f'{layer}.post_attention_layernorm')
    arrays |= {f'{name}.weight': np.ones(32, np.float32) for name in norms}
    directory.mkdir(parents=True)
    (directory / 'config.json').write_text(json.dumps(config))
    save_file(arrays, directory / 'model.safetensors', metadata={'format': 'pt'})
    return directory


def made_drafters(root: Path) -> dict[str, Path]:
    """Drafters that do not ship: those that do in other forms, with noise."""
    table_VD = load_file(SHIPPED / 'target/model.safetensors')['model.embed_tokens.weight']
    table_VD = table_VD.astype(np.float64)
    settings, own = {}, {}
    for kind in ('medusa', 'redrafter', 'eagle'):
        settings[kind] = json.loads((SHIPPED / kind / 'drafter.json').read_text())['settings']
        own[kind] = load_file(SHIPPED / kind / 'drafter.safetensors')
    tables = np.repeat(table_VD[None], settings['medusa']['heads'], axis=0)
    own['medusa'] = noisy(own['medusa'] | {'out': tables})
    project = own['redrafter'].pop('project').astype(np.float64)
    own['redrafter'] = noisy(own['redrafter'] | {'out': table_VD @ project.T})
    settings['medusa'] |= {'own_tables': True}
    settings['redrafter'] |= {'own_table': True}
    settings['eagle'] |= {'width': 1}
    made = {
        'medusa-own-tables': ('medusa', settings['medusa'], own['medusa']),
        'redrafter-own-table': ('redrafter', settings['redrafter'], own['redrafter']),
        'eagle-chain': ('eagle', settings['eagle'], noisy(own['eagle'])),
        'space': ('space', {'mask_id': PAD, 'masks': 3}, {}),
    }
    return {name: write_drafter_files(root / name, *what) for name, what in made.items()}


Entries = Iterator[tuple[str, Any]]


def decoding(wanted: tuple[str, ...]) -> Entries:
    """Every drafter, greedy and sampled, on both tasks."""
    rows = {}
    for task in TASKS:
        source = open_source(task, split='heldout', seed=0, limit=PROMPTS)
        rows[task] = [source[i] for i in range(len(source))]
        yield f'decode/prompts/{task}', digest_of([[r.prompt, r.answer] for r in rows[task]])
    references = ['\n'.join(row.answer for row in rows[task][:8]) for task in TASKS]
    models = {name: load_model(name) for name in ('embedded', 'embedded-target')}
    cllm, target = models['embedded'], models['embedded-target']

    def each(
        name: str, model: Any, make: Any, which: slice | None, hows: dict = HOW
    ) -> Entries:  # fmt: skip
        if which is None:
            several = {f'/{task}': rows[task] for task in TASKS}
        else:
            by_length = (sorted(rows[task], key=lambda row: len(row.prompt)) for task in TASKS)
            several = {'': [row for task in by_length for row in task[which]]}
        for way, how in hows.items():
            for task, chosen in several.items():
                key = f'decode/{name}/{way}{task}'
                if key.startswith(wanted):
                    prompts = [row.prompt for row in chosen]
                    tokens, forwards, accepted = decode(model, make(how), prompts, how)
                    digests = [digest_of([int(t) for t in ids]) for ids in tokens]
                    yield key, {'tokens': digests, 'forwards': forwards, 'accepted': accepted}
        # Else a process has more compiled programs than Linux lets it map.
        jax.clear_caches()

    for name in UNTRAINED:
        yield from each(
            f'{name}/cllm', cllm,
            lambda how, name=name: untrained_drafter(name, cllm, how, references),
            None if name in ('ar', 'jacobi') else SOME,
        )  # fmt: skip
    for name in ('ar', 'jacobi'):
        yield from each(
            f'{name}/target', target,
            lambda how, name=name: untrained_drafter(name, target, how, references), SOME,
        )  # fmt: skip
    for name in ('medusa', 'redrafter', 'eagle'):
        hows = HOW | ({'typical': TYPICAL} if name == 'medusa' else {})
        yield from each(
            f'{name}/target', target,
            lambda how, name=name: trained_drafter(SHIPPED / name, target, how), SOME, hows,
        )  # fmt: skip
    for name in ('ar', 'jacobi', 'jacobi-tree'):
        yield from each(
            f'{name}/cllm', cllm,
            lambda how, name=name: untrained_drafter(name, cllm, how, references), FEW, HOT,
        )  # fmt: skip
    for name in ('medusa', 'redrafter', 'eagle'):
        yield from each(
            f'{name}/target', target,
            lambda how, name=name: trained_drafter(SHIPPED / name, target, how), FEW,
            HOT | (HOT_TYPICAL if name == 'medusa' else {}),
        )  # fmt: skip
    with tempfile.TemporaryDirectory() as root:
        for name, path in made_drafters(Path(root)).items():
            yield from each(
                f'{name}/target', target,
                lambda how, path=path: trained_drafter(path, target, how), FEW,
            )  # fmt: skip
        small = write_small_model(Path(root) / 'small')
        for name, path in (('draft-model-random', str(small)), ('draft-model', 'embedded')):
            yield from each(
                f'{name}/target', target,
                lambda how, path=path: small_model_drafter(path, target, how), FEW,
            )  # fmt: skip


def collecting(wanted: tuple[str, ...]) -> Entries:
    """Records of both modes, field by field."""
    for mode, (records, counts, sums) in collections().items():
        fields = {f: [digest_of(getattr(record, f)) for record in records] for f in FIELDS}
        yield f'collect/{mode}', {'counts': counts, 'fields': fields, 'files': sums}


_collections: dict[str, tuple[list, dict, list]] = {}


def collections() -> dict[str, tuple[list, dict, list]]:
    """What `collected` returns for each mode; collected once."""
    if not _collections:
        model = load_model('embedded-target')
        source = open_source('sql+arithmetic', split='train', seed=1, limit=64)
        for mode in ('sliding', 'block'):
            with tempfile.TemporaryDirectory() as root:
                _collections[mode] = collected(model, source, mode, Path(root) / 'trajectories')
    return _collections


def samples_of(mode: str, block: int | None = None) -> list:
    """The collected records as samples; with `block`, without states, which are then made."""
    found = []
    for record in collections()[mode][0]:
        states, start = record.states, record.start
        if block is not None:
            states, start = np.zeros((0, block), np.int32), np.zeros(0, np.int32)
        found.append(sample_of(record.prompt, record.answer, states, start))
    return found


SPACE = {'fresh': 1.0, 'mask': PAD}
BATCHES = {
    'none': ('sliding', None, None),
    'default': ('sliding', None, {}),
    'pairs': ('block', None, {'pairs': True}),
    'space': ('sliding', 4, SPACE),
    'recipe': ('sliding', None, {'decay': 8.0, 'fresh': 0.15, 'corruption': 0.1}),
    'made': ('sliding', 16, {'decay': 8.0, 'fresh': 0.15}),
    'windows': ('block', None, {'windows': 3}),
}
"""Of which records, states of which size (None: as collected), and the noise."""


def batches(wanted: tuple[str, ...]) -> Entries:
    """Order and content of batches, field by field."""
    for name, (mode, block, noise) in BATCHES.items():
        samples = samples_of(mode, block)
        steps = [batch_of(samples, step, noise) for step in range(2 * STEPS)]
        fields = {f: [digest_of(batch[f])[:16] for batch in steps] for f in sorted(steps[0])}
        yield f'batches/{name}', fields


ADAMW = {'kind': 'adamw', 'learning_rate': 1e-3}
MUON = {'kind': 'muon', 'learning_rate': 1e-3, 'accumulate': 2}
ALONE = {'global_weight': 0.0}
TRAININGS = {
    'ar': ('ar', 'sliding', None, None, ALONE, ADAMW, {}),
    'consistency': ('consistency', 'sliding', None, {}, {}, ADAMW, {}),
    'consistency-pairs': (
        'consistency', 'block', None, {'pairs': True}, {'local_weight': 0.5}, ADAMW, {},
    ),
    'consistency-muon': (
        'consistency', 'sliding', None, {'decay': 8.0, 'fresh': 0.15}, {'ar_weight': 6.0}, MUON, {},
    ),
    'medusa': ('medusa', 'sliding', 5, None, ALONE, ADAMW, {'own_table': False}),
    'medusa-joint': ('medusa', 'sliding', 5, None, ALONE, ADAMW, {'joint': True}),
    'redrafter': ('redrafter', 'sliding', 6, None, ALONE, ADAMW, {'ahead': 5, 'own_table': False}),
    'redrafter-own-table': ('redrafter', 'sliding', 5, None, ALONE, ADAMW, {}),
    'eagle': ('eagle', 'sliding', 5, None, ALONE, ADAMW, {'beams': 3}),
    'space': (
        'space', 'sliding', 4, SPACE, ALONE | {'state_weight': 1.0}, ADAMW, {'ahead': 3},
    ),
}  # fmt: skip
"""Objective, records, size of made states, noise, losses, optimiser and sizes of heads."""


def training(wanted: tuple[str, ...]) -> Entries:
    """Metrics of every step of every objective."""
    model = load_model('embedded-target')
    for name, (kind, mode, block, *settings) in TRAININGS.items():
        if f'train/{name}'.startswith(wanted):
            steps, tree = train_metrics(kind, model, samples_of(mode, block), *settings)
            metrics = {metric: [step[metric] for step in steps] for metric in sorted(steps[0])}
            yield f'train/{name}', {'metrics': metrics, 'tree': tree}
            jax.clear_caches()


SECTIONS = {'decode': decoding, 'collect': collecting, 'batches': batches, 'train': training}


def entries(wanted: tuple[str, ...]) -> Entries:
    """Everything whose name begins with one of `wanted`, as JSON would give it back."""
    for section, compute in SECTIONS.items():
        if any(name.startswith(section) or section.startswith(name) for name in wanted):
            for name, value in compute(wanted):
                if name.startswith(wanted):
                    yield name, json.loads(json.dumps(value, default=int))


def differences(old: Any, new: Any, where: str = '') -> list[str]:
    """What differs between two values, one line per leaf."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = [f'{where}/{k}: {"gone" if k in old else "new"}' for k in old.keys() ^ new.keys()]
        for k in old.keys() & new.keys():
            found += differences(old[k], new[k], f'{where}/{k}')
        return sorted(found)
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = enumerate(zip(old, new, strict=True))
        return [line for i, (a, b) in pairs for line in differences(a, b, f'{where}[{i}]')]
    if isinstance(old, float) and isinstance(new, float):
        apart = abs(old - new)
        if apart <= TOLERANCE * max(1.0, abs(old), abs(new)):
            return []
        return [f'{where}: {old!r} was recorded, now {new!r}, {apart:.2g} apart']
    return [] if old == new else [f'{where}: {old!r} was recorded, now {new!r}']


def record(path: Path, wanted: tuple[str, ...]) -> int:
    """Write everything, or replace what begins with one of `wanted`."""
    found = {}
    if wanted != ('',) and path.exists():
        found = json.loads(gzip.decompress(path.read_bytes()))
    for name, value in timed(entries(wanted)):
        found[name] = value
        data = json.dumps(found, separators=(',', ':')).encode()
        path.write_bytes(gzip.compress(data, mtime=0))
    print(f'{path}: {len(found)} entries, {path.stat().st_size} bytes')
    return 0


def compare(path: Path, wanted: tuple[str, ...]) -> int:
    """Print of every entry whether it is equal, else what differs; 1 if anything does."""
    recorded = json.loads(gzip.decompress(path.read_bytes()))
    old, different = {k: v for k, v in recorded.items() if k.startswith(wanted)}, 0
    for name, value in timed(entries(wanted)):
        lines = differences(old.pop(name), value) if name in old else ['was not recorded']
        print('   equal' if not lines else f'   {len(lines)} DIFFERENCES', flush=True)
        print(''.join(f'      {line}\n' for line in lines[:8]), end='', flush=True)
        different += bool(lines)
    for name in old:
        print(f'{name}\n   NOT COMPUTED')
    different += len(old)
    print(f'{different} entries differ')
    return int(different > 0)


def timed(computed: Entries) -> Entries:
    """The entries, each after a line with its name and the seconds that it took."""
    begin = time.perf_counter()
    for name, value in computed:
        print(f'{name}  ({time.perf_counter() - begin:.1f} s)', flush=True)
        yield name, value
        begin = time.perf_counter()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('action', choices=('record', 'compare'))
    parser.add_argument('file', type=Path)
    parser.add_argument('--only', nargs='+', default=[''], help="beginnings of entries' names")
    arguments = parser.parse_args()
    act = record if arguments.action == 'record' else compare
    return act(arguments.file, tuple(arguments.only))


if __name__ == '__main__':
    sys.exit(main())
