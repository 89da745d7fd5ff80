"""Recipes: YAML files of settings, and the way from plain data to config dataclasses and back.

A recipe maps stage names to settings:

    description: a small model, end to end
    target: {steps: 2000, optimizer: {learning_rate: 1.0e-3}}
    collect:
      block: 16

Nothing is guessed: unknown names, wrong types, duplicate keys and YAML aliases are refused.
Relative paths in a recipe are relative to the current directory.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from cllm_jax.errors import ConfigError, no_such
from cllm_jax.runs.stages import STAGES

C = TypeVar('C')

MAX_RECIPE_BYTES = 1_000_000
STRICT = ConfigDict(strict=True, allow_inf_nan=False)
KINDS = {'bool_type': bool, 'int_type': int, 'float_type': float, 'string_type': str}
"""The type that a value should have had, by pydantic's name of the error."""


def read_recipe(path: str | Path) -> dict[str, dict[str, Any]]:
    """The stages of a YAML recipe, each a mapping of settings that is not checked further.

    Raises ConfigError if the file cannot be read, is not YAML, or is not a recipe.
    """
    try:
        with open(path, 'rb') as file:
            raw = file.read(MAX_RECIPE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f'{path}: {error.strerror}; --config takes a YAML recipe') from error
    if len(raw) > MAX_RECIPE_BYTES:
        raise ConfigError(f'{path}: larger than {MAX_RECIPE_BYTES} bytes; this is not a recipe')
    try:
        recipe = yaml.load(raw, Loader=_RecipeLoader)
    except yaml.MarkedYAMLError as error:
        line = f' line {error.problem_mark.line + 1}' if error.problem_mark else ''
        raise ConfigError(f'{path}{line}: {error.problem}; correct the YAML there') from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f'{path}: not a YAML text ({str(error).splitlines()[0]})') from error
    if not isinstance(recipe, dict):
        raise ConfigError(
            f'{path}: holds {_shown(recipe)}; a recipe maps stage names to settings, '
            "such as 'target: {steps: 100}'"
        )
    description = recipe.pop('description', '')
    if not isinstance(description, str):
        raise ConfigError(f'{path}: description is {_shown(description)}; it must be text')
    for name, settings in recipe.items():
        if name not in STAGES:
            raise ConfigError(f'{path}: {no_such("stage", name, STAGES)}')
        if not isinstance(settings, dict | None):
            raise ConfigError(
                f'{path}: {name} is {_shown(settings)}; a stage maps settings to values, '
                f"such as '{name}: {{seed: 1}}'"
            )
    return {name: settings or {} for name, settings in recipe.items()}


def from_mapping(
    config_class: type[C],
    mapping: Mapping[str, Any],
    where: str,
    given: Mapping[str, Any] | None = None,
) -> C:
    """A config dataclass from plain YAML or JSON data; the inverse of `to_json`.

    Missing names keep their defaults. `where` names the source in errors, and `given` holds fields
    that the data may not have. Raises ConfigError for an unknown name, a value of the wrong type,
    and whatever the class itself refuses.
    """
    hints, values = get_type_hints(config_class), dict(given or {})
    names = [f.name for f in dataclasses.fields(config_class) if f.init and f.name not in values]
    for name, value in mapping.items():
        if name not in names:
            raise ConfigError(f'{where}: {no_such("setting", name, names)}')
        place, kind = f'{where}.{name}', hints[name]
        if not dataclasses.is_dataclass(kind):
            values[name] = _strict(kind, value, place)
        elif isinstance(value, Mapping):
            values[name] = from_mapping(kind, value, place)
        else:
            raise ConfigError(f'{place} is {_shown(value)}; it must map settings to values')
    try:
        return config_class(**values)
    except ConfigError as error:
        raise ConfigError(f'{where}: {error}') from error


def to_json(config: Any, name: str = '') -> Any:
    """A config as the plain data (dicts, lists, text, numbers) that JSON and YAML can hold.

    Raises ConfigError for a number that is not finite; `name` is what it is called then.
    """
    if dataclasses.is_dataclass(config):
        names = [field.name for field in dataclasses.fields(config) if field.init]
        return {name: to_json(getattr(config, name), name) for name in names}
    if isinstance(config, tuple | list):
        return [to_json(entry, name) for entry in config]
    if isinstance(config, float) and not math.isfinite(config):
        raise ConfigError(f'{name} is {config}; a setting must be a finite number')
    return config


def _strict(kind: Any, value: Any, where: str) -> Any:
    """A YAML value as its field's type; never a guess between types."""
    try:
        return TypeAdapter(kind, config=STRICT).validate_python(_with_tuples(value))
    except ValidationError as error:
        found = error.errors(include_url=False)
    wrong, kind, place = (found[0][name] for name in ('input', 'type', 'loc'))
    place = where + ''.join(f'[{i}]' for i in place if isinstance(i, int))
    shown = 'missing' if kind == 'missing' else _shown(wrong)
    rules = ' or '.join(each['msg'] for each in found)
    rules = rules.replace('Input', 'it').replace('tuple', 'list')
    raise ConfigError(f'{place} is {shown}; {rules}{_remedy(KINDS.get(kind), wrong)}')


def _with_tuples(value: Any) -> Any:
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value


def _remedy(kind: type | None, value: Any) -> str:
    """How to write a value that YAML read as another type than `kind`."""
    if value is None:
        return '; leave the name out for its default'
    if kind is str:
        return '; put it in quotes'
    if kind is None or not isinstance(value, str):
        return ''
    text = value.strip().lower()
    try:
        TypeAdapter(kind, config=STRICT).validate_json(text)
    except ValidationError:
        return ''
    mantissa, _, exponent = text.partition('e')
    if not exponent:
        return f'; write {text} without quotes'
    written = f'{float(mantissa)}e{int(exponent):+}'
    return f'; YAML wants a dot and a signed exponent: write {written}'


def _shown(value: Any) -> str:
    """A value as its writer would recognise it, short."""
    if isinstance(value, dict):
        return 'a mapping'
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    text = repr(list(value) if isinstance(value, tuple) else value)
    return text if len(text) <= 60 else f'{text[:57]}...'


class _RecipeLoader(yaml.SafeLoader):
    """Plain YAML: no aliases (a few lines of them expand without bound), no key given twice."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(problem='an alias; write the value out', problem_mark=mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                problem = f'the key {_shown(key)} is not text'
            elif key in seen:
                problem = f'the key {key!r} appears twice'
            else:
                seen.add(key)
                continue
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=key_node.start_mark)
        return super().construct_mapping(node, deep)
