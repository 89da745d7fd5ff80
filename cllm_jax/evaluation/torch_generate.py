"""`transformers` generate on torch, the speed a user has today (the `bench` extra)."""

import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from cllm_jax.decoding.request import encode
from cllm_jax.hf.load import Model
from cllm_jax.hf.write import write_model

LOOKUP_TOKENS = 10
"""Draft length of prompt lookup, the value of its documentation."""


def generate_speed(
    model: Model, prompts: Sequence[str], max_tokens: int, batch: int = 1, repeats: int = 3
) -> dict[str, float]:
    """Tokens per second of greedy decoding, and at batch 1 of prompt lookup, with these weights.

    They take turns on each batch of prompts; its time is the median. An answer's tokens count up to
    its end token. Needs torch.
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
    ways = {'greedy': GenerationConfig(**shared)}
    if batch == 1:
        lookup = GenerationConfig(**shared, prompt_lookup_num_tokens=LOOKUP_TOKENS)
        ways['prompt lookup'] = lookup
    totals = {name: [0, 0.0] for name in ways}
    for begin_row in range(0, len(prompts), batch):
        rows = [encode(model, prompt) for prompt in prompts[begin_row : begin_row + batch]]
        width = max(map(len, rows))
        ids = torch.tensor([[shared['pad_token_id']] * (width - len(r)) + r for r in rows])
        mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(repeats + 1):
            for name, config in ways.items():
                begin = time.perf_counter()
                with torch.no_grad():
                    out = network.generate(ids, attention_mask=mask, generation_config=config)
                if turn:
                    seconds[name].append(time.perf_counter() - begin)
                else:
                    answers = out[:, width:].tolist()
                    totals[name][0] += sum(_length(answer, end) for answer in answers)
        for name in ways:
            totals[name][1] += statistics.median(seconds[name])
    return {name: tokens / taken for name, (tokens, taken) in totals.items()}


def _length(answer: list[int], end: list[int]) -> int:
    return next((i + 1 for i, token in enumerate(answer) if token in end), len(answer))
