"""Fixed prompts: continued as a request alone is, and a GLM's blanks filled in their order, many prompts side by side."""

from dataclasses import replace

import engines
import pytest

from megatrain.config.asked import SamplesConfig
from megatrain.config.schema import Config, DataConfig, ModelConfig
from megatrain.data.tokenizer import load_tokenizer
from megatrain.inference.continuations import Continuations
from megatrain.inference.requests import Request, Sampling

CODEC = load_tokenizer("bytes")


def config_of(*prompts, objective="next_token", **samples):
    config = Config(data=DataConfig(objective=objective, tokenizer="bytes"))
    return replace(config, log=replace(config.log, samples=SamplesConfig(prompts, **samples)))


def engine_of(vocab_size=257, **model):
    return engines.engine_of(engines.weights_of(vocab_size=vocab_size, **model), CODEC)


def test_a_prompt_is_continued_as_its_request_alone_is():
    engine = engine_of()
    config = config_of("one", "two", max_tokens=5, temperature=0.8, top_p=0.9, seed=7)
    continuations = Continuations(config, CODEC, engine)
    written = continuations.written(engine, continuations.prompts)
    for number, text in enumerate(("one", "two")):
        sampling = Sampling(temperature=0.8, top_p=0.9)
        (alone,) = engine.run([Request(tuple(text.encode()), 5, sampling, 7 + number, ends=frozenset({256}), text=True)])
        assert written[number] == [(alone.text, len(alone.tokens), alone.finish)]
        assert continuations.prompts[number].longest >= 3 + 5


def test_blanks_are_filled_in_their_order_beside_other_prompts():
    engine = engine_of(vocab_size=257 + 7)
    prompts = ("a[MASK]b[sMASK]c", "end", "x[MASK]")
    together = Continuations(config_of(*prompts, objective="glm", max_tokens=3), CODEC, engine)
    written = together.written(engine, together.prompts)
    assert [len(of) for of in written] == [2, 1, 1]
    for prompt, of in zip(prompts, written, strict=True):
        alone = Continuations(config_of(prompt, objective="glm", max_tokens=3), CODEC, engine)
        assert alone.written(engine, alone.prompts) == [of]
    assert all(tokens <= 3 and finish in ("stop", "length") for of in written for _, tokens, finish in of)


def test_what_does_not_fit_is_named():
    engine = engine_of(seq_length=8)
    with pytest.raises(ValueError, match=r"log\.samples\.prompts\[1\]: it has 9 tokens, and model\.max_positions is 8\."):
        Continuations(config_of("short", "too long!"), CODEC, engine)
    glm = engine_of(vocab_size=257 + 7, seq_length=8)
    with pytest.raises(ValueError, match=r"log\.samples\.prompts\[0\]: the prompt has 9 tokens and 1 blanks"):
        Continuations(config_of("seven..[MASK]", objective="glm"), CODEC, glm)
    assert ModelConfig(seq_length=8).positions == 8
