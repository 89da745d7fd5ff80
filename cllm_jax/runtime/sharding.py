"""Where arrays live: one table from the axis names of parameters to the axes of the mesh."""

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from cllm_jax.errors import ConfigError

RULES = {
    'vocab': 'tensor',
    'embed': 'fsdp',
    'heads': 'tensor',
    'kv_heads': 'tensor',
    'head': None,
    'mlp': 'tensor',
    None: None,
}
"""Logical axis of a parameter (`model/llama.py`) -> axis of the mesh (`mesh.py`)."""


def param_shardings(axes: Any, shapes: Any, mesh: Mesh) -> Any:
    """A NamedSharding for every parameter.

    Args:
      axes: the logical axis names of each parameter, a tree of PartitionSpecs.
      shapes: the same tree of arrays or their shapes and dtypes.
      mesh: see `make_mesh`.

    Raises:
      ConfigError: an axis does not divide among the devices of its mesh axis.
    """

    def one(spec: P, leaf: Any) -> NamedSharding:
        for name, size in zip(spec, leaf.shape, strict=True):
            if RULES[name] and size % mesh.shape[RULES[name]]:
                raise ConfigError(
                    f'mesh {RULES[name]} {mesh.shape[RULES[name]]}: does not divide the {size} of '
                    f"the model's {name}; use a divisor of {size}"
                )
        return NamedSharding(mesh, P(*(RULES[name] for name in spec)))

    return jax.tree.map(one, axes, shapes, is_leaf=lambda x: isinstance(x, P))


def state_shardings(state: Any, params: Any, shardings: Any, mesh: Mesh) -> Any:
    """Shardings of a training state: what mirrors a parameter lives where the parameter does.

    `jit(optimizer.init)` alone would put a copy of every moment on every device. An array mirrors
    a parameter if its path in the state ends in the parameter's path and the shapes are equal.

    Args:
      state: a tree of arrays or shapes that has trees like `params` somewhere inside.
      params, shardings: the parameters (or shapes) and where each lives.
      mesh: where everything else is replicated.
    """
    places = jax.tree.leaves(shardings)
    found = jax.tree_util.tree_leaves_with_path(params)
    known = {path: (x.shape, place) for (path, x), place in zip(found, places, strict=True)}

    def one(path, leaf):
        tails = (known.get(path[i:]) for i in range(len(path)))
        mirrors = [place for shape, place in filter(None, tails) if shape == leaf.shape]
        return mirrors[0] if mirrors else replicated(mesh)

    return jax.tree_util.tree_map_with_path(one, state)


def replicated(mesh: Mesh) -> NamedSharding:
    """A copy on every device."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Arrays whose first axis is the batch, divided along data and fsdp."""
    return NamedSharding(mesh, P(('data', 'fsdp')))


def check_batch(rows: int, mesh: Mesh) -> None:
    """Raise ConfigError unless the rows of a (micro-)batch divide among the devices sharing it."""
    parts = mesh.shape['data'] * mesh.shape['fsdp']
    if rows % parts:
        raise ConfigError(
            f'batch {rows}: does not divide among data x fsdp = {parts} devices; '
            f'try {-(-rows // parts) * parts}'
        )


def place_batch(batch: Any, mesh: Mesh) -> Any:
    """A batch that every process has whole, on the devices: each takes only its own rows."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(
        lambda x: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index]), batch
    )
