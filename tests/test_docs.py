"""The code in the documentation runs."""

import re
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize('name', ['README.md', 'docs/adding_a_drafter.md'])
def test_python_examples_run(name, capsys):
    (code,) = re.findall(r'```python\n(.*?)```', (ROOT / name).read_text(), re.S)
    assert code.count('\n') < 60
    with jax.numpy_dtype_promotion('standard'), jax.numpy_rank_promotion('allow'):
        exec(compile(code, name, 'exec'), {})
    assert capsys.readouterr().out


def test_every_fault_names_tests_that_exist():
    text = (ROOT / 'docs/faults.md').read_text()
    rows = [line for line in text.splitlines() if line.startswith('| ')]
    rows = [row for row in rows if not row.startswith(('| fault', '| ---'))]
    found = ''.join(path.read_text() for path in (ROOT / 'tests').rglob('test_*.py'))
    for row in rows:
        named = re.findall(r'`(test_\w+|tests/[\w/.]+)`', row)
        assert named, row
        for name in named:
            assert f'def {name}(' in found or (ROOT / name).is_file(), name
