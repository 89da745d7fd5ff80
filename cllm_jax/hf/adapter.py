"""LoRA adapters of PEFT, to be merged into their base: `W + B A alpha / r`, computed in float32.

What PEFT would compute otherwise is refused by name, and so are tensors that are not all of an
adapter, or not of this base: half an adapter is another model.
"""

import dataclasses
import math
import os
import re
import reprlib
from collections.abc import Callable, Mapping, Set
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from cllm_jax.errors import ConfigError, DataError
from cllm_jax.hf.files import STORED, check_link, headers, listed, open_tensors, read_json

SETTINGS, TENSORS, PICKLE = 'adapter_config.json', 'adapter_model.safetensors', 'adapter_model.bin'
TENSOR = re.compile(r'base_model\.model\.(.+)\.lora_([AB])\.weight')
PATTERN = re.compile(r'(?:[\w.^$-]|\\\.)+')
"""Names of modules, and expressions that no text can make slow."""
PLAIN_INITS = (True, False, None, 'gaussian', 'orthogonal', 'eva')
"""Beginnings of a training that leave the base as it is; the others subtract something from it."""
CHOICE = ('target_modules', 'exclude_modules', 'layers_to_transform', 'layers_pattern')
"""Which modules have factors."""
READ = {
    'base_model_name_or_path': str,
    'revision': str,
    'use_rslora': bool,
    'rank_pattern': dict,
    'alpha_pattern': dict,
    **dict.fromkeys(('peft_type', 'r', 'lora_alpha', 'bias', 'init_lora_weights', *CHOICE)),
}
"""Settings that are read here, and their types."""
IGNORED = {
    *('auto_mapping', 'inference_mode', 'lora_dropout', 'peft_version', 'task_type'),
    *('megatron_core', 'qalora_group_size', 'runtime_config', 'ensure_weight_tying'),
    *('loftq_config', 'eva_config', 'corda_config', 'lora_ga_config'),
    'fan_in_fan_out',  # PEFT sets it to false for the matrices of these models
}
"""Settings that change nothing of an adapter that has been trained; those of neither set must be
off, also those that are not known yet."""
MERGE = 'merge it with peft (merge_and_unload) and save the whole model'


@dataclasses.dataclass(frozen=True)
class Adapter:
    """What `adapter_config.json` says of a LoRA adapter."""

    directory: Path
    base: str
    """What it calls the model that it changes, '' for nothing."""
    revision: str | None
    rank: int
    alpha: float
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    """Ranks and alphas of modules that have others, by a pattern of the end of their names."""
    root: bool
    """Divide alpha by the root of the rank (rsLoRA)."""
    chosen: Mapping[str, Any]
    """Which modules have factors, in the words of PEFT (`CHOICE`)."""

    @property
    def title(self) -> str:
        """What is merged, for people."""
        ranks = {self.rank, *self.ranks.values()}
        return 'LoRA rank ' + ' to '.join(map(str, sorted({min(ranks), max(ranks)})))

    def rank_of(self, module: str) -> int:
        return _of(self.ranks, module, self.rank)

    def scale_of(self, module: str) -> float:
        rank = self.rank_of(module)
        return _of(self.alphas, module, self.alpha) / (math.sqrt(rank) if self.root else rank)


def find_adapter(directory: Path) -> Adapter | None:
    """The adapter of a directory, or None; its weights are not looked for.

    Raises:
      DataError: its settings are missing or of wrong kinds.
      ConfigError: it is not LoRA, or LoRA with more than two factors of a matrix.
    """
    found = [name for name in (SETTINGS, TENSORS, PICKLE) if os.path.lexists(directory / name)]
    if not found:
        return None
    path = directory / SETTINGS
    if SETTINGS not in found:
        rule = f'fetch {SETTINGS} too, or delete the adapter'
        raise DataError(f'{directory}: {found[0]} without {SETTINGS}; {rule}')
    raw = read_json(path)
    _check_settings(path, raw)
    return Adapter(
        directory,
        raw.get('base_model_name_or_path') or '',
        raw.get('revision'),
        _number(path, 'r', raw.get('r', 8), whole=True),
        _number(path, 'lora_alpha', raw.get('lora_alpha', 8)),
        _patterns(path, raw, 'rank_pattern', whole=True),
        _patterns(path, raw, 'alpha_pattern'),
        bool(raw.get('use_rslora')),
        {key: raw.get(key) for key in CHOICE},
    )


def read_deltas(
    adapter: Adapter, matrices: Mapping[str, tuple[int, ...]]
) -> dict[str, Callable[[], np.ndarray]]:
    """What is added to the matrices of the base, by module: functions that compute it, float32.

    Args:
      matrices: the shape of each matrix of the base, (outputs, inputs), by its module's name.

    Raises DataError for tensors that are missing, unknown, ill-shaped or damaged.
    """
    path = adapter.directory / TENSORS
    if not os.path.isfile(path):
        fault, rule = f'no {TENSORS}', 'fetch the whole adapter'
        if (adapter.directory / PICKLE).exists():
            fault += f', only {PICKLE}'
            rule = 'pickled weights are never opened, save it with peft: save_pretrained(DIR)'
        raise DataError(f'{adapter.directory}: {fault}; {rule}')
    check_link(path)
    modules = _check_tensors(path, adapter, matrices)
    with open_tensors(path) as f:
        factors = {
            name: f.get_tensor(name).astype(np.float32)
            for module in modules
            for name in tensor_names(module)
        }
    return {
        module: partial(
            _product,
            *(factors[n] for n in tensor_names(module)),
            adapter.scale_of(module),
            f'{path}: {module}',
        )
        for module in modules
    }


