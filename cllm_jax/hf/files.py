"""The safetensors files of a model directory: which they are, what they hold, what is wrong.

Nothing outside the directory is opened, nothing is unpickled, and only headers are read here.
"""

import dataclasses
import json
import os
from pathlib import Path

from safetensors import SafetensorError, safe_open

from cllm_jax.errors import DataError
from cllm_jax.model.config import one_line

INDEX = 'model.safetensors.index.json'
SINGLE = 'model.safetensors'
INDEX_BYTES = 64 << 20
LISTED = 10


@dataclasses.dataclass(frozen=True)
class Stored:
    """Where a tensor lies, its shape, and its number format as safetensors spells it."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


def _weight_files(directory: Path) -> list[Path]:
    index, single = directory / INDEX, directory / SINGLE
    if os.path.isfile(index):
        return _indexed_files(directory, index)
    if os.path.isfile(single):
        return [single]
    pickles = sorted(p.name for s in ('*.bin', '*.pt', '*.pth') for p in directory.glob(s))
    if pickles:
        raise DataError(
            f'{directory}: no {SINGLE}, only {pickles[0]}; pickled weights are never opened, '
            'convert them with transformers: model.save_pretrained(DIR)'
        )
    raise DataError(f'{directory}: no {SINGLE} and no {INDEX}; name a whole model directory')


def _indexed_files(directory: Path, index: Path) -> list[Path]:
    try:
        if index.stat().st_size > INDEX_BYTES:
            raise DataError(f'{index}: larger than 64 MiB; fetch the file again')
        names = dict.fromkeys(json.loads(index.read_text('utf-8'))['weight_map'].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise DataError(f'{index}: not a safetensors index; fetch the file again') from None
    home = directory.resolve()
    # The hub's cache links every file of snapshots/REVISION into blobs/.
    homes = [home, home.parents[1] / 'blobs'] if home.parent.name == 'snapshots' else [home]
    for name in names:
        shown = one_line(ascii(name))
        if (
            not isinstance(name, str)
            or name != Path(name).name
            or Path(name).suffix != '.safetensors'
        ):
            raise DataError(
                f'{index}: names {shown}; only a *.safetensors file of the same directory is '
                'opened, fetch the index again'
            )
        path = directory / name
        if not os.path.isfile(path):
            raise DataError(f'{index}: names {shown}, which is no file here; fetch that file too')
        if not any(path.resolve().is_relative_to(h) for h in homes):
            raise DataError(
                f'{index}: names {shown}, a link that leads out of the directory; '
                'copy the file itself here'
            )
    return [directory / name for name in names]


def explain(path: Path, error: Exception) -> DataError:
    """What is wrong with a file that safetensors could not read; the commonest causes by name."""
    try:
        with open(path, 'rb') as f:
            head = f.read(64)
    except OSError as e:
        return DataError(f'{path}: {e.strerror or e}; make the file readable')
    if not head:
        return DataError(f'{path}: an empty file, not weights; fetch it again')
    if head.startswith(b'version https://git-lfs'):
        return DataError(f'{path}: a git-LFS pointer, not the weights; run git lfs pull')
    if head.lstrip().lower().startswith((b'<!doctype', b'<html')):
        return DataError(f'{path}: an HTML page, not weights; download the file itself')
    return DataError(f'{path}: damaged safetensors file ({one_line(error, 120)}); fetch it again')


def read_headers(directory: Path) -> dict[str, Stored]:
    """Every tensor of a model directory by name; reads no weights.

    Raises:
      DataError: no, pickled, missing or damaged files, or an index that points elsewhere.
    """
    found: dict[str, Stored] = {}
    for path in _weight_files(directory):
        try:
            with safe_open(path, framework='np') as f:
                names = list(f.keys())
                slices = [f.get_slice(name) for name in names]
                stored = [Stored(path, tuple(s.get_shape()), s.get_dtype()) for s in slices]
        except (SafetensorError, OSError, ValueError) as e:
            raise explain(path, e) from None
        if twice := sorted(found.keys() & set(names)):
            raise DataError(
                f'{path}: {listed(twice)} also in {found[twice[0]].file.name}; '
                'delete the stale one of the two files'
            )
        found |= dict(zip(names, stored, strict=True))
    # Old checkpoints store this constant of the architecture.
    return {k: v for k, v in found.items() if not k.endswith('rotary_emb.inv_freq')}


def listed(names: list[str]) -> str:
    """At most ten names, and how many more there are."""
    more = f' and {len(names) - LISTED} more' if len(names) > LISTED else ''
    return ', '.join(one_line(name) for name in names[:LISTED]) + more
