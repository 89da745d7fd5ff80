"""Every choice that depends on what a model runs on: CPU, GPU or TPU.

A `Backend` is chosen once, from the devices that the weights live on, and travels with the model
(`Model.backend`, `Llama.backend`). No other file asks what the hardware is. Each field names what
decided it: a benchmark (docs/benchmarks.md, docs/log.md), or what a compiler does.
"""

import dataclasses
import functools
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import jaxlib

from cllm_jax.errors import ConfigError

Exactness = Literal['auto', 'class', 'program', 'off']
MOST_ROWS = 1024
"""Of a forward, batch times nodes: more were not looked at."""
HARMLESS = '--xla_force_host_platform_device_count'
"""Other XLA_FLAGS may compile something else than what was looked at."""

CACHED = 32 << 20
"""Bytes that a CPU's last cache holds. Larger weights come from memory, whose bandwidth the threads
would have to share, each for its own reading of them (docs/benchmarks.md)."""

YNNPACK = 'xla_cpu_experimental_ynn_fusion_type'
SUMS_ALIKE = (YNNPACK, 'LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT')
"""YNNPACK multiplies on a CPU, and does nothing else. XLA gives it the sums too, of norms and of
softmax, where it expects to gain: with 24 rows of the embedded model, not with 16; and it adds up
in another order, by which a rounding to bfloat16 falls otherwise once in some hundred tokens."""
NO_YNNPACK = (YNNPACK, '')
EIGEN = (NO_YNNPACK,) if jaxlib.__version__.startswith('0.10.') else ()
"""Options with which XLA's CPU backend multiplies by Eigen; other jaxlibs may not know them."""


@dataclasses.dataclass(frozen=True)
class Class:
    """With how many rows a forward of the decoding loop rounds each of them as it rounds more.

    The defaults were enough wherever it was looked: for SmolLM2-135M on Zen 4, 1 to 7 nodes round
    alike, and 8 and more do.
    """

    rows: int = 8
    """Fewest rows of a forward, batch times nodes."""
    queries: int = 8
    """Fewest queries of a head of keys."""
    dtypes: tuple[str, ...] = ()
    """Dtypes of products for which that has been seen on this hardware (docs/exactness.md)."""


AMX = 'amx_bf16'
CLASSED = {
    (AMX, '0.10'): Class(4, 8, ('bfloat16',)),
    (AMX, '0.12'): Class(2, 2, ('bfloat16',)),
}
"""By what a CPU multiplies bfloat16 with and the jax version."""


@dataclasses.dataclass(frozen=True)
class Backend:
    """What suits one kind of hardware. The defaults are those of an accelerator."""

    default_dtype: str = 'bfloat16'
    """What dtype 'auto' stands for: matrix units multiply bfloat16, a CPU may have none. On one
    that has AMX a window of 16 decodes half as fast again or twice as fast in mixed precision as in
    float32 (docs/benchmarks.md); that is the default where a class is known for it."""
    bfloat16_as_bits: bool = False
    """Keep a bfloat16 cache, and look up a bfloat16 table, as uint16. XLA's CPU backend writes a
    few bfloat16 rows, or reads a few, by converting the whole array to float32 and back."""
    wide_cache_for_one_query: bool = False
    """Keep the bfloat16 values of a cache that one query at a time reads as float32: XLA's CPU
    backend multiplies a single query with bfloat16 keys by converting those."""
    transposes_in_memory: bool = False
    """Write a transposed operand to memory before a product. XLA's CPU backend folds the
    transposition into the product, for which it has no bfloat16 kernel: it fails, or takes three
    times as long in float32."""
    narrowest: int | None = None
    """Fewest rows for which the loop is compiled again, to go on with half of a batch; None for
    never. On a CPU finished rows take as much time as others; on an accelerator hardly any."""
    any_precision_may_be_faster: bool = False
    """Whether one token at a time may decode faster in another precision than a draft. Then all
    are timed: the baseline is AR at its best. On a CPU bfloat16 matrices are half as much to read,
    but there may be no good kernel for a row or two."""
    windows: tuple[int, ...] = (16, 32, 64)
    """Jacobi windows among which the fastest is chosen. On an accelerator a forward with 64 tokens
    takes hardly longer than with one."""
    weights_in_host_memory: bool = False
    """Whether the weights lie in the memory that NumPy reads, whose bandwidth it can measure."""
    threads: int = 1
    """How many threads decode parts of a batch side by side. XLA divides single operations among
    cores; those of a small model are too small for that."""
    compiler_options: tuple[tuple[str, Any], ...] = ()
    """How the decoding loop is compiled. With 16 float32 rows, weights that lie in a CPU's cache
    are multiplied a quarter faster by Eigen (docs/benchmarks.md)."""

    fast_rows: int = 1
    """Fewest rows that a bfloat16 product has when it is fastest; fewer are filled up with copies.
    XLA's CPU backend multiplies a single row in float32, by a loop of its own, and keeps a float32
    copy of all weights for that (docs/exactness.md)."""
    weights_left: bool = False
    """Decode with bfloat16 matrices as (outputs, inputs), on the left of a product. For AMX the
    right operand is packed anew for every product, and to pack weights takes longer than to
    multiply a few tokens with them (docs/benchmarks.md)."""
    exact_rows: int = 1
    """Fewest rows of a forward of the decoding loop: 1, or those with which a row's bits depend on
    nothing but the row (`exactly`)."""
    exact_queries: int = 1
    """The same for the queries of a head of keys."""
    rounding_class: Class = Class()
    """Those two numbers of the class here, and what they have been seen for."""
    sums: tuple[tuple[str, Any], ...] = ()
    """Compiler options without which sums are not taken in one order."""

    @property
    def exact(self) -> bool:
        return self.exact_rows > 1

    @property
    def exact_options(self) -> tuple[tuple[str, Any], ...]:
        """Compiler options without which it is not exact."""
        return self.sums if self.exact else ()

    def exactly(self, how: Exactness) -> 'Backend':
        """The backend under which AR and drafts of any width round alike, see docs/exactness.md.

        Args:
          how: 'class': rows are filled up until their number does not matter. 'program': nothing is
            filled up, and the rows of a batch stay together, so that AR runs what the drafter runs.
            'off': each at its fastest. 'auto': as it is.
        """
        if how == 'auto':
            return self
        least = self.rounding_class if how == 'class' else Class(1, 1)
        narrowest = None if how == 'program' else self.narrowest
        return dataclasses.replace(
            self, exact_rows=least.rows, exact_queries=least.queries, narrowest=narrowest
        )

    def cache_dtype(self, values: jnp.dtype, one_query: bool = False) -> jnp.dtype:
        """The dtype of a KV cache that holds `values`, and is read by one or several queries."""
        if values != jnp.bfloat16:
            return values
        if one_query and self.wide_cache_for_one_query and not self.exact:
            return jnp.float32
        return jnp.uint16 if self.bfloat16_as_bits else values


