"""Prompts and answers as ids: what is put around them, and the text that a model learns."""

import copy
import itertools
from types import SimpleNamespace

import pytest

from cllm_jax.data.encoding import plain_ids, prompt_ids
from cllm_jax.data.tokenizer import encode_examples
from cllm_jax.decoding.request import encode
from cllm_jax.decoding.text import text_of
from cllm_jax.hf.tokenizer import read_tokenizer
from cllm_jax.tasks.example import Example
from tests.kinds import KINDS, ZEPHYR, around, bytes_of, tokenizer_of, write

PROMPTS = (
    '### Response:\n',
    'Question: the city',
    'Answer: ',
    'the  ',
    'ci',
    '',
    'x\n\n',
    'a \U0001f44d',
    'the city{end}',
    '{begin}the city',
)
ANSWERS = (
    'def name(you):\n    the city\n',
    '    def x',
    ' the city',
    '  the',
    'ty',
    '\n\n  def',
    '\n',
    '\u0301\U0001f3fd',
    '=1',
    'x{end}the',
)
CHATS = (
    [{'role': 'user', 'content': 'the city'}],
    [{'role': 'system', 'content': 'def'}, {'role': 'user', 'content': ' x'}],
    [
        {'role': 'user', 'content': 'the city?'},
        {'role': 'assistant', 'content': 'def'},
        {'role': 'user', 'content': 'the'},
    ],
)
with_kinds = pytest.mark.parametrize('kind', KINDS)


def filled(tokenizer, text: str) -> str:
    return text.format(begin=tokenizer.bos_token or tokenizer.eos_token, end=tokenizer.eos_token)


def model_of(tokenizer) -> SimpleNamespace:
    """As much of a model as texts need."""
    ids = {'eos_ids': (tokenizer.eos_token_id,), 'bos_id': tokenizer.bos_token_id}
    config = SimpleNamespace(vocab_size=len(tokenizer), **ids)
    return SimpleNamespace(tokenizer=tokenizer, config=config, source='it', lacks='')


@with_kinds
def test_the_text_of_a_learnt_answer_is_the_answer(kind):
    tokenizer = tokenizer_of(kind)
    model = model_of(tokenizer)
    texts = [(filled(tokenizer, p), filled(tokenizer, a)) for p in PROMPTS for a in ANSWERS]
    examples = [Example(str(i), *pair) for i, pair in enumerate(texts)]
    eos, bos = model.config.eos_ids, model.config.bos_id
    for (prompt, answer), (begun, learnt) in zip(
        texts, encode_examples(tokenizer, examples, eos, bos), strict=True
    ):
        assert learnt[-1] == eos[0]
        if not begun.size:  # nothing is learnt without a prompt
            continue
        assert begun.tolist() == encode(model, prompt), 'as decoding has it'
        text = text_of(model, learnt.tolist())
        if kind not in ('first', 'never'):  # others may write a space after a special token
            text = text.replace('> the', '>the')
        assert text == answer, (prompt, answer)
        together = prompt_ids(tokenizer, [prompt + answer])[0]
        special = begun[-1] in tokenizer.get_added_vocab().values()
        if not special and together[: len(begun)] == begun.tolist():
            assert learnt[:-1].tolist() == together[len(begun) :]


@with_kinds
def test_a_learnt_answer_ends_in_exactly_one_end_token(kind):
    tokenizer = tokenizer_of(kind)
    end = tokenizer.eos_token_id
    other = tokenizer.convert_tokens_to_ids('the')
    tails = ('', '{end}', '{end}{end}', '{end}\n', '{end} {end}\n\n')
    examples = [Example('', 'the city:', filled(tokenizer, 'def' + tail)) for tail in tails]
    pairs = encode_examples(tokenizer, examples, (end, other), None)
    assert len({tuple(answer.tolist()) for _, answer in pairs[:4]}) == 1
    for _, answer in pairs[:4]:
        assert answer.tolist().count(end) == 1 and answer[-1] == end
    assert pairs[4][1][-1] == end
    [(_, kept)] = encode_examples(tokenizer, [examples[1]], (other, end), None)
    assert kept.tolist() == pairs[0][1].tolist(), 'it keeps the end that it has'
    [(_, kept)] = encode_examples(tokenizer, [Example('', 'x', 'the None\n')], (end, 999), None)
    assert tokenizer.decode(kept[:-1]).endswith('None\n'), 'an unknown end has no name'
    empty = [Example('', 'the', filled(tokenizer, text)) for text in ('', '{end}', '{end}\n')]
    assert all(a.tolist() == [end] for _, a in encode_examples(tokenizer, empty, (end,), None))


@with_kinds
@pytest.mark.parametrize('text', ['the city', '', ' x', '\ndef', 'the {begin} city{end}'])
def test_nothing_is_added_that_the_text_has_and_no_end_token_follows_it(kind, text):
    tokenizer = tokenizer_of(kind)
    text, begin = filled(tokenizer, text), tokenizer.bos_token_id
    [ids], [inner] = prompt_ids(tokenizer, [text]), plain_ids(tokenizer, [text])
    added = [] if begin is None else [begin]
    assert ids == added + inner
    if begin is not None:
        [again] = plain_ids(tokenizer, [tokenizer.bos_token + text])
        assert prompt_ids(tokenizer, [tokenizer.bos_token + text]) == [again]
        assert again[0] == begin and again[1:].count(begin) == inner.count(begin)


def test_of_two_tokens_before_a_text_those_are_added_that_it_has_not(tmp_path):
    inner = bytes_of('<sop>', '<end>', '<mask>')
    around(inner, '<mask> <sop>', '<end>')
    tokenizer = read_tokenizer(write(tmp_path, inner))
    [wanted] = plain_ids(tokenizer, ['<mask><sop>the'])
    texts = ['the', '<sop>the', '<mask><sop>the']
    assert prompt_ids(tokenizer, texts) == [wanted] * 3


@pytest.mark.parametrize('kind', [kind for kind in KINDS if 'hat' in kind])
@pytest.mark.parametrize(('chat', 'open_ended'), [*itertools.product(CHATS, (False, True))])
def test_a_chat_has_the_ids_of_its_template(kind, chat, open_ended):
    """As text for `decode`; a template may hold BOS and EOS many times, or no BOS at all."""
    tokenizer = tokenizer_of(kind)
    options = {'add_generation_prompt': open_ended}
    text = tokenizer.apply_chat_template(chat, tokenize=False, **options)
    wanted = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False, **options)
    assert encode(model_of(tokenizer), text) == wanted
    [(prompt, _)] = encode_examples(tokenizer, [Example('', text, 'x')], (2,), 1)
    assert prompt.tolist() == wanted


@pytest.mark.parametrize('kind', ['first, Zephyr chat', 'legacy, ChatML'])
@pytest.mark.parametrize('role', ['assistant', 'tool', 'developer', 'system'])
def test_a_chat_may_begin_with_any_role(kind, role):
    tokenizer, chat = tokenizer_of(kind), [{'role': role, 'content': 'the city'}]
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    wanted = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False)
    assert prompt_ids(tokenizer, [text]) == [wanted]


def test_a_text_that_is_no_chat_begins_as_the_tokenizer_has_it():
    tokenizer = copy.deepcopy(tokenizer_of('first, Zephyr chat'))
    for template in (ZEPHYR, "{% for m in messages %}{{ ' ' + m['content'] }}{% endfor %}", '{{'):
        tokenizer.chat_template = template
        for text in ('the city', ' the', '<|user', ''):
            assert prompt_ids(tokenizer, [text])[0][0] == tokenizer.bos_token_id
