"""What the documentation says is so: its links, commands, code, files and names of tests."""

import ast
import importlib.util
import itertools
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from xml.etree import ElementTree

import jax
import numpy as np
import pytest
import yaml

import cllm_jax
from cllm_jax.evaluation.race import Runner
from cllm_jax.runs.stages import STAGES
from tests.evaluation.traces import jacobi, plain

ROOT = Path(__file__).parents[1]
PAGES = ['README.md', 'CONTRIBUTING.md', 'launch/README.md']
PAGES += sorted(f'docs/{path.name}' for path in (ROOT / 'docs').glob('*.md'))

api = cllm_jax.decode
NAMES = ('decode', 'collect', 'train', 'evaluate', 'export', 'bench', 'view')
COMMANDS = {name: import_module(f'cllm_jax.{name}') for name in NAMES}
cllm_jax.decode = api  # importing the command hides the function of that name; put it back

ELSEWHERE = {'mine.yaml', 'NAME.yaml', 'runs/NAME', 'data/wikisql.json.bz2', 'configs/data/'}
"""What pages name that is not in this repository."""
PLACEHOLDERS = {
    'RECIPE': 'configs/embedded.yaml',
    'CONFIG': 'configs/embedded.yaml',
    'mine.yaml': 'configs/embedded.yaml',
    'ROOT': 'runs/embedded',
    'DIR': 'runs/embedded/medusa',
}
SHELL = ('cp', 'docker', 'done', 'export', 'for', 'mkdir', 'ruff', 'sbatch', 'sed', 'sky')
"""What else stands in front of a line; nothing of this project is parsed there."""


def text_of(page: str) -> str:
    return (ROOT / page).read_text('utf-8')


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf'^```{language}\n(.*?)^```', text_of(page), re.S | re.M)


def prose(page: str) -> str:
    """A page without its blocks of code."""
    return re.sub(r'^```.*?^```', '', text_of(page), flags=re.S | re.M)


def spans(page: str) -> list[str]:
    """Code within lines."""
    return [' '.join(span.split()) for span in re.findall(r'`([^`]+)`', prose(page))]


def anchors(page: str) -> set[str]:
    """The headings of a page as GitHub names them."""
    titles = re.findall(r'^#+ (.+)$', prose(page), re.M)
    return {re.sub(r'[^\w\- ]', '', title.lower()).replace(' ', '-') for title in titles}


@pytest.mark.parametrize('page', PAGES)
def test_links_lead_somewhere(page):
    for link in re.findall(r'\[[^\]]*\]\(([^)\s]+)\)', prose(page)):
        if re.match(r'\w+:', link):
            continue
        name, _, anchor = link.partition('#')
        target = (ROOT / page).parent / name if name else ROOT / page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(str(target.resolve().relative_to(ROOT))), link


@pytest.mark.parametrize('page', PAGES)
def test_files_that_are_named_exist(page):
    places = [
        ROOT,
        ROOT / 'cllm_jax',
        ROOT / 'cllm_jax/drafters',
        ROOT / 'configs',
        ROOT / 'launch',
    ]
    rooms = {path.name for place in places[:2] for path in place.iterdir() if path.is_dir()}
    for span in set(spans(page)) - ELSEWHERE:
        named = span.endswith(('.py', '.sh', '.yaml')) or span.partition('/')[0] in rooms - {span}
        if named and ' ' not in span:
            assert any((place / span).exists() for place in places), span


def lines(page: str) -> Iterator[list[str]]:
    """The commands of a page as words: those after `$` and `>`, and those within its text."""
    variables: dict[str, str] = {}
    shown = '\n'.join(blocks(page, 'console')).splitlines()
    commands = [line[2:].strip() for line in shown if line.startswith(('$ ', '> '))]
    commands += [s for s in spans(page) if re.match(r'python -m cllm_jax\.\w+ |bash launch/', s)]
    for line in commands:
        if found := re.fullmatch(r"(\w+)='(.*)'", line):
            variables[found[1]] = found[2]
            continue
        for name, value in (variables | {'stage': 'medusa'}).items():
            line = line.replace(f'${name}', value)
        for part in line.split(' && '):
            yield [PLACEHOLDERS.get(word, word) for word in shlex.split(part, comments=True)]


class Parsed(Exception):
    """A command has parsed its settings; it is to go no further."""


def parse_only(monkeypatch, words: list[str]) -> None:
    """Parse the arguments of `python -m cllm_jax.NAME ...` as that command does."""
    module = COMMANDS[words[2].removeprefix('cllm_jax.')]
    parse = module.parse

    def parsed(*args, **kwargs):
        parse(*args, **kwargs)
        raise Parsed

    with monkeypatch.context() as patch, pytest.raises(Parsed):
        patch.chdir(ROOT)
        patch.setattr(sys, 'argv', words[2:])
        patch.setattr(module, 'parse', parsed)
        module.run()


def dry_run(words: list[str]) -> None:
    """Run a launch script with --dry-run, before what it passes on."""
    at = 4 if words[1].endswith('local_multiprocess.sh') else len(words)
    at = words.index('--') if '--' in words else at
    words = [*words[:at], '--dry-run', *words[at:]]
    environment = os.environ | {'PYTHON': sys.executable}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f'{shlex.join(words)}\n{done.stderr}'


