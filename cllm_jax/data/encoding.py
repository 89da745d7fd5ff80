"""Text to token ids, the same wherever a text is a prompt or its answer, and back.

What is here takes any `transformers` tokenizer. They differ in what they put around a text (BOS and
EOS tokens), and in the space that those like sentencepiece put before its first word.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from cllm_jax.data.chat import chat_text
from cllm_jax.errors import ConfigError
from cllm_jax.tasks.example import Prompt

WORDS = '\n', 'a', '.', ':', '0'
"""Texts to encode an answer after if its own prompt will not do; no token has a part of both."""
ROLES = 'user', 'system', 'assistant', 'tool', 'developer'
"""Who may speak first in a chat."""
MARK = '\N{SNOWMAN}'


def plain_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Ids of each text and nothing more; special tokens that it spells are what they are."""
    return tokenizer(list(texts), add_special_tokens=False)['input_ids'] if texts else []


def text_of_ids(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of ids, special tokens included, as it is."""
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def prompt_ids(
    tokenizer: Any, prompts: Sequence[Prompt], bos_id: int | None = None
) -> list[list[int]]:
    """Ids of each prompt, as they are decoded, collected and learnt from.

    They begin with what the tokenizer adds to a text (a BOS token), as far as the text has not got
    it already. What it would add to the end is left out: an answer follows. The tokenizer adds
    nothing to a chat, nor to a text that `apply_chat_template` has made of one. A prompt without a
    token becomes `bos_id`, or stays empty where that is None.
    """
    before = _added_before(tokenizer)
    chats = _chat_openings(tokenizer, repr(tokenizer.chat_template)) if before else ()
    texts = [p if isinstance(p, str) else chat_text(tokenizer, p) for p in prompts]
    found = []
    for prompt, text, ids in zip(prompts, texts, plain_ids(tokenizer, texts), strict=True):
        if isinstance(prompt, str) and not text.startswith(chats):
            there = range(len(before), 0, -1)
            known = next((n for n in there if before[-n:] == ids[:n]), 0)
            ids = before[: len(before) - known] + ids
        found.append(ids or ([] if bos_id is None else [bos_id]))
    return found


def answer_ids(
    tokenizer: Any, prompts: Sequence[str], answers: Sequence[str], begun: Sequence[list[int]]
) -> list[list[int]]:
    """Ids of each answer as it goes on after the ids `begun` of its prompt.

    They are those of the two texts together where these begin with the prompt's. Where the two
    share a token, or a space would come between them, they are others that spell the answer.
    """
    whole = prompt_ids(tokenizer, [p + a for p, a in zip(prompts, answers, strict=True)])
    added = {*tokenizer.get_added_vocab().values()}  # some put a space after each of these

    def text_after(before: list[int], ids: list[int]) -> str | None:
        start, text = (text_of_ids(tokenizer, i) for i in (before, before + ids))
        return text[len(start) :] if text.startswith(start) else None

    found = [w[len(p) :] if w[: len(p)] == p else None for w, p in zip(whole, begun, strict=True)]
    for i, ids in enumerate(found):
        if ids and begun[i][-1:] and begun[i][-1] in added:
            found[i] = ids if text_after(begun[i], ids) == answers[i] else None
    left = [i for i, ids in enumerate(found) if ids is None]
    apart = dict(zip(left, plain_ids(tokenizer, [answers[i] for i in left]), strict=True))
    # No ids spell an answer of which a tokenizer drops something; some come near enough.
    near: dict[int, list[int]] = {}
    tried, first = apart, None
    for word in (*WORDS, ''):
        for i, ids in tried.items():
            text = text_after(begun[i], ids)
            if text == answers[i]:
                found[i] = ids
            elif first and text is not None and text == text_after(first, ids):
                near.setdefault(i, ids)
        left = [i for i in left if found[i] is None]
        if not (left and word):
            break
        [first] = plain_ids(tokenizer, [word])
        after = plain_ids(tokenizer, [word + answers[i] for i in left])
        fits = ((i, ids) for i, ids in zip(left, after, strict=True) if ids[: len(first)] == first)
        tried = {i: ids[len(first) :] for i, ids in fits}
    return [near.get(i, apart[i]) if ids is None else ids for i, ids in enumerate(found)]


def ended(ids: list[int], eos_ids: Sequence[int]) -> list[int]:
    """The ids of an answer with exactly one end token at their end: its own, or the first known."""
    size = len(ids)
    while size and ids[size - 1] in eos_ids:
        size -= 1
    return ids[: size + 1] if size < len(ids) else [*ids, eos_ids[0]]


def turn_end(tokenizer: Any) -> int | None:
    """The special token with which the chat template ends an answer, None if it has none."""
    if not tokenizer.chat_template:
        return None
    chat = [{'role': role, 'content': MARK} for role in ('user', 'assistant')]
    try:
        _, found, after = chat_text(tokenizer, chat, answered=True).rpartition(MARK)
    except ConfigError:  # who asks for an answer by this template is told
        return None
    [ids] = plain_ids(tokenizer, [after.lstrip()])
    special = found and ids and ids[0] in tokenizer.get_added_vocab().values()
    return ids[0] if special else None


def _added_before(tokenizer: Any) -> list[int]:
    """The ids that the tokenizer puts before a text."""
    [inner], whole = plain_ids(tokenizer, ['a']), tokenizer('a')['input_ids']
    places = range(len(whole) - len(inner), -1, -1)
    return whole[: next((n for n in places if whole[n : n + len(inner)] == inner), 0)]


@lru_cache
def _chat_openings(tokenizer: Any, template: str) -> tuple[str, ...]:
    """What stands before the first message in the texts that the chat template makes."""
    found: set[str] = set()
    if not tokenizer.chat_template:
        return ()
    for roles in (('system', 'user'), *([role] for role in ROLES)):
        messages = [{'role': role, 'content': MARK} for role in roles]
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False)
        except Exception:  # templates raise what they like: this one knows no such role
            continue
        found.add(text.partition(MARK)[0])
    return tuple(opening for opening in found if opening.strip())
