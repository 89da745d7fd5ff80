"""Several processes as one: joining a job, and results on every host."""

import os
from importlib.util import find_spec
from typing import Any

import jax
from jax.experimental import multihost_utils

from cllm_jax.errors import ConfigError

NAMED = ('JAX_NUM_PROCESSES', 'JAX_PROCESS_ID')
"""With JAX_COORDINATOR_ADDRESS, what a launcher sets for each process."""
TASKS = ('SLURM_NTASKS', 'OMPI_COMM_WORLD_SIZE')
"""How many processes SLURM or Open MPI has started."""


def initialize(stop_together: bool = False) -> None:
    """Join the other processes of this job, if there are any. Call before any other use of JAX.

    A job is named by JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, or found by JAX
    itself under SLURM, Open MPI and on TPU hosts.

    Args:
      stop_together: let JAX's own service catch SIGTERM, for a command that asks it after every
        step. Others would not notice the signal, so it ends them at once.

    Raises:
      ConfigError: JAX_COORDINATOR_ADDRESS without the other two, or one of them not a number.
    """
    if jax.distributed.is_initialized():
        return
    jax.config.update('jax_enable_preemption_service', stop_together)
    if 'JAX_COORDINATOR_ADDRESS' in os.environ:
        values = {name: os.environ.get(name, '') for name in NAMED}
        if wrong := [name for name, value in values.items() if not value.isdecimal()]:
            raise ConfigError(
                f'{wrong[0]} {values[wrong[0]]!r}: with JAX_COORDINATOR_ADDRESS it must be a '
                'number; set it for every process'
            )
        processes, process = (int(value) for value in values.values())
        jax.distributed.initialize(num_processes=processes, process_id=process)
    elif any(os.environ.get(name, '').isdecimal() and int(os.environ[name]) > 1 for name in TASKS):
        jax.distributed.initialize()
    elif find_spec('libtpu'):
        try:
            jax.distributed.initialize()
        except ValueError as e:  # a machine without a TPU is not a host of a job
            if 'coordinator_address' not in str(e):
                raise


def is_main() -> bool:
    """Whether this process writes what is written once."""
    return jax.process_index() == 0


def fetch(tree: Any) -> Any:
    """Host copies of whole arrays, on every process; all processes must call it together."""

    def one(x):
        whole = not isinstance(x, jax.Array) or x.is_fully_addressable
        return jax.device_get(x) if whole else multihost_utils.process_allgather(x, tiled=True)

    return jax.tree.map(one, tree)


def barrier(name: str) -> None:
    """Wait until every process is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
