"""Text to token ids: making a small tokenizer, and encoding examples with any."""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from cllm_jax.data.sources import Source
from cllm_jax.errors import ConfigError, DataError
from cllm_jax.tasks.example import Example

END, PAD = '<|end|>', '<|pad|>'
SMALLEST = 256 + 2  # tokens: every byte and the two special ones


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
    lengths = [len(prompt) for prompt, _ in encode_examples(tokenizer, rows, 0, bos_id)]
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
    tokenizer: Any, examples: Sequence[Example], eos_id: int, bos_id: int | None
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Prompt and answer ids of each example, int32 arrays; the answer ends with `eos_id`.

    They are encoded apart, as decoding sees them: first a prompt, then an answer. A prompt without
    a token becomes `bos_id`, or stays empty where that is None: then nothing can be decoded or
    learnt from it.
    """
    first = [] if bos_id is None else [bos_id]
    prompts = tokenizer([e.prompt for e in examples])['input_ids']
    answers = tokenizer([e.answer for e in examples], add_special_tokens=False)['input_ids']
    return [
        (np.asarray(p or first, np.int32), np.asarray([*a, eos_id], np.int32))
        for p, a in zip(prompts, answers, strict=True)
    ]
