"""Directories of trained drafters: what it is (`drafter.json`) and its weights, in safetensors."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from cllm_jax.drafters.registry import TRAINED
from cllm_jax.drafters.trained import TrainedDrafter, tables_of
from cllm_jax.errors import ConfigError, DataError
from cllm_jax.hf.files import explain, listed, make_readable
from cllm_jax.hf.load import Model, tokenizer_fingerprint
from cllm_jax.runs.atomic import replace_directory, temporary, write_atomic
from cllm_jax.runs.checksums import SUMS, check_sums, write_sums
from cllm_jax.runs.recipe import from_mapping, no_such, to_json

SETTINGS, WEIGHTS = 'drafter.json', 'drafter.safetensors'
SETTINGS_BYTES = 1 << 20
GIVEN = ('config', 'backend')
"""Settings that come from the model and not from the file."""


def settings_of(drafter: type[TrainedDrafter] | TrainedDrafter) -> list[str]:
    """The names of a drafter's settings that its file holds."""
    fields = dataclasses.fields(drafter)
    static = [f.name for f in fields if not f.metadata.get('pytree_node', True)]
    return [name for name in static if name not in GIVEN]


def write_drafter(directory: Path, drafter: TrainedDrafter, model: Model) -> None:
    """Write a drafter of `model` with its weights; an older one there is replaced at once."""
    about = {
        'kind': drafter.kind,
        'settings': {name: to_json(getattr(drafter, name)) for name in settings_of(drafter)},
        'vocab_size': model.config.vocab_size,
        'dim': model.config.dim,
        'tokenizer': model.tokenizer and tokenizer_fingerprint(model.tokenizer),
    }
    _write(directory, about, {name: np.asarray(leaf) for name, leaf in _named(drafter.own)})


def copy_drafter(source: Path, directory: Path, dtype: jnp.dtype) -> None:
    """Write the drafter of `source`, a directory or a run, once more with weights in `dtype`.

    Raises:
      ConfigError: there is no drafter at `source`.
      DataError: its files are damaged, or `directory` holds something else.
    """
    arrays = {name: array.astype(dtype) for name, array in drafter_arrays(source).items()}
    _write(directory, _about(_of_run(source)), arrays)


def drafter_arrays(source: Path) -> dict[str, np.ndarray]:
    """The weights of the drafter of a directory or a run, by name, as they were written.

    Raises:
      ConfigError: there is no drafter at `source`.
      DataError: its files are damaged.
    """
    source = _of_run(source)
    _about(source)
    check_sums(source)
    return _arrays(source)


def read_drafter(directory: Path, model: Model, kind: str = '') -> TrainedDrafter:
    """The drafter of a directory, or of a run that trained one, for `model`.

    Args:
      kind: what it has to be; '' for any.

    Raises:
      ConfigError: no such directory, another kind, or a drafter of another model.
      DataError: its files are damaged.
    """
    directory = _of_run(directory)
    about = _about(directory)
    if kind and about['kind'] != kind:
        raise ConfigError(
            f'{directory}: holds a {about["kind"]} drafter, not {kind}; name that one'
        )
    check_sums(directory)
    _check_model(directory, about, model)
    known, given = TRAINED[about['kind']], {'config': model.config, 'backend': model.backend}
    fields = {f.name for f in dataclasses.fields(known)}
    given = {name: value for name, value in given.items() if name in fields}
    try:
        drafter = from_mapping(known, about['settings'], str(directory / SETTINGS), given)
    except TypeError as e:  # a setting without a default is missing
        raise DataError(f'{directory / SETTINGS}: {e}; copy it again') from None
    drafter.check_model(model, str(directory))
    shapes = jax.eval_shape(drafter.new_weights, jax.random.key(0), tables_of(model.params))
    found = _arrays(directory)
    wanted = {name: leaf.shape for name, leaf in _named(shapes)}
    if {name: array.shape for name, array in found.items()} != wanted:
        raise DataError(
            f'{directory / WEIGHTS}: not the tensors that {SETTINGS} describes; copy it again'
        )
    arrays = [jnp.asarray(found[name], jnp.float32) for name in wanted]
    own = jax.tree.unflatten(jax.tree.structure(shapes), arrays)
    return drafter.with_weights(own, model.params)


def _of_run(directory: Path) -> Path:
    """The directory itself, or where a run keeps the drafter that it trained."""
    own = directory / 'drafter'
    return own if not (directory / SETTINGS).is_file() and own.is_dir() else directory


def _write(directory: Path, about: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    kept = sorted(p.name for p in directory.glob('*') if p.name not in (SETTINGS, WEIGHTS, SUMS))
    if kept:
        raise DataError(
            f'{directory}: holds {listed(kept)}, which is not part of a drafter and would be lost; '
            'choose another directory'
        )
    temp = temporary(directory)
    save_file(arrays, temp / WEIGHTS)
    write_atomic(temp / SETTINGS, (json.dumps(about, indent=2) + '\n').encode())
    write_sums(temp)
    make_readable(temp)
    replace_directory(temp, directory)


def _arrays(directory: Path) -> dict[str, np.ndarray]:
    try:
        return load_file(directory / WEIGHTS)
    except (SafetensorError, OSError, ValueError) as e:
        raise explain(directory / WEIGHTS, e) from None


def _about(directory: Path) -> dict[str, Any]:
    path = directory / SETTINGS
    try:
        if path.stat().st_size > SETTINGS_BYTES:
            raise DataError(f'{path}: larger than 1 MiB; name the directory of a trained drafter')
        about = json.loads(path.read_text('utf-8'))
        if not isinstance(about['settings'], dict) or not isinstance(about['kind'], str):
            raise ValueError
    except FileNotFoundError:
        raise ConfigError(
            f'{directory}: no {SETTINGS} there; name the directory of a trained drafter'
        ) from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise DataError(f'{path}: not the description of a drafter; copy it again') from None
    if about['kind'] not in TRAINED:
        raise ConfigError(f'{path}: {no_such("drafter", about["kind"], TRAINED)}')
    return about


def _check_model(directory: Path, about: dict[str, Any], model: Model) -> None:
    for name in ('vocab_size', 'dim'):
        if about.get(name) != getattr(model.config, name):
            raise ConfigError(
                f'{directory}: made for a model with {name} {about.get(name)}, {model.source} has '
                f'{getattr(model.config, name)}; use the drafter of this model'
            )
    made_with = about.get('tokenizer')
    if model.tokenizer and made_with not in (None, tokenizer_fingerprint(model.tokenizer)):
        raise ConfigError(
            f'{directory}: made with another tokenizer than that of {model.source}; use the '
            'drafter of this model'
        )


def _named(own: Any) -> list[tuple[str, Any]]:
    """Every array of a tree with its name, in the order of the tree's leaves."""
    leaves = jax.tree_util.tree_leaves_with_path(own)
    return [('.'.join(key.key for key in path), leaf) for path, leaf in leaves]
