"""Any dataset that the `datasets` package reads: of the Hugging Face hub, or of a directory.

Only a hub id reaches for the network, and no code of a dataset is ever run.
"""

import os
import re
from collections import Counter
from typing import Any

from cllm_jax.data.fields import chosen_fields, examples_of
from cllm_jax.data.json_rows import short
from cllm_jax.errors import ConfigError, DataError, no_such, one_line
from cllm_jax.tasks.example import Example

OPTIONS = ('split', 'config', 'prompt', 'answer')

_HUB_ID = re.compile(r'\w[\w.-]*/\w[\w.-]*')
_SAVED = ('state.json', 'dataset_dict.json')
"""What `save_to_disk` writes, of one split and of several."""


def read_hf(
    name: str,
    dropped: Counter[str] | None = None,
    *,
    split: str | None = None,
    config: str | None = None,
    prompt: str = 'prompt',
    answer: str | None = None,
) -> list[Example]:
    """Reads two text fields of a dataset; ids are `hf-row`, counted from 1.

    `name` is a hub id `owner/name`; or a directory, of `save_to_disk` or of Parquet, CSV or JSON
    files. `split` is any that `datasets` knows, by default train or the only one.

    Raises DataError if the dataset is absent, damaged or made by a script, or has no such split or
    field, or fields without text; ConfigError if no `datasets` is installed that runs no scripts.
    """
    found = _opened(name, split, config)
    fields = chosen_fields(found.column_names, prompt, answer, name)
    for field in fields:
        if getattr(kind := found.features[field], 'dtype', None) not in ('string', 'large_string'):
            kind = getattr(kind, 'dtype', None) or type(kind).__name__
            raise DataError(f'{name}: field {short(field)} is {kind}; only text fields can be used')
    dropped = Counter() if dropped is None else dropped
    try:
        found = found.select_columns(fields)
        # Its file is mapped into memory, where an offset that is wrong would end the process.
        found.data.validate(full=True)
        columns = ([batch[field] for field in fields] for batch in found.iter(1000))
        rows = (row for batch in columns for row in zip(*batch, strict=True))
        return examples_of('hf', enumerate(rows, 1), fields, name, dropped)
    except (OSError, ValueError) as error:  # Arrow's errors are among them
        fault = f'cannot be read ({one_line(error, 120)}); write or download it again'
        raise DataError(f'{name}: {fault}') from None


def _opened(name: str, split: str | None, config: str | None) -> Any:
    """One split of a dataset, as the package has it."""
    datasets, place = _package(name), os.path.abspath(os.path.expanduser(name))
    here = os.path.isdir(place)
    if not here and not _HUB_ID.fullmatch(name):
        raise DataError(f'{name}: no such directory; name one, or a hub id OWNER/NAME')
    try:
        if here and any(os.path.isfile(os.path.join(place, file)) for file in _SAVED):
            return _of_split(datasets.load_from_disk(place), name, split)
        # An absolute path: a bare name may stand for a reader of the package itself.
        return datasets.load_dataset(place if here else name, config, split=split or 'train')
    except DataError:
        raise
    except Exception as error:  # the package raises a dozen types, and those of its file systems
        if 'scripts are no longer supported' in str(error):
            fault = 'made by a script, which is never run; convert it to Parquet files'
            raise DataError(f'{name}: {fault}') from None
        remedy = 'check the name, split= and config=' + ('' if here else ', and the connection')
        raise DataError(f'{name}: cannot be opened ({one_line(error, 160)}); {remedy}') from None


def _of_split(found: Any, name: str, split: str | None) -> Any:
    """The split of what `save_to_disk` wrote."""
    if isinstance(found, dict):
        split = split or ('train' if 'train' in found else next(iter(found), 'train'))
        if split not in found:
            raise DataError(f'{name}: {no_such("split", split, found)}')
        return found[split]
    if split not in (None, str(found.split)):
        raise DataError(f'{name}: one split, {found.split}, and not {split!r}; leave split= out')
    return found


def _package(name: str) -> Any:
    remedy = "pip install 'cllm_jax[datasets]'"
    try:
        import datasets
    except ImportError:
        fault = f'hf: needs a package that is not installed; {remedy}'
        raise ConfigError(f'{name}: {fault}') from None
    if int(datasets.__version__.split('.')[0]) < 4:
        fault = f'datasets {datasets.__version__} can run the scripts of a dataset; {remedy}'
        raise ConfigError(f'{name}: {fault}')
    return datasets
