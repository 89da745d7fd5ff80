"""Where the settings of a command come from: its defaults, a recipe, the command line.

A command has one frozen dataclass in which each field has a type, a default and a docstring (its
line in --help). `python -m cllm_jax.train --config recipe.yaml --stage target --steps 100` takes
the defaults, then stage 'target' of the recipe, then what the command line says.
"""

import argparse
import dataclasses
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Generic, Literal, TypeVar

import tyro

from cllm_jax.errors import ConfigError, no_such
from cllm_jax.runs.recipe import from_mapping, read_recipe, to_json
from cllm_jax.runs.stages import STAGES

C, S = TypeVar('C'), TypeVar('S')
Switch = tyro.conf.FlagCreatePairsOff[bool]
Unnamed = tyro.conf.arg(name='')
PROGRAM = 'cllm'
"""What the commands are called together (`main.py`)."""


@dataclasses.dataclass(frozen=True)
class Flags(Generic[S]):
    """What every command accepts as well as its own settings."""

    config: Annotated[str | None, tyro.conf.arg(metavar='FILE')]
    """Recipe: a YAML file of settings by stage."""
    stage: S
    """Stage of the recipe to run."""
    plan: Switch = False
    """Print what would be done and what it needs, and stop."""
    debug: Switch = False
    """Show the traceback of an error."""


@dataclasses.dataclass(frozen=True)
class MeshFlags(Flags[S]):
    """Of a command that can plan for other devices than those here."""

    devices: int = 0
    """With --plan: for so many devices; 0 for those here."""
    compile: Switch = False
    """With --plan: compile the step too, and show what it takes."""


def parse(
    config_class: type[C],
    *,
    stage: str,
    description: str,
    flags: type[Flags] = Flags,
    argv: Sequence[str] | None = None,
) -> tuple[C, Flags]:
    """Settings of one run of a command: class defaults < recipe stage < command line.

    Two settings have other defaults than their class says: `root`, where a recipe's runs are, is
    runs/NAME of the recipe's file, and `objective` is that of the stage.

    `stage` runs when --stage is not given; the command is the one of `STAGES` that runs it, and
    runs its other stages too. `description` heads --help, and `argv` defaults to the arguments of
    the process.

    Raises ConfigError for a bad recipe or value; a malformed command line exits with code 2.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    command = STAGES[stage].command
    short = f'{PROGRAM} {command}'
    program = short if sys.argv[0] == short else f'python -m cllm_jax.{command}'
    stages = tuple(name for name, about in STAGES.items() if about.command == command)
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ('--config', '--stage'):  # they decide on the defaults of all others
        early.add_argument(name, nargs='?')
    first, _ = early.parse_known_args(argv)
    chosen = first.stage or stage
    if chosen not in stages:
        raise ConfigError(f'--stage: {program} has {no_such("stage", chosen, stages)}')
    kinds = Annotated[flags[Literal[stages]], Unnamed], Annotated[config_class, Unnamed]
    given, settings = tyro.cli(
        tuple[kinds],
        prog=program,
        description=description,
        args=argv,
        default=(flags(None, chosen), _defaults(config_class, first.config, chosen)),
    )
    to_json(settings)  # refuses what JSON cannot hold, such as --learning-rate nan
    return settings, given


def can_write(name: str, path: str) -> None:
    """Raise ConfigError, before the work, where its results cannot be written; '' is not a file."""
    if Path(path).is_dir() and path:
        raise ConfigError(f'{name} {path!r}: is a directory; name a file')
    if not path or (Path(path).exists() and not Path(path).is_file()):  # such as /dev/stdout
        return
    place = next(p for p in Path(path).absolute().parents if p.exists())
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise ConfigError(f'{name} {path!r}: cannot write below {place}; name another place')


def installed(what: str, package: str, extra: str) -> None:
    """Raise ConfigError, before the work, for what needs a package that is not there."""
    found = find_spec(package)
    if not (found and found.origin):  # a directory of that name would be found, without an origin
        raise ConfigError(f"{what}: needs the package {package}; pip install 'cllm_jax[{extra}]'")


def can_write_all(written: Mapping[str, str], read: Iterable[str]) -> None:
    """Raise ConfigError, before the work, if a file cannot be written, or is read or written too.

    Args:
      written: files by the name of their setting; '' is not a file, here and among those read.
    """
    taken = dict.fromkeys(filter(None, read), 'read')
    for name, path in written.items():
        can_write(name, path)
        for other, how in taken.items() if path else ():
            if Path(path).resolve() == Path(other).resolve():
                raise ConfigError(f'{name} {path!r}: is {how} too; name another file')
        taken |= {path: 'written'} if path else {}


def _defaults(config_class: type[C], path: str | None, stage: str) -> C:
    """The settings of a stage of a recipe, or of no recipe, before the command line is read."""
    own = {'objective': STAGES[stage].objective, 'root': path and f'runs/{Path(path).stem}'}
    own = {name: own[name] for name in own if own[name] and hasattr(config_class, name)}
    if path is None:
        return config_class(**own)
    recipe = read_recipe(path)
    if stage not in recipe:
        raise ConfigError(
            f"{path}: no stage '{stage}' (it has {', '.join(recipe) or 'none'}); "
            f"add '{stage}: {{}}' to run it with the defaults"
        )
    return from_mapping(config_class, own | recipe[stage], f'{path}: {stage}')
