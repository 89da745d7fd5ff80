"""The weights of a Hugging Face model directory, without torch.

Hugging Face keeps matrices as (outputs, inputs): reading transposes the parts that are wanted, and
writing (`write.py`) is the inverse, bit for bit.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, Sharding

from cllm_jax.errors import ConfigError, DataError
from cllm_jax.hf.adapter import Adapter, read_deltas
from cllm_jax.hf.config import read_config
from cllm_jax.hf.files import STORED, Stored, listed, open_tensors, read_headers
from cllm_jax.model.config import LlamaConfig
from cllm_jax.model.llama import Llama, init_params, param_axes
from cllm_jax.runs.checksums import check_sums
from cllm_jax.runtime.keys import prng_key
from cllm_jax.runtime.sharding import param_shardings

DTYPES = {name: jnp.dtype(name) for name in ('float32', 'bfloat16', 'float16')}
BLOCK_NAMES = {
    'attn_norm': 'input_layernorm.weight',
    'mlp_norm': 'post_attention_layernorm.weight',
    **{name: f'self_attn.{name}_proj.weight' for name in ('q', 'k', 'v', 'o')},
    **{f'{name}_bias': f'self_attn.{name}_proj.bias' for name in ('q', 'k', 'v', 'o')},
    **{f'{name}_norm': f'self_attn.{name}_norm.weight' for name in ('q', 'k')},
    **{name: f'mlp.{name}_proj.weight' for name in ('gate', 'up', 'down')},
    **{f'{name}_bias': f'mlp.{name}_proj.bias' for name in ('gate', 'up', 'down')},
}
EMBED, HEAD = 'model.embed_tokens.weight', 'lm_head.weight'
TOP_NAMES = {'embed': EMBED, 'norm': 'model.norm.weight', 'head': HEAD}
HEAD_AXES = {'q': 1, 'k': 1, 'v': 1, 'o': 0, 'q_bias': 0, 'k_bias': 0, 'v_bias': 0}
"""Where a parameter has its axis of heads, which Hugging Face merges with the next axis."""


@functools.lru_cache(maxsize=16)
def abstract_params(
    config: LlamaConfig, dtype: jnp.dtype = jnp.float32, matrices: jnp.dtype | None = None
) -> Any:
    """Shapes and dtypes of the parameters, computing none; the tree is shared, do not change it.

    `matrices` is the dtype of what is multiplied, `dtype` too if None.
    """
    params = jax.eval_shape(lambda: init_params(Llama(config, dtype), prng_key(0)))
    lower = matrices or dtype
    return map_matrices(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, lower), params)


def map_matrices(change: Callable[[Any], Any], params: Any) -> Any:
    """The parameters with all changed but norms and biases."""

    def changed(path: tuple, leaf: Any) -> Any:
        return leaf if path[-1].key.endswith(('norm', 'bias')) else change(leaf)

    return jax.tree_util.tree_map_with_path(changed, params)


def tensor_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """The tensors of a checkpoint of this architecture, by Hugging Face name."""
    tensors = named(abstract_params(config))
    return {hf_name: _merged(name, leaf.shape) for hf_name, (name, leaf) in tensors.items()}


def named(params: Any) -> dict[str, tuple[str, Any]]:
    """Hugging Face's name of every parameter -> (its own, the parameter), in the tree's order."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        *layer, name = (key.key for key in path)
        hf_name = TOP_NAMES.get(name)
        if layer:
            hf_name = f'model.layers.{layer[0].removeprefix("layers_")}.{BLOCK_NAMES[name]}'
        found[hf_name] = name, leaf
    return found


def hf_tensor(name: str, leaf: Any) -> np.ndarray:
    """A parameter as Hugging Face stores it, in memory that is in one piece."""
    array = np.asarray(leaf)
    if name not in TOP_NAMES:
        array = array.reshape(_merged(name, array.shape)[::-1]).T
    return np.ascontiguousarray(array)  # safetensors writes the memory whatever the strides


