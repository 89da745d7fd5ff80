"""`transformers` generate on torch, the speed a user has today (the `bench` extra)."""

import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from cllm_jax.decoding.request import encode
from cllm_jax.evaluation.speed import time_in_turn
from cllm_jax.hf.model import Model
from cllm_jax.hf.write import write_model


def generate_speed(
    model: Model, prompts: Sequence[str], max_tokens: int, batch: int = 1, repeats: int = 3
) -> dict[str, float]:
    """Tokens per second of greedy decoding, and at batch 1 of prompt lookup, with these weights.

    They take turns (`time_in_turn`). An answer's tokens count up to its end token. Needs torch.
    """
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / 'model'
        write_model(path, model, dtype='float32')
        network = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    end = list(model.config.eos_ids)
    shared = {'max_new_tokens': max_tokens, 'do_sample': False, 'eos_token_id': end or None}
    shared['pad_token_id'] = model.config.pad_id or 0
    # 10 tokens are what its documentation has.
    drafts = {'greedy': None} | ({'prompt lookup': 10} if batch == 1 else {})

    def generate(drafted: int | None, rows: range) -> tuple[int, float]:
        encoded = [encode(model, prompts[i]) for i in rows]
        width = max(map(len, encoded))
        ids = torch.tensor([[shared['pad_token_id']] * (width - len(r)) + r for r in encoded])
        mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in encoded])
        config = GenerationConfig(**shared, prompt_lookup_num_tokens=drafted)
        begin = time.perf_counter()
        with torch.no_grad():
            out = network.generate(ids, attention_mask=mask, generation_config=config)
        seconds = time.perf_counter() - begin
        return sum(_length(answer, end) for answer in out[:, width:].tolist()), seconds

    calls = {name: partial(generate, drafted) for name, drafted in drafts.items()}
    return time_in_turn(calls, len(prompts), repeats, batch=batch)


def _length(answer: list[int], end: list[int]) -> int:
    return next((i + 1 for i, token in enumerate(answer) if token in end), len(answer))