@pytest.mark.parametrize('page', PAGES)
def test_commands_parse(page, monkeypatch):
    project = tomllib.loads(text_of('pyproject.toml'))
    for words in lines(page):
        if words[:2] == ['bash', '.ci/run'] or words[0] in SHELL:
            continue
        if words[0] == 'python':
            assert words[1] == '-m'
            parse_only(monkeypatch, words)
        elif words[0] == 'bash' and page != 'launch/README.md':  # test_launch.py has those
            dry_run(words)
            if 'sh' in words:  # what local_multiprocess.sh runs
                inner = shlex.split(words[words.index('-c') + 1])
                parse_only(monkeypatch, inner[inner.index('python') :])
        elif words[0] == 'pip':
            assert words[1:3] == ['install', '-e']
            extras = re.findall(r'[\[,](\w+)', words[3])
            assert set(extras) <= project['project']['optional-dependencies'].keys()
        elif words[0] == 'pytest':
            markers = project['tool']['pytest']['ini_options']['markers']
            for before, word in itertools.pairwise(words):
                if before == '-m':
                    assert any(marker.startswith(f'{word}:') for marker in markers)
                assert not word.startswith('tests/') or (ROOT / word).exists(), word
        else:
            assert page == 'launch/README.md' and words[0] == 'bash', shlex.join(words)


@pytest.mark.parametrize('page', ['README.md', 'docs/training.md'])
def test_recipes_parse(page, monkeypatch, tmp_path):
    commands = {'target': 'train', 'cllm': 'train'}
    for text in blocks(page, 'yaml'):
        (recipe := tmp_path / 'mine.yaml').write_text(text)
        for stage in yaml.safe_load(text):
            words = ['python', '-m', f'cllm_jax.{commands.get(stage, stage)}']
            parse_only(monkeypatch, [*words, '--config', str(recipe), '--stage', stage])


def test_the_table_of_stages_says_what_each_writes():
    rows = re.findall(r'^\| (`\w+`.*?) \|.*\| `ROOT/(\S+)` \|$', text_of('docs/training.md'), re.M)
    told = {stage: written for names, written in rows for stage in re.findall(r'\w+', names)}
    told = {stage: written.replace('STAGE', stage) for stage, written in told.items()}
    assert told == {name: stage.writes for name, stage in STAGES.items() if stage.writes}


@pytest.mark.parametrize('page', ['README.md', 'docs/adding_a_drafter.md'])
def test_python_examples_run(page, capsys):
    code = '\n'.join(blocks(page, 'python'))
    assert sum(map(bool, code.splitlines())) <= (10 if page == 'README.md' else 90)
    with jax.numpy_dtype_promotion('standard'), jax.numpy_rank_promotion('allow'):
        exec(compile(code, page, 'exec'), {})
    assert capsys.readouterr().out


@pytest.mark.parametrize('page', PAGES)
def test_imports_of_python_examples_exist(page):
    for code in blocks(page, 'python'):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith('cllm_jax'):
                module = import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names), node.module


def test_every_fault_names_tests_that_exist():
    tables = re.findall(r'^\| fault .*\n\| ---.*\n((?:\|.*\n)+)', text_of('docs/faults.md'), re.M)
    found = ''.join(path.read_text() for path in (ROOT / 'tests').rglob('test_*.py'))
    assert len(tables) == 3
    for row in ''.join(tables).splitlines():
        named = re.findall(r'`(test_\w+|tests/[\w/.]+)`', row)
        assert named, row
        for name in named:
            assert f'def {name}(' in found or (ROOT / name).is_file(), name


def test_readme_is_short():
    assert len(text_of('README.md').split()) <= 900


@pytest.mark.parametrize('page', PAGES)
def test_english_is_plain(page):
    banned = 'is no|are no|be it|so must|mood|moods|hour in which'
    if page != 'docs/log.md':
        banned += '|behind|beside|besides'
    assert re.findall(rf'\b(?:{banned})\b', text_of(page), re.I) == []


def script(name: str):
    """A script of the docs, as a module."""
    spec = importlib.util.spec_from_file_location('picture', ROOT / f'docs/{name}.py')
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module


def test_the_picture_shows_a_trajectory():
    answer = [1, 2, 3, 4, 5, 6]
    states = np.array([[1, 2, 9, 4], [3, 4, 8, 8], [5, 6, 7, 7]])
    picture = script('make_window_svg')
    start = np.array([0, 2, 4])
    kinds = [[kind[0] for _, _, kind in row] for row in picture.windows(answer, states, start)]
    # committed, wrong, right ahead (a); after the first window a token is random
    assert kinds == [['c', 'c', 'w', 'a'], ['c', 'c', 'w', 'r'], ['c', 'c']]
    text = picture.draw(answer, states, start, lambda token: f'<{token}>&')
    drawn = ''.join(ElementTree.fromstring(text).itertext())
    assert '6 tokens in 4 forwards' in drawn and '<9>&' in drawn and '<7>&' not in drawn
    assert all(meaning in drawn for meaning in picture.LEGEND.values())


def test_the_readme_shows_the_picture():
    file = ROOT / 'docs/window.svg'
    assert '](docs/window.svg)' in text_of('README.md')
    assert ElementTree.fromstring(file.read_text('utf-8')).tag.endswith('svg')
    assert file.stat().st_size < 40_000
    assert 'url(' not in file.read_text('utf-8'), 'it loads nothing'


def test_the_picture_of_a_race_loads_nothing_and_tells_no_time():
    text = script('make_watch_svg').picture([Runner(plain(), False), Runner(jacobi(), True)])
    file = (ROOT / 'docs/watch.svg').read_text('utf-8')
    for drawn in (text, file):
        words = ''.join(ElementTree.fromstring(drawn).itertext()).replace('\xa0', ' ')
        assert 'tokens/forward' in words and ' ms' not in words
        assert not re.search(r'url\((?!#)|href|font-face', drawn)
    assert '8 tokens, 5 forwards' in ''.join(ElementTree.fromstring(text).itertext()).replace(
        '\xa0', ' '
    )
    assert '](watch.svg)' in text_of('docs/view.md')
