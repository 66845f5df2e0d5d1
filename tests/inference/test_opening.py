"""A Hugging Face directory or a checkpoint is opened with its tokenizer, and writes what transformers writes."""

import json

import pytest
import torch
from hf_models import CASES, made, write
from reference_glm import ChatGLM, spread
from safetensors.torch import save_file
from tiny_checkpoint import arguments
from tokenizer_models import sentencepiece

from megatrain.chat.conversation import conversation_of
from megatrain.chat.templates import open_chat
from megatrain.inference.opening import TokenizerWish, opened
from megatrain.inference.requests import Request, Sampling
from megatrain.serving.opening_served import served_of
from megatrain.verbs.generate import main
from megatrain.verbs.prompt_plans import Planner
from megatrain.verbs.prompt_rows import PromptRow, Wishes

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
    with (
        opened(tmp_path) as model,
        pytest.raises(ValueError, match=r"has no tokenizer\.json and no tokenizer\.model\. Give one: --tokenizer"),
    ):
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


def test_the_first_chatglm_answers_a_plain_text_behind_its_marks(tmp_path, capsys):
    gmask, sop, v = 260, 261, 264
    reference = spread(ChatGLM(2, 32, 4, v))
    config = {"num_layers": 2, "hidden_size": 32, "inner_hidden_size": 128, "num_attention_heads": 4, "vocab_size": v}
    config |= {"model_type": "chatglm", "max_sequence_length": 16, "layernorm_epsilon": 1e-5, "position_encoding_2d": True}
    ids = {"bos_token_id": sop, "eos_token_id": 262, "mask_token_id": 259, "gmask_token_id": gmask}
    (tmp_path / "config.json").write_text(json.dumps({**config, **ids}))
    save_file(reference.state_dict(), tmp_path / "model.safetensors", {"format": "pt"})
    tokens = [97, 98, gmask, sop]
    for answered in range(1, 6):
        text, inside = [0, 1, 2, *[2] * answered], [0, 0, 0, *range(1, answered + 1)]
        with torch.no_grad():
            logits = reference(torch.tensor([tokens]), torch.tensor([[text, inside]]), torch.tensor([3]))
        tokens.append(int(logits[0, -1].argmax()))
    main(arguments(tmp_path, "ab", tokenizer="bytes", greedy=True, max_tokens=5, output="-"))
    row = json.loads(capsys.readouterr().out)
    assert (row["prompt_tokens"], row["tokens"]) == (4, tokens[4:])
    main(arguments(tmp_path, "ab", tokenizer="bytes", eod="none", greedy=True, max_tokens=99, output="-"))
    assert len(json.loads(capsys.readouterr().out)["tokens"]) == 12  # up to the last position
    with pytest.raises(ValueError, match=r"^the prompt has 17 tokens, and model\.max_positions is 16\. Shorten it\.$"):
        main(arguments(tmp_path, "a" * 15, tokenizer="bytes"))
    with opened(tmp_path, tokenizer=TokenizerWish("bytes")) as model:
        assert served_of(model, None, None).encode("ab") == (97, 98, gmask, sop)
        chat = open_chat(model.codec, model.tokenizer_folders, "chatglm", model.named_ids)
        assert chat.prompt(conversation_of([{"role": "user", "content": "ab"}])).tokens == (97, 98, gmask, sop)
        assert (
            262 in chat.ends
            and 262 in Planner(model, None).prompted(PromptRow("", Wishes(), "ab")).plan(0, print).send(None)[0].request.ends
        )
        assert model.closed([97, 259]) == [97, 259, sop] and model.closed([97, gmask, sop]) == [97, gmask, sop]