ANY = GPU = TPU = Backend()
CPU = Backend(
    default_dtype='float32',
    bfloat16_as_bits=True,
    wide_cache_for_one_query=True,
    fast_rows=2,
    transposes_in_memory=True,
    narrowest=8,
    any_precision_may_be_faster=True,
    windows=(8, 16, 32),
    sums=(SUMS_ALIKE,) if jaxlib.__version__.startswith(('0.10.', '0.12.')) else (),
    weights_in_host_memory=True,
)


def backend_for(devices: Iterable[jax.Device]) -> Backend:
    """The backend of devices, which are all of one kind."""
    return {'cpu': CPU, 'gpu': GPU, 'tpu': TPU}.get(next(iter(devices)).platform, ANY)


def backend_of(weights: Any, sharing: int = 1) -> Backend:
    """The backend of the devices that a tree of weights lives on, JAX's first if on none yet.

    `sharing` is how many devices will share weights that are nowhere yet.

    Small weights on a single CPU device decode in one thread per core of this process; those that
    are float32 throughout are multiplied by Eigen.
    """
    leaves = [leaf for leaf in jax.tree.leaves(weights) if isinstance(leaf, jax.Array)]
    devices = {device for leaf in leaves for device in leaf.devices()} or {jax.devices()[0]}
    backend = backend_for(devices)
    if backend is not CPU:
        return backend
    flags = os.environ.get('XLA_FLAGS', '').split()
    usual = all(flag.startswith(HARMLESS) for flag in flags)
    usual = usual and not jax.config.read('jax_disable_most_optimizations')
    known = CLASSED.get(hardware(), Class()) if usual else Class()
    backend = dataclasses.replace(CPU, rounding_class=known)
    if hardware()[0] == AMX and len(devices) == sharing == 1:
        dtype = 'mixed' if known.dtypes else CPU.default_dtype
        backend = dataclasses.replace(backend, weights_left=True, default_dtype=dtype)
    small = 4 * sum(leaf.size for leaf in leaves) <= CACHED
    if len(devices) > 1 or not leaves or not small:
        return backend
    narrow = all(leaf.dtype == jnp.float32 for leaf in leaves)
    return dataclasses.replace(backend, threads=cores(), compiler_options=EIGEN if narrow else ())


@functools.cache
def hardware() -> tuple[str, str]:
    """What multiplies bfloat16 here, and the version of jax: what the rounding of rows hangs on.

    Of a CPU its widest instructions for it, '' if it has none or does not tell.
    """
    kind, version = jax.devices()[0], '.'.join(jax.__version__.split('.')[:2])
    if kind.platform != 'cpu':
        return kind.device_kind, version
    try:
        known = Path('/proc/cpuinfo').read_text().split()
    except OSError:
        known = []
    best = next((name for name in (AMX, 'avx512_bf16') if name in known), '')
    return best, version


@functools.cache
def machine() -> list[Any]:
    """What the time of a forward hangs on besides: the kind of device, their number, the cores."""
    devices = jax.devices()
    kind = devices[0].device_kind
    if devices[0].platform == 'cpu':
        try:
            lines = Path('/proc/cpuinfo').read_text().splitlines()
            kind = next((line for line in lines if line.startswith('model name')), kind)
        except OSError:
            pass
    return [kind, len(devices), cores()]


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def pretend(devices: int) -> None:
    """Stand in for a machine with so many devices, to plan and compile for it; nothing can run.

    Call it before any other use of JAX. Raises ConfigError for a number that is not positive.
    """
    if devices < 1:
        raise ConfigError(f'devices {devices}: must be at least 1')
    jax.config.update('jax_platforms', 'cpu')
    jax.config.update('jax_num_cpu_devices', devices)
    # In the order that needs least memory, as on an accelerator, not in the most parallel one.
    order = '--xla_cpu_enable_concurrency_optimized_scheduler=false'
    os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {order}'
