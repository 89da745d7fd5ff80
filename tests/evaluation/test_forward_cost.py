"""What a forward costs is measured in the decoding loop itself, to its very end."""

from cllm_jax.decoding.engine import decode_all
from cllm_jax.decoding.request import Request
from cllm_jax.drafters.autoregressive import AutoRegressive
from cllm_jax.evaluation.bandwidth import weight_bytes
from cllm_jax.evaluation.forward_cost import NeverRight, costs
from tests.tiny import ragged_prompts, random_model, tiny_config


def test_a_drafter_that_is_never_right_takes_a_forward_per_token_and_returns_what_ar_returns():
    model, prompts = random_model(config=tiny_config(layers=1)), ragged_prompts(0, (3, 9, 5))
    never, plain = (
        decode_all(model, Request(drafter, 12), prompts)
        for drafter in (NeverRight(4), AutoRegressive())
    )
    assert never.tokens == plain.tokens
    assert never.accepted == plain.accepted == [[1] * 12] * 3


def test_costs_run_to_the_end_whatever_the_model_says():
    """End tokens would cut a measurement short: here every token is one."""
    model = random_model(config=tiny_config(layers=1, eos_ids=tuple(range(29))))
    seen = []
    found = costs(model, (1, 4), batch=3, prompt=5, repeats=1, progress=seen.append)
    assert found.keys() == {1, 4} and sum(seen) == 4
    for cost in found.values():
        assert min(cost.forward, cost.prefill) > 0
    assert weight_bytes(model.params) == 4 * model.config.parameters
