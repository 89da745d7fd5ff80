"""From datasets to samples."""

import json

from cllm_jax.cli.console import Console
from cllm_jax.training.config import TrainConfig
from cllm_jax.training.data import prepare


def test_rows_without_a_prompt_are_not_trained_on(tmp_path, capsys):
    rows = [{'prompt': 'a question' * (i % 2), 'answer': 'an answer'} for i in range(8)]
    path = tmp_path / 'rows.jsonl'
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    settings = TrainConfig(objective='ar', model='embedded-target', data=f'{path}#all')
    model, kept = prepare(settings, None, Console(), tmp_path)
    assert model.config.bos_id is None
    assert len(kept) == 4 and all(len(sample.prompt) for sample in kept)
    assert '4 samples without a prompt left out' in capsys.readouterr().err