def _product(a: np.ndarray, b: np.ndarray, scale: float, where: str) -> np.ndarray:
    with np.errstate(all='ignore'):
        delta = (b @ a) * np.float32(scale)
    if not np.isfinite(delta).all():
        raise DataError(f'{where}: factors that are not finite, or too large; train it again')
    return delta


def tensor_names(module: str) -> list[str]:
    """The two tensors of a module: A of shape (rank, inputs), B of shape (outputs, rank)."""
    return [f'base_model.model.{module}.lora_{half}.weight' for half in 'AB']


def _of(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first pattern that is the module's name, or the end of it after a dot."""
    found = (v for key, v in patterns.items() if re.match(rf'(.*\.)?({key})$', module))
    return next(found, default)


def _refuse(path: Path, key: str, value: object, rule: str = MERGE) -> NoReturn:
    raise ConfigError(f'{path}: {key} = {reprlib.repr(value)} is not supported; {rule}')


def _wrong(path: Path, key: str, value: object, rule: str) -> NoReturn:
    raise DataError(f'{path}: {key} = {reprlib.repr(value)}, {rule}; fetch the file again')


def _check_settings(path: Path, raw: dict[str, Any]) -> None:
    """Refuse what is not `W + B A scale`."""
    if raw.get('peft_type') != 'LORA':
        _refuse(path, 'peft_type', raw.get('peft_type'), f'only LORA is merged here, {MERGE}')
    if raw.get('bias', 'none') != 'none':
        _refuse(path, 'bias', raw['bias'])
    if raw.get('init_lora_weights') not in PLAIN_INITS:
        _refuse(path, 'init_lora_weights', raw['init_lora_weights'])
    for key in sorted(raw.keys() - READ.keys() - IGNORED):
        if raw[key]:
            _refuse(path, key, raw[key])
    for key, kind in READ.items():
        if kind and raw.get(key) is not None and not isinstance(raw[key], kind):
            _wrong(path, key, raw[key], f'a {kind.__name__} expected')


def _number(path: Path, key: str, value: object, whole: bool = False) -> Any:
    """A positive number."""
    kind = int if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kind) or not 0 < value < 1 << 24:
        _wrong(path, key, value, f'a positive {"whole " * whole}number expected')
    return value


def _patterns(path: Path, raw: dict[str, Any], key: str, whole: bool = False) -> dict[str, Any]:
    found = raw.get(key) or {}
    for pattern, value in found.items():
        if not PATTERN.fullmatch(pattern):
            _refuse(path, key, pattern, f'only names of modules are, {MERGE}')
        _number(path, f'{key}[{reprlib.repr(pattern)}]', value, whole)
    return found


def _check_tensors(
    path: Path, adapter: Adapter, matrices: Mapping[str, tuple[int, ...]]
) -> list[str]:
    """The modules that an adapter changes, in order, whose tensors are complete and fit."""
    found = headers([path])
    matches = {name: TENSOR.fullmatch(name) for name in found}
    if other := sorted(name for name, match in matches.items() if not match):
        raise DataError(f'{path}: tensors that are no factors of LoRA: {listed(other)}; {MERGE}')
    modules = {match[1] for match in matches.values()}
    belongs = 'use the base that it was trained for'
    if foreign := sorted(modules - matrices.keys()):
        raise DataError(
            f'{path}: modules that are no linear layers of the base: {listed(foreign)}; {belongs}'
        )
    chosen = _chosen(adapter.chosen, matrices.keys())
    wanted = modules if chosen is None else chosen
    if missing := sorted({n for m in wanted for n in tensor_names(m)} - found.keys()):
        raise DataError(f'{path}: missing tensors: {listed(missing)}; fetch the adapter again')
    if extra := sorted(modules - wanted):
        fault = f'modules that {SETTINGS} does not name: {listed(extra)}'
        raise DataError(f'{path}: {fault}; fetch both files again')
    if not modules:
        raise DataError(f'{path}: no tensors; fetch the adapter again')
    differ = []
    for module in sorted(modules):
        rank, (outputs, inputs) = adapter.rank_of(module), matrices[module]
        shapes = zip(tensor_names(module), ((rank, inputs), (outputs, rank)), strict=True)
        differ += [f'{n} is {found[n].shape} and not {s}' for n, s in shapes if found[n].shape != s]
    if differ:
        raise DataError(f'{path}: {listed(differ)}; {belongs}')
    if formats := sorted(n for n, tensor in found.items() if tensor.dtype not in STORED):
        fault = f'{found[formats[0]].dtype} tensors: {listed(formats)}'
        raise DataError(f'{path}: {fault}; weights must be {", ".join(STORED)}')
    return sorted(modules)


def _chosen(settings: Mapping[str, Any], modules: Set[str]) -> set[str] | None:
    """The modules that the settings name; None where they are expressions, which are not run."""
    targets, excluded, layers, pattern = (settings[key] for key in CHOICE)
    if not isinstance(targets, list) or not isinstance(excluded or [], list) or pattern:
        return None

    def named(module: str, names: list) -> bool:
        return any(module == name or module.endswith(f'.{name}') for name in names)

    kept = {m for m in modules if named(m, targets) and not named(m, excluded or [])}
    if layers is not None:
        numbers = layers if isinstance(layers, list) else [layers]
        inside = {m for m in kept if any(f'.layers.{number}.' in m for number in numbers)}
        kept = inside | (kept & set(map(str, targets)))
    return kept
