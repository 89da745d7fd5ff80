"""The house stands as CONTRIBUTING.md draws it: arrows point down, rooms are small."""

import ast
from graphlib import TopologicalSorter
from itertools import pairwise
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / 'cllm_jax'
FILES = sorted(path for path in PACKAGE.rglob('*.py'))

CHAIN = (
    {'decode', 'collect', 'train', 'evaluate', 'export', 'bench', 'view', ''},
    {'evaluation', 'training'},
    {'trajectories'},
    {'drafters'},
    {'decoding'},
    {'hf'},
    {'model'},
    {'runtime'},
    {'errors'},
)
"""Rooms from the top floor down; '' is the package itself, which hands names on."""
BESIDE = {
    'cli': {'runs', 'runtime', 'errors'},
    'runs': {'runtime', 'errors'},
    'data': {'tasks', 'errors'},
    'tasks': {'errors'},
}
"""Rooms at the side, which every floor may use, and all that each of them may use."""

CORE = (
    *(f'model/{name}.py' for name in ('config', 'llama', 'attention', 'cache', 'precision')),
    *(f'decoding/{name}.py' for name in ('drafter', 'tree', 'sampling', 'state', 'loop')),
    'drafters/jacobi.py',
    'training/losses.py',
    'training/packing.py',
)
"""What a newcomer reads in an hour."""

MOST_LINES, MOST_OF_A_FUNCTION, MOST_PARAMETERS = 330, 60, 7
EXCEPTIONS = {'__init__.py:decode'}
"""The public call has its settings as keywords, each with a default."""


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix('').parts
    return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


MODULES = {name_of(path): path for path in FILES}


def imports(path: Path) -> set[str]:
    """The modules of the package that a file imports, also where it does so late."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ''
            found.add(module)
            found |= {f'{module}.{alias.name}' for alias in node.names}
    return {name for name in found if name in MODULES}


def room(module: str) -> str:
    return [*module.split('.'), ''][1]


ARROWS = {name: imports(path) - {name} for name, path in MODULES.items()}


def test_every_room_has_its_floor():
    known = set().union(*CHAIN, BESIDE)
    assert {room(name) for name in MODULES} == known


@pytest.mark.parametrize('name', MODULES)
def test_imports_point_down(name):
    here = room(name)
    if here in BESIDE:
        allowed = BESIDE[here]
    else:
        floor = next(i for i, rooms in enumerate(CHAIN) if here in rooms)
        allowed = set(BESIDE).union(*CHAIN[floor + 1 :])
    used = {room(other) for other in ARROWS[name]} - {here}
    assert used <= allowed, f'{name} uses {sorted(used - allowed)}'


def test_no_files_import_each_other():
    TopologicalSorter(ARROWS).prepare()  # CycleError names them


def test_there_are_at_most_nine_floors():
    rooms = {room(name) for name in MODULES}
    below = {r: {room(o) for n in MODULES if room(n) == r for o in ARROWS[n]} - {r} for r in rooms}
    floor: dict[str, int] = {}
    for here in TopologicalSorter(below).static_order():
        floor[here] = 1 + max((floor[other] for other in below[here]), default=0)
    assert max(floor.values()) <= 9, floor


def test_files_and_functions_are_small():
    large = []
    for path in FILES:
        where, text = path.relative_to(PACKAGE).as_posix(), path.read_text()
        if text.count('\n') > MOST_LINES:
            large.append(f'{where}: {text.count(chr(10))} lines')
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                names = [a.arg for a in (*node.args.posonlyargs, *node.args.args)]
                names += [a.arg for a in node.args.kwonlyargs]
                count = len(names) - (names[:1] in (['self'], ['cls']))
                length = node.end_lineno - node.lineno + 1
                if f'{where}:{node.name}' in EXCEPTIONS:
                    continue
                if count > MOST_PARAMETERS or length > MOST_OF_A_FUNCTION:
                    large.append(f'{where}: {node.name} has {count} parameters, {length} lines')
    assert not large, large


def test_a_newcomer_reads_the_core_in_an_hour():
    assert sum((PACKAGE / name).read_text().count('\n') for name in CORE) <= 1900


def test_only_one_room_knows_the_hardware():
    asking = ('default_backend', 'platform_dependent', 'xla_cpu')
    found = {
        path.relative_to(PACKAGE).as_posix()
        for path in FILES
        if any(word in path.read_text() for word in asking)
    }
    assert found == {'runtime/backend.py'}


def test_floors_are_listed_once():
    assert all(not (a & b) for a, b in pairwise(CHAIN))
