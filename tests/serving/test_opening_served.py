"""What a server knows of a model: its chat template, its name, how it fills blanks."""

import re
from pathlib import Path

import jobs
import pytest
import served

from megatrain.data.tokenizer import ByteTokenizer
from megatrain.inference.opening import opened
from megatrain.inference.text_places import LEFT_TO_RIGHT
from megatrain.serving.bodies import UNSUPPORTED, UNSUPPORTED_CHAT, ChatBody, CompletionBody
from megatrain.serving.fields import parsed
from megatrain.serving.opening_served import name_of, served_of
from megatrain.serving.orders import chat_order, completion_order
from megatrain.serving.refusal import Refusal


@pytest.fixture(scope="module")
def glm_run(tmp_path_factory):
    run = tmp_path_factory.mktemp("glm") / "glm"
    return served.save_model(
        run, model={"vocab_size": 270, "family": "glm", "position": "learned_2d"}, data={"objective": "glm"}
    )


@pytest.fixture(scope="module")
def glm(glm_run):
    with opened(glm_run) as model:
        yield model


@pytest.fixture(scope="module")
def gpt(model):
    with opened(model) as found:
        yield served_of(found, None, None)


def completion(**body):
    return parsed(CompletionBody, body, UNSUPPORTED)


def test_the_name_is_the_runs():
    assert name_of(Path("runs/demo/checkpoints/step_00000200")) == "demo"
    assert name_of(Path("/models/qwen3")) == "qwen3"


def test_a_model_without_a_template_holds_no_conversations(gpt):
    assert (gpt.name, gpt.max_length, gpt.vocab_size) == ("tiny", 256, 261)
    assert re.fullmatch(r"paged attention by (torch|numba), float32 on cpu, blocks of 16 tokens", gpt.attention)
    body = parsed(ChatBody, {"messages": [{"role": "user", "content": "Hi"}]}, UNSUPPORTED_CHAT)
    with pytest.raises(
        Refusal, match=r"there is no chat template beside bytes: a base model .* Or use /v1/completions\."
    ) as caught:
        chat_order(body, gpt)
    assert caught.value.code == "no_chat_template" and caught.value.status == 400


def test_a_prompt_begins_as_the_tokenizer_says(gpt):
    assert gpt.encode("ab") == (97, 98)
    assert gpt.encode("") == (256,)  # the end of a document, for an empty prompt
    with pytest.raises(Refusal, match="prompt is empty"):
        gpt.encode("", opening=False)
    assert gpt.places((1, 2)) is LEFT_TO_RIGHT


def text_of(glm, order):
    (answer,) = glm.engine.run(order.requests)
    return ByteTokenizer().decode([each.token for each in answer.tokens])


@pytest.mark.parametrize(
    ("body", "prompt"),
    [
        ({"prompt": "def f(", "suffix": "): return 1"}, "def f([MASK]): return 1"),
        ({"prompt": "a [sMASK] b"}, "a [sMASK] b"),
        ({"prompt": "Once upon"}, "Once upon[gMASK]"),
    ],
    ids=str,
)
def test_a_glm_fills_the_blank_as_generate_does(glm, glm_run, body, prompt):
    filled = text_of(glm, completion_order(completion(**body, max_tokens=20, temperature=0), served_of(glm, None, None)))
    ended = jobs.here(str(glm_run), "--prompt", prompt, "--greedy", "--max-tokens", "20", verb="generate")
    before, after = prompt[: prompt.index("[")], prompt[prompt.index("]") + 1 :]
    assert ended.code == 0 and ended.out.rstrip("\n") == before + filled + after, ended.err


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"prompt": "a [MASK] b [MASK]"}, "there are 2 blanks, and one is filled at a time"),
        ({"prompt": "a [MASK] b", "suffix": "c"}, "there are 2 blanks"),
        ({"prompt": [1, 2], "suffix": "c"}, "a blank is filled in a text, not in token ids"),
        ({"prompt": "a", "suffix": "c", "echo": True}, "echo shows a text from left to right"),
        (
            {"prompt": "x" * 250, "suffix": "c"},
            r"that makes 270; the model's context has room for 256\. Use max_tokens=2 or fewer",
        ),
        ({"prompt": "x" * 300, "suffix": "c"}, "there is no room to fill"),
    ],
    ids=str,
)
def test_blanks_that_cannot_be_filled_are_refused(glm, body, said):
    with pytest.raises(Refusal, match=said):
        completion_order(completion(**body), served_of(glm, None, None))
