"""A bit that flips on disk is found before what it is in gets used."""

import random

import pytest

from cllm_jax.errors import CllmError, DataError
from cllm_jax.hf.weights import read_model
from cllm_jax.hf.write import write_model
from cllm_jax.runs.checksums import SUMS, check_sums, write_sums
from tests.tiny import random_model


def flip(path, rng: random.Random) -> None:
    """Flip one random bit of a file."""
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(bytes(data))


def test_every_flipped_bit_of_a_model_is_found(tmp_path):
    model = random_model()
    write_model(tmp_path, model, dtype='float32', sums=True)
    read_model(tmp_path)
    rng = random.Random(0)
    for path in sorted(tmp_path.iterdir()) * 10:
        good = path.read_bytes()
        flip(path, rng)
        with pytest.raises(CllmError):
            read_model(tmp_path)
        path.write_bytes(good)
    read_model(tmp_path)


def test_what_is_missing_is_named_and_what_is_not_summed_may_change(tmp_path):
    (tmp_path / 'deep').mkdir()
    for name in ('a.bin', 'deep/b.bin', 'README.md'):
        (tmp_path / name).write_bytes(b'x')
    write_sums(tmp_path)
    (tmp_path / 'README.md').write_bytes(b'y')
    (tmp_path / '.hidden').write_bytes(b'z')
    (tmp_path / 'drafter').mkdir()
    (tmp_path / 'drafter/c.bin').write_bytes(b'z')
    write_sums(tmp_path / 'drafter')
    check_sums(tmp_path)
    (tmp_path / 'deep/b.bin').unlink()
    with pytest.raises(DataError, match=r'b\.bin: missing'):
        check_sums(tmp_path)
    (tmp_path / SUMS).unlink()
    check_sums(tmp_path)


def test_sums_that_were_cut_are_refused(tmp_path):
    for name in ('a.bin', 'b.bin', 'c.bin'):
        (tmp_path / name).write_bytes(b'x')
    write_sums(tmp_path)
    whole = (tmp_path / SUMS).read_bytes()
    for size in range(len(whole) - 1):
        (tmp_path / SUMS).write_bytes(whole[:size])
        with pytest.raises(DataError):
            check_sums(tmp_path)


@pytest.mark.parametrize('line', ['no sum at all', '00  /etc/hostname', '00  ../secret', '\xff'])
def test_sums_that_are_none_are_refused(tmp_path, line):
    (tmp_path / SUMS).write_text(line, 'latin-1')
    with pytest.raises(DataError, match='damaged'):
        check_sums(tmp_path)
