"""Trajectories on disk: array_record shards with a manifest, readable as a TFDS dataset.

    manifest.json                                     what was collected; the sha256 of each shard
    shard-00000.json                                  the manifest's entry, until all are there
    trajectories-train.array_record-00000-of-00008    records, complete or absent
    dataset_info.json, features.json                  written last, for tfds.builder_from_directory

A shard is written under a temporary name and renamed when it is on disk, then its entry is written;
whatever moment a process is killed at, the next one sees whole shards only. No two processes write
the same file: each has its own shards, and the first one writes the rest.
"""

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cllm_jax.decoding.result import Trajectory
from cllm_jax.drafters.jacobi import Jacobi
from cllm_jax.errors import ConfigError, DataError, at_least, check_seed
from cllm_jax.runs.atomic import write_atomic
from cllm_jax.runs.checksums import sha256
from cllm_jax.runtime.processes import barrier, is_main

NAME = 'trajectories'
MANIFEST = 'manifest.json'
ENTRY = {'file': str, 'records': int, 'bytes': int, 'sha256': str, 'counts': dict}
"""What the manifest says of a shard."""


@dataclasses.dataclass(frozen=True)
class Collection:
    """What is collected, and in which portions: part of what a manifest identifies."""

    block: int = 16
    """Tokens per state (n)."""
    mode: Literal['block', 'sliding'] = 'block'
    """States of the paper's block schedule, or of the sliding window that decodes fastest."""
    max_tokens: int = 128
    """Longest answer; one that does not end by then is counted as truncated."""
    seed: int = 1
    """Of generated prompts and of the random initial guesses."""
    batch: int = 16
    """Prompts decoded together; a small model on a CPU has one such batch per core."""
    shard: int = 512
    """Prompts per file; what an interruption can cost."""

    def __post_init__(self):
        at_least(self, max_tokens=1, batch=1, shard=1)
        check_seed(self)
        Jacobi(self.block)  # checks it

    @property
    def identity(self) -> dict[str, Any]:
        """What makes two collections of the same prompts differ."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(Collection)}


def features(block: int) -> Any:
    """The TFDS schema of a record with states of `block` tokens."""
    import tensorflow_datasets as tfds  # slow to import

    f = tfds.features
    return f.FeaturesDict(
        {
            'id': f.Text(),
            'prompt': f.Tensor(shape=(None,), dtype=np.int32),
            'answer': f.Tensor(shape=(None,), dtype=np.int32),
            'states': f.Tensor(shape=(None, block), dtype=np.int32),
            'start': f.Tensor(shape=(None,), dtype=np.int32),
            'finished': f.Scalar(np.int32),
            'right': f.Scalar(np.int32),
            'forwards': f.Scalar(np.int32),
        }
    )


def shard_name(index: int, count: int) -> str:
    return f'{NAME}-train.array_record-{index:05}-of-{count:05}'


def entry_path(directory: Path, index: int) -> Path:
    """Where a finished shard's entry waits for the others."""
    return directory / f'shard-{index:05}.json'


def open_manifest(
    directory: Path, identity: dict[str, Any], shards: int, mine: Sequence[int]
) -> dict[str, Any]:
    """The manifest of a collection, new or begun before; finished shards of `mine` are verified.

    A shard whose bytes are not those of the manifest is set aside (`.damaged`) and forgotten, so
    that it alone is collected again.

    Raises:
      ConfigError: the directory holds trajectories of another model, dataset or setting.
    """
    if is_main() and not (directory / MANIFEST).exists():
        directory.mkdir(parents=True, exist_ok=True)
        _write(directory / MANIFEST, {'identity': identity, 'shards': [None] * shards})
    barrier('manifest')
    manifest = read_manifest(directory)
    begun = manifest['identity']
    changed = [k for k in identity | begun if identity.get(k) != begun.get(k)]
    if changed or len(manifest['shards']) != shards:
        key = changed[0] if changed else 'shards'
        raise ConfigError(
            f'{directory}: collected with {key} = {begun.get(key, len(manifest["shards"]))!r}, now '
            f'{identity.get(key, shards)!r}; use the old settings or another directory'
        )
    for i in mine:
        entry = manifest['shards'][i]
        if entry and not _intact(directory, entry):
            manifest['shards'][i] = None
    return manifest


def _write(path: Path, value: Any) -> None:
    write_atomic(path, (json.dumps(value, indent=1) + '\n').encode())


