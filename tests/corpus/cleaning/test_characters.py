"""Characters: misread lines, Unicode forms, controls and what is not seen."""

from collections import Counter

import pytest

from megatrain.corpus.cleaning.characters import in_form, mended, with_line_feeds, without_controls, without_controls_of_code

CHINESE = "人工智能的发展改变世界了"


def told(function, *arguments):
    counts = Counter()
    return function(*arguments, counts), {name: number for name, number in counts.items() if number}


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "mac-roman", "cp1251"])
def test_utf8_that_was_read_in_another_encoding(encoding):
    text = "Привет мир, как дела" if encoding == "cp1251" else "It’s “fine, naïve café"
    wrong = text.encode().decode(encoding)
    assert told(mended, f"plain\n{wrong}\nçà et là, «café» É»") == (f"plain\n{text}\nçà et là, «café» É»", {"mojibake": 1})


def test_text_that_was_read_well_stays():
    for text in (
        "çà et là, «café» à “Paris” – 5 €",
        "Россия и СССР: Рёв",
        "Ä Ö Ü ß, Ø Å",
        CHINESE,
        "鍏 is one letter",
        "Tiếng Việt",
    ):
        assert told(mended, text) == (text, {})


def test_utf8_that_was_read_as_gbk():
    whole = "人工智能的发展改变世界"  # 33 bytes and a line's end that pairs with the last
    wrong = f"{whole}了".encode().decode("gb18030")
    assert told(mended, f"a\n{wrong}\nb") == (f"a\n{whole}了\nb", {"mojibake": 1})
    lost = whole.encode().decode("gbk", "replace")
    assert told(mended, f"a\n{lost}\nb") == ("a\nb", {"unreadable": 1})
    assert told(mended, "a\n锟斤拷锟斤拷\nb") == ("a\nb", {"unreadable": 1})


def test_forms():
    assert told(in_form, "e\u0301ﬁ", "NFC") == ("éﬁ", {"form": 1})
    assert told(in_form, "e\u0301ﬁＡ", "NFKC") == ("éfiA", {"form": 1})
    assert told(in_form, "éﬁ", "NFC") == ("éﬁ", {})


CASES = {
    "c\x0bd\x0ce\x85f\u2028g\u2029h": "c\nd\ne\nf\ng\nh",
    "a\0b\x07\x1b[0m\x7f\x9f\ufffe\ufdd0": "ab[0m",
    "\ufeffzero\u200bwidth\u2060 soft\xadhyphen\u200e\u202e": "zerowidth softhyphen",
    "a\u200db\u200c": "ab",
    "क\u200dष می\u200cخواهم 👩\u200d👧 ❤\ufe0f\u200d🔥": "क\u200dष می\u200cخواهم 👩\u200d👧 ❤\ufe0f\u200d🔥",
    "x\U000e0041\U000e0042 🏴\U000e0067\U000e0062\U000e007f": "x 🏴\U000e0067\U000e0062\U000e007f",
    "tab\tand \ufffd stay": "tab\tand \ufffd stay",
}


@pytest.mark.parametrize("text", CASES, ids=ascii)
def test_controls_and_what_is_not_seen(text):
    once = without_controls(text, Counter())
    assert once == CASES[text]
    assert without_controls(once, Counter()) == once


def test_what_was_removed_is_counted():
    assert told(without_controls, "a\0\0b\u200b") == ("ab", {"controls": 2, "invisible": 1})


def test_ends_of_lines():
    assert with_line_feeds("a\r\nb\r\rc\n\r") == "a\nb\n\nc\n\n"


def test_code_keeps_form_feeds_and_what_strings_may_hold():
    assert told(without_controls_of_code, "\ufeffa\n\x0cb\0\t'\u200b\x85'") == ("a\n\x0cb\t'\u200b\x85'", {"controls": 1})
