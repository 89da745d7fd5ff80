"""The weights of a GGUF file, dequantised into those of a model of Hugging Face's layout."""

from collections.abc import KeysView, Sequence
from contextlib import nullcontext
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from cllm_jax.hf.adapter import Adapter
from cllm_jax.hf.gguf_config import EMBED, HEAD, ROPE_FACTORS, config_of
from cllm_jax.hf.gguf_file import AGAIN, Gguf
from cllm_jax.hf.weights import (
    TOP_NAMES,
    abstract_params,
    check_tensors,
    deltas_of,
    named,
    params_of,
    tensor_shapes,
)
from cllm_jax.model.config import LlamaConfig

TOP = {'embed': EMBED, 'norm': 'output_norm.weight', 'head': HEAD}
PARTS = {
    **{name: f'attn_{name}' for name in ('q', 'k', 'v', 'q_norm', 'k_norm')},
    **{'o': 'attn_output', 'attn_norm': 'attn_norm', 'mlp_norm': 'ffn_norm'},
    **{name: f'ffn_{name}' for name in ('gate', 'up', 'down')},
}
"""Names of parameters in a file: as they are, and those of a layer without its number."""


def read_gguf(
    file: Gguf,
    dtype: jnp.dtype,
    mesh: Mesh | None,
    matrices: jnp.dtype | None = None,
    adapters: Sequence[Adapter] = (),
) -> tuple[LlamaConfig, Any]:
    """The config and the parameters of a file, as `read_model` gives those of a directory.

    Names, shapes and kinds are checked before any weight is read. One tensor at a time is in memory
    in float32; with a mesh, every process dequantises all of each.

    Raises:
      DataError: missing, extra or ill-shaped tensors, or kinds that the package cannot dequantise.
      ConfigError: an architecture that is not supported.
    """
    config = config_of(file)
    tensors = _Tensors(file, config)
    shapes = {tensors.names[hf_name]: s for hf_name, s in tensor_shapes(config).items()}
    stored = {name: file.shape(name) for name in file.tensors if name != ROPE_FACTORS}
    own = f'a {config.family} model of its metadata'
    check_tensors(file.path, stored, shapes, shapes, f'{own} has not', AGAIN)
    file.check_kinds(file.tensors)
    abstract = abstract_params(config, dtype, matrices)
    deltas = deltas_of(config, adapters)
    return config, params_of(config, abstract, mesh, [nullcontext(tensors)], deltas)


def names_of(config: LlamaConfig) -> tuple[dict[str, str], dict[str, int]]:
    """A file's names of the tensors, by Hugging Face's, and the heads of those with other rows."""
    names, turned = {}, {}
    for hf_name, (name, _) in named(abstract_params(config)).items():
        part, kind = name.removesuffix('_bias'), 'bias' if name.endswith('_bias') else 'weight'
        if name in TOP_NAMES:
            names[hf_name] = TOP[name]
            continue
        names[hf_name] = f'blk.{hf_name.split(".")[2]}.{PARTS[part]}.{kind}'
        if config.family == 'llama' and part in ('q', 'k'):
            turned[hf_name] = config.heads if part == 'q' else config.kv_heads
    return names, turned


class _Tensors:
    """A file's tensors by Hugging Face's names and in its order, as `params_of` reads them."""

    def __init__(self, file: Gguf, config: LlamaConfig):
        self.file = file
        self.names, self.turned = names_of(config)

    def keys(self) -> KeysView[str]:
        return self.names.keys()

    def get_slice(self, hf_name: str) -> np.ndarray:
        """A whole tensor, dequantised once for all the parts that are wanted of it."""
        array = self.file.array(self.names[hf_name])
        if heads := self.turned.get(hf_name):
            # Of LLaMA's rows alone llama.cpp puts those side by side that are rotated together;
            # Hugging Face has them half a head apart.
            pairs = array.reshape(heads, -1, 2, *array.shape[1:])
            array = pairs.swapaxes(1, 2).reshape(array.shape)
        return array
