"""Opening the drafter that a command's options name, for a model."""

from pathlib import Path

from jax.sharding import Mesh

from cllm_jax.decoding.drafter import Drafter
from cllm_jax.drafters.checkpoint import read_drafter
from cllm_jax.drafters.draft_model import draft_model
from cllm_jax.drafters.jacobi import AUTO, Jacobi
from cllm_jax.drafters.jacobi_tree import JacobiTree
from cllm_jax.drafters.lookahead import Lookahead
from cllm_jax.drafters.prompt_lookup import PromptLookup, with_references
from cllm_jax.drafters.registry import DRAFTERS, TRAINED, DrafterConfig
from cllm_jax.hf.load import Precision, load, resolve
from cllm_jax.hf.model import Model


def open_drafter(
    config: DrafterConfig, model: Model, dtype: Precision = 'auto', mesh: Mesh | None = None
) -> Drafter:
    """The drafter that `config` names.

    Raises ConfigError if there is none or it does not fit the model, DataError for damaged files.
    """
    config.check_drafter()
    size = {} if config.block == AUTO else {'block': config.block}
    name, _, directory = config.drafter.partition(':')
    if name in TRAINED:
        path = Path(directory).expanduser() if directory else own_drafter(model, name)
        return read_drafter(path, model, name)
    if name == 'model':
        return draft_model(model, load(directory, dtype, mesh), **size)
    if name == 'lookup' and config.reference:
        texts = [Path(path).read_text('utf-8', errors='replace') for path in config.reference]
        return with_references(model, texts, **size)
    if name == 'lookup':
        return PromptLookup(**size)
    if name == 'lookahead':
        return Lookahead(**size)
    if config.branches:
        return JacobiTree(branches=config.branches, **size)
    if name == 'jacobi':
        return Jacobi(config.block, config.mode, config.recycle, config.lookup)
    return DRAFTERS[name]()


def own_drafter(model: Model, name: str) -> Path:
    """The drafter that was trained with the model, else the one of that name next to it."""
    path = resolve(model.source)
    run = path.parent if path.name == 'model' else path
    trained = next((p / 'drafter' for p in (path, run) if (p / 'drafter').is_dir()), None)
    return trained or run.parent / name
