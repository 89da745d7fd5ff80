"""Writing a LoRA adapter as PEFT saves one: all of it or nothing."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from cllm_jax.hf.adapter import SETTINGS, TENSORS, tensor_names
from cllm_jax.hf.files import check_replaceable, written_whole
from cllm_jax.hf.weights import BLOCK_NAMES


def write_adapter(
    directory: Path, factors: Mapping[str, Mapping], rank: int, alpha: float, base: str
) -> None:
    """Write the factors of matrices; an old adapter in the directory is replaced.

    Args:
      factors: by layer (`layers_0`), `q_a` of shape (inputs, rank) and `q_b` (rank, outputs).
      base: what the adapter calls the model that it changes: a directory or a hub id.

    Raises DataError if the directory holds something else, or cannot be written.
    """
    tensors, modules = {}, set()
    for layer, own in factors.items():
        for name in (key.removesuffix('_a') for key in own if key.endswith('_a')):
            module = BLOCK_NAMES[name].removesuffix('.weight')
            modules.add(module.rpartition('.')[2])
            names = tensor_names(f'model.layers.{layer.removeprefix("layers_")}.{module}')
            for tensor, half in zip(names, 'ab', strict=True):
                tensors[tensor] = np.ascontiguousarray(np.asarray(own[f'{name}_{half}']).T)
    settings = {
        'base_model_name_or_path': base,
        'bias': 'none',
        'fan_in_fan_out': False,
        'inference_mode': True,
        'init_lora_weights': True,
        'lora_alpha': alpha,
        'lora_dropout': 0.0,
        'modules_to_save': None,
        'peft_type': 'LORA',
        'r': rank,
        'target_modules': sorted(modules),
        'task_type': 'CAUSAL_LM',
        'use_rslora': False,
    }
    directory = directory.resolve()
    check_replaceable(directory, {SETTINGS, TENSORS}, 'an adapter')
    with written_whole(directory) as temp:
        (temp / SETTINGS).write_text(json.dumps(settings, indent=2) + '\n', 'utf-8')
        save_file(tensors, temp / TENSORS, metadata={'format': 'pt'})
