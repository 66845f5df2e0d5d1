"""Lines that are no text of a page but its frame: menus, buttons to share, cookie banners, notes on copyright; English and Chinese.

A line is compared as a whole, without case, blanks and marks at its ends. Three lists, which a file of the user's extends:

    alone     lines that go wherever they stand: `read more`, `上一篇`
    begins    beginnings of lines of up to 200 letters that go: `copyright ©`, `责任编辑`
    in menus  words that go only beside others: three such lines in a row, or one line of three of them parted by `|`, `·` or `»`

Lines that may be code stay.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from megatrain.corpus.cleaning.spacing import INDENTED, fenced_lines

LONGEST = 200
"""Letters of a line that may be boilerplate, at most."""
ROW = 3
"""Words of a menu, at least."""
ENDS = " \t\xa0\u3000|·•»›>«‹<-–—_*#:：.。…!！,，、[]【】()（）→←▲▼+=~\"'“”"
"""Marks and blanks that do not count at the ends of a line."""
PARTS = ("|", "·", "»", "│", "｜")

ALONE = """
read more | continue reading | read the full article | read full story | click here | click here to read more | learn more
show more | see more | view more | load more | share this | share this article | share this post | share on facebook
share on twitter | tweet this | pin it | email this | print this page | skip to content | skip to main content
skip to navigation | jump to navigation | toggle navigation | back to top | return to top | scroll to top
all rights reserved | privacy policy | cookie policy | terms of use | terms of service | terms and conditions | accept cookies
accept all cookies | accept all | reject all | manage cookies | cookie settings | i accept | got it | leave a comment
leave a reply | post a comment | no comments yet | add to cart | add to wishlist | items in cart | subscribe now
subscribe to our newsletter | sign up for our newsletter | follow us on twitter | follow us on facebook | like us on facebook
related posts | related articles | you may also like | recommended for you | advertisement | sponsored content | loading
please wait | javascript is disabled | please enable javascript | this page requires javascript
enable javascript to view this page | 展开 | 展开全文 | 展开更多 | 收起 | 收起全文 | 更多 | 更多>> | 查看更多 | 查看全文
阅读全文 | 阅读更多 | 阅读原文 | 点击查看 | 点击查看更多 | 点击阅读全文 | 点击加载更多 | 加载更多 | 加载中 | 正在加载 | 上一篇
下一篇 | 上一页 | 下一页 | 上一章 | 下一章 | 返回顶部 | 回到顶部 | 返回首页 | 返回列表 | 返回目录 | 关闭窗口 | 打印本页
加入收藏 | 设为首页 | 收藏本站 | 版权所有 | 分享到 | 分享到微信 | 分享到微博 | 分享到朋友圈 | 扫一扫 | 扫码关注 | 扫描二维码
微信扫一扫 | 关注我们 | 关注公众号 | 点击关注 | 长按识别二维码 | 举报 | 我要评论 | 发表评论 | 网友评论 | 暂无评论 | 相关阅读
相关文章 | 相关新闻 | 相关推荐 | 推荐阅读 | 热门推荐 | 热门文章 | 猜你喜欢 | 为您推荐 | 延伸阅读 | 免责声明 | 广告 | 点赞
立即购买 | 加入购物车 | 立即注册 | 忘记密码 | 登录/注册 | 登录注册 | 展開 | 展開全文 | 閱讀全文 | 閱讀更多 | 查看更多內容
上一頁 | 下一頁 | 版權所有 | 返回頂部 | 分享到臉書 | 相關文章 | 延伸閱讀 | 推薦閱讀 | 關注我們 | 廣告 | 載入中
"""
BEGINS = """
copyright © | copyright (c) | © copyright | all rights reserved. | we use cookies | this site uses cookies
this website uses cookies | our website uses cookies | by continuing to use this site | by using this site, you agree
by clicking accept | your browser does not support | please enable javascript | please enable cookies
sign up for our newsletter | subscribe to our newsletter | follow us on | share on facebook | share on twitter
click to share on | powered by wordpress | you must be logged in to | posted in uncategorized | tagged with: | 版权所有
版权声明 | 版權所有 | 责任编辑 | 責任編輯 | 上一篇： | 上一篇: | 下一篇： | 下一篇: | 分享到： | 分享到: | 未经授权不得转载
未经许可不得转载 | 转载请注明 | 转载请联系 | 本文来源： | 文章来源： | 扫描二维码 | 扫一扫关注 | 长按二维码 | 微信扫码
关注微信公众号 | 点击上方蓝字 | 声明：本文 | 声明：该文 | 免责声明： | 特别声明： | 如有侵权 | 网站备案号 | 京icp备 | 沪icp备
粤icp备 | 浙icp备 | 苏icp备 | 京公网安备 | 本站使用cookie | 您的浏览器不支持 | 请升级您的浏览器 | 客服电话： | 热线电话：
"""
MENU = """
home | about | about us | contact | contact us | news | blog | menu | search | login | log in | log out | sign in | sign up
register | subscribe | share | tweet | facebook | twitter | instagram | linkedin | youtube | pinterest | reddit | whatsapp
print | next | previous | prev | close | reply | like | comments | help | faq | products | services | support | careers | jobs
press | sitemap | site map | shop | store | cart | checkout | my account | account | privacy | terms | cookies | rss | forum
forums | gallery | archive | archives | categories | tags | downloads | download | events | sports | business | politics
entertainment | video | videos | photos | 首页 | 新闻 | 财经 | 体育 | 娱乐 | 科技 | 军事 | 国际 | 国内 | 社会 | 视频 | 图片
汽车 | 房产 | 教育 | 健康 | 旅游 | 游戏 | 论坛 | 博客 | 微博 | 微信 | 登录 | 注册 | 退出 | 搜索 | 帮助 | 评论 | 收藏 | 打印
关闭 | 分享 | 关于我们 | 联系我们 | 网站地图 | 产品 | 服务 | 招聘 | 人才招聘 | 友情链接 | 网站首页 | 公司简介 | 新闻中心
产品中心 | 加入我们 | 意见反馈 | 隐私政策 | 用户协议 | 法律声明 | 设置 | 我的 | 下载 | 客户端 | 手机版 | 首頁 | 新聞 | 財經
體育 | 娛樂 | 國際 | 影片 | 登入 | 註冊 | 搜尋 | 關於我們 | 聯絡我們 | 下載
"""


def words_of(lines: str) -> Iterable[str]:
    """The entries of a list above."""
    return (word.strip() for line in lines.splitlines() for word in line.split(" | ") if word.strip())


def key(line: str) -> str:
    """A line as it is compared."""
    return line.strip(ENDS).casefold()


def heads_of(lines: Iterable[str]) -> frozenset[str]:
    """First two letters of some lines, small, capital and as at the beginning of a sentence: other lines are text at once."""
    heads = {line[:2] for line in lines}
    return frozenset(of for head in heads for of in (head, head.upper(), head.capitalize()))


class Boilerplate:
    """Lists of lines that go: those above and the user's, of which one that ends in `*` is the beginning of lines.

    Raises ValueError for a line that has no letter.
    """

    def __init__(self, own: Sequence[str] = ()) -> None:
        for line in own:
            if not key(line):
                raise ValueError(
                    f"the boilerplate line {line[:40]!r} has no letter or digit, so it would stand for any line of marks. Remove it"
                )
        started = [line[:-1] for line in own if line.endswith("*")]
        self.alone = frozenset(key(line) for line in (*words_of(ALONE), *own) if not line.endswith("*"))
        self.begins = tuple(sorted({line.lstrip(ENDS).casefold() for line in (*words_of(BEGINS), *started)}))
        self.menu = frozenset(map(key, words_of(MENU)))
        self.longest = max(map(len, (*self.alone, *self.menu)))
        self.heads, self.long_heads = heads_of((*self.alone, *self.begins, *self.menu)), heads_of(self.begins)
        letters = {head[:1] for head in self.heads} | set(ENDS)
        self.begun = self.heads | {end + letter for end in ENDS for letter in letters}
        """How a line may begin: with a head, or with a mark and what may follow it."""

    def without(self, text: str, counts: Counter[str]) -> str:
        """A text without such lines."""
        lines = text.split("\n")
        parts = [part for part in PARTS if part in text]
        found: dict[int, str] = {}
        begun, indented = self.begun, INDENTED[0]
        for number in [number for number, line in enumerate(lines) if line[:2] in begun and line[:4] != indented]:
            line = lines[number]
            if len(line) > LONGEST or line.startswith(INDENTED):
                continue
            head = line.lstrip(ENDS)[:2]
            if head in self.long_heads or (head in self.heads and (parts or len(line) < 2 * self.longest)):
                kind = self._kind(key(line), parts)
                if kind:
                    found[number] = kind
        if not found:
            return text
        fenced = fenced_lines(text, lines)
        found = {number: kind for number, kind in found.items() if number not in fenced}
        removed = {number for number, kind in found.items() if kind == "alone"} | _rows(lines, found)
        counts["boilerplate"] += len(removed)
        return "\n".join([line for number, line in enumerate(lines) if number not in removed])

    def _kind(self, word: str, parts: Sequence[str]) -> str:
        """`alone` for a line that goes, `menu` for one that goes beside others, "" for text."""
        if word in self.alone or word.startswith(self.begins):
            return "alone"
        if word in self.menu:
            return "menu"
        for part in parts:
            words = [key(of) for of in word.split(part)] if part in word else ()
            if len(words) >= ROW and all(of in self.menu or of in self.alone for of in words):
                return "alone"
        return ""


def _rows(lines: Sequence[str], found: dict[int, str]) -> set[int]:
    """The lines that stand in rows of at least three lines of boilerplate; empty lines between them do not count."""
    rows: set[int] = set()
    row: list[int] = []
    for number in sorted(found):
        if row and any(line.strip() for line in lines[row[-1] + 1 : number]):
            row = []
        row.append(number)
        if len(row) >= ROW:
            rows.update(row)
    return rows


def read_lines(path: str) -> list[str]:
    """The lines of a file of the user's that are not empty; `#` begins a comment. Raises ValueError where it is no UTF-8."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8: byte {error.start} is {error.object[error.start]:#04x}. Write it as UTF-8"
        ) from None
    return [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
