"""sha256 sums of the files of a directory: what a disk changed by itself is found before use.

The file of sums has the format of coreutils: `sha256sum -c cllm_jax.sha256` checks it too.
"""

import hashlib
from pathlib import Path

from cllm_jax.errors import DataError
from cllm_jax.runs.atomic import write_atomic

SUMS = 'cllm_jax.sha256'
FREE = (SUMS, 'README.md', 'LICENSE')
"""Not summed: a model card and a licence may be added and edited."""
OTHERS = '.gguf'
"""The suffix of models of their own, which come and go: other programs put them into a directory,
and what reads the directory does not read them."""


def sha256(path: Path) -> str:
    """The sum of one file, in hex."""
    with open(path, 'rb') as f:
        return hashlib.file_digest(f, 'sha256').hexdigest()


def write_sums(directory: Path) -> None:
    """Write the sums of every file below `directory`."""
    files = sorted(p for p in directory.rglob('*') if p.is_file() and not _free(p))
    lines = [f'{sha256(p)}  {p.relative_to(directory).as_posix()}\n' for p in files]
    write_atomic(directory / SUMS, ''.join(lines).encode())


def check_sums(directory: Path) -> None:
    """Compare every file with its sum; a directory without sums passes.

    Hidden files, and directories with sums of their own, need no sums here.

    Raises:
      DataError: a file is missing, not what was written or without a sum, or the sums are
        unreadable.
    """
    path = directory / SUMS
    if not path.exists():
        return
    try:
        rows = [line.split('  ', 1) for line in path.read_text('utf-8').splitlines()]
        known = {name: digest for digest, name in rows}
        if any(Path(name).is_absolute() or '..' in Path(name).parts for name in known):
            raise ValueError
    except (ValueError, OSError):
        raise DataError(f'{path}: damaged; copy the directory again') from None
    for name, digest in known.items():
        file = directory / name
        if not file.is_file():
            raise DataError(f'{file}: missing, but listed in {SUMS}; copy the directory again')
        if sha256(file) != digest:
            raise DataError(
                f'{file}: not the bytes that were written; copy the directory again, or remove '
                f'{SUMS} if you changed it yourself'
            )
    for file in directory.rglob('*'):
        name = file.relative_to(directory)
        free = _free(file) or any(part.startswith('.') for part in name.parts)
        own = file.parent != directory and (file.parent / SUMS).exists()
        if file.is_file() and not (free or own or name.as_posix() in known):
            raise DataError(
                f'{file}: has no sum in {SUMS}; copy the directory again, or remove {SUMS} if you '
                'added it yourself'
            )


def _free(path: Path) -> bool:
    return path.name in FREE or path.suffix == OTHERS
