"""Write tests/golden/NAME.npz: tiny models of every supported kind and transformers' logits.

    python tests/make_golden.py            # needs torch; the tests that read the files do not

Weights are multiples of 1/128, which float16 holds exactly and zip compresses well.
"""

import functools
import tempfile
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).parent / 'golden'
_SHARED = {
    'vocab_size': 64,
    'hidden_size': 32,
    'intermediate_size': 40,
    'num_hidden_layers': 2,
    'num_attention_heads': 4,
    'num_key_value_heads': 2,
    'max_position_embeddings': 64,
}
_LLAMA3 = {
    'rope_type': 'llama3',
    'rope_theta': 10_000.0,
    'factor': 8.0,
    'low_freq_factor': 1.0,
    'high_freq_factor': 4.0,
    'original_max_position_embeddings': 64,
}
_LINEAR = {'rope_type': 'linear', 'rope_theta': 10_000.0, 'factor': 4.0}
CASES = {
    'llama': {'num_key_value_heads': 4, 'rms_norm_eps': 1e-2, 'rope_theta': 500.0},
    'llama3': {'rope_parameters': _LLAMA3, 'max_position_embeddings': 128},
    'linear': {'rope_parameters': _LINEAR},
    'gqa': {'num_key_value_heads': 1, 'head_dim': 16, 'eos_token_id': [2, 5]},
    'tied': {'tie_word_embeddings': True, 'pad_token_id': 0},
    'qwen2': {'model_type': 'qwen2', 'rms_norm_eps': 1e-3},
    'qwen3': {'model_type': 'qwen3', 'head_dim': 16, 'tie_word_embeddings': True},
    'mistral': {'model_type': 'mistral', 'sliding_window': None},
    'biased': {'attention_bias': True, 'mlp_bias': True, 'tie_word_embeddings': True},
    'attention_bias': {'attention_bias': True, 'num_key_value_heads': 1, 'head_dim': 16},
    'qwen3_bias': {'model_type': 'qwen3', 'head_dim': 16, 'attention_bias': True},
}


def torch_model(name: str, seed: int):
    """A `transformers` model with every parameter random, norms and biases included."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    case = {'model_type': 'llama', **_SHARED, **CASES[name]}
    config = AutoConfig.for_model(**case)
    model = AutoModelForCausalLM.from_config(config, attn_implementation='eager').eval()
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = rng.normal(0, 0.3, tuple(parameter.shape)) + key.endswith('norm.weight')
            parameter.copy_(torch.from_numpy(np.round(noise * 128) / 128))
    return model


def torch_logits(model, tokens_BT: np.ndarray) -> np.ndarray:
    """Float32 logits `[B, T, V]`."""
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(tokens_BT).long()).logits.numpy()


def random_tokens(seed: int, length: int = 24) -> np.ndarray:
    """int32 `[2, length]` below the vocabulary size of every case."""
    return np.random.default_rng(seed).integers(0, _SHARED['vocab_size'], (2, length), np.int32)


def golden_tensors(name: str) -> dict[str, np.ndarray]:
    """The weights of a golden model, by their name in a checkpoint."""
    stored = np.load(GOLDEN / f'{name}.npz')
    return {k.removeprefix('tensor/'): stored[k] for k in stored if k.startswith('tensor/')}


@functools.cache
def golden(name: str) -> tuple:
    """A golden model: config, parameters, tokens `[B, T]` and the logits of `transformers`."""
    from safetensors.numpy import save_file

    from cllm_jax.hf.weights import read_model

    data = np.load(GOLDEN / f'{name}.npz')
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / 'config.json').write_text(str(data['config']))
        save_file(golden_tensors(name), Path(directory) / 'model.safetensors')
        return (*read_model(Path(directory)), data['tokens'], data['logits'])


@functools.cache
def saved_by_torch(name: str) -> tuple:
    """A `transformers` model, and the directory to which it saved itself in small shards."""
    directory = tempfile.TemporaryDirectory(prefix=f'torch-{name}-')  # removed at exit
    model = torch_model(name, seed=100 + list(CASES).index(name))
    model.save_pretrained(directory.name, max_shard_size='30KB')
    return model, directory


def main() -> None:
    GOLDEN.mkdir(exist_ok=True)
    for seed, name in enumerate(CASES):
        model = torch_model(name, seed)
        tokens = random_tokens(seed)
        tensors = {
            key: tensor.numpy().astype(np.float16)
            for key, tensor in model.state_dict().items()
            if not (key == 'lm_head.weight' and model.config.tie_word_embeddings)
        }
        np.savez_compressed(
            GOLDEN / f'{name}.npz',
            **{f'tensor/{key}': tensor for key, tensor in tensors.items()},
            config=np.array(model.config.to_json_string()),
            tokens=tokens,
            logits=torch_logits(model, tokens),
        )


if __name__ == '__main__':
    main()
