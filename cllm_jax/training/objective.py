"""What a run trains: the loss of its parameters, and what they decode with when they are tested."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from cllm_jax.decoding.drafter import Drafter
from cllm_jax.drafters.checkpoint import write_drafter
from cllm_jax.drafters.jacobi import Jacobi
from cllm_jax.hf.load import Model
from cllm_jax.hf.write import write_model
from cllm_jax.model.llama import Llama, param_axes
from cllm_jax.training.step import Loss, LossWeights, text_loss


@dataclasses.dataclass(frozen=True)
class Trained:
    """A model with the drafter that a test decodes with, and what is kept of the two."""

    model: Model
    drafter: Drafter
    weights: Any = ()
    own: Any = None
    """Weights of the drafter to write; None if there are none."""
    new_model: bool = True
    """Whether the model is another than before the run."""


@dataclasses.dataclass(frozen=True)
class Objective:
    """What `run.train` needs to know."""

    params: Any
    """What is trained, as it is at first."""
    axes: Any
    """Names of its axes (`runtime/sharding.py`)."""
    loss: Loss
    trained: Callable[[Any], Trained]
    """What parameters make."""
    frozen: Any = ()
    """What the loss needs beside them."""
    faster: bool = True
    """Whether tokens per forward are what is wanted, at the same quality; else quality alone."""


def of_text(
    model: Model,
    weights: LossWeights,
    block: int,
    compute: Any = None,
    remat: bool = False,
    mesh: Mesh | None = None,
) -> Objective:
    """All of a model is trained: on texts, or for consistency; tested with a Jacobi window."""
    module = Llama(model.config, model.params['norm'].dtype, compute, remat, mesh)
    return Objective(
        params=model.params,
        axes=param_axes(model.config),
        loss=text_loss(module, weights),
        trained=lambda params: Trained(dataclasses.replace(model, params=params), Jacobi(block)),
        faster=bool(weights.global_weight or weights.local_weight),
    )


def keep(directory: Path, trained: Trained, fetched: Callable[[Any], Any], write: bool) -> None:
    """Write what was trained to `directory/model` and `directory/drafter`.

    Args:
      fetched: brings parameters to the host; every process calls it.
      write: whether this process writes.
    """
    params = fetched(trained.model.params) if trained.new_model else None
    own = None if trained.own is None else fetched(trained.own)
    if not write:
        return
    model = trained.model
    if params is not None:
        dtype, where = str(params['norm'].dtype), directory / 'model'
        write_model(where, dataclasses.replace(model, params=params), dtype=dtype, sums=True)
    if own is not None:
        write_drafter(directory / 'drafter', trained.drafter, jax.device_get(own), model)
