"""Chats: what they have to be, what the template makes of them, and the answers that are learnt."""

import copy

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cllm_jax.data.chat import (
    check_chat,
    check_template,
    fault_of,
    is_chat,
    opening,
    split_answer,
    turns_of,
    user_chat,
)
from cllm_jax.data.encoding import plain_ids, prompt_ids, turn_end
from cllm_jax.data.tokenizer import encode_examples
from cllm_jax.errors import ConfigError, DataError
from cllm_jax.tasks.example import Example
from tests.kinds import KINDS, tokenizer_of
from tests.tiny_model import refusal

CHATS = [kind for kind in KINDS if 'hat' in kind]
QWEN = 'Qwen2, ChatML'


def say(*texts: str, system: str | None = None) -> list[dict[str, str]]:
    """A chat whose messages are the user's and the assistant's in turn."""
    first = [] if system is None else [{'role': 'system', 'content': system}]
    roles = ('user', 'assistant')
    return first + [{'role': roles[i % 2], 'content': text} for i, text in enumerate(texts)]


def with_template(template: str, kind: str = QWEN):
    tokenizer = copy.deepcopy(tokenizer_of(kind))
    tokenizer.chat_template = template
    return tokenizer


chats = st.builds(
    lambda texts, system: say(*texts, system=system),
    st.lists(st.text(st.sampled_from('the cityx\n.'), min_size=1, max_size=8), min_size=1),
    st.none() | st.just('def x'),
)


@pytest.mark.parametrize('kind', CHATS)
def test_messages_have_the_ids_of_the_template(kind):
    tokenizer = tokenizer_of(kind)

    @given(chats)
    def check(chat):
        wanted = tokenizer.apply_chat_template(
            chat, tokenize=True, return_dict=False, add_generation_prompt=True
        )
        assert prompt_ids(tokenizer, ['the', chat, tuple(chat)])[1:] == [wanted, wanted]

    check()


@pytest.mark.parametrize('kind', CHATS)
def test_every_answer_is_learnt_after_all_that_is_before_it_up_to_its_end(kind):
    """Or left out, where the template has other ids before it than the prompt's."""
    tokenizer, counts = tokenizer_of(kind), [0, 0]
    end = tokenizer.eos_token_id

    @given(chats.filter(lambda chat: len(chat) > 2))
    def check(chat):
        rows = turns_of(Example('row', *split_answer(chat)))
        answered = [i for i, message in enumerate(chat) if message['role'] == 'assistant']
        assert [row.id for row in rows] == [f'row/{i}' for i in answered]
        for i, (prompt, answer) in zip(
            answered, encode_examples(tokenizer, rows, [end], None), strict=True
        ):
            options = {'tokenize': True, 'return_dict': False}
            begun = tokenizer.apply_chat_template(chat[:i], add_generation_prompt=True, **options)
            whole = tokenizer.apply_chat_template(chat[: i + 1], **options)
            assert prompt.tolist() == begun
            consistent = whole[: len(begun)] == begun
            counts[consistent] += 1
            learnt = [*begun, *answer]
            assert bool(len(answer)) == consistent
            if consistent:
                assert learnt == whole[: len(learnt)] and learnt.count(end) == whole.count(end)
                assert answer.tolist().index(end) == len(answer) - 1
                assert not tokenizer.decode(whole[len(learnt) :]).strip()

    check()
    assert counts[True]
    assert counts[False] or kind != QWEN, 'two line breaks are one token'


def test_an_answer_that_spells_an_end_token_is_not_learnt():
    tokenizer = tokenizer_of(QWEN)
    rows = [Example('a', say('x'), text) for text in ('the', 'the<|im_end|>', 'a<|im_end|>b', '')]
    lengths = [len(a) for _, a in encode_examples(tokenizer, rows, [tokenizer.eos_token_id], None)]
    assert lengths == [2, 0, 0, 1]


def test_an_answer_that_the_template_does_not_end_gets_an_end_token():
    tokenizer = with_template(
        "{% for m in messages %}{{ m['role'] + ':' + m['content'] }}"
        '{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}'
    )
    [(_, answer)] = encode_examples(tokenizer, [Example('', say('x'), 'the')], [7, 8], None)
    assert answer.tolist() == [*plain_ids(tokenizer, ['the'])[0], 7]


def test_texts_and_chats_may_be_mixed():
    tokenizer = tokenizer_of(QWEN)
    rows = [Example('a', 'the', ' x'), Example('b', say('x'), 'y'), Example('c', 'city', 'z')]
    alone = [encode_examples(tokenizer, [row], [1], None)[0] for row in rows]
    for found, wanted in zip(encode_examples(tokenizer, rows, [1], None), alone, strict=True):
        assert [ids.tolist() for ids in found] == [ids.tolist() for ids in wanted]


@pytest.mark.parametrize('kind', CHATS)
def test_the_template_tells_what_ends_an_answer(kind):
    assert turn_end(tokenizer_of(kind)) == tokenizer_of(kind).eos_token_id


