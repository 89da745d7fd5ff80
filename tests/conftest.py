"""What every test runs under; set before anything creates a JAX array.

Eight virtual CPU devices stand in for an accelerator mesh. JAX_PLATFORMS in the environment
runs the same tests elsewhere.
"""

import os

os.environ['HF_HUB_OFFLINE'] = '1'
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
# Unoptimised programs compile twice as fast, in commands that tests start too, and no test depends
# on the last bit.
os.environ['JAX_DISABLE_MOST_OPTIMIZATIONS'] = '1'

import hypothesis
import jax

jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_numpy_dtype_promotion', 'strict')
jax.config.update('jax_numpy_rank_promotion', 'raise')
jax.config.update('jax_default_matmul_precision', 'highest')


def pytest_collection_modifyitems(items):
    """Files with slow tests come first: one that started last would keep a single core busy."""
    slow = {item.path for item in items if item.get_closest_marker('slow')}
    items.sort(key=lambda item: item.path not in slow)


# Compilation makes the first example slow, and a failure has to repeat on the next machine.
hypothesis.settings.register_profile('repeatable', deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile('repeatable')
