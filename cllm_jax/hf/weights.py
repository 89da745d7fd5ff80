"""Hugging Face model directories in and out, without torch.

One table says where each parameter lives. Hugging Face keeps matrices as (outputs, inputs): reading
transposes the parts that are wanted, and writing is the inverse, bit for bit.
"""

import functools
import json
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from cllm_jax.errors import ConfigError, DataError
from cllm_jax.hf.files import INDEX, SINGLE, Stored, explain, listed, read_headers
from cllm_jax.model.config import LlamaConfig, config_json, one_line, parse_config, read_config
from cllm_jax.model.llama import Llama, init_params
from cllm_jax.runs.atomic import recover_replacement, replace_directory, temporary
from cllm_jax.runs.checksums import check_sums, write_sums

SHARD_BYTES = 4 << 30
DTYPES = {name: jnp.dtype(name) for name in ('float32', 'bfloat16', 'float16')}
STORED = ('F64', 'F32', 'F16', 'BF16')
"""Number formats (as safetensors spells them) that hold plain weights."""
MODEL_SUFFIXES = ('.json', '.safetensors', '.model', '.jinja', '.txt', '.sha256')
MODEL_DIRS = ('additional_chat_templates',)
"""What a model directory that may be overwritten consists of."""
BLOCK_NAMES = {
    'attn_norm': 'input_layernorm.weight',
    'q': 'self_attn.q_proj.weight',
    'k': 'self_attn.k_proj.weight',
    'v': 'self_attn.v_proj.weight',
    'o': 'self_attn.o_proj.weight',
    'q_bias': 'self_attn.q_proj.bias',
    'k_bias': 'self_attn.k_proj.bias',
    'v_bias': 'self_attn.v_proj.bias',
    'q_norm': 'self_attn.q_norm.weight',
    'k_norm': 'self_attn.k_norm.weight',
    'mlp_norm': 'post_attention_layernorm.weight',
    'gate': 'mlp.gate_proj.weight',
    'up': 'mlp.up_proj.weight',
    'down': 'mlp.down_proj.weight',
}
TOP_NAMES = {
    'embed': 'model.embed_tokens.weight',
    'norm': 'model.norm.weight',
    'head': 'lm_head.weight',
}


