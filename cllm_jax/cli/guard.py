"""How every command ends: with an exit code, and one line for what went wrong."""

import errno
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax

from cllm_jax.errors import CllmError, Interrupted, one_line
from cllm_jax.runtime.processes import initialize

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


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
    """Exit code and the line to print; 2 is that of a `ConfigError`, 3 of a `DataError`."""
    if isinstance(error, CllmError):
        label = 'interrupted' if isinstance(error, Interrupted) else 'error'
        return error.exit_code, f'{label}: {one_line(error, None)}'
    for cause in _chain(error):
        # TensorStore, below Orbax, reports a full disk as a ValueError with the same words.
        full = isinstance(cause, OSError) and cause.errno in _FULL
        if full or os.strerror(errno.ENOSPC) in str(cause):
            named = full and cause.filename is not None
            subject = f'{cause.filename}: {cause.strerror}' if named else one_line(cause, None)
            return 3, f'error: {subject}; free space and run the same command again'
    if isinstance(error, OSError) and error.filename is not None:
        return 3, f'error: {error.filename}: {error.strerror}; check that path'
    if isinstance(error, MemoryError) or 'RESOURCE_EXHAUSTED' in str(error):
        detail = one_line(error) or 'no memory left'
        return 1, f'error: out of memory ({detail}); use a smaller batch, length or model'
    try:
        jax.devices()
    except Exception as missing:  # AssertionError or RuntimeError, by the platform asked for
        asked, reason = os.environ.get('JAX_PLATFORMS', ''), one_line(missing, 160)
        return 2, (
            f'error: JAX finds no device (JAX_PLATFORMS={asked!r}{reason and ": " + reason}); set '
            'JAX_PLATFORMS=cpu, or install the jax of your accelerator'
        )
    return 1, (
        f'error: unexpected {type(error).__name__}: {one_line(error, None)} '
        '(this is a bug; run with --debug for the traceback)'
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
