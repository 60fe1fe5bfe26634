"""LLM(...) in this process against the transformers path, token for token."""

from __future__ import annotations

import logging

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm runs these tests")

from vllm.exceptions import VLLMValidationError

from vllm_plugin.conftest import SERVED, answer, engine, generate, mixed, prompts


@pytest.fixture(scope="module")
def llm(llama):
    with engine(llama, max_num_batched_tokens=64) as started:
        yield started


@pytest.mark.parametrize("precision", SERVED)
def test_a_precision_or_profile_alone(llm, llama, expected, precision):
    asked = [(prompt, precision) for prompt in prompts(3, seed=int(float(precision)))]
    for output, (prompt, p) in zip(generate(llm, asked), asked, strict=True):
        assert answer(output) == expected(llama, prompt, p)


def test_all_precisions_and_the_profile_in_one_batch(llm, llama, expected):
    asked = mixed(15, seed=7)
    assert [answer(o) for o in generate(llm, asked)] == [expected(llama, *one) for one in asked]


def test_the_same_prompt_differs_between_precisions(llm, llama):
    outputs = generate(llm, [(prompts(1, seed=3)[0], p) for p in SERVED])
    assert len({tuple(answer(o)) for o in outputs}) == len(SERVED), "the other tests would not notice a wrong precision"


def test_no_precision_means_the_highest(llm, llama, expected):
    prompt = prompts(1, seed=9)[0]
    assert answer(generate(llm, [(prompt, None)])[0]) == expected(llama, prompt, 5)


def test_prompts_longer_than_a_step_are_chunked(llm, llama, expected):
    assert llm.llm_engine.vllm_config.scheduler_config.max_num_batched_tokens == 64
    asked = [([*prompt, *range(3, 63), *range(3, 63)], p) for p, prompt in zip((5, "2.5", 2), prompts(3), strict=True)]
    assert [answer(o) for o in generate(llm, asked)] == [expected(llama, *one) for one in asked]


def test_the_prefix_cache_is_parted_by_precision(llm, llama, expected):
    prompt = [*range(40, 63), *range(3, 63), 5, 9]
    cached = []
    for precision in (2, 4, "2.5", 2, 4, 2.5):
        output = generate(llm, [(prompt, precision)])[0]
        assert answer(output) == expected(llama, prompt, precision)
        cached.append(output.num_cached_tokens)
    assert cached == [0, 0, 0, 64, 64, 64]


@pytest.mark.parametrize("precision", [1, 6, "x", 2.7, True, [3]])
def test_a_wrong_precision_is_refused_and_the_engine_lives(llm, llama, expected, precision):
    with pytest.raises(VLLMValidationError, match="choose one of 2, 2.5, 3, 4, 5"):
        generate(llm, [([5, 6], precision)])
    assert answer(generate(llm, [([5, 6], "3")])[0]) == expected(llama, [5, 6], 3)


def test_codebooks_with_skipped_layers_up_to_a_max_precision(codebooks, expected, caplog):
    caplog.set_level(logging.INFO, "anybits.integrations.vllm.loading")
    options = {"anybits": {"max_precision": 5, "precision": 4}}
    with engine(codebooks, additional_config=options) as llm:
        record = next(r for r in caplog.records if "bytes read" in r.getMessage())
        read, total, highest = record.args
        assert (highest, read < total) == (5, True)
        asked = [(prompt, p) for prompt, p in zip(prompts(6, seed=1), (3, 4, 5) * 2, strict=True)]
        assert [answer(o) for o in generate(llm, asked)] == [expected(codebooks, *one) for one in asked]
        prompt = prompts(1, seed=2)[0]
        assert answer(generate(llm, [(prompt, None)])[0]) == expected(codebooks, prompt, 4)
        with pytest.raises(VLLMValidationError, match="choose one of 3, 4, 5"):
            generate(llm, [(prompt, 6)])


def test_drafts_are_verified_at_the_request_s_precision(llama, expected):
    ngrams = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    with engine(llama, speculative_config=ngrams) as llm:
        asked = [(prompt * 3, p) for prompt, p in mixed(6, seed=5)]
        assert [answer(o) for o in generate(llm, asked)] == [expected(llama, *one) for one in asked]
