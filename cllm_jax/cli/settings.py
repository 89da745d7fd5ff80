"""What every command shares: where its settings come from and how it ends.

A command has one frozen dataclass in which each field has a type, a default and a docstring (its
line in --help). `python -m cllm_jax.train --config recipe.yaml --stage target --steps 100` takes
the defaults, then stage 'target' of the recipe, then what the command line says.
"""

import dataclasses
import errno
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import jax
import tyro

from cllm_jax.errors import CllmError, ConfigError, DataError, Interrupted
from cllm_jax.runs.recipe import from_mapping, no_such, read_recipe, to_json
from cllm_jax.runtime.processes import initialize

__all__ = [
    'Flags',
    'can_write',
    'from_mapping',
    'guard',
    'parse',
    'read_recipe',
    'to_json',
]

C = TypeVar('C')

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclasses.dataclass(frozen=True)
class Flags:
    """What every command accepts beside its own settings."""

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
    chosen = _last_value(argv, '--stage') or stage
    if chosen not in stages:
        raise ConfigError(f'--stage: {program} has {no_such("stage", chosen, stages)}')
    recipe_path, defaults = _last_value(argv, '--config'), own.get(chosen, {})
    if recipe_path is None:
        base = config_class(**defaults)
    else:
        base = _from_recipe(config_class, recipe_path, chosen, defaults)

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
    command = dataclasses.make_dataclass(
        'Command',
        [('settings', Annotated[config_class, tyro.conf.arg(name='')]), *options.items()],
    )
    defaults = Flags(None, chosen, False, False)
    given: Any = tyro.cli(
        command,
        prog=program,
        description=description,
        args=argv,
        default=command(base, *(getattr(defaults, name) for name in options)),
    )
    to_json(given.settings)  # refuses what JSON cannot hold, such as --learning-rate nan
    return given.settings, Flags(**{name: getattr(given, name) for name in options})


def can_write(name: str, path: str) -> None:
    """Raise ConfigError, before the work, where its results could not be written; '' is no file."""
    if Path(path).is_dir() and path:
        raise ConfigError(f'{name} {path!r}: is a directory; name a file')
    if not path or (Path(path).exists() and not Path(path).is_file()):  # such as /dev/stdout
        return
    place = next(p for p in Path(path).absolute().parents if p.exists())
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise ConfigError(f'{name} {path!r}: cannot write below {place}; name another place')


def guard(main: Callable[[], None], stop_together: bool = False) -> None:
    """Runs a command; what goes wrong becomes one line on stderr and an exit code.

    CllmError: its own code. Ctrl-C: 130, silently. Reader of our output gone (`| head`): 141,
    silently. A path that cannot be read or written, a full disk included: 3. All else: 1.
    The traceback is shown only if --debug is among the arguments of the process.
    `stop_together`: see `initialize`.
    """
    usual = sys.unraisablehook
    sys.unraisablehook = partial(_interrupt_again, usual)
    try:
        initialize(stop_together)
        main()
        if sys.stdout is not None:  # closed by whoever started this
            sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        # Python flushes stdout once more at exit and would complain there.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except Exception as error:
        if '--debug' in sys.argv:
            traceback.print_exc()
        code, message = _verdict(error)
        print(message, file=sys.stderr)
        sys.exit(code)
    finally:
        sys.unraisablehook = usual


def _interrupt_again(usual: Callable[[Any], Any], ignored: Any) -> None:
    """Ctrl-C in a callback of the garbage collector, JAX has one, where Python ignores it."""
    if isinstance(ignored.exc_value, KeyboardInterrupt):
        main = threading.main_thread().ident
        threading.Timer(0.05, signal.pthread_kill, (main, signal.SIGINT)).start()
    else:
        usual(ignored)


def _verdict(error: Exception) -> tuple[int, str]:
    """Exit code and the line to print."""
    if isinstance(error, CllmError):
        label = 'interrupted' if isinstance(error, Interrupted) else 'error'
        return error.exit_code, f'{label}: {_one_line(error)}'
    for cause in _chain(error):
        # TensorStore, below Orbax, reports a full disk as a ValueError with the same words.
        full = isinstance(cause, OSError) and cause.errno in _FULL
        if full or os.strerror(errno.ENOSPC) in str(cause):
            place = getattr(cause, 'filename', None)
            reason = cause.strerror if full else os.strerror(errno.ENOSPC)
            subject = f'{place}: {reason}' if place else _one_line(cause)
            return DataError.exit_code, (
                f'error: {subject}; free space and run the same command again'
            )
    if isinstance(error, OSError) and error.filename is not None:
        return DataError.exit_code, f'error: {error.filename}: {error.strerror}; check that path'
    if isinstance(error, MemoryError) or 'RESOURCE_EXHAUSTED' in str(error):
        detail = _one_line(error)[:200] or 'no memory left'
        return 1, f'error: out of memory ({detail}); use a smaller batch, length or model'
    if (reason := _no_device()) is not None:
        asked = os.environ.get('JAX_PLATFORMS', '')
        return ConfigError.exit_code, (
            f'error: JAX finds no device (JAX_PLATFORMS={asked!r}{reason}); set JAX_PLATFORMS=cpu, '
            'or install the jax of your accelerator'
        )
    return 1, (
        f'error: unexpected {type(error).__name__}: {_one_line(error)} '
        '(this is a bug; run with --debug for the traceback)'
    )


def _no_device() -> str | None:
    """Why JAX cannot start, if that is so."""
    try:
        jax.devices()
    except Exception as error:  # AssertionError or RuntimeError, by the platform asked for
        return f': {_one_line(error)[:160]}' if str(error) else ''
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _from_recipe(config_class: type[C], path: str, stage: str, defaults: Mapping[str, Any]) -> C:
    recipe = read_recipe(path)
    if stage not in recipe:
        raise ConfigError(
            f"{path}: no stage '{stage}' (it has {', '.join(recipe) or 'none'}); "
            f"add '{stage}: {{}}' to run it with the defaults"
        )
    settings = {**defaults, **recipe[stage]}
    if 'root' in {field.name for field in dataclasses.fields(config_class)}:
        settings = {'root': f'runs/{Path(path).stem}'} | settings
    return from_mapping(config_class, settings, f'{path}: {stage}')


def _last_value(argv: Sequence[str], option: str) -> str | None:
    """The value that the command line gives an option, before it is parsed in earnest."""
    value = None
    for here, following in zip(argv, [*argv[1:], '--'], strict=False):
        if here == option and not following.startswith('--'):
            value = following
        elif here.startswith(f'{option}='):
            value = here.removeprefix(f'{option}=')
    return value


def _one_line(error: BaseException) -> str:
    return ' '.join(str(error).split('\n')).strip()
