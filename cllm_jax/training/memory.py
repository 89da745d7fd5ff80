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

from cllm_jax.hf.weights import abstract_params
from cllm_jax.model.config import LlamaConfig
from cllm_jax.model.llama import Llama, param_axes
from cllm_jax.runtime.sharding import batch_sharding
from cllm_jax.training.packing import Batch, Noise, Sample, make_batch
from cllm_jax.training.step import (
    LossWeights,
    OptimizerConfig,
    TrainState,
    make_optimizer,
    make_step,
    new_state,
    state_places,
    text_loss,
)

COLLECTIVE = re.compile(
    r' = (.+?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\('
)
SHAPE = re.compile(r'(\w+)\[([\d,]*)\]')


@dataclasses.dataclass(frozen=True)
class StepShape:
    """A training step as far as its shapes go."""

    config: LlamaConfig
    dtype: Any
    compute: Any
    remat: bool
    optimizer: OptimizerConfig
    weights: LossWeights
    noise: Noise | None
    batch: int
    prompt: int
    """Tokens of the prompt of every sample."""
    answer: int
    """Tokens of its answer."""
    block: int


def abstract_batch(shape: StepShape, mesh: Mesh) -> Batch:
    """Shapes and places of a batch in which every sample is as long as can be."""
    states = np.zeros((0, shape.block), np.int32)
    sample = Sample(
        np.zeros(shape.prompt, np.int32), np.zeros(shape.answer, np.int32), states, states[:, 0]
    )
    one = make_batch([sample], 1, 0, 0, shape.noise)
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            (shape.batch, *x.shape[1:]), x.dtype, sharding=batch_sharding(mesh)
        ),
        one,
    )


def abstract_state(shape: StepShape, mesh: Mesh) -> TrainState:
    """Shapes and places of the training state; nothing is computed."""
    optimizer, params = (
        make_optimizer(shape.optimizer, 100),
        abstract_params(shape.config, shape.dtype),
    )
    state = jax.eval_shape(partial(new_state, optimizer), params)
    places = state_places(optimizer, param_axes(shape.config), params, mesh)
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), state, places
    )


def bytes_here(tree: Any) -> int:
    """Bytes of a tree of placed shapes on one device."""
    return sum(
        int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
    )


def activation_bytes(shape: StepShape, batch: Batch, mesh: Mesh) -> int:
    """An estimate of what the backward pass finds kept on one device, the largest parts only.

    Per token and layer: the residual stream twice, both normed inputs, queries, keys, values and
    the attention's result, three times the MLP's width, and the softmax over the keys it may see
    (`packed_attention.py`). With `remat` only the stream of every layer, and one whole layer. Also
    three float32 arrays of logits.
    """
    c, tensor = shape.config, mesh.shape['tensor']
    rows = -(-shape.batch // (shape.optimizer.accumulate * mesh.shape['data'] * mesh.shape['fsdp']))
    tokens, scored = batch.tokens_BT.shape[1], batch.rows_BR.shape[1]
    clean = tokens - batch.offset_BW.shape[1]
    pairs = clean * clean + (tokens - clean) * (clean + batch.block)
    wide, narrow = np.dtype(shape.dtype).itemsize, np.dtype(shape.compute).itemsize
    split = tokens * ((2 * c.heads + 2 * c.kv_heads) * c.head_dim + 3 * c.mlp_dim) + c.heads * pairs
    layer = tokens * 4 * c.dim * wide + split * narrow // tensor
    layers = c.layers * tokens * c.dim * wide + layer if shape.remat else c.layers * layer
    return rows * (layers + 3 * 4 * scored * c.vocab_size // tensor)


def needs(shape: StepShape, mesh: Mesh) -> dict[str, int]:
    """Bytes on each device, by what they are for."""
    state, batch = abstract_state(shape, mesh), abstract_batch(shape, mesh)
    return {
        'weights': bytes_here(state.params),
        'gradients': bytes_here(state.params),
        'optimiser state': bytes_here(state.opt_state),
        'batch': bytes_here(batch),
        'activations (estimate)': activation_bytes(shape, batch, mesh),
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
        size = 0
        for dtype, dims in SHAPE.findall(shapes):
            bits = int(re.sub(r'\D', '', dtype) or 8)
            size += math.prod(int(d) for d in dims.split(',') if d) * max(bits // 8, 1)
        count, total = found.get(kind, (0, 0))
        found[kind] = (count + 1, total + size)
    return found


def compiled_needs(shape: StepShape, mesh: Mesh) -> Compiled:
    """The same as the compiler sees it, for the backend of the mesh's devices.

    On CPU it is an upper bound: products in bfloat16 are widened there, gathered weights with them;
    and where a TPU would scatter the sum of a gradient, it adds all of all gradients everywhere.
    """
    state, batch = abstract_state(shape, mesh), abstract_batch(shape, mesh)
    places = jax.tree.map(lambda x: x.sharding, state)
    module = Llama(shape.config, shape.dtype, shape.compute, shape.remat, mesh)
    optimizer = make_optimizer(shape.optimizer, 100)
    step = make_step(
        text_loss(module, shape.weights), optimizer, shape.optimizer.accumulate, places
    )
    begin = time.perf_counter()
    compiled = step.lower(state, batch).compile()
    seconds, found = time.perf_counter() - begin, compiled.memory_analysis()
    sizes = {
        'state and batch': found.argument_size_in_bytes,
        'temporary': found.temp_size_in_bytes,
        'code': found.generated_code_size_in_bytes,
    }
    return Compiled(seconds, sizes, collectives(compiled.as_text()))
