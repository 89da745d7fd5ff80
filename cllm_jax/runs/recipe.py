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
import difflib
import json
import math
import types
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from cllm_jax.errors import ConfigError

C = TypeVar('C')

STAGES = (
    'target', 'collect', 'cllm', 'recollect', 'refine', 'export', 'evaluate', 'decode', 'bench',
    'draft', 'medusa', 'medusa2', 'redrafter', 'eagle', 'space',
)  # fmt: skip
MAX_RECIPE_BYTES = 1_000_000
_KINDS = {bool: 'true or false', int: 'a whole number', float: 'a number', str: 'text'}


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
        values[name] = _convert(hints[name], value, f'{where}.{name}')
    try:
        return config_class(**values)
    except ConfigError as error:
        raise ConfigError(f'{where}: {error}') from error


def to_json(config: Any) -> Any:
    """A config as the plain data (dicts, lists, text, numbers) that JSON and YAML can hold.

    Raises ConfigError for a number that is not finite.
    """
    return _plain(config, type(config).__name__)


def _convert(annotation: Any, value: Any, where: str) -> Any:
    """A YAML value as its field's type; never a guess between types."""
    origin, options = get_origin(annotation), get_args(annotation)
    if dataclasses.is_dataclass(annotation):
        if not isinstance(value, Mapping):
            raise ConfigError(f'{where} is {_shown(value)}; it must map settings to values')
        return from_mapping(annotation, value, where)
    if origin is Literal:
        for option in options:
            if type(option) is type(value) and option == value:
                return value
        raise ConfigError(f'{where}: {no_such("choice", value, options)}')
    if origin in (Union, types.UnionType):
        return _convert_union(options, value, where)
    if origin is tuple:
        return _convert_tuple(options, value, where)
    if annotation is float and type(value) is int:
        return float(value)
    if annotation not in _KINDS:
        raise TypeError(f'{where}: a config field cannot have the type {annotation}')
    if type(value) is annotation:
        return value
    raise ConfigError(
        f'{where} is {_shown(value)}; it must be {_KINDS[annotation]}{_remedy(annotation, value)}'
    )


def _convert_union(options: Sequence[Any], value: Any, where: str) -> Any:
    if value is None and types.NoneType in options:
        return None
    options = [option for option in options if option is not types.NoneType]
    for option in options[:-1]:
        try:
            return _convert(option, value, where)
        except ConfigError:
            continue
    return _convert(options[-1], value, where)


def _convert_tuple(options: Sequence[Any], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise ConfigError(f'{where} is {_shown(value)}; it must be a list, such as [1, 2]')
    if options[-1] is Ellipsis:
        options = [options[0]] * len(value)
    if len(value) != len(options):
        raise ConfigError(f'{where} has {len(value)} entries; it must have {len(options)}')
    pairs = enumerate(zip(options, value, strict=True))
    return tuple(_convert(option, entry, f'{where}[{i}]') for i, (option, entry) in pairs)


def _remedy(annotation: type, value: Any) -> str:
    """How to write a value that YAML read as another type."""
    if value is None:
        return '; leave the name out for its default'
    if annotation is str:
        return '; put it in quotes'
    if not isinstance(value, str):
        return ''
    text = value.strip().lower()
    if annotation is bool:
        return f'; write {text} without quotes' if text in ('true', 'false') else ''
    try:
        annotation(text)
    except ValueError:
        return ''
    mantissa, e, exponent = text.partition('e')
    if not e:
        return f'; write {text} without quotes'
    mantissa += '' if '.' in mantissa else '.0'
    exponent = exponent if exponent[0] in '+-' else f'+{exponent}'
    return f'; YAML wants a dot and a signed exponent: write {mantissa}e{exponent}'


def _plain(value: Any, name: str) -> Any:
    if dataclasses.is_dataclass(value):
        fields = [field.name for field in dataclasses.fields(value) if field.init]
        return {field: _plain(getattr(value, field), field) for field in fields}
    if isinstance(value, tuple | list):
        return [_plain(entry, name) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f'{name} is {value}; a setting must be a finite number')
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f'{name}: a config field cannot hold a {type(value).__name__}')


def no_such(kind: str, name: Any, known: Collection[Any]) -> str:
    near = difflib.get_close_matches(str(name), [str(option) for option in known], 1)
    if near:
        return f'no {kind} {name!r}; did you mean {near[0]!r}?'
    return f'no {kind} {name!r}; there are {", ".join(map(str, known))}'


def _shown(value: Any) -> str:
    """A value as its writer would recognise it, short."""
    if isinstance(value, dict):
        return 'a mapping'
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    text = repr(value)
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
