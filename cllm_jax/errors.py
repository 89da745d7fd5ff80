"""What can go wrong, by exit code. A message is one line: the value, the rule, the remedy."""

import difflib
from collections.abc import Collection
from typing import Any


class CllmError(Exception):
    """An error the user can act on; commands print its message and exit with its code."""

    exit_code = 1


class ConfigError(CllmError):
    """The request is wrong: an option, a config file, a model that does not fit."""

    exit_code = 2


class DataError(CllmError):
    """A file is wrong: a dataset, a trajectory shard, weights, a checkpoint."""

    exit_code = 3


class NumericalError(CllmError):
    """Training produced NaN or Inf, or a model that collapsed; what was good before is kept."""

    exit_code = 4


class Interrupted(CllmError):
    """Stopped by a signal after saving; the same command continues (EX_TEMPFAIL)."""

    exit_code = 75


def at_least(config: Any, **least: float) -> None:
    """Raise ConfigError for a field of a dataclass that is below its least value; None is not.

    Of a tuple every value counts, and there has to be one.
    """
    for name, bound in least.items():
        value = getattr(config, name)
        if isinstance(value, tuple) and not value:
            raise ConfigError(f'{name}: no value is given; give one or more')
        values = value if isinstance(value, tuple) else (value,)
        if low := [v for v in values if v is not None and v < bound]:
            raise ConfigError(f'{name} {low[0]}: must be at least {bound}')


def check_seed(config: Any) -> None:
    """Raise ConfigError for a `seed` of a dataclass that is not from 0 to 2**32 - 1."""
    at_least(config, seed=0)
    if config.seed >= 1 << 32:
        raise ConfigError(f'seed {config.seed}: must be below 2**32')


def shares(config: Any, *names: str) -> None:
    """Raise ConfigError for a field of a dataclass that is not from 0 to 1; None is not."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not 0 <= value <= 1:
            raise ConfigError(f'{name} {value}: a share must be 0 to 1')


def did_you_mean(name: Any, known: Collection[Any]) -> str:
    """A question with the known name that is nearest to an unknown one; '' if none is near."""
    near = difflib.get_close_matches(str(name), [str(option) for option in known], 1)
    return f'did you mean {near[0]!r}?' if near else ''


def no_such(kind: str, name: Any, known: Collection[Any]) -> str:
    """What to say of an unknown name: the nearest that is known, else all of them."""
    hint = did_you_mean(name, known) or f'there are {", ".join(map(str, known))}'
    return f'no {kind} {name!r}; {hint}'


def one_line(text: object, limit: int | None = 200) -> str:
    """A text as one printable line of bounded length, fit for an error message."""
    line = ' '.join(filter(None, map(str.strip, str(text).splitlines())))
    return ''.join(c if c.isprintable() else '?' for c in line[:limit])