def _intact(directory: Path, entry: dict[str, Any]) -> bool:
    path = directory / entry['file']
    if not path.exists():
        return False
    if sha256(path) == entry['sha256']:
        return True
    path.rename(path.with_name(path.name + '.damaged'))
    return False


def read_manifest(directory: Path) -> dict[str, Any]:
    """Raises DataError if the directory has no readable manifest."""
    path = directory / MANIFEST
    try:
        manifest = json.loads(path.read_text('utf-8'))
        shards = manifest['shards']
        if not (isinstance(manifest['identity']['block'], int) and isinstance(shards, list)):
            raise TypeError
        for i, entry in enumerate(shards):
            path = entry_path(directory, i)
            if path.exists():
                entry = shards[i] = json.loads(path.read_text('utf-8'))
            else:
                path = directory / MANIFEST
            if entry is not None and not all(isinstance(entry[k], ENTRY[k]) for k in ENTRY):
                raise TypeError
    except FileNotFoundError:
        raise DataError(
            f'{directory}: no {MANIFEST}; collect trajectories first (python -m cllm_jax.collect)'
        ) from None
    except (ValueError, KeyError, TypeError, UnicodeError):
        raise DataError(f'{path}: damaged; remove {directory} and collect again') from None
    return manifest


def write_shard(
    directory: Path,
    manifest: dict[str, Any],
    index: int,
    records: Sequence[Trajectory],
    counts: dict,
) -> None:
    """Add one shard and its entry. The same records give the same bytes."""
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.proto import tf_example_pb2

    schema = features(manifest['identity']['block'])
    name = shard_name(index, len(manifest['shards']))
    temp = directory / f'.{name}.tmp'
    writer = ArrayRecordWriter(str(temp), 'group_size:1')
    for record in records:
        row = dataclasses.asdict(record) | {'finished': int(record.finished)}
        data = schema.serialize_example(schema.encode_example(row))
        row = tf_example_pb2.Example.FromString(data)
        # Protocol buffers order a map as the process pleases; the same record must be the same
        # bytes in all of them.
        writer.write(row.SerializeToString(deterministic=True))
    writer.close()
    with open(temp, 'rb') as f:
        os.fsync(f.fileno())
    entry = {'file': name, 'records': len(records), 'bytes': temp.stat().st_size}
    manifest['shards'][index] = entry | {'sha256': sha256(temp), 'counts': counts}
    temp.rename(directory / name)
    _write(entry_path(directory, index), manifest['shards'][index])


def finish(directory: Path) -> None:
    """Complete the manifest and write the TFDS metadata, once every shard is there."""
    import tensorflow_datasets as tfds

    manifest = read_manifest(directory)
    shards = manifest['shards']
    _write(directory / MANIFEST, manifest)
    for i in range(len(shards)):
        entry_path(directory, i).unlink(missing_ok=True)
    template = tfds.core.ShardedFileTemplate(
        data_dir=directory, dataset_name=NAME, split='train', filetype_suffix='array_record'
    )
    split = tfds.core.SplitInfo(
        name='train',
        shard_lengths=[s['records'] for s in shards],
        num_bytes=sum(s['bytes'] for s in shards),
        filename_template=template,
    )
    tfds.folder_dataset.write_metadata(
        data_dir=directory,
        features=features(manifest['identity']['block']),
        split_infos=[split],
        filename_template='{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}',
        check_data=False,  # the check needs TensorFlow
    )


def read_records(directory: Path) -> list[Trajectory]:
    """Every record of a finished collection, in order; each shard is verified before use.

    Raises:
      DataError: no manifest, an unfinished collection, or a damaged shard.
    """
    from array_record.python.array_record_module import ArrayRecordReader

    manifest, records = read_manifest(directory), []
    schema = features(manifest['identity']['block'])
    missing = sum(entry is None for entry in manifest['shards'])
    if missing:
        raise DataError(
            f'{directory}: {missing} of {len(manifest["shards"])} shards are not collected yet; '
            'run collect again to finish'
        )
    for entry in manifest['shards']:
        path = directory / entry['file']
        if not path.exists() or sha256(path) != entry['sha256']:
            raise DataError(f'{path}: missing or damaged; run collect again, it redoes this shard')
        reader = ArrayRecordReader(str(path))
        for data in reader.read_all():
            row = schema.deserialize_example_np(data)
            row['id'] = row['id'].decode()
            row |= {k: int(row[k]) for k in ('right', 'forwards')}
            records.append(Trajectory(**row | {'finished': bool(row['finished'])}))
        reader.close()
    return records
