"""Files and directories that are replaced at once: a reader or a crash finds the old or the new."""

import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def write_atomic(path: Path, data: bytes) -> None:
    """Replace a file so that a reader or a crash sees the old bytes or the new ones, no mix.
    What is not a file, such as a pipe, is not replaced but written to. So is the file to which this
    process prints (/dev/stdout may be one).
    """
    if path.exists():
        if (number := _printed_to(path)) is not None:
            sys.stdout.flush()
            with open(number, 'wb', closefd=False) as f:
                f.write(data)
            return
        if not path.is_file():
            path.write_bytes(data)
            return
    with replacing(path) as temp:
        temp.write_bytes(data)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name under which to write a file. It takes the name `path` once it is on disk; after an
    error it is gone, and the old file is as it was.
    """
    path = path.resolve()
    temp = path.with_name(f'.{path.name}.tmp')
    try:
        yield temp
        _sync(temp)
        temp.rename(path)
        _sync(path.parent)
    except BaseException:
        temp.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Replace a file with indented JSON, by `write_atomic`; its directory is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, (json.dumps(value, indent=2) + '\n').encode())


def temporary(directory: Path) -> Path:
    """A new, empty directory in which to write what is to replace `directory`."""
    recover_replacement(directory)
    temp = directory.with_name(f'.{directory.name}.tmp')
    temp.mkdir(parents=True)
    return temp


def replace_directory(temp: Path, directory: Path) -> None:
    """Give `temp`, of `temporary`, its final name; what was there survives until it is on disk."""
    for path in [*temp.rglob('*'), temp]:
        _sync(path)
    old = directory.with_name(f'.{directory.name}.old')
    if directory.exists():
        directory.rename(old)
    temp.rename(directory)
    _sync(directory.parent)
    shutil.rmtree(old, ignore_errors=True)


def recover_replacement(directory: Path) -> None:
    """Clean up after a `replace_directory` that was killed: the old directory is back, or gone."""
    old, temp = (directory.with_name(f'.{directory.name}.{end}') for end in ('old', 'tmp'))
    if os.path.isdir(old) and not os.path.exists(directory):  # False for names that cannot be
        old.rename(directory)
    for left in (old, temp):
        shutil.rmtree(left, ignore_errors=True)


def _printed_to(path: Path) -> int | None:
    """The number of the output of this process that a path is, if it is one."""
    for stream in (sys.__stdout__, sys.__stderr__):
        # None if it was closed before; its number may be another file's then.
        if stream and os.path.samestat(path.stat(), os.fstat(stream.fileno())):
            return stream.fileno()
    return None


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on disk."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
