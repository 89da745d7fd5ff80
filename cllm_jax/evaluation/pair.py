"""Which two models are compared: a CLLM and the target that it was trained from."""

from pathlib import Path

from cllm_jax.errors import ConfigError
from cllm_jax.hf.load import EMBEDDED_ROOT


def model_pair(root: str, cllm: str, target: str) -> tuple[str, str]:
    """Names of the CLLM and of its target: as given, else the exports of the runs in `root`.

    Only where `root` is `EMBEDDED_ROOT`, and has no exports at all, the embedded models take their
    place.

    Raises:
      ConfigError: a model is not given, and `root` has no export of it.
    """
    exports = Path(root) / 'export'
    if Path(root) == Path(EMBEDDED_ROOT) and not exports.exists():
        return cllm or 'embedded', target or 'embedded-target'
    for name, given in (('cllm', cllm), ('target', target)):
        if not given and not (exports / name).is_dir():
            raise ConfigError(
                f'{exports / name}: no such directory; train and export first, or name --model '
                'and --target'
            )
    return cllm or str(exports / 'cllm'), target or str(exports / 'target')