def _merged(name: str, sizes: Sequence[int]) -> tuple[int, ...]:
    """From a size per axis of a parameter to the sizes of Hugging Face's tensor."""
    if name in TOP_NAMES:
        return tuple(sizes)
    if (at := HEAD_AXES.get(name)) is not None:
        sizes = (*sizes[:at], sizes[at] * sizes[at + 1], *sizes[at + 2 :])
    return tuple(reversed(sizes))


def cast(name: str, tensor: np.ndarray, dtype: jnp.dtype) -> np.ndarray:
    """`astype`; ConfigError if a finite weight is beyond the range of `dtype`, float16's alone."""
    with np.errstate(over='ignore'):
        out = tensor.astype(dtype)
    if dtype == jnp.float16 and not np.array_equal(np.isfinite(tensor), np.isfinite(out)):
        raise ConfigError(f'{name}: a weight exceeds 65504, the range of float16; use bfloat16')
    return out


def read_model(
    directory: Path,
    dtype: jnp.dtype = jnp.float32,
    mesh: Mesh | None = None,
    adapters: Sequence[Adapter] = (),
    matrices: jnp.dtype | None = None,
) -> tuple[LlamaConfig, Any]:
    """Read a model directory: its config and its parameters, cast to `dtype`.

    Names, shapes and formats are checked before any weight is read or memory taken. In addition to
    the result, one tensor is in memory at a time.

    Args:
      directory: holds config.json and safetensors.
      dtype, matrices: of the parameters, see `abstract_params`.
      mesh: devices that share the weights; each process reads only what its own devices hold. None
        leaves the choice to JAX.
      adapters: merged into the weights before they are cast.

    Raises:
      DataError: a missing or damaged file; pickled weights; missing, extra or ill-shaped tensors,
        those of an adapter too.
      ConfigError: an architecture that is not supported.
    """
    config = read_config(directory)
    found = read_headers(directory)
    _check(directory, config, found)
    if config.tied and HEAD in found:
        _check_tied(directory, found)
    deltas = deltas_of(config, adapters)
    for place in {directory, *(adapter.directory for adapter in adapters)}:
        check_sums(place)
    files = dict.fromkeys(stored.file for stored in found.values())
    abstract = abstract_params(config, dtype, matrices)
    return config, params_of(config, abstract, mesh, map(open_tensors, files), deltas)


def deltas_of(
    config: LlamaConfig, adapters: Sequence[Adapter]
) -> dict[str, Callable[[], np.ndarray]]:
    """What adapters add to matrices, by module, as `params_of` takes it; see `read_deltas`."""
    shapes = {n: s for n, s in tensor_shapes(config).items() if len(s) == 2 and n != EMBED}
    modules, found = {n.removesuffix('.weight'): s for n, s in shapes.items()}, {}
    for adapter in adapters:
        for module, delta in read_deltas(adapter, modules).items():
            before = found.get(module)
            found[module] = functools.partial(_sum, before, delta) if before else delta
    return found


def _sum(*deltas: Callable[[], np.ndarray]) -> np.ndarray:
    return sum(delta() for delta in deltas)


def params_of(
    config: LlamaConfig,
    abstract: Any,
    mesh: Mesh | None,
    files: Iterable[AbstractContextManager[Any]],
    deltas: Mapping[str, Callable[[], np.ndarray]] = MappingProxyType({}),
) -> Any:
    """The parameters, read one tensor at a time from files that have been checked.

    Args:
      abstract: their shapes and dtypes.
      mesh: see `read_model`.
      files: what they give in a `with` block has `keys()`, Hugging Face's names, and `get_slice`.
      deltas: what is added to matrices, by module.
    """
    places, arrays, wanted = {}, {}, named(abstract)
    if mesh is not None:
        shardings = jax.tree.leaves(param_shardings(param_axes(config), abstract, mesh))
        places = dict(zip(wanted, shardings, strict=True))
    for file in files:
        with file as f:
            for hf_name in sorted(wanted.keys() & f.keys()):
                add = deltas.get(hf_name.removesuffix('.weight'))
                arrays[hf_name] = _read(f, hf_name, *wanted[hf_name], places.get(hf_name), add)
    return jax.tree.unflatten(jax.tree.structure(abstract), [arrays[n] for n in wanted])


