"""Trajectories on disk: array_record shards with a manifest, readable as a TFDS dataset.

    manifest.json                                     what was collected; the sha256 of each shard
    shard-00000.json                                  the manifest's entry, until all are there
    trajectories-train.array_record-00000-of-00008    records, complete or absent
    dataset_info.json, features.json                  written last, for tfds.builder_from_directory

A shard is written under a temporary name and renamed when it is on disk, then its entry is written:
whenever a process is killed, the next one sees whole shards only. No two processes write the same
file: each has its own shards, and the first one writes the rest.
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
    shapes = {'prompt': (None,), 'answer': (None,), 'states': (None, block), 'start': (None,)}
    return f.FeaturesDict(
        {'id': f.Text()}
        | {name: f.Tensor(shape=shape, dtype=np.int32) for name, shape in shapes.items()}
        | {name: f.Scalar(np.int32) for name in ('finished', 'right', 'forwards')}
    )


def entry_path(directory: Path, index: int) -> Path:
    """Where a finished shard's entry waits for the others."""
    return directory / f'shard-{index:05}.json'


def open_manifest(
    directory: Path, identity: dict[str, Any], shards: int, mine: Sequence[int]
) -> dict[str, Any]:
    """The manifest of a collection, new or begun before; finished shards of `mine` are verified.

    A shard whose bytes are not those of the manifest is set aside (`.damaged`), and it alone is
    collected again. Raises ConfigError for trajectories of another model, dataset or setting.
    """
    if is_main() and not (directory / MANIFEST).exists():
        directory.mkdir(parents=True, exist_ok=True)
        _write(directory / MANIFEST, {'identity': identity, 'shards': [None] * shards})
    barrier('manifest')
    manifest = read_manifest(directory)
    begun = manifest['identity'] | {'shards': len(manifest['shards'])}
    wanted = identity | {'shards': shards}
    if changed := [k for k in wanted | begun if wanted.get(k) != begun.get(k)]:
        old, new = (settings.get(changed[0]) for settings in (begun, wanted))
        what = f'{directory}: collected with {changed[0]} = {old!r}, now {new!r}'
        raise ConfigError(f'{what}; use the old settings or another directory')
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
    directory: Path, manifest: dict, index: int, records: Sequence[Trajectory], counts: dict
) -> None:
    """Add one shard and its entry. The same records give the same bytes."""
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.proto import tf_example_pb2

    schema = features(manifest['identity']['block'])
    name = f'{NAME}-train.array_record-{index:05}-of-{len(manifest["shards"]):05}'
    temp = directory / f'.{name}.tmp'
    writer = ArrayRecordWriter(str(temp), 'group_size:1')
    for record in records:
        row = dataclasses.asdict(record) | {'finished': int(record.finished)}
        data = schema.serialize_example(schema.encode_example(row))
        row = tf_example_pb2.Example.FromString(data)
        # Else every process orders the map of a protocol buffer as it pleases.
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
    shards, schema = manifest['shards'], features(manifest['identity']['block'])
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
        features=schema,
        split_infos=[split],
        filename_template='{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}',
        check_data=False,  # the check needs TensorFlow
    )


def read_records(directory: Path) -> list[Trajectory]:
    """Every record of a finished collection, in order; each shard is verified before use.

    Raises DataError for no manifest, an unfinished collection, or a damaged shard.
    """
    from array_record.python.array_record_module import ArrayRecordReader

    manifest, records = read_manifest(directory), []
    schema, shards = features(manifest['identity']['block']), manifest['shards']
    if missing := shards.count(None):
        state = f'{missing} of {len(shards)} shards are not collected yet'
        raise DataError(f'{directory}: {state}; run collect again to finish')
    for entry in shards:
        path = directory / entry['file']
        if not path.exists() or sha256(path) != entry['sha256']:
            raise DataError(f'{path}: missing or damaged; run collect again, it redoes this shard')
        reader = ArrayRecordReader(str(path))
        for data in reader.read_all():
            row = schema.deserialize_example_np(data)
            row |= {k: int(row[k]) for k in ('right', 'forwards')} | {'id': row['id'].decode()}
            records.append(Trajectory(**row | {'finished': bool(row['finished'])}))
        reader.close()
    return records
