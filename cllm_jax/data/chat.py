"""Chats: what messages have to be, and the texts that a tokenizer's template makes of them."""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from cllm_jax.errors import ConfigError, one_line
from cllm_jax.tasks.example import Example, Messages, Prompt

LONGEST = 512
"""Tokens of an answer in a chat, where nobody says how many."""
TURNS = {'user': 'assistant', 'assistant': 'user'}
"""Who speaks after whom."""
WRITE = "write [{'role': 'user', 'content': '...'}]"


def is_chat(prompt: Any) -> bool:
    """Whether a prompt is a list of messages, and neither a text nor a list of token ids."""
    return isinstance(prompt, list | tuple) and bool(prompt) and isinstance(prompt[0], Mapping)


def fault_of(messages: Any) -> str:
    """What is wrong with the messages of a chat, and the remedy; '' if nothing is.

    A system message may come first; then the user and the assistant speak in turn.
    """
    if not isinstance(messages, list | tuple) or not messages:
        return f'messages {_short(messages)}: must be a list of one or more; {WRITE}'
    speaker = 'user'
    for number, message in enumerate(messages, 1):
        here = f'message {number}'
        if not isinstance(message, Mapping):
            return f'{here} is {_short(message)}: must have a role and a content; {WRITE}'
        for name in ('role', 'content'):
            if name not in message:
                return f'{here}: no {name}; {WRITE}'
            if not isinstance(text := message[name], str):
                return f'{here}: {name} {_short(text)}: must be a text; {WRITE}'
            if half := next((c for c in text if '\ud800' <= c <= '\udfff'), ''):
                return f'{here}: {name} has {half!r}, which is not a character; write UTF-8'
        role = message['role']
        if role == 'system' and number == 1:
            continue
        if role != speaker:
            rule = f'must be {speaker!r}, as after a system message user and assistant take turns'
            return f'{here}: role {_short(role)}: {rule}; join, reorder or leave out messages'
        speaker = TURNS[role]
    if len(messages) == 1 and speaker == 'user':
        return 'message 1: a system message alone asks nothing; add a message of the user'
    return ''


def check_chat(messages: Any) -> None:
    """Raise ConfigError unless messages are a chat that somebody can answer."""
    fault = fault_of(messages)
    if not fault and messages[-1]['role'] == 'assistant':
        rule = 'is the last, and there is nothing to answer; leave it out or ask something'
        fault = f"message {len(messages)}: the assistant's {rule}"
    if fault:
        raise ConfigError(fault)


def check_template(tokenizer: Any, name: str = '') -> None:
    """Raise ConfigError if a tokenizer, that of the model `name`, has no chat template."""
    if not tokenizer.chat_template:
        name = name or tokenizer.name_or_path or 'this tokenizer'
        remedy = 'name an instruct model, or use prompts that are texts'
        raise ConfigError(f'{name} has no chat template; {remedy}')


def chat_text(tokenizer: Any, messages: Messages, answered: bool = False) -> str:
    """What the template writes: up to where an answer begins, or with one, to the end of the last.

    Raises ConfigError without a template, for messages that it refuses, and for a system message
    that it leaves out.
    """
    check_template(tokenizer)
    options = {'tokenize': False, 'add_generation_prompt': not answered}
    try:
        text = tokenizer.apply_chat_template([dict(m) for m in messages], **options)
    except Exception as e:  # templates raise what they like
        fault = f'the chat template refuses {_short(messages)} ({one_line(e, 120)})'
        raise ConfigError(f'{fault}; change the messages') from None
    first = messages[0]
    if first['role'] == 'system' and first['content'].strip() not in text:
        fault = f'the chat template leaves out the system message {_short(first["content"])}'
        raise ConfigError(f"{fault}; say it in the user's first message")
    return text


def user_chat(prompt: Prompt, system: str | None = None) -> Messages:
    """A text as the first turn of a user; a chat as it is. Either after a system message, if any.

    Raises ConfigError for a second system message.
    """
    chat = ({'role': 'user', 'content': prompt},) if isinstance(prompt, str) else tuple(prompt)
    if system is None:
        return chat
    if chat and chat[0]['role'] == 'system':
        own = _short(chat[0]['content'])
        raise ConfigError(f'system {_short(system)}: a chat has {own} already; leave one out')
    return ({'role': 'system', 'content': system}, *chat)


def split_answer(messages: Messages) -> tuple[Messages, str]:
    """The messages before the last one of the assistant, and that, '' if somebody else is last."""
    *before, last = messages
    return (
        (tuple(before), last['content']) if last['role'] == 'assistant' else (tuple(messages), '')
    )


def turns_of(example: Example) -> list[Example]:
    """An example for each answer of a chat, with all that is before it; another one as it is."""
    if isinstance(example.prompt, str):
        return [example]
    last = [{'role': 'assistant', 'content': example.answer}] if example.answer else []
    messages = (*example.prompt, *last)
    turns = [
        replace(example, id=f'{example.id}/{i}', prompt=messages[:i], answer=message['content'])
        for i, message in enumerate(messages)
        if message['role'] == 'assistant'
    ]
    return turns or [example]


def opening(prompt: Prompt) -> str:
    """A text, or of a chat what is before the first answer: all its turns are on one side."""
    if isinstance(prompt, str):
        return prompt
    first = next(i for i, message in enumerate(prompt, 1) if message['role'] == 'user')
    return json.dumps([[m['role'], m['content']] for m in prompt[:first]])


def _short(value: Any) -> str:
    text = one_line(repr(value), None)
    return text if len(text) <= 60 else text[:57] + '...'
