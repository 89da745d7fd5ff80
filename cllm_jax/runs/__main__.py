"""Print the steps of a recipe, for `launch/local.sh`: `python -m cllm_jax.runs RECIPE`."""

import sys

from cllm_jax.errors import ConfigError
from cllm_jax.runs.recipe import read_recipe
from cllm_jax.runs.stages import pipeline

try:
    for command, stage in pipeline(read_recipe(sys.argv[1])):
        print(command if command == stage else f'{command} --stage {stage}')
except ConfigError as error:
    print(f'error: {error}', file=sys.stderr)
    sys.exit(error.exit_code)
