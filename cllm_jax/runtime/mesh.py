"""The device mesh: which devices share a batch, and which share a weight."""

import dataclasses
import math

import jax
from jax.sharding import AxisType, Mesh

from cllm_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How many devices along each axis; -1, for one axis at most, takes what is left."""

    data: int = -1
    """Copies of the weights, each with its own part of the batch."""
    fsdp: int = 1
    """Parts of the weights, gathered when needed; the batch is divided along this axis too."""
    tensor: int = 1
    """Parts of every matrix product (heads, MLP width, vocabulary)."""


def shape(config: MeshConfig, devices: int) -> dict[str, int]:
    """The size of each axis on so many devices; ConfigError if the sizes do not fit them."""
    sizes = dataclasses.asdict(config)
    said = ', '.join(f'{axis} {size}' for axis, size in sizes.items())
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1 or any(size < 1 for axis, size in sizes.items() if axis not in free):
        raise ConfigError(f'mesh {said}: sizes must be positive, one of them may be -1 (the rest)')
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if devices % fixed or (not free and fixed != devices):
        raise ConfigError(
            f'mesh {said}: {fixed} does not fit {devices} devices; the sizes must multiply to '
            f'{devices}, or one be -1 and the others divide it'
        )
    return sizes | {axis: devices // fixed for axis in free}


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh over all devices of all processes. Its axes are Auto: the compiler places the rest."""
    devices = jax.devices() if devices is None else devices
    sizes = shape(config, len(devices))
    auto = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=auto, devices=devices)


def tensor_mesh(tensor: int) -> Mesh | None:
    """The first devices, which share every layer; None for one, ConfigError if there are fewer."""
    count = len(jax.devices())
    if not 1 <= tensor <= count:
        raise ConfigError(f'tensor {tensor}: must be 1 to {count}, the devices that are here')
    config = MeshConfig(data=1, tensor=tensor)
    return None if tensor == 1 else make_mesh(config, jax.devices()[:tensor])
