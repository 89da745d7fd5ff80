"""Print the steps of a recipe, one per line, as `launch/local.sh` runs them.

python -m cllm_jax.runs RECIPE
"""

import sys

from cllm_jax.errors import ConfigError
from cllm_jax.runs.recipe import read_recipe
from cllm_jax.runs.stages import pipeline


def main() -> None:
    try:
        steps = pipeline(read_recipe(sys.argv[1]))
    except ConfigError as error:
        print(f'error: {error}', file=sys.stderr)
        sys.exit(error.exit_code)
    for command, stage in steps:
        print(command if command == stage else f'{command} --stage {stage}')


if __name__ == '__main__':
    main()
