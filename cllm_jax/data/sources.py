"""The one list of datasets that a config can name, and how to open one.

To add one takes a line in `GENERATED` (a task that makes its rows) or in `FORMATS` (a file).
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from types import ModuleType

from cllm_jax.data import fields, formats, hub, tables, tfds
from cllm_jax.data.chat import opening
from cllm_jax.errors import ConfigError, DataError, did_you_mean
from cllm_jax.tasks import arithmetic, grader, sql
from cllm_jax.tasks.example import Example, Split, holds_out

Check = Callable[[Example, str], bool]

DEFAULT_LIMIT = 10_000  # rows of a generated task when no limit is given
HELDOUT_ONE_IN = 20


@dataclass(frozen=True, eq=False)
class Source:
    """Rows with random access (what Grain reads) and the test of their grader.

    `check(example, text)` tells whether a generated answer is right. `checkable` is False where
    that says little: open-ended tasks (chat, code), and rows without a reference. `dropped` counts,
    by reason, the rows of the file that the reader left out.
    """

    name: str
    rows: Sequence[Example] = field(repr=False)
    check: Check = field(repr=False)
    checkable: bool = True
    dropped: Mapping[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        return self.rows[index]


@dataclass(frozen=True)
class Format:
    """How a file is read and its answers are checked; `graded` is False where that says little.

    A reader that `drops` rows takes a Counter as well, and counts them there by reason. `options`
    are what may be asked for after the path (`PATH?prompt=FIELD`), each an argument of the reader.
    """

    read: Callable[..., list[Example]]
    check: Check
    graded: bool = True
    drops: bool = False
    options: Sequence[str] = ()


def _table(read: Callable[..., list[Example]], options: Sequence[str] = fields.OPTIONS) -> Format:
    return Format(read, grader.same_text, drops=True, options=options)


# Modules with generate(index, *, seed, split) -> Example and check(example, text) -> bool.
GENERATED: Mapping[str, ModuleType] = {'sql': sql, 'arithmetic': arithmetic}

FORMATS: Mapping[str, Format] = {
    'jsonl': Format(formats.read_jsonl, grader.same_text, options=fields.OPTIONS),
    'csv': _table(tables.read_csv),
    'tsv': _table(partial(tables.read_csv, delimiter='\t')),
    'parquet': _table(tables.read_parquet),
    'hf': _table(hub.read_hf, hub.OPTIONS),
    'gsm8k': Format(formats.read_gsm8k, grader.same_number),
    'gsm8k-plain': Format(partial(formats.read_gsm8k, calculator_marks=False), grader.same_number),
    'wikisql': Format(formats.read_wikisql, grader.same_text),
    'spider': Format(formats.read_spider, grader.same_sql),
    'codesearchnet': Format(formats.read_codesearchnet, grader.same_text, graded=False),
    'sharegpt': Format(formats.read_sharegpt, grader.same_text, graded=False, drops=True),
    'sharegpt-chat': Format(formats.read_sharegpt_chat, grader.same_text, graded=False, drops=True),
    'tfds': Format(tfds.read_tfds, grader.same_text, options=tfds.OPTIONS),
}

SUFFIXES = {f'.{kind}{gz}': kind for kind in ('jsonl', 'csv', 'tsv') for gz in ('', '.gz')}
SUFFIXES |= {'.parquet': 'parquet'}
"""How the name of a file may end whose format need not be named."""


def rows_fingerprint(source: Source) -> str:
    """The number of rows, and the sha256 (its first 16 digits) of all ids, prompts and answers."""
    digest = hashlib.sha256()
    for row in source.rows:
        digest.update(json.dumps([row.id, row.prompt, row.answer]).encode())
    return f'{len(source)} rows, sha256 {digest.hexdigest()[:16]}'


def open_source(
    spec: str, *, split: Split = 'train', seed: int = 0, limit: int | None = None
) -> Source:
    """Opens the dataset that `spec` names.

    - `sql`, `arithmetic`: rows made on demand from (index, seed, split), `limit` of them (10,000
      if None). `sql+arithmetic` takes the tasks in turn; each is told apart by `meta['task']`.
    - `FORMAT:PATH` with a format of `FORMATS`, such as `gsm8k:train.jsonl.gz`; a bare path that
      ends like one of `SUFFIXES` has that format.
    - Formats with options take them after the path: `mine.csv?prompt=FIELD&answer=FIELD`,
      `hf:OWNER/NAME?split=train`, `tfds:NAME?data_dir=DIR`; see their readers.

    Of a file, split 'heldout' has the rows whose prompt's sha256 is divisible by 20 (of a chat what
    is before its first answer) and 'train' the others, so no prompt is in both; a spec that ends in
    `#all` has every row. `limit` then takes a random choice given by `seed`; a smaller limit takes
    a prefix of a larger one's choice.

    Raises ConfigError for a spec, split or limit that cannot be, DataError for a bad file.
    """
    holds_out(split)  # refuses any other split
    if limit is not None and limit < 1:
        raise ConfigError(f'limit {limit} of {spec!r} must be at least 1; leave it out for all')
    plain = spec.removesuffix('#all')
    names = plain.split('+')
    if all(name in GENERATED for name in names):
        if spec != plain:
            raise ConfigError(f"{spec!r}: rows made on demand have no '#all'; write {plain!r}")
        if len(set(names)) < len(names):
            raise ConfigError(f'{spec!r} names a task twice; name each once')
        made = _Generated(tuple(names), split, seed, DEFAULT_LIMIT if limit is None else limit)
        return Source(spec, made, made.check)
    kind, path = _kind_and_path(spec)
    form, dropped, options = FORMATS[kind], Counter(), {}
    if form.options:
        path, options = fields.read_options(path, form.options)
    rows = form.read(path, *[dropped] * form.drops, **options)
    if spec == plain:
        rows = _of_split(rows, split, spec)
    if limit is not None and limit < len(rows):
        rows = sorted(rows, key=lambda row: _digest(f'{seed}/{row.id}'))[:limit]
    graded = form.graded and all(row.answer.strip() for row in rows)
    return Source(spec, rows, form.check, graded, dict(dropped))


@dataclass(frozen=True)
class _Generated(Sequence[Example]):
    """Row i comes from task i mod k as its row i div k."""

    tasks: tuple[str, ...]
    split: Split
    seed: int
    size: int

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Example:
        row, task = divmod(range(self.size)[index], len(self.tasks))
        name = self.tasks[task]
        example = GENERATED[name].generate(row, seed=self.seed, split=self.split)
        return replace(example, meta={**example.meta, 'task': name})

    def check(self, example: Example, text: str) -> bool:
        return GENERATED[example.meta['task']].check(example, text)


def _kind_and_path(spec: str) -> tuple[str, str]:
    file = spec.removesuffix('#all')
    kind, _, path = file.partition(':')
    if kind in FORMATS:
        if not path:
            raise ConfigError(f'{spec!r} names no file; write {kind + ":PATH"!r}')
        return kind, path
    bare = fields.without_options(file)
    if bare.endswith(tuple(SUFFIXES)) and (':' not in bare or '/' in kind):
        return next(SUFFIXES[s] for s in SUFFIXES if bare.endswith(s)), file
    tasks = [*GENERATED, '+'.join(GENERATED)]
    hint = f'{did_you_mean(kind, [*tasks, *FORMATS])} a dataset is {", ".join(tasks)}'.lstrip()
    raise ConfigError(
        f'dataset {spec!r} is unknown; {hint}, a path ending in {", ".join(SUFFIXES)}, or '
        f'FORMAT:PATH with FORMAT one of {", ".join(FORMATS)}'
    )


def _of_split(rows: list[Example], split: Split, spec: str) -> list[Example]:
    heldout = holds_out(split)
    kept = [row for row in rows if (_digest(opening(row.prompt)) % HELDOUT_ONE_IN == 0) == heldout]
    if not kept:
        fault = (
            f'{spec}: none of its {len(rows)} rows is in split {split!r} (1 in {HELDOUT_ONE_IN} '
        )
        if heldout:
            raise DataError(
                f'{fault}is, for tests); name the rows of tests with --task: another file, or '
                f"'{spec}#all' for all of these, also those that are trained on"
            )
        raise DataError(
            f"{fault}is held out); name another file, or write '{spec}#all' to use every row"
        )
    return kept


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode('utf-8')).digest(), 'big')