@pytest.mark.parametrize(
    ('template', 'end'),
    [
        (None, None),
        ("{{ messages[-1]['content'] }}", None),
        ("{{ messages[-1]['content'] + ' \\n<|im_end|><|im_start|>' }}", '<|im_end|>'),
        ("{{ messages[-1]['content'] + 'the<|im_end|>' }}", None),
        ('<|im_start|>', None),
        ("{{ raise_exception('no') }}", None),
        ('{{', None),
    ],
)
def test_a_template_without_an_end_has_none(template, end):
    tokenizer = with_template(template)
    assert turn_end(tokenizer) == (end and tokenizer.convert_tokens_to_ids(end))


USER, SYSTEM = {'role': 'user', 'content': 'a'}, {'role': 'system', 'content': 's'}
ASSISTANT = {'role': 'assistant', 'content': 'b'}


@pytest.mark.parametrize(
    ('messages', 'words'),
    [
        ([], r'messages \[\]: must be a list of one or more'),
        (None, 'messages None: must be a list'),
        ('hello', "messages 'hello': must be a list"),
        ([USER, 'x'], "message 2 is 'x': must have a role and a content"),
        ([{'role': 'user'}], 'message 1: no content'),
        ([{'content': 'x'}], 'message 1: no role'),
        ([{'role': 'user', 'content': None}], 'message 1: content None: must be a text'),
        ([{'role': 'user', 'content': [{'type': 'text'}]}], 'content .*: must be a text'),
        ([{'role': 1, 'content': 'x'}], 'message 1: role 1: must be a text'),
        ([{'role': 'user', 'content': '\ud800'}], 'message 1: content has .* not a character'),
        ([{'role': 'tool', 'content': 'x'}], "message 1: role 'tool': must be 'user'"),
        ([USER, USER], "message 2: role 'user': must be 'assistant'"),
        ([ASSISTANT], "message 1: role 'assistant': must be 'user'"),
        ([SYSTEM, SYSTEM, USER], "message 2: role 'system': must be 'user'"),
        ([USER, SYSTEM], "message 2: role 'system': must be 'assistant'"),
        ([SYSTEM], 'a system message alone asks nothing'),
    ],
)
def test_what_is_no_chat_is_refused_by_the_message(messages, words):
    assert refusal(check_chat, messages, of=ConfigError) == fault_of(messages)
    with pytest.raises(ConfigError, match=words):
        check_chat(messages)


def test_there_must_be_something_to_answer():
    for good in ([USER], [SYSTEM, USER], [USER, ASSISTANT, USER]):
        check_chat(good)
        assert fault_of([*good, ASSISTANT]) == ''
        told = refusal(check_chat, [*good, ASSISTANT], of=ConfigError)
        assert f"message {len(good) + 1}: the assistant's is the last" in told


def test_texts_and_ids_are_not_chats():
    assert is_chat([USER]) and is_chat((USER,))
    assert not any(map(is_chat, ('', 'x', [], (), [1, 2], None, 3, ['x'])))


def test_templates_that_refuse_or_leave_out_are_told_in_one_line():
    bare, strict = with_template(None), with_template("{{ raise_exception('no\nway') }}")
    told = refusal(check_template, bare, 'DIR', of=ConfigError)
    assert told.startswith('DIR has no chat template; name an instruct model')
    assert 'has no chat template' in refusal(prompt_ids, bare, [[USER]], of=ConfigError)
    told = refusal(prompt_ids, strict, [[USER]], of=ConfigError)
    assert 'the chat template refuses' in told and 'no way' in told
    deaf = with_template("{{ messages[-1]['content'] }}")
    told = refusal(prompt_ids, deaf, [[SYSTEM, USER]], of=ConfigError)
    assert "leaves out the system message 's'" in told
    assert prompt_ids(deaf, [[USER]]) == plain_ids(deaf, ['a'])
    for tokenizer in (bare, strict, with_template('{{')):
        told = refusal(encode_examples, tokenizer, [Example('7', [USER], 'x')], [1], None)
        assert told.startswith('row 7: ')
    with pytest.raises(DataError):
        encode_examples(strict, [Example('7', [USER], 'x')], [1], None)


def test_a_system_message_is_put_before_a_text_or_a_chat_without_one():
    assert list(user_chat('a')) == [USER]
    assert list(user_chat('a', 's')) == [SYSTEM, USER] == list(user_chat([USER], 's'))
    assert list(user_chat([], 's')) == [SYSTEM] and not user_chat([])
    assert user_chat('a', '')[0] == {'role': 'system', 'content': ''}
    assert "has 's' already" in refusal(user_chat, [SYSTEM, USER], 'other', of=ConfigError)


def test_a_chat_is_on_one_side_with_all_that_begin_like_it():
    begin = opening([SYSTEM, USER])
    assert opening([SYSTEM, USER, ASSISTANT, USER]) == begin != opening([USER])
    assert opening('text') == 'text'
    assert opening([{**USER, 'name': 'x'}]) == opening([USER]), 'only what is said counts'


def test_a_chat_without_an_answer_is_one_row():
    for prompt in ('text', (USER,)):
        row = Example('a', prompt, '')
        assert turns_of(row) == [row]
    assert split_answer([USER]) == ((USER,), '')
    assert split_answer([USER, ASSISTANT]) == ((USER,), 'b')
    rows = turns_of(Example('a', *split_answer([USER, ASSISTANT, USER])))
    assert [(row.prompt, row.answer) for row in rows] == [((USER,), 'b')]
