"""Checkpoints of a training run (Orbax v1): atomic, asynchronous, the last few kept."""

import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from cllm_jax.errors import DataError

KEEP = 2


def open_checkpoints(directory: Path) -> ocp.training.Checkpointer:
    """The checkpoints of a run. Leftovers of a save that was killed are removed."""
    directory = directory.resolve()  # Orbax refuses relative paths
    for stale in directory.glob('*.orbax-checkpoint-tmp*'):
        shutil.rmtree(stale, ignore_errors=True)
    policies = ocp.training.preservation_policies
    return ocp.training.Checkpointer(directory, preservation_policy=policies.LatestN(KEEP))


def save(checkpoints: ocp.training.Checkpointer, step: int, state: Any, progress: dict) -> None:
    """Start saving; returns when the arrays are copied. `progress` holds plain numbers."""
    numbers = {k: np.asarray(v, np.float64) for k, v in progress.items()}
    checkpoints.save_checkpointables_async(step, {'state': state, 'progress': numbers}, force=True)


def restore(checkpoints: ocp.training.Checkpointer, state: Any) -> tuple[Any, dict] | None:
    """The newest complete checkpoint as (state, progress), or None in a new run.

    Args:
      state: a state of the same shapes, whose values are ignored.

    Raises:
      DataError: the checkpoint cannot be read, or belongs to a model of another shape.
    """
    latest = checkpoints.latest
    if latest is None:
        return None
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    try:
        loaded = checkpoints.load_checkpointables(
            latest.step, {'state': abstract, 'progress': None}
        )
    except Exception as e:  # orbax and tensorstore raise many types for damaged files
        reason = ' '.join(str(e).split())[:160]
        raise DataError(
            f'checkpoint {latest.step}: unreadable ({type(e).__name__}: {reason}); remove its '
            'directory to go back to the one before'
        ) from None
    return loaded['state'], {k: float(v) for k, v in loaded['progress'].items()}
