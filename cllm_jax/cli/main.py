"""`cllm COMMAND ...`: the commands of the package under one name, each as `python -m` runs it."""

import sys
from importlib import import_module
from importlib.metadata import version
from typing import Annotated, Any

import tyro

from cllm_jax.cli.guard import guard
from cllm_jax.cli.settings import PROGRAM, Flags, Unnamed
from cllm_jax.errors import ConfigError, no_such

COMMANDS = {
    'decode': 'decode prompts, and compare with one token at a time',
    'view': 'a page that plays decodes, forward by forward',
    'evaluate': 'quality, speed and identity on held-out prompts',
    'train': 'a target, a CLLM, or a drafter',
    'collect': 'Jacobi trajectories of a model',
    'export': 'write models for others',
    'bench': 'costs and methods on this machine',
}
SHELLS = ('bash', 'zsh')
USAGE = f"""usage: {PROGRAM} COMMAND ...

{{}}

  {PROGRAM} COMMAND --help      what a command can be told
  {PROGRAM} --version
  {PROGRAM} completion SHELL    a script for the completion of all this: {', '.join(SHELLS)}
                           (eval "$({PROGRAM} completion bash)" in ~/.bashrc)
"""


def main() -> None:
    """The entry point `cllm`."""
    name, *rest = [*sys.argv[1:], '--help'][: max(len(sys.argv) - 1, 1)]
    if name in ('-h', '--help'):
        width = max(map(len, COMMANDS))
        lines = (f'  {command:{width}}  {about}' for command, about in COMMANDS.items())
        print(USAGE.format('\n'.join(lines)), end='')
    elif name == '--version':
        print(f'{PROGRAM} {version("cllm_jax")}, jax {version("jax")}')
    elif name in COMMANDS:
        sys.argv = [f'{PROGRAM} {name}', *rest]
        import_module(f'cllm_jax.{name}').main()
    else:
        guard(lambda: _complete(rest) if name == 'completion' else _refuse(name))


def _refuse(name: str) -> None:
    raise ConfigError(f'{PROGRAM}: {no_such("command", name, COMMANDS)}')


def _complete(arguments: list[str]) -> None:
    """Print a shell's script for completion."""
    if len(arguments) != 1 or arguments[0] not in SHELLS:
        raise ConfigError(f'{PROGRAM} completion: name one shell of {", ".join(SHELLS)}')

    def taken(name: str) -> Any:
        config = getattr(import_module(f'cllm_jax.{name}'), f'{name.title()}Config')

        def command(flags, settings): ...

        kinds = {'flags': Flags[str], 'settings': config}
        command.__annotations__ = {key: Annotated[kind, Unnamed] for key, kind in kinds.items()}
        return command

    commands = {name: taken(name) for name in COMMANDS}
    printed = ['--tyro-print-completion', arguments[0]]
    tyro.extras.subcommand_cli_from_dict(commands, prog=PROGRAM, args=printed)
