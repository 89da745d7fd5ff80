"""An answer's text while it is decoded."""

from collections.abc import Iterator, Sequence

from cllm_jax.decoding.engine import STREAM_ITERATIONS, answers, run_until, start
from cllm_jax.decoding.request import Request, encode, row_keys
from cllm_jax.decoding.text import find_stop, settled, text_of
from cllm_jax.hf.model import Model, with_tokenizer


def stream(model: Model, request: Request, prompt: str | Sequence[int]) -> Iterator[str]:
    """Yield the answer's text in pieces that are never taken back.

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
