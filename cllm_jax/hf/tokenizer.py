"""Tokenizers of model directories: read as their files say, written as they were, recognised."""

import hashlib
import json
from importlib import import_module
from pathlib import Path
from typing import Any

from cllm_jax.data.encoding import plain_ids, prompt_ids, text_of_ids
from cllm_jax.errors import ConfigError, one_line

WHOLE, PIECES, CONFIG = 'tokenizer.json', 'tokenizer.model', 'tokenizer_config.json'
VOCABULARIES = (WHOLE, PIECES, 'vocab.json')
TOKENIZER_FILES = (*VOCABULARIES, CONFIG)
CARRIED = (
    *TOKENIZER_FILES,
    *('special_tokens_map.json', 'added_tokens.json', 'merges.txt', 'vocab.txt', 'tekken.json'),
    *('chat_template.jinja', 'chat_template.json', 'additional_chat_templates/*.jinja'),
)
"""Files of a tokenizer, as patterns; a model that is written takes those it was read with."""
FILES = 'cllm_files'
"""The attribute of a tokenizer that holds them, name to bytes: their directory may change."""
PROBES = (
    'city',
    ' The quick  brown   fox.',
    'trailing space ',
    'def f(x):\n    if x >= 10:\n\t\treturn {"a": x**2}  # done\r\n\n',
    '1234567890 3.14 1,000 0x1F',
    "It's we'll CamelCase snake_case http://a.b/c?d=e",
    'na\u00efve e\u0301 \u0928\u0940 \u4f60\u597d \ud55c\uae00',
    '\U0001f44d\U0001f3fd \u00a0\u200b\ufb01',
    '\u2581 <s></s><|im_start|><unk>[INST]',
)
"""Texts that tell tokenizers of one vocabulary apart by what they make of them."""
SETTINGS = ('chat_template', 'pad_token_id', 'add_bos_token', 'add_eos_token')
"""What else of a tokenizer somebody may have changed."""
SPECIAL_PROBES = 64
"""Special tokens that are tried between words: some vocabularies have a thousand."""


def read_tokenizer(directory: Path) -> Any:
    """The `transformers` tokenizer of a model directory, or None if it has no tokenizer files.

    It does what `tokenizer.json` says, or else `tokenizer.model`: classes such as LlamaTokenizer
    take the vocabulary of the file, and their own notions of the rest. Raises ConfigError if it
    cannot be read, or not without another package (`lacks_package`).
    """
    if not any((directory / name).exists() for name in TOKENIZER_FILES):
        return None
    if lacking := lacks_package(directory):
        raise ConfigError(f'{directory}: {lacking}')
    from transformers import AutoTokenizer, PreTrainedTokenizerFast  # slow to import

    options = {'local_files_only': True, 'trust_remote_code': False}
    reader, only_pieces = PreTrainedTokenizerFast, _only_pieces(directory)
    try:
        files = {
            path.relative_to(directory).as_posix(): path.read_bytes()
            for pattern in CARRIED
            for path in sorted(directory.glob(pattern))
        }
        if only_pieces and 'add_bos_token' not in json.loads(files.get(CONFIG, b'{}')):
            options['add_bos_token'] = True  # as all the families do that have such a file
        elif not only_pieces and WHOLE not in files:
            reader = AutoTokenizer
            if files.keys() <= {CONFIG}:  # a class alone makes a tokenizer of three tokens
                raise FileNotFoundError(f'{CONFIG} without {WHOLE} or {PIECES}')
        tokenizer = reader.from_pretrained(directory, **options)
    except Exception as e:  # tokenizers raise bare Exceptions on malformed files
        reason = f'{type(e).__name__}: {one_line(e, 160)}'
        if only_pieces:  # transformers takes every such file for one of tiktoken then
            reason = f'{PIECES} is not a sentencepiece model'
        raise ConfigError(
            f'{directory}: unreadable tokenizer ({reason}); '
            'copy the tokenizer files of the original model again'
        ) from None
    setattr(tokenizer, FILES, files)
    return tokenizer


def lacks_package(directory: Path) -> str:
    """What a tokenizer cannot be read without and how to get it; '' if all that it needs is here.

    Models of 2023 often have a `tokenizer.model` of sentencepiece and no `tokenizer.json`.
    """
    if not _only_pieces(directory):
        return ''
    try:
        import_module('sentencepiece.sentencepiece_model_pb2')
    except Exception as e:  # absent, or the two packages do not fit: protobuf has its own errors
        reason = f'{PIECES} needs sentencepiece and protobuf ({one_line(e, 120)})'
        return f"{reason}; pip install -U 'cllm_jax[sentencepiece]'"
    return ''


