"""A model that is ready to run, and what computes with it."""

import dataclasses
import functools
import hashlib
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cllm_jax.errors import ConfigError
from cllm_jax.model.config import LlamaConfig
from cllm_jax.model.layout import with_outputs_first
from cllm_jax.model.llama import Llama
from cllm_jax.runs.notes import read_note
from cllm_jax.runtime.backend import ANY, Backend, backend_of, hardware, machine

CLASS_NOTE = 'class'
MIXED = 'mixed'


@dataclasses.dataclass(frozen=True)
class Model:
    """A model ready to run: its config, its weights as a plain pytree, and its tokenizer."""

    config: LlamaConfig
    params: Any = dataclasses.field(repr=False)
    """Not to be changed in place: a copy of them may decode. `dataclasses.replace` takes others."""
    tokenizer: Any = dataclasses.field(repr=False)
    """A `transformers` tokenizer, or None if its files have none, or `lacks` says why."""
    source: str
    """What the user called it."""
    adapter: str = ''
    """Which adapter was merged into which weights, '' for none."""
    directory: Path | None = dataclasses.field(default=None, repr=False)
    """Where its files lie: a directory, a GGUF file, or None if nowhere."""
    lacks: str = ''
    """Why its tokenizer cannot be read, and the remedy; token ids can be used without."""

    @property
    def title(self) -> str:
        """What to call it in results."""
        return f'{self.source} ({self.adapter})' if self.adapter else self.source

    @functools.cached_property
    def backend(self) -> Backend:
        """What suits the devices that the weights live on; exact where that is known to hold."""
        backend = backend_of(self.params)
        return backend.exactly('class') if self.has_class else backend

    @functools.cached_property
    def has_class(self) -> bool:
        """Whether it is known that a token's bits do not depend on how many are computed with it.

        From what `bench --invariance` has seen here, else from the table of docs/exactness.md.
        """
        if not all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(self.params)):
            return False
        if isinstance(noted := read_note(CLASS_NOTE, self.rounding), bool):
            return noted
        return str(self.products) in backend_of(self.params).rounding_class.dtypes

    @property
    def rounding(self) -> dict[str, Any]:
        """All that the rounding of its forwards hangs on: sizes, dtypes, hardware and versions."""
        versions = [version(name) for name in ('jax', 'jaxlib', 'cllm_jax')]
        module, flags = repr(self.module_on(ANY)), os.environ.get('XLA_FLAGS', '')
        here = {'on': list(hardware()), 'machine': machine(), 'versions': versions, 'flags': flags}
        backend = backend_of(self.params)
        way = {'class': repr(backend.rounding_class), 'weights_left': backend.weights_left}
        return {'module': module, **way, **here}

    @property
    def products(self) -> jnp.dtype:
        """The dtype of what is multiplied."""
        return self.params['embed'].dtype

    @property
    def precision(self) -> str:
        """The name under which `load` gives these dtypes."""
        mixed = self.products != self.params['norm'].dtype
        return MIXED if mixed else str(self.products)

    @property
    def module(self) -> Llama:
        """The Linen module; equal for equal configs, so it shares compilations."""
        return self.module_on(self.backend)

    def module_on(self, backend: Backend) -> Llama:
        """The module for another way to compute."""
        dtype, matrices = self.params['norm'].dtype, self.params['embed'].dtype
        compute = None if matrices == dtype else matrices
        ids = {'bos_id': None, 'eos_ids': (), 'pad_id': None}  # of which no computation depends
        return Llama(dataclasses.replace(self.config, **ids), dtype, compute, backend=backend)

    def decoding_on(self, backend: Backend) -> tuple[Llama, Any]:
        """The module and the parameters of the decoding loop, for another way to compute."""
        module = self.module_on(backend)
        if self.products == jnp.bfloat16 and backend.weights_left:
            return module.clone(outputs_first=True), self.params_outputs_first
        return module, self.params

    @functools.cached_property
    def params_outputs_first(self) -> Any:
        """A copy of the parameters, made once; the tables are shared."""
        with jax.ensure_compile_time_eval():  # not as a part of a function that is traced
            return with_outputs_first(self.params, self.products)


def with_tokenizer(model: Model, remedy: str = '') -> Model:
    """The model, if texts can be learned or answered with it; ConfigError without a tokenizer."""
    if model.tokenizer is None:
        copy = 'copy the tokenizer files of the original model into its directory'
        if model.directory and model.directory.is_file():
            copy = '' if model.lacks else 'use the Hugging Face directory of this model'
        remedies = filter(None, (model.lacks or 'has no tokenizer', remedy or copy))
        mark, link = (': ', ', or ') if model.lacks else (' ', '; ')
        raise ConfigError(model.source + mark + link.join(remedies))
    return model


def fingerprint(model: Model) -> str:
    """sha256 over the config and every weight: two models with one fingerprint compute the same."""
    digest = hashlib.sha256(repr(model.config).encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(model.params):
        array = np.ascontiguousarray(jax.device_get(leaf))
        digest.update(f'{jax.tree_util.keystr(path)} {array.dtype} {array.shape}'.encode())
        digest.update(array.view(np.uint8).data)
    return digest.hexdigest()
