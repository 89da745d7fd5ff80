"""The tokenizer of a GGUF file, made into the files that a model directory would have."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from cllm_jax.errors import DataError, one_line
from cllm_jax.hf.gguf_file import AGAIN, Gguf
from cllm_jax.hf.tokenizer import CONFIG, WHOLE, read_tokenizer

SPECIAL, OWN, UNUSED = 3, 4, 5
"""Types of tokens: those that are no text, those that are found whole in a text, and names for rows
of the table that have no token."""
NAMED = {'bos': 'bos', 'eos': 'eos', 'pad': 'padding', 'unk': 'unknown'}
"""Tokens with a role, by the name that `transformers` and the file have for it."""
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r'| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
)
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SPLITS = {
    'gpt-2': (GPT2,),
    'default': (r'[\p{P}$+<=>^~|]+', GPT2, r'\p{N}+', r'[0-9][0-9][0-9]'),
    'smollm': (r'\p{N}', GPT2),
    'llama-bpe': (WORDS % '{1,3}',),
    'qwen2': (WORDS % '',),
}
"""Where texts are cut before pairs are merged, one expression after the other, by the name of the
rule. `default` is what llama.cpp does under that name."""


def tokenizer_of(file: Gguf) -> tuple[Any, str]:
    """The `transformers` tokenizer of a file and '', or None and why it cannot be had.

    A file without a tokenizer gives None and ''. Raises DataError if its parts do not fit together.
    """
    kind = file.get('tokenizer.ggml.model', str, 'none')
    if kind in ('none', 'no_vocab'):
        return None, ''
    if lacks := _lacks(file, kind):
        return None, lacks
    tokens = _strings(file, 'tokens')
    try:
        whole = _build(file, tokens).to_str()
    except DataError:
        raise
    except Exception as e:  # tokenizers raises bare Exceptions
        fault = f'its tokenizer cannot be made ({one_line(e, 120)})'
        raise DataError(f'{file.path}: {fault}; {AGAIN}') from None
    settings = {
        'tokenizer_class': 'PreTrainedTokenizerFast',
        'clean_up_tokenization_spaces': False,
        **{f'{name}_token': _role(file, tokens, name) for name in NAMED},
        'chat_template': file.get('tokenizer.chat_template', str),
    }
    settings = {name: value for name, value in settings.items() if value is not None}
    # Read as any other, it carries its files, which every model made with it takes.
    with TemporaryDirectory() as directory:
        Path(directory, WHOLE).write_text(whole, 'utf-8')
        Path(directory, CONFIG).write_text(json.dumps(settings, indent=2), 'utf-8')
        tokenizer = read_tokenizer(Path(directory))
    tokenizer.name_or_path = str(file.path)
    return tokenizer, ''


def _lacks(file: Gguf, kind: str) -> str:
    """Why a tokenizer is not read, and the remedy; '' if it is."""
    remedy = 'use the Hugging Face directory of this model'
    if kind != 'gpt2':
        fault = f'tokenizer.ggml.model = {one_line(repr(kind), 80)} is not supported, only gpt2'
        return f'{fault}; {remedy}'
    rule = file.get('tokenizer.ggml.pre', str)
    if rule not in SPLITS:
        fault = f'tokenizer.ggml.pre = {one_line(repr(rule), 80)} is not supported'
        return f'{fault}, only {", ".join(SPLITS)}; {remedy}'
    if file.get('tokenizer.ggml.add_space_prefix', bool, False):
        return f'tokenizer.ggml.add_space_prefix = True is not supported; {remedy}'
    return ''


def _strings(file: Gguf, name: str, kind: type = str) -> list:
    """A list of the metadata, whose values are all of one kind."""
    values = file.get(f'tokenizer.ggml.{name}', list)
    if values is None or not all(type(value) is kind for value in values):
        fault = f'tokenizer.ggml.{name} is not a list of {kind.__name__}'
        raise DataError(f'{file.path}: {fault}; {AGAIN}')
    return values


def _role(file: Gguf, tokens: list[str], name: str) -> str | None:
    """The token with a role, None if the file names none."""
    key = f'tokenizer.ggml.{NAMED[name]}_token_id'
    at = file.get(key, int)
    if at is not None and not 0 <= at < len(tokens):
        fault = f'{key} = {at}, one of {len(tokens)} tokens expected'
        raise DataError(f'{file.path}: {fault}; {AGAIN}')
    return None if at is None else tokens[at]


def _build(file: Gguf, tokens: list[str]) -> Any:
    """The tokenizer as `tokenizers` has it."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
    from tokenizers import pre_tokenizers as pre

    rule, types = file.get('tokenizer.ggml.pre', str), _strings(file, 'token_type', int)
    merges = [tuple(pair.split(' ')) for pair in _strings(file, 'merges')]
    vocabulary = {t: i for i, (t, k) in enumerate(zip(tokens, types, strict=True)) if k != UNUSED}
    if len(vocabulary) + types.count(UNUSED) != len(tokens):
        raise DataError(f'{file.path}: tokenizer.ggml.tokens has a token twice; {AGAIN}')
    inner = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=rule == 'llama-bpe'))
    if rule == 'qwen2':
        inner.normalizer = normalizers.NFC()
    cuts = [pre.Split(Regex(split), 'isolated') for split in SPLITS[rule]]
    inner.pre_tokenizer = pre.Sequence(
        [*cuts, pre.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    inner.decoder = decoders.ByteLevel()
    inner.add_tokens(
        [
            AddedToken(token, special=kind == SPECIAL, normalized=False)
            for token, kind in zip(tokens, types, strict=True)
            if kind in (SPECIAL, OWN)
        ]
    )
    _add_around(file, inner, tokens, bos=rule == 'llama-bpe')
    return inner


def _add_around(file: Gguf, inner: Any, tokens: list[str], bos: bool) -> None:
    """Let a tokenizer put a BOS or an EOS token around a text, if the file says so.

    `bos` is what is done where the file says nothing.
    """
    from tokenizers import processors

    asked = {'bos': bos, 'eos': False}
    marks = {}
    for name, default in asked.items():
        if file.get(f'tokenizer.ggml.add_{name}_token', bool, default):
            marks[name] = _role(file, tokens, name)
            if marks[name] is None:
                fault = f'no tokenizer.ggml.{name}_token_id, but texts are to have one'
                raise DataError(f'{file.path}: {fault}; {AGAIN}')
    if not marks:
        return
    first, last = ([mark] if (mark := marks.get(name)) else [] for name in asked)
    special = [(mark, inner.token_to_id(mark)) for mark in dict.fromkeys(marks.values())]
    inner.post_processor = processors.TemplateProcessing(
        [*first, '$A', *last], [*first, '$A', *last, *first, '$B:1', *last], special
    )
