"""What a training step needs on each device: by its shapes and shardings, and by the compiler."""

import dataclasses
import math
import re
import time
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from cllm_jax.hf.load import DTYPES
from cllm_jax.hf.model import Model
from cllm_jax.hf.weights import abstract_params
from cllm_jax.model.config import LlamaConfig
from cllm_jax.model.llama import Llama, param_axes
from cllm_jax.runtime.backend import backend_for
from cllm_jax.runtime.sharding import batch_sharding, param_shardings
from cllm_jax.training.config import TrainConfig
from cllm_jax.training.data import without_states
from cllm_jax.training.lora import adapted, factor_axes, first_factors
from cllm_jax.training.objectives import objective_of
from cllm_jax.training.optimizer import make_optimizer
from cllm_jax.training.packing import Batch, make_batch
from cllm_jax.training.step import TrainState, make_step, new_state, state_places, text_loss

COLLECTIVE = re.compile(
    r' = (.+?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\('
)
SHAPE = re.compile(r'(\w+)\[([\d,]*)\]')


def longest(settings: TrainConfig) -> tuple[int, int]:
    """The tokens of a prompt and its answer that a plan counts with: as many as settings allow.

    An answer is one of `held_out.max_tokens`, but at most half of a sample.
    """
    answer = min(settings.held_out.max_tokens, settings.max_length // 2)
    return settings.max_length - answer, answer


def abstract_batch(settings: TrainConfig, config: LlamaConfig, mesh: Mesh) -> Batch:
    """Shapes and places of a batch in which every sample is as long as can be."""
    objective, rows, place = objective_of(settings), settings.batch, batch_sharding(mesh)
    noise = objective.noise(settings, Model(config, None, None, settings.model))
    texts = (np.zeros(tokens, np.int32) for tokens in longest(settings))
    one = make_batch([without_states(objective.block(settings), *texts)], 1, 0, 0, noise)
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype, sharding=place), one
    )


def abstract_state(settings: TrainConfig, config: LlamaConfig, mesh: Mesh) -> TrainState:
    """Shapes and places of the training state of a whole model, or of its adapter."""
    optimizer = make_optimizer(settings.optimizer, settings.steps)
    params, axes = abstract_params(config, DTYPES[settings.dtype]), param_axes(config)
    if settings.lora.rank:
        params = jax.eval_shape(partial(first_factors, settings.lora, params, settings.seed))
        axes = factor_axes(params)
    state = jax.eval_shape(partial(new_state, optimizer), params)
    return _placed(state, state_places(optimizer, axes, params, mesh))


def abstract_frozen(settings: TrainConfig, config: LlamaConfig, mesh: Mesh) -> Any:
    """Shapes and places of the weights that are read but not trained; () for none."""
    if not (settings.lora.rank or settings.loss.frozen_weight):
        return ()
    params = abstract_params(config, DTYPES[settings.dtype])
    return _placed(params, param_shardings(param_axes(config), params, mesh))


def _placed(tree: Any, places: Any) -> Any:
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree, places
    )


def bytes_here(tree: Any) -> int:
    """Bytes of a tree of placed shapes on one device."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def activation_bytes(settings: TrainConfig, config: LlamaConfig, batch: Batch, mesh: Mesh) -> int:
    """An estimate of what the backward pass finds kept on one device, only of what is large.

    Per token and layer: the residual stream twice, both normed inputs, queries, keys, values and
    the attention's result, three times the MLP's width, and the softmax over the keys it may see
    (`packed_attention.py`). With `remat` only the stream of every layer, and one whole layer. Also
    three float32 arrays of logits.
    """
    c, tensor = config, mesh.shape['tensor']
    parts = settings.optimizer.accumulate * mesh.shape['data'] * mesh.shape['fsdp']
    rows = -(-settings.batch // parts)
    tokens, scored = batch.tokens_BT.shape[1], batch.rows_BR.shape[1]
    clean = tokens - batch.offset_BW.shape[1]
    pairs = clean * clean + (tokens - clean) * (clean + batch.block)
    wide, narrow = DTYPES[settings.dtype].itemsize, DTYPES[settings.compute].itemsize
    split = tokens * ((2 * c.heads + 2 * c.kv_heads) * c.head_dim + 3 * c.mlp_dim) + c.heads * pairs
    layer = tokens * 4 * c.dim * wide + split * narrow // tensor
    layers = c.layers * tokens * c.dim * wide + layer if settings.remat else c.layers * layer
    return rows * (layers + 3 * 4 * scored * c.vocab_size // tensor)


def memory_per_device(settings: TrainConfig, config: LlamaConfig, mesh: Mesh) -> dict[str, int]:
    """Bytes on each device, by what they are for."""
    state, batch = abstract_state(settings, config, mesh), abstract_batch(settings, config, mesh)
    frozen = bytes_here(abstract_frozen(settings, config, mesh))
    return {
        **({'weights before training': frozen} if frozen else {}),
        'weights': bytes_here(state.params),
        'gradients': bytes_here(state.params),
        'optimiser state': bytes_here(state.opt_state),
        'batch': bytes_here(batch),
        'activations (estimate)': activation_bytes(settings, config, batch, mesh),
    }


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled step: bytes on each device, and what the devices tell each other."""

    seconds: float
    """Of compilation."""
    sizes: dict[str, int]
    collectives: dict[str, tuple[int, int]]
    """How many of each kind, and the bytes that one device gets of them."""


def collectives(program: str) -> dict[str, tuple[int, int]]:
    """The communication of a compiled program; what is in a loop counts once."""
    found: dict[str, tuple[int, int]] = {}
    for shapes, kind in COLLECTIVE.findall(program):
        count, total = found.get(kind, (0, 0))
        for dtype, dims in SHAPE.findall(shapes):
            bits = int(re.sub(r'\D', '', dtype) or 8)
            total += math.prod(int(d) for d in dims.split(',') if d) * max(bits // 8, 1)
        found[kind] = (count + 1, total)
    return found


def compiled_step(settings: TrainConfig, config: LlamaConfig, mesh: Mesh) -> Compiled:
    """The same as the compiler sees it, for the backend of the mesh's devices.

    On CPU it is an upper bound: products in bfloat16 are widened there, gathered weights with them;
    and where a TPU would scatter the sum of a gradient, it adds all of all gradients everywhere.
    """
    state, batch = abstract_state(settings, config, mesh), abstract_batch(settings, config, mesh)
    dtype, compute = DTYPES[settings.dtype], DTYPES[settings.compute]
    module = Llama(config, dtype, compute, settings.remat, mesh, backend_for(mesh.devices.flat))
    loss, optimizer = partial(text_loss, module, settings.loss), settings.optimizer
    loss = adapted(loss, settings.lora) if settings.lora.rank else loss
    places = jax.tree.map(lambda x: x.sharding, state)
    rule = make_optimizer(optimizer, settings.steps)
    step = make_step(loss, rule, optimizer.accumulate, places)
    begin = time.perf_counter()
    frozen = abstract_frozen(settings, config, mesh)
    compiled = step.lower(state, batch, frozen).compile()
    seconds, found = time.perf_counter() - begin, compiled.memory_analysis()
    sizes = {
        'state and batch': found.argument_size_in_bytes,
        'temporary': found.temp_size_in_bytes,
        'code': found.generated_code_size_in_bytes,
    }
    return Compiled(seconds, sizes, collectives(compiled.as_text()))
