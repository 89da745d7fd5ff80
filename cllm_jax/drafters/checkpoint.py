"""Directories of trained drafters: what it is (`drafter.json`) and its weights, in safetensors."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from cllm_jax.drafters.registry import TRAINED
from cllm_jax.drafters.trained import TrainedDrafter, tables_of
from cllm_jax.errors import ConfigError, DataError
from cllm_jax.hf.files import check_replaceable, make_readable, open_tensors, read_json
from cllm_jax.hf.model import Model
from cllm_jax.hf.tokenizer import same_tokenizer, tokenizer_fingerprint
from cllm_jax.runs.atomic import replace_directory, temporary, write_atomic
from cllm_jax.runs.checksums import SUMS, check_sums, write_sums
from cllm_jax.runs.recipe import from_mapping, no_such, to_json
from cllm_jax.runtime.keys import prng_key

SETTINGS, WEIGHTS = 'drafter.json', 'drafter.safetensors'
GIVEN = ('config', 'backend')
"""Settings that come from the model and not from the file."""


def write_drafter(directory: Path, drafter: TrainedDrafter, model: Model) -> None:
    """Write a drafter of `model` with its weights; an older one there is replaced at once."""
    fields = dataclasses.fields(drafter)
    static = [f.name for f in fields if not f.metadata.get('pytree_node', True)]
    about = {
        'kind': drafter.kind,
        'settings': {name: to_json(getattr(drafter, name)) for name in static if name not in GIVEN},
        'vocab_size': model.config.vocab_size,
        'dim': model.config.dim,
        'tokenizer': model.tokenizer and tokenizer_fingerprint(model.tokenizer),
    }
    _write(directory, about, {name: np.asarray(leaf) for name, leaf in _named(drafter.own)})


def copy_drafter(source: Path, directory: Path, dtype: jnp.dtype) -> None:
    """Write the drafter of `source`, a directory or a run, once more with weights in `dtype`.

    Raises like `read_drafter`, and DataError if `directory` holds something else.
    """
    _, about, arrays = _read(source)
    _write(directory, about, {name: array.astype(dtype) for name, array in arrays.items()})


def drafter_arrays(source: Path) -> dict[str, np.ndarray]:
    """The weights of the drafter of a directory or a run, by name; raises like `read_drafter`."""
    return _read(source)[2]


def read_drafter(directory: Path, model: Model, kind: str = '') -> TrainedDrafter:
    """The drafter of a directory, or of a run that trained one, for `model`; kind '' for any.

    Raises:
      ConfigError: no such directory, another kind, or a drafter of another model.
      DataError: its files are damaged.
    """
    directory, about, found = _read(directory, kind)
    _check_model(directory, about, model)
    known = TRAINED[about['kind']]
    fields = {field.name for field in dataclasses.fields(known)}
    given = {name: getattr(model.module, name) for name in GIVEN if name in fields}
    try:
        drafter = from_mapping(known, about['settings'], str(directory / SETTINGS), given)
    except TypeError as e:  # a setting without a default is missing
        raise DataError(f'{directory / SETTINGS}: {e}; copy it again') from None
    drafter.check_model(model, str(directory))
    shapes = jax.eval_shape(drafter.new_weights, prng_key(0), tables_of(model.params))
    wanted = {name: leaf.shape for name, leaf in _named(shapes)}
    if {name: array.shape for name, array in found.items()} != wanted:
        raise DataError(
            f'{directory / WEIGHTS}: not the tensors that {SETTINGS} describes; copy it again'
        )
    arrays = [jnp.asarray(found[name], jnp.float32) for name in wanted]
    own = jax.tree.unflatten(jax.tree.structure(shapes), arrays)
    return drafter.with_weights(own, model.params)


def _write(directory: Path, about: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    check_replaceable(directory, (SETTINGS, WEIGHTS, SUMS), 'a drafter')
    temp = temporary(directory)
    save_file(arrays, temp / WEIGHTS)
    write_atomic(temp / SETTINGS, (json.dumps(about, indent=2) + '\n').encode())
    write_sums(temp)
    make_readable(temp)
    replace_directory(temp, directory)


def _read(directory: Path, kind: str = '') -> tuple[Path, dict[str, Any], dict[str, np.ndarray]]:
    """Where a drafter lies (a run has it in a directory of its own), what it is, its weights."""
    own = directory / 'drafter'
    directory = own if not (directory / SETTINGS).is_file() and own.is_dir() else directory
    path = directory / SETTINGS
    if not path.exists():
        rule = 'name the directory of a trained drafter'
        raise ConfigError(f'{directory}: no {SETTINGS} there; {rule}')
    about = read_json(path)
    found = about.get('kind')
    if not (isinstance(about.get('settings'), dict) and isinstance(found, str)):
        raise DataError(f'{path}: not the description of a drafter; copy it again')
    if found not in TRAINED:
        raise ConfigError(f'{path}: {no_such("drafter", found, TRAINED)}')
    if kind and found != kind:
        raise ConfigError(f'{directory}: holds a {found} drafter, not {kind}; name that one')
    check_sums(directory)
    with open_tensors(directory / WEIGHTS) as f:
        return directory, about, {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118


def _check_model(directory: Path, about: dict[str, Any], model: Model) -> None:
    for name in ('vocab_size', 'dim'):
        if about.get(name) != getattr(model.config, name):
            raise ConfigError(
                f'{directory}: made for a model with {name} {about.get(name)}, {model.source} has '
                f'{getattr(model.config, name)}; use the drafter of this model'
            )
    made_with = about.get('tokenizer')
    if model.tokenizer and made_with and not same_tokenizer(made_with, model.tokenizer):
        fault = f'made with another tokenizer than that of {model.source}'
        raise ConfigError(f'{directory}: {fault}; use the drafter of this model')


def _named(own: Any) -> list[tuple[str, Any]]:
    """Every array of a tree with its name, in the order of the tree's leaves."""
    leaves = jax.tree_util.tree_leaves_with_path(own)
    return [('.'.join(key.key for key in path), leaf) for path, leaf in leaves]
