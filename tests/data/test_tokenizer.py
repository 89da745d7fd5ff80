"""The tokenizer that the package trains, and how examples become ids."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm_jax.data.sources import open_source
from cllm_jax.data.tokenizer import END, drop_prompts_without_room, encode_examples, train_tokenizer
from cllm_jax.errors import ConfigError, DataError
from cllm_jax.tasks.example import Example

ROWS = open_source('sql+arithmetic', seed=5, limit=600)
TOKENIZER = train_tokenizer((r.prompt + r.answer for r in ROWS), 1024)


@settings(max_examples=60)
@given(st.text(max_size=40))
def test_any_text_comes_back(text):
    ids = TOKENIZER(text)['input_ids']
    assert TOKENIZER.decode(ids) == text or END in text or '<|pad|>' in text


def test_numbers_are_single_digits_and_words_are_not_letters():
    pieces = TOKENIZER.convert_ids_to_tokens(TOKENIZER('has 1234')['input_ids'])
    assert pieces[-4:] == ['1', '2', '3', '4']
    for row in ROWS:
        text = row.prompt + row.answer
        assert len(TOKENIZER(text)['input_ids']) < len(text) / 1.8, row.meta['task']


def test_examples_end_with_the_stop_token():
    rows = [ROWS[i] for i in range(10)]
    pairs = encode_examples(TOKENIZER, rows, [7], None)
    for row, (prompt, answer) in zip(rows, pairs, strict=True):
        assert answer[-1] == 7
        assert TOKENIZER.decode(prompt) == row.prompt
        assert TOKENIZER.decode(answer[:-1]) == row.answer


def test_an_empty_prompt_is_the_first_token_of_a_text_if_there_is_one():
    rows = [Example('a', '', 'x'), Example('b', 'y', 'x')]
    for bos, wanted in ((5, [5]), (None, [])):
        (empty, _), (other, _) = encode_examples(TOKENIZER, rows, [7], bos)
        assert empty.tolist() == wanted
        assert other.tolist() == TOKENIZER('y')['input_ids']


def test_prompts_without_room_for_an_answer_are_left_out_and_counted():
    lengths = [len(TOKENIZER(row.prompt)['input_ids']) for row in ROWS]
    room = sorted(lengths)[400]
    fitting = drop_prompts_without_room(ROWS, TOKENIZER, None, room)
    kept = [row for row, length in zip(ROWS, lengths, strict=True) if length <= room]
    assert list(fitting) == kept
    assert fitting.dropped == {f'prompt longer than {room} tokens': len(ROWS) - len(kept)}
    assert drop_prompts_without_room(ROWS, TOKENIZER, None, max(lengths)).dropped == {}
    with pytest.raises(DataError, match='no prompt has 1 to 3 tokens'):
        drop_prompts_without_room(ROWS, TOKENIZER, None, 3)


def test_prompts_without_a_token_are_left_out_and_counted_unless_there_is_a_first_one():
    rows = [Example('a', '', 'x'), Example('b', 'y', 'x')]
    source = dataclasses.replace(ROWS, rows=rows)
    assert list(drop_prompts_without_room(source, TOKENIZER, 5, 8)) == rows
    fitting = drop_prompts_without_room(source, TOKENIZER, None, 8)
    assert list(fitting) == rows[1:] and fitting.dropped == {'prompt without a token': 1}


def test_too_small_a_vocabulary_is_refused():
    with pytest.raises(ConfigError, match='vocab_size 100'):
        train_tokenizer(['a'], 100)