def _check(directory: Path, config: LlamaConfig, found: dict[str, Stored]) -> None:
    """Refuse anything but exactly the tensors, shapes and formats of this architecture."""
    shapes = tensor_shapes(config)
    allowed = shapes | ({HEAD: shapes[EMBED]} if config.tied else {})
    if shapes.keys() - found.keys() == {HEAD}:
        remedy = 'set tie_word_embeddings to true in config.json if the head is the embedding'
        raise DataError(f'{directory}: missing tensors: {HEAD}; {remedy}')
    own = f'a {config.family} model of this config.json'
    remedy = 'use the config.json that belongs to these weights'
    stored = {name: tensor.shape for name, tensor in found.items()}
    check_tensors(directory, stored, shapes, allowed, f'{own} has not', remedy)
    if formats := sorted(n for n, tensor in found.items() if tensor.dtype not in STORED):
        raise DataError(
            f'{directory}: {found[formats[0]].dtype} tensors: {listed(formats)}; '
            f'weights must be {", ".join(STORED)}, export the model unquantised'
        )


def check_tensors(
    place: Path,
    stored: Mapping[str, tuple[int, ...]],
    wanted: Mapping[str, tuple[int, ...]],
    allowed: Mapping[str, tuple[int, ...]],
    foreign: str,
    remedy: str,
) -> None:
    """Refuse tensors that are missing, not `allowed`, or of another shape than there, by name.

    `foreign` ends the sentence about those that are not allowed; `remedy` is for these and shapes.
    """
    if missing := sorted(wanted.keys() - stored.keys()):
        raise DataError(f'{place}: missing tensors: {listed(missing)}; fetch the whole model again')
    if extra := sorted(stored.keys() - allowed.keys()):
        raise DataError(f'{place}: tensors that {foreign}: {listed(extra)}; {remedy}')
    wrong = sorted(name for name, shape in stored.items() if shape != allowed[name])
    if differ := [f'{name} is {stored[name]} and not {allowed[name]}' for name in wrong]:
        raise DataError(f'{place}: {listed(differ)}; {remedy}')


def _read(
    file: Any,
    hf_name: str,
    name: str,
    leaf: Any,
    sharding: Sharding | None,
    delta: Callable[[], np.ndarray] | None,
) -> jax.Array:
    """One parameter, read part by part as its devices need it; what is added to it is whole."""
    stored, parts = file.get_slice(hf_name), {}
    added = delta and delta()

    def part(index: tuple[slice, ...]) -> np.ndarray:
        spans = tuple(s.indices(n)[:2] for s, n in zip(index, leaf.shape, strict=True))
        if spans not in parts:
            at = _hf_index(name, spans, leaf.shape)
            tensor = stored[at] if added is None else stored[at].astype(np.float32) + added[at]
            tensor = cast(hf_name, tensor, leaf.dtype)
            shape = [stop - start for start, stop in spans]
            parts[spans] = tensor if name in TOP_NAMES else tensor.T.reshape(shape)
        return parts[spans]

    if sharding is None:
        return jnp.asarray(part((slice(None),) * len(leaf.shape)))
    return jax.make_array_from_callback(leaf.shape, sharding, part)


def _hf_index(name: str, spans: Sequence[tuple[int, int]], shape: Sequence[int]) -> tuple:
    """Where Hugging Face's tensor has the given part of a parameter; heads are never cut."""
    starts, stops = ([span[end] for span in spans] for end in (0, 1))
    if name in HEAD_AXES:  # a start at head n is at number n * width of the merged axis
        width = HEAD_AXES[name] + 1
        starts[width] = shape[width]
    return tuple(map(slice, _merged(name, starts), _merged(name, stops)))


def _check_tied(directory: Path, found: dict[str, Stored]) -> None:
    """Refuse a stored head that differs from the embedding to which it is tied."""
    tensors = []
    for name in (HEAD, EMBED):
        with open_tensors(found[name].file) as f:
            tensors.append(f.get_tensor(name))
    if not np.array_equal(*tensors, equal_nan=True):
        fault = f'{HEAD} differs from the embedding although config.json ties them'
        raise DataError(f'{directory}: {fault}; set tie_word_embeddings to false')