def _matrix(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a layer's parameter with its input and its output axes merged."""
    if name in ('q', 'k', 'v'):
        return (shape[0], shape[1] * shape[2])
    if name == 'o':
        return (shape[0] * shape[1], shape[2])
    return (shape[0] * shape[1],) if name.endswith('_bias') else shape


def _hf_view(name: str, leaf: np.ndarray) -> np.ndarray:
    """A layer's parameter as Hugging Face has it: matrices as (outputs, inputs), biases flat."""
    return leaf.reshape(_matrix(name, leaf.shape)).T


@functools.lru_cache(maxsize=16)
def _abstract(config: LlamaConfig, dtype: Any) -> Any:
    return jax.eval_shape(lambda: init_params(Llama(config, dtype), jax.random.key(0)))


def abstract_params(config: LlamaConfig, dtype: jnp.dtype = jnp.float32) -> Any:
    """Shapes and dtypes of the parameters, without computing any."""
    return jax.tree.map(lambda leaf: leaf, _abstract(config, dtype))


def tensor_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """The tensors of a checkpoint of this architecture, by Hugging Face name."""
    params = abstract_params(config)
    return {
        hf_name: leaf.shape if name in TOP_NAMES else _matrix(name, leaf.shape)[::-1]
        for hf_name, name, leaf in _named(params)
    }


def _hf_names(params: Any) -> Any:
    """The tree of Hugging Face's names for a tree of parameters."""
    names = {name: TOP_NAMES[name] for name in params if name in TOP_NAMES}
    for i in range(len(params) - len(names)):
        layer = params[f'layers_{i}']
        names[f'layers_{i}'] = {n: f'model.layers.{i}.{BLOCK_NAMES[n]}' for n in layer}
    return names


def _named(params: Any) -> Iterator[tuple[str, str, Any]]:
    """Every parameter with its Hugging Face name and its own, one layer at a time."""
    for name, hf_name in _hf_names(params).items():
        if name in TOP_NAMES:
            yield hf_name, name, params[name]
        else:
            yield from ((hf_name[n], n, params[name][n]) for n in hf_name)


def _check(directory: Path, config: LlamaConfig, found: dict[str, Stored]) -> None:
    """Refuse anything but exactly the tensors, shapes and formats of this architecture."""
    shapes, head = tensor_shapes(config), TOP_NAMES['head']
    allowed = shapes | ({head: shapes[TOP_NAMES['embed']]} if config.tied else {})
    if missing := sorted(shapes.keys() - found.keys()):
        remedy = 'fetch the whole model again'
        if missing == [head]:
            remedy = 'set tie_word_embeddings to true in config.json if the head is the embedding'
        raise DataError(f'{directory}: missing tensors: {listed(missing)}; {remedy}')
    if extra := sorted(found.keys() - allowed.keys()):
        raise DataError(
            f'{directory}: tensors that a {config.family} model of this config.json has not: '
            f'{listed(extra)}; use the config.json that belongs to these weights'
        )
    wrong = sorted(name for name, tensor in found.items() if tensor.shape != allowed[name])
    if wrong:
        pairs = [f'{n} is {found[n].shape} and not {allowed[n]}' for n in wrong]
        raise DataError(
            f'{directory}: {listed(pairs)}; use the config.json that belongs to these weights'
        )
    if formats := sorted(n for n, tensor in found.items() if tensor.dtype not in STORED):
        raise DataError(
            f'{directory}: {found[formats[0]].dtype} tensors: {listed(formats)}; '
            f'weights must be {", ".join(STORED)}, export the model unquantised'
        )


def _cast(name: str, tensor: np.ndarray, dtype: jnp.dtype) -> np.ndarray:
    """`astype`, but a finite weight must stay finite; only float16 has too short a range."""
    with np.errstate(over='ignore'):
        out = tensor.astype(dtype)
    if dtype == jnp.float16 and not np.array_equal(np.isfinite(tensor), np.isfinite(out)):
        raise ConfigError(f'{name}: a weight exceeds 65504, the range of float16; use bfloat16')
    return out


def read_model(
    directory: Path,
    dtype: jnp.dtype = jnp.float32,
    place: Callable[[LlamaConfig], Any] = lambda config: None,
) -> tuple[LlamaConfig, Any]:
    """Read a model directory: its config and its parameters, cast to `dtype`.

    Names, shapes and formats are checked before any weight is read or memory taken; besides the
    result, one tensor is in memory at a time.

    Args:
      directory: holds config.json and safetensors.
      dtype: of the parameters.
      place: from the config to a tree of shardings. Each process then reads only what its own
        devices hold, which goes straight there. None leaves the choice to JAX.

    Raises:
      DataError: a missing or damaged file; pickled weights; missing, extra or ill-shaped tensors.
      ConfigError: an architecture that is not supported.
    """
    config = read_config(directory)
    found = read_headers(directory)
    _check(directory, config, found)
    _check_tied(directory, config, found)
    check_sums(directory)
    abstract = abstract_params(config, dtype)
    names = {name: one for name, *one in _named(abstract)}
    places = place(config)
    where = {name: sharding for name, _, sharding in _named(places or {})}
    arrays = {}
    for path in dict.fromkeys(stored.file for stored in found.values()):
        try:
            with safe_open(path, framework='np') as f:
                for name in names.keys() & f.keys():
                    arrays[name] = _read(f, name, *names[name], where.get(name))
        except (SafetensorError, OSError, ValueError) as e:
            raise explain(path, e) from None
    leaves = jax.tree.leaves(_hf_names(abstract))
    return config, jax.tree.unflatten(jax.tree.structure(abstract), [arrays[n] for n in leaves])


def _read(file: Any, hf_name: str, name: str, leaf: Any, sharding: Sharding | None) -> jax.Array:
    """One parameter, read part by part as its devices need it."""
    stored, parts = file.get_slice(hf_name), {}

    def part(index: tuple[slice, ...]) -> np.ndarray:
        spans = tuple(s.indices(n)[:2] for s, n in zip(index, leaf.shape, strict=True))
        if spans not in parts:
            tensor = _cast(hf_name, stored[_hf_index(name, spans, leaf.shape)], leaf.dtype)
            shape = [stop - start for start, stop in spans]
            parts[spans] = tensor if name in TOP_NAMES else tensor.T.reshape(shape)
        return parts[spans]

    if sharding is None:
        return jnp.asarray(part((slice(None),) * len(leaf.shape)))
    return jax.make_array_from_callback(leaf.shape, sharding, part)


def _hf_index(name: str, spans: Sequence[tuple[int, int]], shape: Sequence[int]) -> tuple:
    """Where Hugging Face's tensor has the given part of a parameter; heads are never cut."""
    slices = [slice(*span) for span in spans]
    if name in TOP_NAMES or len(shape) == 1:
        return tuple(slices)
    first = 1 if name in ('q', 'k', 'v') else 0  # of the two axes that are one in the file
    if name in ('q', 'k', 'v', 'o') or name.endswith('_bias'):
        start, stop = (at * shape[first + 1] for at in spans[first])
        slices[first : first + 2] = [slice(start, stop)]
    return tuple(reversed(slices))


def _check_tied(directory: Path, config: LlamaConfig, found: dict[str, Stored]) -> None:
    """A head that is stored beside the embedding it is tied to must be the same."""
    names = [TOP_NAMES['head'], TOP_NAMES['embed']]
    if not config.tied or names[0] not in found:
        return
    tensors = []
    for name in names:
        path = found[name].file
        try:
            with safe_open(path, framework='np') as f:
                tensors.append(f.get_tensor(name))
        except (SafetensorError, OSError, ValueError) as e:
            raise explain(path, e) from None
    if not np.array_equal(*tensors, equal_nan=True):
        raise DataError(
            f'{directory}: lm_head.weight differs from the embedding although config.json ties '
            'them; set tie_word_embeddings to false'
        )


def named_tensors(params: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Every parameter under its Hugging Face name, one layer at a time."""
    for hf_name, name, leaf in _named(params):
        array = np.asarray(leaf)
        # safetensors writes the memory of an array whatever its strides.
        yield hf_name, np.ascontiguousarray(array if name in TOP_NAMES else _hf_view(name, array))


def write_model(
    directory: Path,
    config: LlamaConfig,
    params: Any,
    tokenizer: Any = None,
    *,
    dtype: str = 'bfloat16',
    shard_bytes: int = SHARD_BYTES,
    card: str = '',
    sums: bool = False,
    rewritten: Set[str] = frozenset(),
) -> None:
    """Write a directory that `read_model` and `transformers` load, with `card` as its README.md.

    With `sums` it holds the sha256 of its files, which `read_model` then checks (`sums.py`). An old
    model there is replaced, with what else the caller says will be `rewritten`.

    Files go to a sibling temporary directory first, which then takes the final name: a reader
    never sees half a model.

    Raises:
      ConfigError: an unknown `dtype`, a config no supported family has, or parameters of another
        config.
      DataError: the directory exists and is not an (old) model directory, or cannot be written.
    """
    if dtype not in DTYPES:
        raise ConfigError(f'dtype {dtype!r} is unknown; choose one of {", ".join(DTYPES)}')
    shapes = jax.tree.map(jnp.shape, params)
    if shapes != jax.tree.map(jnp.shape, abstract_params(config)):
        raise ConfigError(f'{directory}: the parameters do not belong to this config; pass its own')
    directory = directory.resolve()
    raw = config_json(config, dtype)
    if parse_config(directory / 'config.json', raw) != config:
        raise ConfigError(f'{directory}: no {config.family} model is {config}; correct its family')
    try:
        temp = temporary(directory)
        _check_replaceable(directory, {'README.md', *rewritten} if card else rewritten)
        (temp / 'config.json').write_text(json.dumps(raw, indent=2) + '\n', 'utf-8')
        if tokenizer is not None:
            tokenizer.save_pretrained(temp)
        if card:
            (temp / 'README.md').write_text(card, 'utf-8')
        _write_weights(temp, named_tensors(params), dtype, shard_bytes)
        if sums:
            write_sums(temp)
        make_readable(temp)
        replace_directory(temp, directory)
    except (OSError, SafetensorError) as e:
        raise DataError(
            f'{directory}: not written ({one_line(e)}); free some space or choose another directory'
        ) from None
    finally:
        recover_replacement(directory)


def _check_replaceable(directory: Path, rewritten: Set[str]) -> None:
    if not directory.exists():
        return
    if not directory.is_dir():
        raise DataError(f'{directory}: is a file; choose another directory')
    present = sorted(p for p in directory.iterdir() if p.name not in rewritten)
    foreign = [
        p.name
        for p in present
        if (p.name not in MODEL_DIRS if p.is_dir() else p.suffix not in MODEL_SUFFIXES)
    ]
    if present and not (directory / 'config.json').is_file():
        foreign = foreign or [present[0].name]
    if foreign:
        raise DataError(
            f'{directory}: holds {listed(foreign)}, which is no part of a model and would be '
            'lost; choose another directory'
        )


def _write_weights(
    directory: Path, tensors: Iterable[tuple[str, np.ndarray]], dtype: str, shard_bytes: int
) -> None:
    """Write shards as they fill, so that one shard at a time is in memory twice."""
    shard: dict[str, np.ndarray] = {}
    written: list[list[str]] = []
    total = size = 0

    def flush():
        save_file(shard, directory / f'shard-{len(written)}', metadata={'format': 'pt'})
        written.append(list(shard))
        shard.clear()

    for name, tensor in tensors:
        tensor = _cast(name, tensor, jnp.dtype(dtype))
        if shard and size + tensor.nbytes > shard_bytes:
            flush()
            size = 0
        shard[name] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
    flush()
    if len(written) == 1:
        (directory / 'shard-0').rename(directory / SINGLE)
        return
    weight_map = {}
    for i, names in enumerate(written):
        file = f'model-{i + 1:05}-of-{len(written):05}.safetensors'
        (directory / f'shard-{i}').rename(directory / file)
        weight_map |= dict.fromkeys(names, file)
    index = {'metadata': {'total_size': total}, 'weight_map': weight_map}
    (directory / INDEX).write_text(json.dumps(index, indent=2) + '\n', 'utf-8')


def make_readable(directory: Path) -> None:
    """Every file as readable as its JSON files (safetensors writes mode 0600)."""
    mode = stat.S_IMODE(next(directory.glob('*.json')).stat().st_mode)
    for path in directory.rglob('*'):
        if path.is_file():
            path.chmod(mode)
