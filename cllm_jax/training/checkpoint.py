"""Checkpoints of a training run (Orbax v1): atomic, asynchronous, summed, the last few kept."""

import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from cllm_jax.errors import DataError
from cllm_jax.runs.checksums import check_sums, write_sums
from cllm_jax.runtime.processes import barrier, is_main

KEEP = 2


@dataclass
class Checkpoints:
    """The open checkpoints of a run, and the thread that sums what has been written."""

    directory: Path
    orbax: ocp.training.Checkpointer
    thread: ThreadPoolExecutor
    pending: Future | None = None

    def settle(self) -> None:
        """Wait until the last save is complete; raises what went wrong in it."""
        pending, self.pending = self.pending, None
        if pending:
            pending.result()


@contextmanager
def open_checkpoints(
    directory: Path, note: Callable[[str], None] = lambda text: None
) -> Iterator[Checkpoints]:
    """The checkpoints of a run, for a `with` block that waits for the last save.

    Leftovers of a save that was killed are removed. A checkpoint whose files are not those that
    were written is moved aside to `damaged-checkpoint-STEP`, and `note` is told: training goes on
    from the one before, if there is one.
    """
    directory = directory.resolve()  # Orbax refuses relative paths
    if is_main() and directory.is_dir():
        for stale in directory.glob('*.orbax-checkpoint-tmp*'):
            shutil.rmtree(stale, ignore_errors=True)
        for step in sorted(p for p in directory.iterdir() if p.name.isdigit()):
            try:
                check_sums(step)
            except DataError as e:
                aside = directory.with_name(f'damaged-checkpoint-{step.name}')
                shutil.rmtree(aside, ignore_errors=True)
                step.rename(aside)
                fault = e.args[0].split(';')[0]
                note(f'warning: {fault}; kept as {aside}, going back to the one before')
    barrier('checkpoints')
    policies = ocp.training.preservation_policies
    with (
        ocp.training.Checkpointer(directory, preservation_policy=policies.LatestN(KEEP)) as orbax,
        ThreadPoolExecutor(1) as thread,
    ):
        checkpoints = Checkpoints(directory, orbax, thread)
        yield checkpoints
        checkpoints.settle()


def save(checkpoints: Checkpoints, step: int, state: Any, progress: dict) -> None:
    """Start saving; returns when the arrays are copied. `progress` holds plain numbers.

    Raises what went wrong in the save before.
    """
    checkpoints.settle()
    numbers = {k: np.asarray(v, np.float64) for k, v in progress.items()}
    saved = checkpoints.orbax.save_checkpointables_async(
        step, {'state': state, 'progress': numbers}, force=True
    )

    def complete() -> None:
        saved.result()
        if is_main():
            write_sums(checkpoints.directory / str(step))

    checkpoints.pending = checkpoints.thread.submit(complete)


def restore(checkpoints: Checkpoints, state: Any) -> tuple[Any, dict] | None:
    """The newest complete checkpoint as (state, progress), or None in a new run.

    Args:
      state: a state of the same shapes, whose values are ignored.

    Raises:
      DataError: the checkpoint cannot be read, or belongs to a model of another shape.
    """
    latest = checkpoints.orbax.latest
    if latest is None:
        return None
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    wanted = {'state': shapes, 'progress': None}
    try:
        loaded = checkpoints.orbax.load_checkpointables(latest.step, wanted)
    except Exception as e:  # orbax and tensorstore raise many types for damaged files
        reason = ' '.join(str(e).split())[:160]
        raise DataError(
            f'checkpoint {latest.step}: unreadable ({type(e).__name__}: {reason}); remove its '
            'directory to go back to the one before'
        ) from None
    return loaded['state'], {k: float(v) for k, v in loaded['progress'].items()}
