"""A chat is decoded as the ids of its template are; streamed, it ends where there is no room."""

import dataclasses

import pytest

import cllm_jax as cllm
from cllm_jax.decoding.engine import decode_all
from cllm_jax.decoding.request import Request
from cllm_jax.decoding.stream import reply, stream
from cllm_jax.drafters.jacobi import Jacobi
from cllm_jax.errors import ConfigError
from tests.tiny import byte_tokenizer, chat_model, echo_model, random_model, text_config
from tests.tiny_model import refusal

CHAT = [
    {'role': 'system', 'content': 'def'},
    {'role': 'user', 'content': 'the city?'},
    {'role': 'assistant', 'content': 'x\n'},
    {'role': 'user', 'content': 'the <|im_end|> mark'},
]
REQUEST = Request(Jacobi(8), max_tokens=40, batch=2)


def ids_of(model, chat) -> list[int]:
    options = {'tokenize': True, 'add_generation_prompt': True, 'return_dict': False}
    return model.tokenizer.apply_chat_template(chat, **options)


@pytest.mark.parametrize('kind', ['Qwen2, ChatML', 'first, Zephyr chat', 'legacy, LLaMA 2 chat'])
def test_a_chat_is_decoded_as_the_ids_of_its_template(kind):
    model = chat_model(kind)
    prompts = [CHAT, 'the city', CHAT[1:2], tuple(CHAT[:2])]
    ids = [p if isinstance(p, str) else ids_of(model, p) for p in prompts]
    found, wanted = (cllm.decode(model, p, max_tokens=24, batch=2) for p in (prompts, ids))
    assert found.tokens == wanted.tokens and found.texts == wanted.texts
    assert len({*map(tuple, found.tokens)}) == 4
    plain = cllm.decode(model, prompts, cllm.AutoRegressive(), max_tokens=24)
    assert plain.tokens == found.tokens
    assert ''.join(cllm.stream(model, CHAT, max_tokens=24)) == found.texts[0]
    assert model.chat(CHAT, max_tokens=24) == cllm.chat(model, CHAT, max_tokens=24)
    assert model.chat(CHAT, max_tokens=24) == found.texts[0]


def test_an_answer_of_a_chat_is_as_long_as_there_is_room():
    model = chat_model(eos_ids=(), max_positions=128)
    room = 128 - len(ids_of(model, CHAT))
    assert model.chat(CHAT) == cllm.decode(model, [CHAT], max_tokens=room).texts[0]
    full = [{'role': 'user', 'content': 'x' * 200}]
    assert 'exceed' in refusal(model.chat, full, of=ConfigError)


@pytest.mark.parametrize(
    ('prompts', 'message'),
    [
        (CHAT, r'prompts\[0\]: prompt .* is a message, and a chat is a list of them'),
        ([CHAT[:3]], r"prompts\[0\]: message 3: the assistant's is the last"),
        ([CHAT, [*CHAT, CHAT[0]]], r"prompts\[1\]: message 5: role 'system'"),
        ([[CHAT[1], 'x']], r"message 2 is 'x'"),
        ([[{'role': 'user'}]], 'message 1: no content'),
    ],
)
def test_what_nobody_can_answer_is_refused(prompts, message):
    with pytest.raises(ConfigError, match=message):
        decode_all(chat_model(), REQUEST, prompts)


def test_messages_must_be_messages_and_a_base_model_says_that_it_has_no_template():
    model = chat_model()
    for wrong in ('the city', [1, 2], [], None, CHAT[0]):
        assert 'messages' in refusal(model.chat, wrong) or 'message 1' in refusal(model.chat, wrong)
    base = random_model(config=text_config(), tokenizer=byte_tokenizer())
    told = refusal(decode_all, base, REQUEST, [CHAT[1:2]], of=ConfigError)
    assert 'random has no chat template; name an instruct model' in told
    told = refusal(decode_all, random_model(), REQUEST, [CHAT[1:2]], of=ConfigError)
    assert 'random has no tokenizer' in told
    assert 'no chat template' in refusal(cllm.load('embedded').chat, CHAT, of=ConfigError)


def drained(pieces) -> tuple[str, object]:
    """What a generator yields, joined, and what it returns."""
    text = ''
    while True:
        try:
            text += next(pieces)
        except StopIteration as end:
            return text, end.value


def test_a_reply_says_why_it_was_cut_off():
    model = chat_model(eos_ids=(), max_positions=128)
    size = len(ids_of(model, CHAT))
    wanted = decode_all(model, dataclasses.replace(REQUEST, max_tokens=20), [CHAT]).texts[0]
    text, why = drained(reply(model, dataclasses.replace(REQUEST, max_tokens=20), CHAT))
    assert text == wanted and why == 'cut off after 20 tokens; --max-tokens sets how many'
    for room in (3, 1):
        config = dataclasses.replace(model.config, max_positions=size + room)
        small = dataclasses.replace(model, config=config)
        _, why = drained(reply(small, REQUEST, CHAT))
        assert why == f'cut off: the chat fills the {size + room} positions of the model'
    full = dataclasses.replace(model, config=dataclasses.replace(config, max_positions=size))
    told = refusal(drained, reply(full, REQUEST, CHAT), of=ConfigError)
    assert f'a chat of {size} tokens: the model has {size} positions' in told


def test_a_stream_returns_whether_its_answer_ended():
    model = echo_model('aababaa!')
    assert drained(stream(model, REQUEST, 'aababaa!')) == ('aababaa', True)
    short = dataclasses.replace(REQUEST, max_tokens=4)
    assert drained(stream(model, short, 'aababaa!')) == ('aaba', False)
    stopped = dataclasses.replace(REQUEST, stop=('ba',))
    endless = echo_model('aababaac')
    assert drained(stream(endless, stopped, 'aababaac')) == ('aa', True)
