"""Lines of a page's frame: which go, which stay, and a user's own."""

from collections import Counter

import pytest

from megatrain.corpus.cleaning.boilerplate import Boilerplate, read_lines

PAGE = """首页 | 新闻 | 财经
Skip to content

Home
About us

Contact
A storm hit the coast on Monday.
Read more »
Read more about the storm in our report.
【展开全文】
更多的人来了。
上一篇：昨天的新闻
责任编辑：王小明
版权所有 © 2020 某公司
Copyright © 2020 Someone. All rights reserved.
We use cookies to make this site better.
The sea is calm again.
Search
The search for survivors goes on.
Copyright law is old.
    read more"""

KEPT = """

A storm hit the coast on Monday.
Read more about the storm in our report.
更多的人来了。
The sea is calm again.
Search
The search for survivors goes on.
Copyright law is old.
    read more"""


def test_a_page_without_its_frame():
    counts = Counter()
    assert Boilerplate().without(PAGE, counts) == KEPT
    assert counts == {"boilerplate": 12}
    assert Boilerplate().without(KEPT, Counter()) == KEPT


def test_words_of_menus_stay_but_in_rows_of_three():
    assert Boilerplate().without("Search\nHome\ntext\nNews", Counter()) == "Search\nHome\ntext\nNews"
    assert Boilerplate().without("text\nSearch\n\nHome\nLog in\nend", Counter()) == "text\n\nend"
    assert Boilerplate().without("a | b | c\nhome | news | weather", Counter()) == "a | b | c\nhome | news | weather"


def test_long_lines_stay():
    line = "we use cookies " + "and more " * 30
    assert Boilerplate().without(line, Counter()) == line


def test_own_lines(tmp_path):
    path = tmp_path / "own.txt"
    path.write_bytes("\ufeff# comment\nOur Shop\n\n本站声明*\n".encode())
    mine = Boilerplate(read_lines(str(path)))
    assert mine.without("our shop!\nOur shop is open.\n本站声明：请看\n完", Counter()) == "Our shop is open.\n完"


def test_bad_files_and_lines(tmp_path):
    path = tmp_path / "own.txt"
    path.write_bytes("好".encode("gbk"))
    with pytest.raises(ValueError, match=r"own.txt is not UTF-8: byte 0 is 0xba. Write it as UTF-8"):
        read_lines(str(path))
    for line in ("---", "*", ":*"):
        with pytest.raises(ValueError, match="has no letter or digit"):
            Boilerplate([line])
