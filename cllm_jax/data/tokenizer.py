"""Text to token ids: making a small tokenizer, and encoding examples with any."""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from cllm_jax.data.chat import chat_text
from cllm_jax.data.encoding import answer_ids, ended, plain_ids, prompt_ids
from cllm_jax.data.sources import Source
from cllm_jax.errors import ConfigError, DataError
from cllm_jax.tasks.example import Example

END, PAD = '<|end|>', '<|pad|>'
SMALLEST = 256 + 2  # tokens: every byte and the two special ones
BATCH = 4096  # examples that are encoded at a time


def check_vocabulary(size: int) -> None:
    """Raises ConfigError for fewer tokens than a new vocabulary has."""
    if size < SMALLEST:
        raise ConfigError(f'vocab_size {size}: at least {SMALLEST}, 256 bytes and 2 special tokens')


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Any:
    """A byte-level BPE tokenizer in `transformers` form, with single-digit numbers.

    It has an end and a padding token, no BOS, and covers every byte, so no text is unknown.
    Raises ConfigError for a vocabulary that is too small for that.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast  # slow to import

    check_vocabulary(vocab_size)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=PAD, clean_up_tokenization_spaces=False
    )


def drop_prompts_without_room(
    source: Source, tokenizer: Any, bos_id: int | None, room: int
) -> Source:
    """The rows whose prompts have 1 to `room` tokens; `dropped` counts the others, only them.

    Raises DataError if no row is left.
    """
    rows = list(source.rows)
    lengths = [len(ids) for ids in prompt_ids(tokenizer, [row.prompt for row in rows], bos_id)]
    kept = [row for row, length in zip(rows, lengths, strict=True) if 0 < length <= room]
    if not kept:
        raise DataError(
            f'{source.name}: no prompt has 1 to {room} tokens, the positions of the model '
            'without max_tokens; use fewer max_tokens'
        )
    long, empty = f'prompt longer than {room} tokens', 'prompt without a token'
    dropped = Counter(long if length else empty for length in lengths if not 0 < length <= room)
    return dataclasses.replace(source, rows=kept, dropped=dropped)


def encode_examples(
    tokenizer: Any, examples: Sequence[Example], eos_ids: Sequence[int], bos_id: int | None
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Prompt and answer ids of each example, int32 arrays; the answer ends with one of `eos_ids`.

    The prompt has the ids that decoding gives it (`prompt_ids`), and the answer those with which a
    model that writes exactly this text goes on (`answer_ids`). An answer that ends with an end
    token of its own keeps that one, others get the first of `eos_ids`. A prompt without a token
    becomes `bos_id`, or stays empty where that is None: then nothing can be decoded or learnt
    from it. Chats: see `encode_chat`.
    """
    pairs = []
    for begin in range(0, len(examples), BATCH):
        rows = examples[begin : begin + BATCH]
        texts = [row for row in rows if isinstance(row.prompt, str)]
        found = iter(_encode_texts(tokenizer, texts, eos_ids, bos_id))
        for row in rows:
            text = isinstance(row.prompt, str)
            pair = next(found) if text else encode_chat(tokenizer, row, eos_ids)
            pairs.append(tuple(np.asarray(ids, np.int32) for ids in pair))
    return pairs


def encode_chat(
    tokenizer: Any, row: Example, eos_ids: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Ids of a chat and of its answer, as the template has both; it ends the answer, too.

    There is no id of an answer that nobody could decode: the template writes other ids than the
    prompt's before it, or the answer spells an end token. Raises DataError if it refuses the chat.
    """
    try:
        [prompt] = prompt_ids(tokenizer, [row.prompt])
        if not row.answer:
            return prompt, [eos_ids[0]]
        answer = {'role': 'assistant', 'content': row.answer}
        text = chat_text(tokenizer, [*row.prompt, answer], answered=True)
    except ConfigError as e:
        raise DataError(f'row {row.id}: {e}') from None
    whole, alone = plain_ids(tokenizer, [text, row.answer])
    ids = whole[len(prompt) :]
    if whole[: len(prompt)] != prompt or not {*eos_ids}.isdisjoint(alone):
        return prompt, []
    size = next((n for n, i in enumerate(ids, 1) if i in eos_ids), None)
    return prompt, ended(ids[:size], eos_ids)


def _encode_texts(
    tokenizer: Any, rows: Sequence[Example], eos_ids: Sequence[int], bos_id: int | None
) -> list[tuple[list[int], list[int]]]:
    ends = tuple(name for name, i in tokenizer.get_added_vocab().items() if i in eos_ids)
    texts, answers = [row.prompt for row in rows], [row.answer for row in rows]
    # Blanks after an end token: a chat template writes them between two messages.
    answers = [a if not (b := a.rstrip()).endswith(ends) else b for a in answers]
    prompts = prompt_ids(tokenizer, texts, bos_id)
    found = answer_ids(tokenizer, texts, answers, prompts)
    return [(p, ended(a, eos_ids)) for p, a in zip(prompts, found, strict=True)]
