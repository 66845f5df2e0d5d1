"""All rules together: every decision is the one written plainly, and hostile text takes neither long nor much memory."""

import math
import operator
import random
import subprocess
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import reference_rules as reference
from rule_texts import random_text

from megatrain.corpus.document import Document, Tally
from megatrain.corpus.rules.judge import rules_step
from megatrain.corpus.rules.rulebook import RULES

SETS = sorted({rule.of for rule in RULES.values()} - {"language"})
BOUNDS = {"least": operator.ge, "most": operator.le, "above": operator.gt, "below": operator.lt}
EDITORS = {
    "c4": reference.c4,
    "map_neo": lambda text: reference.chinese_lines(text, wudao=False),
    "wudao": lambda text: reference.chinese_lines(text, wudao=True),
}
VOCABULARY = """
我们 他们 今天 天气 很好 的 是 在 了 和 有 人 中国 学习 工作 一个 问题 可以 没有 这个 时候 什么 现在 知道 因为 所以 發展 臺灣 12 GPU
"""


def library() -> Iterator[str]:
    """Files of the standard library, whole or the beginning of long ones."""
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        text = path.read_text(errors="replace")
        if "site-packages" not in path.parts and text:
            yield text[:6000]


def chinese(seed: int) -> str:
    """A text of sentences from a few words, some of them more than once."""
    made = random.Random(seed)
    words = VOCABULARY.split()
    few = made.sample(words, made.randint(5, len(words)))
    sentences = [
        "".join(made.choice(few) for _ in range(made.randint(2, 20))) + made.choice("。。。，！？\n") for _ in range(40)
    ]
    return "".join(made.choice(sentences) for _ in range(made.randint(5, 200)))


def plainly(text: str, of: str) -> list[str]:
    """The rules of a set that a text breaks, as written plainly."""
    left, counts = EDITORS[of](text) if of in EDITORS else (text, {})
    broken, found = [], {}
    for rule in RULES.values():
        measure, _, signal = rule.signal.partition(".")
        if rule.of == of and rule.words != "jieba" and measure not in ("line", "scores"):
            if (measure, rule.words) not in found:
                found[measure, rule.words] = counts if measure == "left" else reference.signals(left, measure, rule.words)
            if not BOUNDS[rule.bound](found[measure, rule.words][signal], rule.threshold):
                broken.append(rule.name)
    return broken


def differing(texts: list[str]) -> tuple[Counter[str], list[tuple[str, str]]]:
    """(how many texts break each rule, those where a set's rules decide otherwise than written plainly: the set and the text)."""
    broken, wrong = Counter[str](), []
    for of in SETS:
        step = rules_step([of], {})
        for text in texts:
            document = Document(text, "source", "file", 0)
            said = list(step(document, Tally()))
            broken.update(said)
            same = of not in EDITORS or document.text == EDITORS[of](text)[0]
            if said != plainly(text, of) or not same:
                wrong.append((of, text))
    return broken, wrong


def test_every_decision_is_the_one_written_plainly() -> None:
    texts = [random_text(seed, 60) for seed in range(30)] + [chinese(seed) for seed in range(10)]
    assert differing(texts)[1] == []


@pytest.mark.slow
def test_every_decision_on_2000_documents_is_the_one_written_plainly() -> None:
    files = list(library())
    texts = [*random.Random(5).sample(files, min(len(files), 1300)), *(chinese(seed) for seed in range(400))]
    texts += [random_text(seed, 250) for seed in range(2000 - len(texts))]
    broken, wrong = differing(texts)
    assert len(texts) == 2000
    assert wrong == []
    assert len(broken) > 80  # nearly every rule is broken by some, so that its decision was put to the test


HOSTILE = {
    **{
        "no blank": "'a' * n",
        "line feeds": "'\\n' * n",
        "one character": "'天' * n",
        "astral": "'𠀀' * n",
        "words": "'a ' * (n // 2)",
    },
    **{
        "combining marks": "'e' + '\\u0315\\u0316' * (n // 2)",
        "brackets": "'【' * n",
        "citations": "'[1' * (n // 2)",
        "hex": "'de ' * (n // 3)",
    },
    **{"phrases": "'javascript lorem ipsum ' * (n // 23)", "ends": '"?\')" * (n // 3)', "İ": "'İ' * n", "empty": "''"},
}
PROGRAM = """
import resource, sys, time
from megatrain.corpus.document import Document, Tally
from megatrain.corpus.rules.judge import rules_step
from megatrain.corpus.rules.language import detect

n = int(sys.argv[2])
rules_step(sys.argv[3:], {})(Document("A text.", "source", "file", 0), Tally())
text = eval(sys.argv[1])
before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
document = Document(text, "source", "file", 0)
detect(text)
rules_step(sys.argv[3:], {})(document, Tally())
print(time.process_time() - began, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.parametrize("kind", HOSTILE)
def test_every_signal_of_hostile_text_is_a_number(kind: str) -> None:
    document = Document(eval(HOSTILE[kind], {"n": 30_000}), "source", "file", 0)
    for of in SETS:
        rules_step([of], {})(document, Tally())
    assert all(math.isfinite(value) for value in document.scores.values())


@pytest.mark.slow
@pytest.mark.parametrize("kind", HOSTILE)
def test_100_mb_of_hostile_text_take_a_minute_and_400_mb_at_most(kind: str) -> None:
    command = [sys.executable, "-c", PROGRAM, HOSTILE[kind], str(10**8), *SETS]
    seconds, more = map(float, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    assert seconds < 60
    assert more < 400
