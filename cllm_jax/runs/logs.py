"""Other logs of a run, for TensorBoard and for Weights & Biases.

metrics.jsonl is the truth. Each time a run begins or goes on, its other logs are made anew from
that file, and then follow it line by line. So they show every step once and in order, also after a
run went back to a checkpoint, and a run that began without them has them from its first step.
"""

import dataclasses
import os
import shutil
import socket
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from cllm_jax.errors import one_line
from cllm_jax.runs.run_dir import read_metrics, scalars
from cllm_jax.runtime.processes import is_main

LogName = Literal['tensorboard', 'wandb']
"""Also the package that writes such a log, and the extra that installs it."""


@dataclasses.dataclass(frozen=True)
class Log:
    """An open log."""

    write: Callable[[int, Mapping[str, float]], None]
    """Adds the numbers of a step."""
    close: Callable[[], None]


@contextmanager
def open_logs(
    names: Collection[LogName],
    directory: Path,
    settings: Mapping[str, Any],
    note: Callable[[str], None],
) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Yields what adds a line of metrics.jsonl to other logs, which begin with all lines so far.

    A log that fails is closed with one warning, through `note`, and the run goes on without it. Of
    several processes only the first one writes.
    """
    logs: dict[str, Log] = {}

    def attempt(name: str, act: Callable, *given: Any) -> Any:
        try:
            return act(*given)
        except Exception as error:
            failed = logs.pop(name, None)
            with suppress(Exception):
                failed and failed.close()
            reason = one_line(error) or type(error).__name__
            note(
                f'warning: log {name}: {reason}; the run goes on without it, and makes all of it '
                'again when it is continued'
            )

    def write(record: Mapping[str, Any]) -> None:
        for name, log in [*logs.items()]:
            attempt(name, log.write, record['step'], scalars(record))

    try:
        for name in dict.fromkeys(names) if is_main() else ():
            if log := attempt(name, OPEN[name], directory, settings):
                logs[name] = log
        for record in read_metrics(directory / 'metrics.jsonl') if logs else ():
            write(record)
        yield write
    finally:
        for name, log in [*logs.items()]:
            attempt(name, log.close)


def open_tensorboard(directory: Path, settings: Mapping[str, Any]) -> Log:
    """A new event file in `directory/tensorboard`; the one before is left empty, older ones go.

    Written here and now: the library's own EventFileWriter has a thread, and when that has died of
    a full disk, whoever adds another event waits for ever.
    """
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.record_writer import RecordWriter

    place = directory / 'tensorboard'
    place.mkdir(exist_ok=True)
    for old in place.glob('*tfevents*'):
        if (
            old.stat().st_size
        ):  # an open TensorBoard goes on from this file to the next, if it stays
            os.truncate(old, 0)
        else:
            old.unlink()
    second, rest = divmod(time.time_ns(), 10**9)  # a name comes after those of files before
    name = f'events.out.tfevents.{second}.{socket.gethostname()}.{rest:09}'
    records = RecordWriter(open(place / name, 'wb'))  # noqa: SIM115  # `close` does

    def add(**fields: Any) -> None:
        records.write(Event(wall_time=time.time(), **fields).SerializeToString())
        records.flush()

    def write(step: int, numbers: Mapping[str, float]) -> None:
        values = [Summary.Value(tag=tag, simple_value=x) for tag, x in numbers.items()]
        add(step=step, summary=Summary(value=values))

    add(file_version='brain.Event:2')
    # An open TensorBoard drops what it has read of the file before.
    add(step=0, session_log=SessionLog(status=SessionLog.START))
    return Log(write, records.close)


def open_wandb(directory: Path, settings: Mapping[str, Any]) -> Log:
    """A run of Weights & Biases in `directory/wandb`, offline unless WANDB_MODE says otherwise.

    It keeps its id when it is made anew, so that it stays one run wherever it is sent. There, steps
    that are known already are left out, and the same step has the same numbers.
    """
    import wandb

    mode, place = os.environ.get('WANDB_MODE', 'offline'), directory / 'wandb'
    before = sorted(place.glob('*run-*-*'))
    if mode == 'offline':
        for old in before:
            shutil.rmtree(old, ignore_errors=True)
    run = wandb.init(
        project=os.environ.get('WANDB_PROJECT', 'cllm_jax'),
        name='/'.join(directory.absolute().parts[-2:]),
        id=before[-1].name.rpartition('-')[2] if before else None,
        resume='allow',
        dir=str(directory),
        mode=mode,
        config=dict(settings),
        settings=wandb.Settings(console='off', silent=True),
    )
    return Log(lambda step, numbers: run.log(dict(numbers), step=step), run.finish)


OPEN: dict[str, Callable[[Path, Mapping[str, Any]], Log]] = {
    'tensorboard': open_tensorboard,
    'wandb': open_wandb,
}
