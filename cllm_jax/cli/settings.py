"""Where the settings of a command come from: its defaults, a recipe, the command line.

A command has one frozen dataclass in which each field has a type, a default and a docstring (its
line in --help). `python -m cllm_jax.train --config recipe.yaml --stage target --steps 100` takes
the defaults, then stage 'target' of the recipe, then what the command line says.
"""

import argparse
import dataclasses
import os
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro

from cllm_jax.errors import ConfigError
from cllm_jax.runs.recipe import from_mapping, no_such, read_recipe, to_json

C = TypeVar('C')


@dataclasses.dataclass(frozen=True)
class Flags:
    """What every command accepts as well as its own settings."""

    config: str | None
    stage: str
    plan: bool
    debug: bool
    devices: int = 0
    compile: bool = False


def parse(
    config_class: type[C],
    *,
    program: str,
    description: str,
    stage: str,
    stages: Collection[str] | Mapping[str, Mapping[str, Any]] = (),
    meshed: bool = False,
    argv: Sequence[str] | None = None,
) -> tuple[C, Flags]:
    """Settings of one run of a command: class defaults < recipe stage < command line.

    A setting `root`, where a recipe's runs are, is by default runs/NAME of the recipe's file.

    `program` and `description` head --help, `stage` is what runs when --stage is not given and
    `stages` are those the command can run, or maps each to defaults of its own; one that is
    `meshed` can also plan for other devices than those here. `argv` defaults to the arguments of
    the process.
    Raises ConfigError for a bad recipe or value; a malformed command line exits with code 2.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    own = stages if isinstance(stages, Mapping) else {}
    stages = tuple(stages) or (stage,)
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ('--config', '--stage'):  # they decide on the defaults of all others
        early.add_argument(name, nargs='?')
    first, _ = early.parse_known_args(argv)
    chosen = first.stage or stage
    if chosen not in stages:
        raise ConfigError(f'--stage: {program} has {no_such("stage", chosen, stages)}')
    base = _defaults(config_class, first.config, chosen, own.get(chosen, {}))

    def option(annotation: Any, help_text: str, metavar: str | None = None) -> Any:
        return Annotated[annotation, tyro.conf.arg(help=help_text, metavar=metavar)]

    flag = tyro.conf.FlagCreatePairsOff[bool]
    options = {
        'config': option(str | None, 'Recipe: a YAML file of settings by stage.', 'FILE'),
        'stage': option(Literal[stages], 'Stage of the recipe to run.'),
        'plan': option(flag, 'Print what would be done and what it needs, and stop.'),
        'debug': option(flag, 'Show the traceback of an error.'),
    }
    if meshed:
        options |= {
            'devices': option(int, 'With --plan: for so many devices; 0 for those here.'),
            'compile': option(flag, 'With --plan: compile the step too, and show what it takes.'),
        }
    settings = ('settings', Annotated[config_class, tyro.conf.arg(name='')])
    command = dataclasses.make_dataclass('Command', [settings, *options.items()])
    flags = Flags(None, chosen, False, False)
    given: Any = tyro.cli(
        command,
        prog=program,
        description=description,
        args=argv,
        default=command(base, *(getattr(flags, name) for name in options)),
    )
    to_json(given.settings)  # refuses what JSON cannot hold, such as --learning-rate nan
    return given.settings, Flags(**{name: getattr(given, name) for name in options})


def can_write(name: str, path: str) -> None:
    """Raise ConfigError, before the work, where its results cannot be written; '' is not a file."""
    if Path(path).is_dir() and path:
        raise ConfigError(f'{name} {path!r}: is a directory; name a file')
    if not path or (Path(path).exists() and not Path(path).is_file()):  # such as /dev/stdout
        return
    place = next(p for p in Path(path).absolute().parents if p.exists())
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise ConfigError(f'{name} {path!r}: cannot write below {place}; name another place')


def _defaults(config_class: type[C], path: str | None, stage: str, own: Mapping[str, Any]) -> C:
    """The settings of a stage of a recipe, or of no recipe, before the command line is read."""
    if path is None:
        return config_class(**own)
    recipe = read_recipe(path)
    if stage not in recipe:
        raise ConfigError(
            f"{path}: no stage '{stage}' (it has {', '.join(recipe) or 'none'}); "
            f"add '{stage}: {{}}' to run it with the defaults"
        )
    settings = {**own, **recipe[stage]}
    if hasattr(config_class, 'root'):
        settings = {'root': f'runs/{Path(path).stem}'} | settings
    return from_mapping(config_class, settings, f'{path}: {stage}')
