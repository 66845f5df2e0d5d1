"""A Hugging Face directory or a checkpoint is opened with its tokenizer, and writes what transformers writes."""

import pytest
import torch
from hf_models import CASES, made, write
from tokenizer_models import sentencepiece

from megatrain.inference.opening import TokenizerWish, opened
from megatrain.inference.requests import Request, Sampling

GREEDY = Sampling(greedy=True)


@pytest.mark.parametrize("case", ["gpt2", "qwen3, a window in every second layer", "bloom"])
def test_greedy_text_is_that_of_transformers(tmp_path, case):
    write(case, tmp_path)
    model, prompts = made(case).eval(), [[5, 9, 17, 33, 2], [7], list(range(40))]
    with opened(tmp_path) as found:
        answers = found.engine.run([Request(tuple(prompt), 12, GREEDY) for prompt in prompts])
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([prompt])
        for scored in answer.tokens:
            with torch.no_grad():
                logprobs = torch.log_softmax(model(ids).logits[0, -1].double(), -1)
            assert scored.token == int(logprobs.argmax())
            assert scored.logprob == pytest.approx(float(logprobs.max()), abs=1e-4)
            ids = torch.cat([ids, torch.tensor([[scored.token]])], -1)


def test_the_tokenizer_is_that_of_the_directory_or_the_one_given(tmp_path):
    write("llama", tmp_path)
    with opened(tmp_path) as model, pytest.raises(ValueError, match=r"has no tokenizer\.json\. Give one: --tokenizer"):
        model.codec.encode("a")
    with opened(tmp_path, tokenizer=TokenizerWish("bytes")) as model:
        assert model.codec.encode("a") == [97] and model.engine.codec is model.codec
    lost = TokenizerWish("lost.json")
    with (
        pytest.raises(ValueError, match=r"--tokenizer is lost\.json, and there is no such file here"),
        opened(tmp_path, tokenizer=lost),
    ):
        pass
    sentencepiece().save(str(tmp_path / "tokenizer.json"))
    with opened(tmp_path) as model:
        assert model.codec.decode(model.codec.encode("once upon")) == "once upon" and model.is_first


def test_every_case_can_be_opened():
    assert {"gpt2", "bloom"} <= set(CASES)
