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
