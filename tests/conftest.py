"""What every test runs under; set before anything creates a JAX array.

Eight virtual CPU devices stand in for an accelerator mesh. JAX_PLATFORMS in the environment
runs the same tests elsewhere.
"""

import os
import shutil
import signal
import tempfile
from pathlib import Path

os.environ['HF_HUB_OFFLINE'] = '1'
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
# Commands that tests start find this checkout, and libraries where the tests do.
ROOT, PLACES = str(Path(__file__).parents[1]), os.environ.get('PYTHONPATH', '').split(os.pathsep)
os.environ['PYTHONPATH'] = os.pathsep.join([ROOT, *(p for p in PLACES if p not in ('', ROOT))])
# The terminal of whoever runs the tests does not wrap or colour what commands print.
os.environ['COLUMNS'] = '80'
for name in ('FORCE_COLOR', 'CLICOLOR_FORCE', 'TTY_COMPATIBLE', 'TTY_INTERACTIVE'):
    os.environ.pop(name, None)
# Unoptimised programs compile twice as fast, in commands that tests start too, and no test depends
# on the last bit.
os.environ['JAX_DISABLE_MOST_OPTIMIZATIONS'] = '1'
# What somebody has noted of this machine (`runs/notes.py`) decides nothing here.
NOTES = tempfile.mkdtemp(prefix='notes-')
os.environ['XDG_CACHE_HOME'] = NOTES
# What one test compiles need not be compiled by the next: workers and commands share a directory.
OWN_CACHE = 'JAX_COMPILATION_CACHE_DIR' not in os.environ
if OWN_CACHE:
    os.environ['JAX_COMPILATION_CACHE_DIR'] = tempfile.mkdtemp(prefix='compiled-')
    os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0.3'
    os.environ['JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES'] = '-1'

import hypothesis  # noqa: E402
import jax  # noqa: E402
import jaxlib  # noqa: E402
import pytest  # noqa: E402

# Half of the time of compilation again. A jaxlib that does not know a flag ends the process.
EMITTERS = '--xla_cpu_use_fusion_emitters'
if jaxlib.__version__.startswith('0.10.') and EMITTERS not in os.environ.get('XLA_FLAGS', ''):
    os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {EMITTERS}=false'

jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_numpy_dtype_promotion', 'strict')
jax.config.update('jax_numpy_rank_promotion', 'raise')
jax.config.update('jax_default_matmul_precision', 'highest')


@pytest.fixture
def usual_signals():
    """SIGINT and SIGTERM do what they usually do, here and in what a test starts.

    What a script runs in the background has SIGINT ignored, pytest too, and children inherit that.
    """
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def room_for_programs():
    """Programs are dropped between tests, never in the middle of one that counts them."""
    from cllm_jax.runtime.programs import MOST
    from tests.tiny import compiled

    for run in compiled():
        if run._cache_size() > MOST // 2:
            run.clear_cache()


def pytest_unconfigure():
    shutil.rmtree(NOTES, ignore_errors=True)
    if OWN_CACHE:
        shutil.rmtree(os.environ['JAX_COMPILATION_CACHE_DIR'], ignore_errors=True)


def pytest_collection_modifyitems(items):
    """Files with slow tests come first: one that started last would keep a single core busy."""
    slow = {item.path for item in items if item.get_closest_marker('slow')}
    items.sort(key=lambda item: item.path not in slow)


# Compilation makes the first example slow, and so do libraries outside site-packages, whose source
# Hypothesis reads for constants; a failure has to repeat on the next machine.
hypothesis.settings.register_profile(
    'repeatable',
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile('repeatable')
