"""The files of a model directory. Nothing outside it is opened, and nothing is unpickled."""

import contextlib
import json
import os
import re
import stat
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from cllm_jax.errors import DataError, one_line
from cllm_jax.runs.atomic import recover_replacement, replace_directory, temporary

INDEX = 'model.safetensors.index.json'
SINGLE = 'model.safetensors'
INDEX_MIB = 64
SET_NAME = re.compile(r'model(-\d+-of-\d+)?\.safetensors')
"""What `transformers` calls the weights of a model, in one file or in several."""
WEIGHTS_NAME = re.compile(r'[^/]+\.safetensors')
STORED = ('F64', 'F32', 'F16', 'BF16')
"""Number formats (as safetensors spells them) that hold plain weights."""
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


def has_weights(directory: Path) -> bool:
    """Whether a directory holds a model's weights, in whichever form."""
    files = (p.name for p in directory.glob('*model*'))
    return any(SET_NAME.fullmatch(n) or n == INDEX or n.startswith('pytorch_model') for n in files)


def _weight_files(directory: Path) -> list[Path]:
    """The files of the one set of weights of a directory; two sets are refused by name."""
    single, index = directory / SINGLE, directory / INDEX
    here = {p.name for p in directory.glob('model*.safetensors') if SET_NAME.fullmatch(p.name)}
    indexed = os.path.isfile(index)
    names = _indexed_names(index) if indexed else [SINGLE] if SINGLE in here else []
    stale = sorted(here.difference(names))
    if names and stale and not (stale == [SINGLE] and _same_tensors(directory, names, stale)):
        told = f'{listed(names)} of {INDEX}' if indexed else SINGLE
        raise DataError(
            f'{directory}: two sets of weights, {told} and {listed(stale)}; delete the stale one'
        )
    for name in names:
        if not os.path.isfile(directory / name):
            said = f'{index}: names {one_line(ascii(name))}, which is' if indexed else f'{single}:'
            raise DataError(f'{said} not a file here, or a link to none; fetch that file too')
        check_link(directory / name)
    if names:
        return [directory / name for name in names]
    if stale:
        raise DataError(f'{directory}: {listed(stale)} without {INDEX}; fetch that file too')
    pickles = sorted(p.name for s in ('*.bin', '*.pt', '*.pth') for p in directory.glob(s))
    if pickles:
        raise DataError(
            f'{directory}: no {SINGLE}, only {pickles[0]}; pickled weights are never opened, '
            'convert them with transformers: model.save_pretrained(DIR)'
        )
    raise DataError(f'{directory}: no {SINGLE} and no {INDEX}; name a whole model directory')


def _indexed_names(index: Path) -> list[str]:
    """The files that an index names, which may only be names: it comes from elsewhere."""
    try:
        names = list(dict.fromkeys(read_json(index, INDEX_MIB)['weight_map'].values()))
        names[0]
    except (DataError, KeyError, TypeError, AttributeError, IndexError):
        raise DataError(
            f'{index}: not a safetensors index of at most {INDEX_MIB} MiB; fetch the file again'
        ) from None
    for name in names:
        if not isinstance(name, str) or not WEIGHTS_NAME.fullmatch(name):
            raise DataError(
                f'{index}: names {one_line(ascii(name))}; only a *.safetensors file of the same '
                'directory is opened, fetch the index again'
            )
    return names


def check_link(path: Path) -> None:
    """Refuse a link of the hub's cache that leads elsewhere than to its own files.

    There every file of `snapshots/REVISION` is a link into `blobs`, which may be a link itself.
    In other directories links are the work of who uses them, and may lead anywhere.
    """
    home = path.parent.resolve()
    blobs = home.parent.parent / 'blobs'
    if home.parent.name != 'snapshots' or not blobs.is_dir():
        return
    here = home / path.name
    while here.is_symlink() and here.is_relative_to(home):
        here = here.parent / os.readlink(here)
        here = here.parent.resolve() / here.name
    if not any(here.is_relative_to(own) for own in (home, blobs.resolve())):
        raise DataError(f'{path}: a link that leads out of the hub cache; fetch the file again')


def _same_tensors(directory: Path, *sets: list[str]) -> bool:
    """Whether two sets of files hold the same, bit for bit; a pair of tensors at a time is read."""
    if not all(os.path.isfile(directory / name) for names in sets for name in names):
        return False
    one, other = (headers([directory / name for name in names]) for names in sets)
    if {k: t[1:] for k, t in one.items()} != {k: t[1:] for k, t in other.items()}:
        return False
    if not all(tensor.dtype in STORED for tensor in one.values()):
        return False  # NumPy may not know the format, and it will be refused
    return all(_bits(tensor, name) == _bits(other[name], name) for name, tensor in one.items())


def _bits(tensor: Stored, name: str) -> bytes:
    with open_tensors(tensor.file) as f:
        return f.get_tensor(name).tobytes()


def explain(path: Path, error: object, kind: str = 'safetensors') -> DataError:
    """What is wrong with a file that could not be read as `kind`; the commonest causes by name."""
    wrong = f'damaged {kind} file ({one_line(error, 120)}); fetch it again'
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

    Raises DataError for absent, pickled or damaged files, two sets of them, or an index that points
    elsewhere.
    """
    found = headers(_weight_files(directory))
    # Old checkpoints store this constant of the architecture.
    return {k: v for k, v in found.items() if not k.endswith('rotary_emb.inv_freq')}


def headers(files: list[Path]) -> dict[str, Stored]:
    """Every tensor of some files by name; DataError if two of them hold one of the same name."""
    found: dict[str, Stored] = {}
    for path in files:
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
    return found


def make_readable(directory: Path) -> None:
    """Every file as readable as its JSON files (safetensors writes mode 0600)."""
    mode = stat.S_IMODE(next(directory.glob('*.json')).stat().st_mode)
    for path in directory.rglob('*'):
        if path.is_file():
            path.chmod(mode)


def check_replaceable(directory: Path, known: Collection[str], what: str) -> None:
    """Raise DataError if a directory that is to be written holds files that would be lost.

    Args:
      known: names of the files of `what`, which are written again.
    """
    if directory.exists() and not directory.is_dir():
        raise DataError(f'{directory}: is a file; choose another directory')
    if kept := sorted(path.name for path in directory.glob('*') if path.name not in known):
        fault = f'holds {listed(kept)}, which is not part of {what} and would be lost'
        raise DataError(f'{directory}: {fault}; choose another directory')


@contextlib.contextmanager
def written_whole(directory: Path) -> Iterator[Path]:
    """Yield an empty directory, to be filled, which then replaces `directory` at once.

    Raises DataError if that cannot be written.
    """
    try:
        temp = temporary(directory)
        yield temp
        make_readable(temp)
        replace_directory(temp, directory)
    except (OSError, SafetensorError) as e:
        raise DataError(
            f'{directory}: not written ({one_line(e)}); free some space or choose another directory'
        ) from None
    finally:
        recover_replacement(directory)
