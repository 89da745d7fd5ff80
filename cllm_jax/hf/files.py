"""The files of a model directory. Nothing outside it is opened, and nothing is unpickled."""

import contextlib
import json
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from cllm_jax.errors import DataError, one_line

INDEX = 'model.safetensors.index.json'
SINGLE = 'model.safetensors'
INDEX_MIB = 64
WEIGHTS_NAME = re.compile(r'[^/]+\.safetensors')
LISTED = 10


class Stored(NamedTuple):
    """Where a tensor lies, its shape, and its number format as safetensors spells it."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


def listed(names: list[str]) -> str:
    """At most ten names, and how many more there are."""
    more = f' and {len(names) - LISTED} more' if len(names) > LISTED else ''
    return ', '.join(one_line(name) for name in names[:LISTED]) + more


def read_json(path: Path, most_mib: int = 1) -> dict[str, Any]:
    """The JSON object of a file; DataError if it is absent, too large, or something else."""
    if not path.is_file():
        raise DataError(f'{path}: no such file; name a directory that holds a whole model')
    try:
        wrong = f'{path.stat().st_size} bytes, at most {most_mib} MiB expected'
        if path.stat().st_size <= most_mib << 20:
            data = json.loads(path.read_text('utf-8'))
            if isinstance(data, dict):
                return data
            wrong = f'a JSON {type(data).__name__}, an object expected'
    except OSError as e:
        raise DataError(f'{path}: {e.strerror or e}; make the file readable') from None
    except (ValueError, RecursionError):
        wrong = 'not valid JSON'
    raise DataError(f'{path}: {wrong}; fetch the file again')


def _weight_files(directory: Path) -> list[Path]:
    if os.path.isfile(directory / INDEX):
        return _indexed_files(directory, directory / INDEX)
    if os.path.isfile(directory / SINGLE):
        return [directory / SINGLE]
    pickles = sorted(p.name for s in ('*.bin', '*.pt', '*.pth') for p in directory.glob(s))
    if pickles:
        raise DataError(
            f'{directory}: no {SINGLE}, only {pickles[0]}; pickled weights are never opened, '
            'convert them with transformers: model.save_pretrained(DIR)'
        )
    raise DataError(f'{directory}: no {SINGLE} and no {INDEX}; name a whole model directory')


def _indexed_files(directory: Path, index: Path) -> list[Path]:
    try:
        names = dict.fromkeys(read_json(index, INDEX_MIB)['weight_map'].values())
    except (DataError, KeyError, TypeError, AttributeError):
        raise DataError(
            f'{index}: not a safetensors index of at most {INDEX_MIB} MiB; fetch the file again'
        ) from None
    homes = [home := directory.resolve()]
    if home.parent.name == 'snapshots':  # the hub's cache links every file into blobs/
        homes.append(home.parents[1] / 'blobs')
    for name in names:
        says = f'{index}: names {one_line(ascii(name))}'
        if not isinstance(name, str) or not WEIGHTS_NAME.fullmatch(name):
            raise DataError(
                f'{says}; only a *.safetensors file of the same directory is opened, fetch the '
                'index again'
            )
        path = directory / name
        if not os.path.isfile(path):
            raise DataError(f'{says}, which is not a file here; fetch that file too')
        if not any(path.resolve().is_relative_to(h) for h in homes):
            raise DataError(
                f'{says}, a link that leads out of the directory; copy the file itself here'
            )
    return [directory / name for name in names]


def explain(path: Path, error: Exception) -> DataError:
    """What is wrong with a file that safetensors could not read; the commonest causes by name."""
    wrong = f'damaged safetensors file ({one_line(error, 120)}); fetch it again'
    try:
        with open(path, 'rb') as f:
            head = f.read(64)
    except OSError as e:
        wrong = f'{e.strerror or e}; make the file readable'
    else:
        if not head:
            wrong = 'an empty file, not weights; fetch it again'
        elif head.startswith(b'version https://git-lfs'):
            wrong = 'a git-LFS pointer, not the weights; run git lfs pull'
        elif head.lstrip().lower().startswith((b'<!doctype', b'<html')):
            wrong = 'an HTML page, not weights; download the file itself'
    return DataError(f'{path}: {wrong}')


@contextlib.contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """A safetensors file to read in a `with` block; DataError if it is damaged (`explain`)."""
    try:
        with safe_open(path, framework='np') as f:
            yield f
    except (SafetensorError, OSError, ValueError) as e:
        raise explain(path, e) from None


def read_headers(directory: Path) -> dict[str, Stored]:
    """Every tensor of a model directory by name; reads no weights.

    Raises DataError for absent, pickled or damaged files, or an index that points elsewhere.
    """
    found: dict[str, Stored] = {}
    for path in _weight_files(directory):
        stored = {}
        with open_tensors(path) as f:
            for name in f.keys():  # noqa: SIM118
                tensor = f.get_slice(name)
                stored[name] = Stored(path, tuple(tensor.get_shape()), tensor.get_dtype())
        if twice := sorted(found.keys() & stored.keys()):
            raise DataError(
                f'{path}: {listed(twice)} also in {found[twice[0]].file.name}; '
                'delete the stale one of the two files'
            )
        found |= stored
    # Old checkpoints store this constant of the architecture.
    return {k: v for k, v in found.items() if not k.endswith('rotary_emb.inv_freq')}


def make_readable(directory: Path) -> None:
    """Every file as readable as its JSON files (safetensors writes mode 0600)."""
    mode = stat.S_IMODE(next(directory.glob('*.json')).stat().st_mode)
    for path in directory.rglob('*'):
        if path.is_file():
            path.chmod(mode)
