"""Signals for Chinese: MAP-NEO's, ChineseWebText's and those of ROOTS."""

import math

import pytest
import reference_rules as reference
from hypothesis import given, settings
from rule_texts import texts

from megatrain.corpus.document import Document, Tally
from megatrain.corpus.rules import chinese
from megatrain.corpus.rules.judge import rules_step
from megatrain.corpus.rules.repetition import Repeats
from megatrain.corpus.rules.view import View

GOOD = (
    "清晨的阳光洒在小城的街道上，人们开始了新的一天。孩子们背着书包走向学校，老人在公园里散步、下棋。市场里很热闹，卖菜的大叔大声招呼着客人，"
    "空气中有刚出炉的包子的香味。一位年轻的老师站在教室门口，微笑着等待她的学生。她知道，每个孩子都有自己的梦想，而她要做的，是帮助他们找到通向梦想的路。"
)


def view(text: str) -> View:
    return View(text, Repeats())


def test_the_signals_of_map_neo() -> None:
    found = chinese.map_neo(view("【广告】##１２号。。。\n●点击更多"), "han")
    assert found == {
        "brackets": 2 / 18,
        "sentences": 2,
        "letters": 18,
        "hashes": 1 / 18,
        "ellipses": 1 / 18,
        "digits": 2 / 10,  # 广告12号, the line feed, 点击更多: not 【】##...●
        "more": 1,
        "bullets": 1 / 2,
        "marks": 5 / 18,
        "unique": 15 / 18,
        "entropy": pytest.approx(-(13 * math.log(1 / 18) + 2 * math.log(2 / 18) + 3 * math.log(3 / 18)) / 18),
    }


def test_signals_that_fall_with_the_length_of_a_text_are_those_of_its_beginning() -> None:
    long = "".join(chr(0x4E00 + i % 2000) for i in range(50_000))
    assert chinese.map_neo(view(long), "han")["unique"] == 0.2
    assert chinese.map_neo(view(long), "han")["entropy"] == pytest.approx(math.log(2000))


def test_the_signals_of_letters_in_a_row() -> None:
    found = chinese.letters(view("好好好好"), "han")
    assert (found["top_2"], found["top_3"], found["top_4"]) == (4 / 4, 3 / 4, 0)
    assert chinese.letters(view("abcdeabcde"), "han")["again_5"] == 5 / 10


def test_the_signals_of_chinese_web_text_and_of_roots() -> None:
    assert chinese.web_text(view("這是 ab\n12"), "han") == {
        **{"letters": 8, "line_letters": 4, "han": 2 / 8, "traditional": 1, "again_13": 0}
    }
    assert chinese.web_text(view("一二三四五六七八九十甲乙丙丁" * 2), "han")["again_13"] == 4 / 16
    assert chinese.roots(view("aaab 1。"), "han")["special"] == 3 / 7
    assert chinese.roots(view("abcabc"), "han")["letters_3"] == 2 / 4


@pytest.mark.parametrize("text", ["", " ", "\n\n"])
def test_an_empty_text_has_signals(text: str) -> None:
    for measure in (chinese.map_neo, chinese.letters, chinese.web_text, chinese.roots):
        assert all(math.isfinite(number) for number in measure(view(text), "han").values())


def test_the_signals_are_those_written_plainly() -> None:
    repeats = Repeats()

    @settings(max_examples=80, deadline=None)
    @given(texts)
    def check(text: str) -> None:
        one = View(text, repeats)
        assert chinese.map_neo(one, "han") == pytest.approx(reference.map_neo(text), rel=1e-12, abs=1e-12)
        assert chinese.letters(one, "han") == reference.letters(text)
        web_text = chinese.web_text(one, "han")
        assert web_text == reference.web_text(text) | {"traditional": web_text["traditional"]}
        for table in ("han", "marks"):
            assert chinese.roots(one, table) == reference.roots(text, table)

    check()


def refused(text: str, *names: str) -> list[str]:
    return list(rules_step(names, {}, "jieba" if names == ("map_neo",) else None)(Document(text, "source", "file", 0), Tally()))


def test_good_chinese_stays_and_bad_goes() -> None:
    assert refused(GOOD, "fineweb2_zh", "roots_zh", "wudao", "chinese_web_text") == ["chinese_web_text.letters"]
    assert refused(GOOD, "map_neo") == []
    assert refused("点击 更多 AAA 展开\n" * 20, "wudao.han", "roots_zh.words_again", "map_neo.more") == [
        *("wudao.han", "roots_zh.words_again", "map_neo.more")
    ]


def test_lines_of_few_characters_go() -> None:
    document = Document(f"首页\n{GOOD}\nCopyright 2020 (c) 某某公司 版权所有\n", "source", "file", 0)
    rules_step(["wudao"], {})(document, Tally())
    assert document.text == GOOD
    document.text = f"首页。\n{GOOD}\n没有句号"
    rules_step(["map_neo"], {})(document, Tally())
    assert document.text == GOOD
