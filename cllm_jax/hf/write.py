"""Writing a model directory that `read_model` and `transformers` load: all of it or nothing."""

import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors.numpy import save_file

from cllm_jax.errors import ConfigError, DataError
from cllm_jax.hf.config import config_json, parse_config
from cllm_jax.hf.files import INDEX, listed, written_whole
from cllm_jax.hf.model import Model
from cllm_jax.hf.tokenizer import write_tokenizer
from cllm_jax.hf.weights import DTYPES, abstract_params, cast, hf_tensor, named
from cllm_jax.runs.checksums import write_sums

SHARD_BYTES = 4 << 30
MODEL_SUFFIXES = ('.json', '.safetensors', '.model', '.jinja', '.txt', '.sha256')
MODEL_DIRS = ('additional_chat_templates',)  # with the suffixes: what may be overwritten


def write_model(
    directory: Path,
    model: Model,
    *,
    dtype: str = 'bfloat16',
    shard_bytes: int = SHARD_BYTES,
    card: str = '',
    sums: bool = False,
    extra: Mapping[str, Callable[[Path], None] | None] = MappingProxyType({}),
) -> None:
    """Write config, weights and tokenizer; an old model in the directory is replaced.

    Files go to a temporary directory first, which then takes the final name: a reader never sees
    half a model.

    Args:
      dtype: of the weights, one of `DTYPES`.
      shard_bytes: size from which on the weights are divided into several files.
      card: the text of README.md; '' for none.
      sums: write the sha256 of every file too, which `read_model` then checks (`checksums.py`).
      extra: further files by name, with what writes each, or None. Old ones may be lost.

    Raises:
      ConfigError: an unknown `dtype`, a config no supported family has, parameters of another
        config, or a tokenizer that could not be read.
      DataError: the directory exists and is not an (old) model directory, or cannot be written.
    """
    config = model.config
    if dtype not in DTYPES:
        raise ConfigError(f'dtype {dtype!r} is unknown; choose one of {", ".join(DTYPES)}')
    found, wanted = (jax.tree.map(jnp.shape, p) for p in (model.params, abstract_params(config)))
    if found != wanted:
        raise ConfigError(f'{directory}: the parameters do not belong to this config; pass its own')
    if model.lacks:
        raise ConfigError(f'{model.source}: {model.lacks}, or its tokenizer would be lost')
    if card:
        extra = {**extra, 'README.md': lambda path: path.write_text(card, 'utf-8')}
    directory = directory.resolve()
    raw = config_json(config, dtype)
    if parse_config(directory / 'config.json', raw) != config:
        raise ConfigError(f'{directory}: no {config.family} model is {config}; correct its family')
    with written_whole(directory) as temp:
        _check_replaceable(directory, extra)
        (temp / 'config.json').write_text(json.dumps(raw, indent=2) + '\n', 'utf-8')
        if model.tokenizer is not None:
            write_tokenizer(temp, model.tokenizer)
        for name in filter(extra.get, extra):
            extra[name](temp / name)
        _write_weights(temp, model.params, jnp.dtype(dtype), shard_bytes)
        if sums:
            write_sums(temp)


def _check_replaceable(directory: Path, rewritten: Collection[str]) -> None:
    if directory.exists() and not directory.is_dir():
        raise DataError(f'{directory}: is a file; choose another directory')
    is_model = (directory / 'config.json').is_file()

    def replaceable(path: Path) -> bool:
        known = path.name in MODEL_DIRS if path.is_dir() else path.suffix in MODEL_SUFFIXES
        return path.name in rewritten or (is_model and known)

    if foreign := sorted(path.name for path in directory.glob('*') if not replaceable(path)):
        fault = f'holds {listed(foreign)}, which is not part of a model and would be lost'
        raise DataError(f'{directory}: {fault}; choose another directory')


def _write_weights(directory: Path, params: Any, dtype: jnp.dtype, shard_bytes: int) -> None:
    """Write one shard after the other: only one is in memory twice."""
    tensors = named(params)
    plan = split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=lambda tensor: tensor[1].size * dtype.itemsize,
        filename_pattern='model{suffix}.safetensors',
        max_shard_size=shard_bytes,
    )
    for file, names in plan.filename_to_tensors.items():
        shard = {name: cast(name, hf_tensor(*tensors[name]), dtype) for name in names}
        save_file(shard, directory / file, metadata={'format': 'pt'})
    if plan.is_sharded:
        index = {'metadata': plan.metadata, 'weight_map': plan.tensor_to_filename}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + '\n', 'utf-8')
