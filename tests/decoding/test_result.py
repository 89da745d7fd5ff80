"""How a result is shown: shortly, and with nothing of a model's text taken for markup."""

from xml.etree import ElementTree

from cllm_jax.decoding.result import ROWS, DecodeResult


def result(*texts: str | None) -> DecodeResult:
    """Answers of six tokens in three forwards."""
    count = len(texts)
    return DecodeResult(
        list(texts), [[1, 2, 3, 4, 5, 6]] * count, [[1, 2, 3]] * count, [0.5] * count
    )


def table(shown: DecodeResult) -> list[list[str]]:
    tree = ElementTree.fromstring(f'<div>{shown._repr_html_()}</div>')
    return [[''.join(cell.itertext()) for cell in row] for row in tree.iter('tr')]


def test_a_repr_is_one_short_line():
    assert repr(result('one')) == (
        "<DecodeResult: 1 prompt, 6 tokens in 3 forwards, 2.00 tokens/forward: 'one'>"
    )
    long = repr(result('a\n' * 500, 'b', 'c', 'd'))
    assert long.startswith(
        '<DecodeResult: 4 prompts, 24 tokens in 12 forwards, 2.00 tokens/forward'
    )
    assert long.endswith("'b', 'c', ...>") and "...', 'b'" in long and len(long) < 200
    assert '\n' not in long


def test_without_a_tokenizer_the_ids_are_shown():
    assert repr(result(None)).endswith(": '1 2 3 4 5 6'>")
    assert table(result(None))[1][1] == '1 2 3 4 5 6'


def test_no_answer_at_all_has_a_repr_too():
    assert repr(result()).startswith('<DecodeResult: 0 prompts, 0 tokens in 0 forwards, 0.00')
    assert len(table(result())) == 1


def test_a_notebook_shows_a_table_in_which_text_is_text():
    text = '<script>alert(1)</script> & "quoted"\n</td>'
    assert table(result('one', text)) == [
        ['', 'text', 'tokens', 'forwards', 'tokens/forward'],
        ['0', 'one', '6', '3', '2.00'],
        ['1', text, '6', '3', '2.00'],
    ]


def test_a_notebook_shows_the_first_rows_of_many():
    shown = result(*'a' * 50)
    assert len(table(shown)) == 1 + ROWS
    assert (
        f'50 prompts, 300 tokens in 150 forwards, 2.00 tokens/forward, of which the first {ROWS}'
        in (shown._repr_html_())
    )
