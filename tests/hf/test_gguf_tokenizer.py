"""The tokenizer of a GGUF file cuts texts as that of the family, and goes where its model goes."""

import json

import pytest

import cllm_jax as cllm
from cllm_jax.data.encoding import plain_ids, prompt_ids
from cllm_jax.decoding.request import encode
from cllm_jax.errors import ConfigError, DataError
from cllm_jax.hf.load import load, open_tokenizer
from cllm_jax.hf.tokenizer import CONFIG, PROBES, WHOLE, tokenizer_fingerprint
from cllm_jax.hf.write import write_model
from tests.gguf_files import GQA, MARKS, OWN, TEXT, reference, tokenizer_facts, write_gguf
from tests.kinds import write
from tests.tiny_model import model_of, refusal

RULES = ('smollm', 'gpt-2', 'llama-bpe', 'qwen2')
TRICKY = [
    *(*PROBES, *TEXT[:1], 'zqx zqx', '', ' ', '\n', "DON'T we'LL it's I'm", '12345678 ٣٤٥ 1½'),
    *('e\u0301 ﬁ A\u030a', 'a\n\n\nb \n c\t\td', '...!!! ??=++$$ --x', f'the{OWN}city {OWN} the'),
    *(f'city{mark}city {mark} 12' for mark in MARKS),
]


def model_with(tmp_path, rule, **changes):
    facts = tokenizer_facts(rule, **changes)
    config = model_of(GQA).config
    rows = len(facts['tokenizer.ggml.tokens'])
    model = model_of(config.__class__(**{**vars(config), 'vocab_size': rows}))
    return write_gguf(tmp_path / 'm.gguf', model, **facts)


@pytest.mark.parametrize('rule', RULES)
def test_texts_become_the_ids_of_the_family(rule, tmp_path):
    tokenizer = open_tokenizer(model_with(tmp_path, rule))
    alone = reference(rule)
    wanted = [alone.encode(text, add_special_tokens=False).ids for text in TRICKY]
    assert plain_ids(tokenizer, TRICKY) == wanted
    decoded = [alone.decode(ids, skip_special_tokens=False) for ids in wanted]
    assert [tokenizer.decode(ids) for ids in wanted] == decoded
    ids = alone.encode(f'the {MARKS[2]} city {OWN}').ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == f'the  city {OWN}'
    assert tokenizer.decode([*ids[:1], len(tokenizer)]) == tokenizer.decode(ids[:1])


def test_the_families_differ_in_these_texts():
    made = {rule: [reference(rule).encode(text).ids for text in TRICKY] for rule in RULES}
    assert len({json.dumps(ids) for ids in made.values()}) == len(RULES)


def test_default_cuts_at_punctuation_and_triples_of_digits(tmp_path):
    tokenizer = open_tokenizer(model_with(tmp_path, 'default'))
    pieces = [
        piece
        for piece, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(
            "it's 12345 a, $b..  \n c"
        )
    ]
    assert pieces == ['it', "'", 's', 'Ġ', '123', '45', 'Ġa', ',', 'Ġ', '$', 'b', '..', 'ĠĠĊ', 'Ġc']


@pytest.mark.parametrize('rule', RULES)
def test_what_is_put_around_a_text_is_what_the_file_says(rule, tmp_path):
    for said in ({}, {'add_bos_token': True}, {'add_bos_token': False, 'add_eos_token': True}):
        tokenizer = open_tokenizer(model_with(tmp_path, rule, **said))
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        inner = plain_ids(tokenizer, ['the city'])[0]
        first = [bos] if said.get('add_bos_token', rule == 'llama-bpe') else []
        last = [eos] if said.get('add_eos_token') else []
        assert tokenizer('the city')['input_ids'] == first + inner + last
        assert prompt_ids(tokenizer, ['the city']) == [first + inner]


