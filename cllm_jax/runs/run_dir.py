"""Run directories: who owns one, with which settings, and its log of metrics.

settings.json   the settings; a run that goes on must have the same
inputs.json     fingerprints of the data and the model that it reads; they must be the same too
metrics.jsonl   one JSON object per logged step
lock            held while a process works here
"""

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cllm_jax.errors import ConfigError, DataError
from cllm_jax.runs.atomic import write_atomic, write_json
from cllm_jax.runtime.processes import is_main


@contextmanager
def open_run(
    directory: Path, settings: Mapping[str, Any], defaults: Mapping[str, Any] | None = None
) -> Iterator[None]:
    """Own a run directory for the duration of a `with` block; of several processes the first does.

    The settings are noted by `claim`, when there is something to be done with them. A run that
    began before a setting was thought of has the `defaults`'.

    Raises:
      ConfigError: another process works in it, or it has begun with other settings.
    """
    if not is_main():
        yield
        return
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / 'lock', 'a+') as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.seek(0)
            owner = lock.read().strip() or 'another process'
            raise ConfigError(
                f'{directory}: {owner} is working here; wait for it or use another directory'
            ) from None
        lock.truncate(0)
        lock.write(f'process {os.getpid()} on {os.uname().nodename}')
        lock.flush()
        if has_begun(directory):
            _check(directory / 'settings.json', settings, 'use the old settings', defaults or {})
        yield


def has_begun(directory: Path) -> bool:
    """Whether a run has made something: a step in its log, a checkpoint, a model, a manifest.

    One that failed before that, out of memory or at a row that cannot be read, can be begun with
    other settings.
    """
    made = ('model', 'drafter', 'manifest.json', 'checkpoints/*', 'damaged-checkpoint-*')
    return any(any(directory.glob(name)) for name in made) or any(
        record['step'] for record in read_metrics(directory / 'metrics.jsonl')
    )


def claim(directory: Path, settings: Mapping[str, Any], inputs: Mapping[str, Any]) -> None:
    """Note the settings of a run, and what it reads, by name and by content.

    What one noted that has not begun (`has_begun`) is replaced. A run that began without inputs (by
    an older version) notes them when it goes on; of what it has not noted nothing is asked.

    Raises:
      ConfigError: something is not what the run began with.
    """
    if not is_main():
        return
    if begun := has_begun(directory):
        _check(directory / 'inputs.json', inputs, 'put back what was there', inputs)
    for name, noted in (('settings', settings), ('inputs', inputs)):
        path = directory / f'{name}.json'
        if not (begun and path.exists()):
            write_json(path, dict(noted))


def _check(
    path: Path, settings: Mapping[str, Any], remedy: str, defaults: Mapping[str, Any] | None = None
) -> None:
    """Raise ConfigError if a file notes something else; what is not there yet does not."""
    if not path.exists():
        return
    try:
        begun = json.loads(path.read_text('utf-8'))
        if not isinstance(begun, dict):
            raise ValueError
    except ValueError:
        raise DataError(
            f'{path}: not a JSON object; remove this file to go on with what is given now'
        ) from None
    begun.pop('root', None)  # runs noted where they were once; they may be moved
    known = {key: default for key, default in (defaults or {}).items() if key in settings}
    begun = _completed(begun, known)
    for key in [*settings, *begun]:
        if (now := settings.get(key)) != (then := begun.get(key)):
            raise ConfigError(
                f'{path.parent}: begun with {key} = {then!r}, now {now!r}; {remedy} to continue, '
                'or use another directory'
            )


def _completed(begun: Any, defaults: Any) -> Any:
    """What was noted, with the defaults of all that it lacks, at any depth."""
    if not (isinstance(begun, Mapping) and isinstance(defaults, Mapping)):
        return begun
    inner = {key: _completed(begun[key], defaults.get(key)) for key in begun}
    return {**defaults, **inner}


def noted(path: Path, key: str) -> Any:
    """What a JSON file of a run notes under a key; None if it does not, or is damaged."""
    with suppress(OSError, ValueError, AttributeError):
        return json.loads(path.read_text('utf-8')).get(key)
    return None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a metrics file; what a crash cut or left as zeros is left out."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text('utf-8', errors='replace').split('\n')[:-1]:
        with suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict) and isinstance(record.get('step'), int):
                records.append(record)
    return records


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line by what they are of: 'train/loss', 'held_out/quality'.

    Step 0 is the held-out test before training.
    """
    numbers = {}
    for name, value in record.items():
        tested = name.startswith('held_out_') or record['step'] == 0
        if name != 'step' and isinstance(value, int | float):
            group = 'held_out' if tested else 'train'
            numbers[f'{group}/{name.removeprefix("held_out_")}'] = float(value)
    return numbers


def rewind_metrics(path: Path, step: int) -> None:
    """Drop what was logged after `step`, when a run goes back to a checkpoint."""
    kept = [m for m in read_metrics(path) if m['step'] <= step]
    write_atomic(path, ''.join(json.dumps(m) + '\n' for m in kept).encode())


def append_metrics(path: Path, record: Mapping[str, Any]) -> None:
    """Add one line."""
    with open(path, 'a', encoding='utf-8') as f:
        f.write(json.dumps(record) + '\n')
