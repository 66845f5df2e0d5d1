"""The chat page: one file, nothing from elsewhere; and in a browser (launch/browser_checks.sh)."""

import json
import os
import re
import time
from pathlib import Path

import pytest
import served
from playwright.sync_api import expect, sync_playwright
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from megatrain.serving.chat_page import page

HTML = page()[0].decode()
SVG = "http://www.w3.org/2000/svg"
"""A name, which nobody looks up."""


def test_the_page_is_one_short_file_that_needs_nothing():
    assert len(HTML.splitlines()) < 300
    assert re.findall(r"""(?:src|href)\s*=|@import|url\(|//[a-z]+\.[a-z]""", HTML.replace(SVG, "")) == []
    assert "innerHTML" not in HTML and "insertAdjacentHTML" not in HTML and "document.write" not in HTML
    assert not re.search(
        r"<\w[^>]*\son\w+=|<\w[^>]*\sstyle=", HTML
    )  # neither handlers nor styles within tags: the policy forbids them


def test_the_page_says_what_may_run_in_it(server):
    status, text, headers = server.ask("/")
    assert status == 200 and text == HTML and headers["content-type"] == "text/html; charset=utf-8"
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy and policy.count("'sha256-") == 2
    assert "unsafe" not in policy and "access-control-allow-origin" not in {name.lower() for name in headers}


def test_the_page_says_when_to_use_another_server():
    for said in ("megatrain export RUN hf", "vllm serve hf", "python -m sglang.launch_server --model-path hf", "--serve-check"):
        assert said in HTML


TEXT = (
    "今天天气很好，我们去公园散步。春天来了，花都开了。人工智能可以帮助人们学习和工作。从前有一座山，山里有一座庙，庙里有一个老和尚在讲故事。"
    "The weather is fine today, and the children play in the garden. A model writes one token after the other. "
    "语言模型一个字一个字地写文章。"
)


@pytest.fixture(scope="module")
def slow_server(tmp_path_factory):
    """A server whose model writes words, of which a long answer takes seconds."""
    folder = tmp_path_factory.mktemp("words")
    library = Tokenizer(models.BPE())
    library.pre_tokenizer, library.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=800, min_frequency=1, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"], show_progress=False
    )
    library.train_from_iterator([TEXT[at : at + 12] for at in range(0, len(TEXT), 3)], trainer)
    library.save(str(folder / "tokenizer.json"))
    (folder / "template.jinja").write_text(served.TEMPLATE)
    sizes = {"seq_length": 8192, "vocab_size": library.get_vocab_size(), "hidden_size": 32, "num_layers": 8}
    run = served.save_model(folder / "storyteller", model=sizes, data={"tokenizer": str(folder / "tokenizer.json")})
    with served.running(folder, run, "--chat-template", str(folder / "template.jinja"), "--cache-tokens", "20000") as running:
        yield running


@pytest.mark.browser
def test_a_person_chats_in_a_browser(slow_server, tmp_path):
    server, shots = slow_server, Path(os.environ.get("MEGATRAIN_SCREENSHOTS", tmp_path))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=os.environ.get("CHROMIUM", "/usr/bin/chromium"), args=["--no-sandbox"]
        )
        page = browser.new_page(viewport={"width": 1280, "height": 800}, color_scheme="light")
        faults = []
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda line: faults.append(line.text) if line.type == "error" else None)
        page.goto(server.url)
        expect(page.locator("#facts")).to_have_text("8,192 tokens of context")
        page.screenshot(path=shots / "empty.png")
        page.click("#open")
        page.fill("#system", "请用中文回答。")
        page.fill("#max_tokens", "60")
        page.screenshot(path=shots / "settings.png")
        page.click("text=Done")
        first = ask(page, "你好，你会说中文吗？")
        page.click("[title='A bad answer']")
        expect(page.locator(".below span")).to_have_text("kept in feedback.jsonl")
        row = json.loads((server.folder / "feedback.jsonl").read_text().splitlines()[-1])
        assert (row["rating"], row["answer"], row["messages"]) == (
            "down",
            first,
            [{"role": "user", "content": "你好，你会说中文吗？"}],
        )
        stop_while_it_streams(page, server)
        assert faults == []
        photograph(page, shots)
        browser.close()


