"""What the server counts, and how Prometheus reads it."""

import pytest
from prometheus_client.parser import text_string_to_metric_families

from megatrain.inference.requests import Answer, Scored
from megatrain.serving.answer_signals import is_refusal, repetition, script
from megatrain.serving.desk import Desk
from megatrain.serving.exposition import exposed
from megatrain.serving.mail import Mailbox
from megatrain.serving.meters import Distribution, Meters, Timed, one_two_five
from megatrain.serving.replica import AnswerPart


def tokens(count):
    return tuple(Scored(number, -0.5, True) for number in range(count))


def answer(count, finish="stop"):
    return Answer(tokens(count), "", finish, None, (), 0)


def test_bounds_of_lengths():
    assert one_two_five(256) == (1, 2, 5, 10, 20, 50, 100, 200)


def test_a_distribution_counts_what_is_at_most_each_bound():
    found = Distribution((1, 2, 5))
    for value in (0.5, 1, 1.5, 7):
        found.observe(value)
    found.observe(2, times=3)
    assert found.buckets() == [("1.0", 2), ("2.0", 6), ("5.0", 6), ("+Inf", 7)] and found.sum == 16


def test_the_times_of_a_request():
    meters = Meters()
    meters.measure_lengths(100)
    timed = Timed(10.0, 7)
    timed.started = 10.5
    meters.part(timed, AnswerPart(0, tokens(1)), 11.0)
    meters.part(timed, AnswerPart(0, tokens(3)), 11.6)
    meters.part(timed, AnswerPart(0, tokens(1), answer=answer(5)), 12.0)
    assert (meters.first_token.sum, meters.queued.sum, meters.prefill.sum) == pytest.approx((1.0, 0.5, 0.5))
    assert (meters.decode.sum, meters.whole.sum) == pytest.approx((1.0, 2.0))
    assert meters.between_tokens.sum == pytest.approx(1.0) and meters.between_tokens.buckets()[-1] == ("+Inf", 4)
    assert (meters.prompt_tokens, meters.generated_tokens, dict(meters.finished)) == (7, 5, {"stop": 1})
    assert meters.answer_lengths.buckets()[:3] == [("1.0", 0), ("2.0", 0), ("5.0", 1)]


def test_names_that_dashboards_of_vllm_ask_for():
    desk = Desk(Mailbox(), 4, 4)
    families = {family.name: family for family in text_string_to_metric_families(exposed(desk, "tiny", {}).decode())}
    gauges = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    counters = (
        "prompt_tokens",
        "generation_tokens",
        "request_success",
        "num_preemptions",
        "prefix_cache_queries",
        "prefix_cache_hits",
    )
    times = (
        "time_to_first_token",
        "inter_token_latency",
        "e2e_request_latency",
        *(f"request_{x}_time" for x in ("queue", "prefill", "decode")),
    )
    histograms = (*(f"{name}_seconds" for name in times), "request_prompt_tokens", "request_generation_tokens")
    kinds = dict.fromkeys(gauges, "gauge") | dict.fromkeys(counters, "counter") | dict.fromkeys(histograms, "histogram")
    assert {name: families[f"vllm:{name}"].type for name in kinds} == kinds
    assert all(sample.labels["model_name"] == "tiny" for family in families.values() for sample in family.samples)


def read(server):
    text = server.ask("/metrics")[1]
    return {(s.name, *sorted(s.labels.items())): s.value for f in text_string_to_metric_families(text) for s in f.samples}


def test_counts_are_those_of_the_client(server):
    before = read(server)
    prompts = [
        {"prompt": "x" * (1 + n % 20), "max_tokens": 1 + n % 7, "seed": n, "n": 1 + n % 2, "stop": "z"} for n in range(100)
    ]
    answers = [server.ask("/v1/completions", body)[1] for body in prompts]
    assert server.ask("/v1/completions", {"prompt": "x", "n": 0})[0] == 400
    after = read(server)

    def grown(name, **labels):
        return sum(
            value - before.get(key, 0) for key, value in after.items() if key[0] == name and set(labels.items()) <= set(key[1:])
        )

    choices = [choice for reply in answers for choice in reply["choices"]]
    assert grown("vllm:generation_tokens_total") == sum(reply["usage"]["completion_tokens"] for reply in answers)
    assert grown("vllm:prompt_tokens_total") == sum(len(body["prompt"]) * body["n"] for body in prompts)  # each choice reads it
    for reason in ("stop", "length"):
        assert grown("vllm:request_success_total", finished_reason=reason) == sum(c["finish_reason"] == reason for c in choices)
    assert (
        grown("vllm:e2e_request_latency_seconds_count")
        == grown("vllm:time_to_first_token_seconds_count")
        == len(choices)
        == 150
    )
    assert grown("megatrain_errors_total", status="400") == 1


@pytest.mark.parametrize(
    ("text", "refuses"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("As an AI language model, I have no opinion.", True),
        ("抱歉，我无法提供这个信息。", True),
        ("作为一个人工智能，我不能回答。", True),
        ("I cannot answer that.", True),
        ("The answer is 42.", False),
        ("她说对不住大家。今天天气很好。", False),
        ("x" * 300 + "I'm sorry, but no", False),
    ],
)
def test_refusals(text, refuses):
    assert is_refusal(text) == refuses


def test_repetition_and_scripts():
    assert (repetition([1, 2, 3]), repetition(list(range(20))), repetition([7] * 13)) == (0, 0, 0.9)
    texts = {"Hello": "latin", "你好 hi": "han", "こんにちは世界": "kana", "привет": "cyrillic", "123": "other", "": "other"}
    assert {text: script(text) for text in texts} == texts
