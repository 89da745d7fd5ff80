"""An answer's text while it is decoded."""

import dataclasses
from collections.abc import Generator, Sequence

from cllm_jax.decoding.engine import STREAM_ITERATIONS, answers, run_until, start
from cllm_jax.decoding.request import Request, encode, row_keys
from cllm_jax.decoding.text import find_stop, settled, text_of
from cllm_jax.errors import ConfigError
from cllm_jax.hf.model import Model, with_tokenizer
from cllm_jax.tasks.example import Messages


def stream(
    model: Model, request: Request, prompt: str | Messages | Sequence[int]
) -> Generator[str, None, bool]:
    """Yield the answer's text in pieces that are never taken back; return whether it ended itself.

    A piece is held while it is an incomplete character, or could be the beginning of a stop string.
    The pieces joined are the text `decode_all` returns. Raises ConfigError for a model without a
    tokenizer, or a prompt that cannot be decoded.
    """
    with_tokenizer(model, 'decode without streaming')
    state = start(model, request, [encode(model, prompt)], row_keys(request.seed, [0]))
    steps, until, shown, done = state.emitted_BI.shape[1], 1, 0, False
    while not done:
        until = min(until + STREAM_ITERATIONS, steps)
        state = run_until(model, request, state, until)
        tokens = answers(state, 1)[0][0]
        found = find_stop(model, tokens, request.stop)
        done = found is not None or bool(state.finished_B[0])
        text = found[0] if found else text_of(model, tokens)
        if not done:
            text = settled(text, request.stop)
        if len(text) > shown:
            yield text[shown:]
            shown = len(text)
    return found is not None or tokens[-1] in model.config.eos_ids


def reply(model: Model, request: Request, chat: Messages) -> Generator[str, None, str]:
    """Stream the answer to a chat, as long as there is room; return why it was cut off, or ''."""
    ids, positions = encode(model, chat), model.config.max_positions
    room = positions - len(ids)
    if room < 1:
        rule = f'the model has {positions} positions; say less, or begin another chat'
        raise ConfigError(f'a chat of {len(ids)} tokens: {rule}')
    most = min(request.max_tokens, room)
    if (yield from stream(model, dataclasses.replace(request, max_tokens=most), ids)):
        return ''
    if most < request.max_tokens:
        return f'cut off: the chat fills the {positions} positions of the model'
    return f'cut off after {most} tokens; --max-tokens sets how many'