def ask(page, question):
    """Type a question; the answer, once it is whole."""
    page.fill("#text", question)
    page.press("#text", "Enter")
    expect(page.locator("article.user .text").last).to_have_text(question)
    expect(page.locator("article.assistant .below").last).to_contain_text("tokens")
    return page.locator("article.assistant .text").last.text_content()


def stop_while_it_streams(page, server):
    """Stop a long answer half-way: what was shown stays, and the engine is free at once."""
    page.click("#open")
    page.fill("#max_tokens", "4000")
    page.click("text=Done")
    page.fill("#text", "讲一个很长的故事")
    page.press("#text", "Enter")
    streamed = page.locator("article.assistant .text").nth(1)
    expect(streamed).not_to_be_empty()
    before = streamed.text_content()
    expect(streamed).not_to_have_text(before)  # it goes on
    expect(page.locator("#send")).to_have_text("Stop")
    page.press("body", "Escape")
    expect(page.locator(".below span").last).to_contain_text("stopped")
    expect(page.locator("#send")).to_have_text("Send")
    assert len(streamed.text_content()) > len(before)
    began = time.monotonic()
    while server.get("/health")["open"] or server.get("/health")["blocks_used"]:
        assert time.monotonic() - began < 1


@pytest.mark.browser
def test_a_conversation_holds_what_was_answered_and_nobody_elses_code(slow_server):
    """A model may write anything; what failed and what another conversation left is not sent again."""
    hostile = (
        "<img src=x onerror='window.caught=1'><script>window.caught=1</script>\u202e\u0000\x1b[31m" + "長" * 3000 + "w" * 3000
    )
    replies = [
        (400, json.dumps({"error": {"message": "<b>too long</b>"}})),
        (200, event({"content": hostile}, "stop") + "data: [DONE]\n\n"),
        (200, event({"content": "half"}, None)),
    ]
    sent = []

    def reply(route):
        sent.append([each["content"] for each in route.request.post_data_json["messages"]])
        status, body = replies.pop(0)
        route.fulfill(status=status, body=body, content_type="text/event-stream" if status == 200 else "application/json")

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=os.environ.get("CHROMIUM", "/usr/bin/chromium"), args=["--no-sandbox"]
        )
        page = browser.new_page(viewport={"width": 360, "height": 760})
        page.goto(slow_server.url)
        page.route("**/v1/chat/completions", reply)
        told = page.locator(".below span")
        say(page, "one")
        expect(told.last).to_have_text("<b>too long</b>")
        say(page, "two")
        shown = page.locator("article.assistant .text").last
        expect(shown).to_contain_text("<script>window.caught=1</script>")
        assert shown.text_content() == hostile and page.evaluate("window.caught === undefined")
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        say(page, "three")
        expect(told.last).to_have_text("The answer was cut: the connection has ended.")
        assert sent == [["one"], ["two"], ["two", hostile, "three"]]
        page.unroute("**/v1/chat/completions")
        page.click("#new")
        say(page, "讲一个很长的故事")
        expect(page.locator("article.assistant .text").last).not_to_be_empty()
        page.click("#new")  # while it is answered
        expect(page.locator("#send")).to_have_text("Send")
        with page.expect_request("**/v1/chat/completions") as caught:
            say(page, "anew")
        assert [each["content"] for each in caught.value.post_data_json["messages"]] == ["anew"]
        browser.close()


def say(page, question):
    page.fill("#text", question)
    page.press("#text", "Enter")


def event(delta, finish):
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return f"data: {json.dumps({'id': 'x', 'choices': [choice]})}\n\n"


def photograph(page, shots):
    """Pictures at two widths, light and dark; nothing is wider than the window."""
    for width in (360, 1280):
        page.set_viewport_size({"width": width, "height": 760})
        for theme in ("light", "dark"):
            page.emulate_media(color_scheme=theme)
            page.screenshot(path=shots / f"chat_{width}_{theme}.png")
            assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.click("#theme")
    assert page.evaluate("document.documentElement.dataset.theme") == "light"
