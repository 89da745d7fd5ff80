"""What a training run reads: collections, and a tokenizer that is its own or another model's."""

import dataclasses
import json
import shutil

import pytest

import cllm_jax as cllm
from cllm_jax.cli.console import Console
from cllm_jax.data.tokenizer import train_tokenizer
from cllm_jax.errors import ConfigError, DataError
from cllm_jax.hf.tokenizer import tokenizer_fingerprint, vocabulary_fingerprint
from cllm_jax.training.config import NewModel, TrainConfig, with_names
from cllm_jax.training.data import prepare, trajectory_samples
from cllm_jax.trajectories.collector import collect
from tests.trajectories.examples import MODEL, SETTINGS, identity, source


def test_a_manifest_that_is_none_is_no_training_data(tmp_path):
    (tmp_path / 'manifest.json').write_text('{"identity": {}, "shards": []}')
    with pytest.raises(DataError, match=r'manifest\.json: damaged'):
        trajectory_samples(TrainConfig(data=str(tmp_path)), MODEL, Console())


def test_trajectories_of_another_tokenizer_are_refused(tmp_path):
    settings, console = TrainConfig(data=str(tmp_path)), Console()
    for fingerprint in (vocabulary_fingerprint, tokenizer_fingerprint):  # of older versions, of now
        shutil.rmtree(tmp_path)
        known = identity() | {'tokenizer': fingerprint(MODEL.tokenizer)}
        collect(tmp_path, MODEL, source(2), SETTINGS, known)
        assert len(trajectory_samples(settings, MODEL, console)) <= 2
    other = train_tokenizer(['some other text'] * 9, len(MODEL.tokenizer))
    with pytest.raises(ConfigError, match='another tokenizer'):
        trajectory_samples(settings, dataclasses.replace(MODEL, tokenizer=other), console)


def test_a_new_draft_model_takes_the_tokenizer_of_its_target(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where no run takes the place of the embedded target
    small = NewModel(dim=32, layers=1, heads=2, kv_heads=2, mlp_dim=32)
    settings = TrainConfig(objective='ar', model='new', new=small, data='sql', examples=8)
    settings = with_names(settings, 'draft')
    model, samples = prepare(settings, None, Console(), tmp_path)
    target = cllm.load('embedded-target', 'float32')
    assert samples[0].answer[-1] == target.config.eos_ids[0]
    drafted = cllm.draft_model(target, model)
    prompts = ['Question: how many cats are there?\nAnswer:']
    fast = cllm.decode(target, prompts, drafted, max_tokens=8)
    assert fast.tokens == cllm.decode(target, prompts, cllm.AutoRegressive(), max_tokens=8).tokens
    other = dataclasses.replace(settings, new=dataclasses.replace(small, vocab_size=999))
    with pytest.raises(cllm.ConfigError, match='embedded-target has 1536 tokens'):
        prepare(other, None, Console(), tmp_path)


def test_rows_without_a_prompt_are_not_trained_on(tmp_path, capsys):
    rows = [{'prompt': 'a question' * (i % 2), 'answer': 'an answer'} for i in range(8)]
    path = tmp_path / 'rows.jsonl'
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    settings = TrainConfig(objective='ar', model='embedded-target', data=f'{path}#all')
    model, kept = prepare(settings, None, Console(), tmp_path)
    assert model.config.bos_id is None
    assert len(kept) == 4 and all(len(sample.prompt) for sample in kept)
    assert '4 samples without a prompt left out' in capsys.readouterr().err
