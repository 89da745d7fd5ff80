"""The prompt templates."""

from cllm_jax.data import prompts


def test_prompts_end_where_answers_begin():
    assert prompts.vicuna('x').endswith(':') and prompts.wikisql('x', []).endswith(':')
    for prompt in (prompts.gsm8k('x'), prompts.spider('x', []), prompts.codesearchnet('x')):
        assert prompt.endswith('\n')
