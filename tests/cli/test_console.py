"""What commands print can be read back: nothing is cut, nothing is rewritten."""

import pytest

from cllm_jax.cli.console import Console, number, print_plan, size, table


@pytest.mark.parametrize('terminal', [False, True])
def test_no_number_and_no_path_is_cut(monkeypatch, capsys, terminal):
    monkeypatch.setenv('COLUMNS', '40')
    if terminal:
        monkeypatch.setenv('FORCE_COLOR', '1')
        monkeypatch.setenv('TERM', 'dumb')
    columns = ['', *(f'tokens/forward {i}' for i in range(9))]
    path = '/a/path/' + 'x' * 200
    console = Console()
    console.out.print(table('', columns, [[path, *(i + 0.125 for i in range(9))]]))
    print_plan(console, {'root': path}, {'writes to': path})
    out = capsys.readouterr().out
    assert all(name in out for name in columns) and '…' not in out
    assert out.count(path) == 3 and '8.12' in out


@pytest.mark.parametrize(
    ('value', 'shown'),
    [
        (4024.1, '4,020'),
        (999.7, '1,000'),
        (999_400.0, '999,000'),
        (999_600.0, '1e+06'),
        (-4024.1, '-4,020'),
        (0.012345, '0.0123'),
        (123.4, '123'),
        (0.0, '0'),
    ],
)
def test_numbers_have_three_digits_and_no_exponent_below_a_million(value, shown):
    assert number(value) == shown


def test_bytes_have_the_unit_that_fits():
    assert [size(n) for n in (12, 1023, 1536, 3 << 40)] == ['12 B', '1,020 B', '1.5 KiB', '3 TiB']


def test_texts_are_shown_as_they_are(capsys):
    odd = 'x[:100:2] :apple: [b]c[/d] {e}'
    console = Console()
    console.literal(odd + '\r\t', odd)
    console.result(odd)
    console.out.print(table(odd, ['', odd], [[odd, odd]]))
    with console.status(odd), console.progress(odd, 2) as advance:
        advance(1, odd)
    said = capsys.readouterr()
    assert said.out.startswith(f'{odd}\r\t{odd}\n{odd}\n')
    assert said.out.count(odd) == 7 and said.err.count(odd) == 3
