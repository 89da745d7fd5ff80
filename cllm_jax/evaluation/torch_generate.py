"""`transformers` generate on torch, the speed a user has today (the `bench` extra)."""

import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from cllm_jax.decoding.generate import encode
from cllm_jax.models.hf import write_model
from cllm_jax.models.load import Model

LOOKUP_TOKENS = 10
"""Draft length of prompt lookup, the value of its documentation."""


def generate_speed(
    model: Model, prompts: Sequence[str], max_tokens: int, repeats: int = 3
) -> dict[str, float]:
    """Tokens per second of greedy decoding and of prompt lookup: same weights, batch 1.

    Both take turns on each prompt; its time is the median. Needs torch.
    """
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / 'model'
        write_model(path, model.config, model.params, dtype='float32')
        network = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    end = list(model.config.eos_ids)
    shared = {'max_new_tokens': max_tokens, 'do_sample': False, 'eos_token_id': end or None}
    shared['pad_token_id'] = model.config.pad_id or 0
    ways = {
        'greedy': GenerationConfig(**shared),
        'prompt lookup': GenerationConfig(**shared, prompt_lookup_num_tokens=LOOKUP_TOKENS),
    }
    totals = {name: [0, 0.0] for name in ways}
    for prompt in prompts:
        ids = torch.tensor([encode(model, prompt)])
        mask = torch.ones_like(ids)
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(repeats + 1):
            for name, config in ways.items():
                begin = time.perf_counter()
                with torch.no_grad():
                    out = network.generate(ids, attention_mask=mask, generation_config=config)
                if turn:
                    seconds[name].append(time.perf_counter() - begin)
                else:
                    totals[name][0] += out.shape[1] - ids.shape[1]
        for name in ways:
            totals[name][1] += statistics.median(seconds[name])
    return {name: tokens / taken for name, (tokens, taken) in totals.items()}