def _only_pieces(directory: Path) -> bool:
    """Whether a directory has a sentencepiece model, which is protobuf, and no tokenizer.json."""
    path = directory / PIECES
    if (directory / WHOLE).exists() or not path.is_file():
        return False
    try:
        with open(path, 'rb') as f:
            return f.read(1) == b'\n'
    except OSError:  # the tokenizer's own reader says why
        return False


def write_tokenizer(directory: Path, tokenizer: Any) -> None:
    """Write the files of a tokenizer, such that transformers 4 and 5 read it as it is here.

    They are the bytes that it was read from, unless it has been changed or made since. Raises
    ConfigError if the files would be another tokenizer.
    """
    files = getattr(tokenizer, FILES, {})
    for name, data in files.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_bytes(data)
    if not files or not _alike(read_tokenizer(directory), tokenizer):
        for name in files:
            (directory / name).unlink()
        tokenizer.save_pretrained(directory)
        files = {}
    path = directory / CONFIG
    if path.exists():
        given = json.loads(path.read_text('utf-8'))
        made = portable(given, made_here=not files and (directory / WHOLE).exists())
        if made != given:
            path.write_text(json.dumps(made, indent=2, ensure_ascii=False) + '\n', 'utf-8')
    if not files and not _same_ids(read_tokenizer(directory), tokenizer):
        rule = 'what was changed of it is not in what it writes'
        raise ConfigError(f'{directory}: the tokenizer: {rule}; change the files of the original')


def portable(config: dict[str, Any], made_here: bool = False) -> dict[str, Any]:
    """A tokenizer_config.json without what transformers 5 alone understands, or notes of itself.

    One that was `made_here` stands beside a tokenizer.json that says all, so it names no class that
    would add to it.
    """
    made = {k: v for k, v in config.items() if k not in ('is_local', 'local_files_only')}
    if made_here or made.get('tokenizer_class') == 'TokenizersBackend':
        made['tokenizer_class'] = 'PreTrainedTokenizerFast'
        made.pop('backend', None)
    if isinstance(extra := made.get('extra_special_tokens'), list):
        del made['extra_special_tokens']
        known = made.get('additional_special_tokens') or []
        made['additional_special_tokens'] = [*known, *(t for t in extra if t not in known)]
    return made


def _alike(one: Any, other: Any) -> bool:
    same = all(getattr(one, name, None) == getattr(other, name, None) for name in SETTINGS)
    return same and _same_ids(one, other)


def _same_ids(one: Any, other: Any) -> bool:
    return tokenizer_fingerprint(one) == tokenizer_fingerprint(other)


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """sha256 over the vocabulary, the special tokens, and what becomes of some texts.

    Tokenizers with equal ones turn texts into the same ids, and ids into the same texts.
    """
    named = {name: getattr(tokenizer, f'{name}_token_id') for name in ('bos', 'eos', 'unk')}
    added = sorted(tokenizer.get_added_vocab().items(), key=lambda item: item[1])
    special = [token for token, _ in added[:SPECIAL_PROBES]]
    probes = [*PROBES, *(f'city{t}city {t} city' for t in special), *(f'{t}city' for t in special)]
    ids = plain_ids(tokenizer, probes)
    texts = [text_of_ids(tokenizer, one) for one in ids]
    begun = prompt_ids(tokenizer, PROBES[:1])
    facts = [_vocabulary(tokenizer), named, added, ids, texts, begun]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def vocabulary_fingerprint(tokenizer: Any) -> str:
    """sha256 of the vocabulary alone: ids mean the same. Older versions noted it for tokenizers."""
    return hashlib.sha256(json.dumps(_vocabulary(tokenizer)).encode()).hexdigest()


def _vocabulary(tokenizer: Any) -> list[tuple[str, int]]:
    return sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])


def same_tokenizer(noted: Any, tokenizer: Any) -> bool:
    """Whether a noted fingerprint, or its first 16 digits, is that of a tokenizer.

    One that an older version noted tells of the vocabulary alone.
    """
    if not isinstance(noted, str) or len(noted) < 16:
        return False
    made = (make(tokenizer) for make in (tokenizer_fingerprint, vocabulary_fingerprint))
    return any(fingerprint.startswith(noted) for fingerprint in made)


def noted_or_new(noted: Any, tokenizer: Any) -> str:
    """What a run that goes on notes of its tokenizer: the same as before, if it is the same."""
    return noted if same_tokenizer(noted, tokenizer) else tokenizer_fingerprint(tokenizer)