@pytest.mark.parametrize('rule', RULES)
def test_it_is_the_tokenizer_of_a_directory(rule, tmp_path):
    """Its named tokens and its chat template too; a model that is written has them as well."""
    path = model_with(tmp_path, rule, unknown_token_id=0, add_bos_token=False)
    model = load(str(path))
    named = {'bos_token': MARKS[0], 'eos_token': MARKS[1], 'pad_token': MARKS[3]}
    chat = model.tokenizer.chat_template
    place = write(tmp_path / 'a', reference(rule), **named, unk_token='!', chat_template=chat)
    wanted = open_tokenizer(place)
    write_model(tmp_path / 'out', model)
    messages = [{'role': 'user', 'content': 'the city'}]
    for made in (model.tokenizer, open_tokenizer(tmp_path / 'out')):
        assert made.is_fast
        assert tokenizer_fingerprint(made) == tokenizer_fingerprint(wanted)
        assert {name: getattr(made, name) for name in named} == named
        text = made.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert text == f'{MARKS[2]}user\nthe city{MARKS[3]}\n{MARKS[2]}assistant\n'
    config = json.loads((tmp_path / 'out' / CONFIG).read_text())
    assert config['tokenizer_class'] == 'PreTrainedTokenizerFast'
    written = (tmp_path / 'out' / WHOLE).read_bytes()
    write_model(tmp_path / 'again', load(str(tmp_path / 'out')))
    assert (tmp_path / 'again' / WHOLE).read_bytes() == written


def test_texts_are_decoded_from_a_file(tmp_path):
    model = load(str(model_with(tmp_path, 'smollm')), 'float32')
    result = cllm.decode(model, ['the city'], cllm.AutoRegressive(), max_tokens=4)
    assert result.texts == [model.tokenizer.decode(result.tokens[0])]


@pytest.mark.parametrize(
    'key, value',
    [('model', 'llama'), ('pre', 'tekken'), ('pre', None), ('add_space_prefix', True)],
)
def test_another_kind_of_tokenizer_is_refused_by_name_and_ids_are_not(key, value, tmp_path):
    path = model_with(tmp_path, 'gpt-2', **{key: value})
    model = load(str(path))
    told = f'tokenizer.ggml.{key} = {value!r} is not supported'
    assert model.tokenizer is None and told in model.lacks
    assert cllm.decode(model, [[3]], cllm.AutoRegressive(), max_tokens=2).tokens
    for call, args in (
        (open_tokenizer, (path,)),
        (write_model, (tmp_path / 'out', model)),
        (encode, (model, 'the city')),
    ):
        message = refusal(call, *args, of=ConfigError)
        assert told in message and 'use the Hugging Face directory' in message


def test_a_file_may_have_no_tokenizer(tmp_path):
    path = model_with(tmp_path, 'gpt-2', model='no_vocab')
    assert open_tokenizer(path) is None and load(str(path)).lacks == ''


@pytest.mark.parametrize(
    'key, value, told',
    [
        ('tokens', None, 'not a list of str'),
        ('tokens', 'abc', 'list expected'),
        ('token_type', [1, 2], 'cannot be made'),
        ('token_type', ['1'], 'not a list of int'),
        ('merges', ['a b c'], 'cannot be made'),
        ('merges', ['no such'], 'cannot be made'),
        ('add_bos_token', 1, 'bool expected'),
    ],
)
def test_parts_that_do_not_fit_together_are_named(key, value, told, tmp_path):
    path = write_gguf(
        tmp_path / 'm.gguf',
        **tokenizer_facts('gpt-2')
        | {
            'tokenizer.ggml.eos_token_id': 1,
            'tokenizer.ggml.bos_token_id': None,
            'tokenizer.ggml.padding_token_id': None,
            f'tokenizer.ggml.{key}': value,
        },
    )
    message = refusal(load, str(path), of=DataError)
    assert str(path) in message and told in message


def test_roles_and_tokens_must_exist(tmp_path):
    path = model_with(tmp_path, 'gpt-2', padding_token_id=1000)
    assert 'padding_token_id = 1000' in refusal(load, str(path), of=DataError)
    path = model_with(tmp_path, 'gpt-2', add_bos_token=True, bos_token_id=None)
    assert 'no tokenizer.ggml.bos_token_id' in refusal(load, str(path), of=DataError)
    names = tokenizer_facts('gpt-2')['tokenizer.ggml.tokens']
    path = model_with(tmp_path, 'gpt-2', tokens=[names[1], *names[1:]])
    assert 'a token twice' in refusal(load, str(path), of=DataError)
