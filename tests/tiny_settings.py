"""Settings with every kind of field, and a way to write a recipe for them."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from cllm_jax.errors import ConfigError


@dataclass(frozen=True)
class Optimizer:
    """How the weights move."""

    learning_rate: float = 1e-3
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of both moments."""

    def __post_init__(self):
        if self.learning_rate < 0:
            raise ConfigError(f'learning_rate is {self.learning_rate}; it must not be negative')


@dataclass(frozen=True)
class Training:
    """One training stage."""

    steps: int = 10
    """Number of updates."""
    loss: Literal['global', 'local'] = 'global'
    """Which consistency loss."""
    resume: bool = True
    """Continue from the last checkpoint."""
    name: str = 'run'
    """Name of the run."""
    model: str | None = None
    """Model directory."""
    data: str = 'data.jsonl'
    """Training data."""
    blocks: tuple[int, ...] = (16,)
    """Block sizes."""
    width: Literal[1, 2] = 2
    """A choice of numbers."""
    limit: int | Literal['all'] = 'all'
    """How many examples."""
    # A reason for the reader of the code.
    seed: int = 0
    """Seed of the shuffle."""
    optimizer: Optimizer = field(default_factory=Optimizer)
    """What moves the weights."""


def write_recipe(directory: Path, text: str | bytes) -> str:
    """Write a recipe; returns its path."""
    path = directory / 'recipe.yaml'
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)
