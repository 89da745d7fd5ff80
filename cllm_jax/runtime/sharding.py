"""Where arrays live: one table from the axis names of parameters to the axes of the mesh."""

from typing import Any

import flax.linen as nn
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
    """A NamedSharding for every parameter; ConfigError if one does not divide among the devices.

    Args:
      axes: the logical axis names of each parameter, a tree of PartitionSpecs.
      shapes: the same tree of arrays or their shapes and dtypes.
    """

    def check(spec: P, leaf: Any) -> None:
        for name, size in zip(spec, leaf.shape, strict=True):
            axis = RULES[name]
            if axis and size % mesh.shape[axis]:
                raise ConfigError(
                    f'mesh {axis} {mesh.shape[axis]}: does not divide the {size} of the '
                    f"model's {name}; use a divisor of {size}"
                )

    jax.tree.map(check, axes, shapes, is_leaf=lambda x: isinstance(x, P))
    return nn.logical_to_mesh_sharding(axes, mesh, list(RULES.items()))


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


def rows_here(rows: int, mesh: Mesh) -> list[int]:
    """The rows of a batch that the devices of this process take."""
    slices = batch_sharding(mesh).addressable_devices_indices_map((rows,)).values()
    return sorted({row for (index,) in slices for row in range(*index.indices(rows))})


def place_batch(batch: Any, mesh: Mesh) -> Any:
    """A batch on the devices, of which every process has its own rows (`rows_here`)."""
    return jax.make_array_from_process_local_data(batch_sharding(mesh), batch)
