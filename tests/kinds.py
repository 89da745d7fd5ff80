"""Small tokenizers of every kind that models of the LLaMA family have, as their directories."""

import json
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors
from tokenizers import pre_tokenizers as pre

PIECES = (
    *'▁abcdefghijklmnopqrstuvwxyz():,.?#QR_=0123',
    *('▁▁', '▁▁▁▁', 'de', 'def', '▁def', 'it', 'ity', '▁c', '▁city', 'he', '▁t', '▁the', 'the'),
)
MERGES = [
    *(('▁', '▁'), ('▁▁', '▁▁'), ('d', 'e'), ('de', 'f'), ('▁', 'def'), ('i', 't'), ('it', 'y')),
    *(('▁', 'c'), ('▁c', 'ity'), ('h', 'e'), ('▁', 't'), ('▁t', 'he'), ('t', 'he')),
]
LLAMA = {'bos_token': '<s>', 'eos_token': '</s>', 'unk_token': '<unk>', 'add_bos_token': True}
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] }}"
    "{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TURNS = (  # as of LLaMA 2: every turn has a BOS and an EOS token
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ ' ' + m['content'] + ' ' "
    "+ eos_token }}{% else %}{{ bos_token + '[' + m['role'] + '] ' + m['content'] + ' [/]' }}"
    '{% endif %}{% endfor %}'
)
ZEPHYR = (  # which has no BOS token, though the tokenizer puts one before a text
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + eos_token + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)


def pieces(scheme: str, *special: str, eos: bool = False) -> Tokenizer:
    """Like sentencepiece: '▁' for spaces, bytes for unknown characters, `<s>` before a text.

    `scheme` says where a space is put before a word: 'legacy' (a normalizer), or as Metaspace.
    """
    names = ['<unk>', '<s>', '</s>', *(f'<0x{i:02X}>' for i in range(256)), *PIECES, *special]
    vocabulary = {name: i for i, name in enumerate(names)}
    inner = Tokenizer(
        models.BPE(vocabulary, MERGES, byte_fallback=True, unk_token='<unk>', fuse_unk=True)
    )
    steps = [decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse()]
    if scheme == 'legacy':
        parts = [normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')]
        inner.normalizer = normalizers.Sequence(parts)
    else:
        inner.pre_tokenizer = pre.Metaspace('▁', prepend_scheme=scheme, split=False)
    if scheme != 'never':
        steps.append(decoders.Strip(' ', 1))
    inner.decoder = decoders.Sequence(steps)
    marks = ('<unk>', '<s>', '</s>', *special)
    inner.add_special_tokens([AddedToken(mark, normalized=False) for mark in marks])
    around(inner, '<s>', '</s>' if eos else '')
    return inner


def bytes_of(bos: str, end: str, *special: str, space: bool = False) -> Tokenizer:
    """Byte-level, as GPT-2, DeepSeek-Coder and LLaMA 3; puts `bos` before a text unless it is ''.

    With `space` one is put before the first word.
    """
    letters = sorted(pre.ByteLevel.alphabet())
    merges = [
        ('t', 'h'),
        ('th', 'e'),
        ('Ġ', 'the'),
        ('Ġ', 'Ġ'),
        ('Ċ', 'Ċ'),
        ('d', 'e'),
        ('de', 'f'),
    ]
    marks = [mark for mark in (bos, end, *special) if mark]
    names = [*marks, *letters, *(a + b for a, b in merges)]
    inner = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, merges))
    split = [] if space else [pre.Split(Regex('[\\r\\n]+'), 'isolated')]
    inner.pre_tokenizer = pre.Sequence([*split, pre.ByteLevel(add_prefix_space=space)])
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(mark, normalized=False) for mark in marks])
    if bos:
        around(inner, bos)
    return inner


def around(inner: Tokenizer, first: str, last: str = '') -> None:
    """Let a tokenizer put tokens before and after a text; their names have spaces between them."""
    single = ' '.join(filter(None, (first, '$A', last)))
    named = [(mark, inner.token_to_id(mark)) for mark in f'{first} {last}'.split()]
    inner.post_processor = processors.TemplateProcessing(single, f'{single} $B:1', named)


def write(directory: Path, inner: Tokenizer, family: str = 'llama', **config) -> Path:
    """A directory as a hub has it, without weights."""
    directory.mkdir(parents=True, exist_ok=True)
    inner.save(str(directory / 'tokenizer.json'))
    (directory / 'tokenizer_config.json').write_text(json.dumps(config))
    (directory / 'config.json').write_text(json.dumps({'model_type': family}))
    return directory


def write_kind(kind: str, directory: Path) -> Path:
    """The directory of one of `KINDS`."""
    inner, family, config = KINDS[kind]()
    return write(directory, inner, family, **config)


@cache
def tokenizer_of(kind: str):
    """The tokenizer of one of `KINDS`, read as a model's is."""
    from cllm_jax.hf.tokenizer import read_tokenizer

    with TemporaryDirectory() as directory:
        return read_tokenizer(write_kind(kind, Path(directory)))


def _llama(scheme: str, *special: str, eos: bool = False, **more):
    config = LLAMA | {'tokenizer_class': 'LlamaTokenizer', 'legacy': scheme == 'legacy'} | more
    return lambda: (pieces(scheme, *special, eos=eos), 'llama', config)


def _bytes(name: str, family: str, *marks: str, space: bool = False, **more):
    config = {'tokenizer_class': name, 'bos_token': marks[0] or None, 'eos_token': marks[1]} | more
    return lambda: (bytes_of(*marks, space=space), family, config)


IM = '<|im_start|>', '<|im_end|>'
KINDS = {
    'legacy': _llama('legacy'),
    'first': _llama('first'),
    'always': _llama('always'),
    'never': _llama('never'),
    'legacy, adds EOS': _llama('legacy', eos=True, add_eos_token=True),
    'first, adds EOS': _llama('first', eos=True),
    'legacy, LLaMA 2 chat': _llama('legacy', chat_template=TURNS),
    'first, Zephyr chat': _llama('first', chat_template=ZEPHYR),
    'legacy, ChatML': _llama('legacy', *IM, eos_token=IM[1], chat_template=CHATML),
    'DeepSeek-Coder': _bytes(
        'LlamaTokenizerFast',
        'llama',
        '<\uff5cbegin\uff5c>',
        '<\uff5cend\uff5c>',
        add_bos_token=True,
        legacy=True,
    ),
    'LLaMA 3': _bytes('PreTrainedTokenizerFast', 'llama', '<|begin|>', '<|end|>'),
    'Qwen2, ChatML': _bytes('Qwen2Tokenizer', 'qwen2', '', IM[1], IM[0], chat_template=CHATML),
    'bytes, a space first': _bytes('GPT2Tokenizer', 'llama', '', '<|end|>', space=True),
}
