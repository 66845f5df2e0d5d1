"""BLEU and chrF from sums of statistics, against sacrebleu's own corpus scores."""

import sys

import numpy as np
import pytest
import sacrebleu

from megatrain.evaluation.resampling import bootstrap_stderr
from megatrain.evaluation.translation_scores import chosen_tokenizer, corpus_bleu, corpus_chrf, score_of

ENGLISH = ["the", "cat", "sat", "on", "a", "mat", "Dog", "it's", "&", "<", "hello-world", "3.5"]
WORDS = [*ENGLISH, *"猫坐在上。，カタ", "垫子"]


def sentence(rng: np.random.Generator) -> str:
    return str(rng.choice(["", " "])).join(rng.choice(WORDS, rng.integers(0, 12)))


def test_equal_to_sacrebleu_on_a_thousand_random_corpora() -> None:
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(1000):
        items = int(rng.integers(1, 5))
        answers = [sentence(rng) for _ in range(items)]
        references = [
            [sentence(rng) if rng.random() < 0.7 else answer for _ in range(rng.integers(1, 4))] for answer in answers
        ]
        columns = [[texts[at] if at < len(texts) else None for texts in references] for at in range(max(map(len, references)))]
        way = str(rng.choice(["13a", "zh", "char"]))
        for ours, theirs in (
            (corpus_bleu(answers, references, way), sacrebleu.BLEU(tokenize=way)),
            (corpus_chrf(answers, references), sacrebleu.CHRF()),
        ):
            assert ours.score == pytest.approx(theirs.corpus_score(answers, columns).score, abs=1e-12, rel=1e-12)
            assert ours.signature == str(theirs.get_signature())
            assert len(ours.statistics) == items
            seen.add(0.0 if ours.score == 0.0 else 100.0 if ours.score > 99.9 else 50.0)
    assert seen == {0.0, 50.0, 100.0}


def test_chinese_is_cut_as_chinese() -> None:
    text = "我们今天去公园散步，然后回家吃饭。"
    score = corpus_bleu([text], [[text]])
    assert score.score == pytest.approx(100.0)
    assert "tok:zh" in score.signature
    assert corpus_bleu([text], [[text]], tokenize="13a").score == 0.0


@pytest.mark.parametrize(
    ("references", "way"),
    [
        ([["The capital is Tokyo (东京)."]], "13a"),
        ([["one"], ["two", "三只猫"]], "zh"),
        ([["吾輩は猫である"]], "char"),
        ([[""]], "13a"),
    ],
)
def test_chosen_tokenizer(references: list[list[str]], way: str) -> None:
    assert chosen_tokenizer(references) == way


def test_scores_of_many_sums_at_once_are_those_of_each() -> None:
    rng = np.random.default_rng(1)
    answers = [sentence(rng) for _ in range(30)]
    references = [[sentence(rng), answer[: len(answer) // 2]] for answer in answers]
    for made in (corpus_bleu(answers, references), corpus_chrf(answers, references)):
        counts = rng.integers(0, 3, size=(20, 30)).astype(np.float64)
        together = score_of(made.metric)(counts @ made.statistics)
        each = [float(score_of(made.metric)((row @ made.statistics)[None])[0]) for row in counts]
        assert together.tolist() == pytest.approx(each, abs=1e-12)
        assert len(set(each)) > 10


def test_the_estimate_holds_the_score() -> None:
    rng = np.random.default_rng(2)
    texts = [" ".join(rng.choice(ENGLISH[:8], 9)) for _ in range(40)]
    references = [[text if at % 3 else " ".join(reversed(text.split()))] for at, text in enumerate(texts)]
    for score in (corpus_bleu(texts, references), corpus_chrf(texts, references)):
        found = score.estimate()
        assert found.low < found.value == score.score < found.high
        spread = bootstrap_stderr(score.statistics, score_of(score.metric), resamples=4000)
        assert found.stderr == pytest.approx(spread, rel=0.1)
        assert found.units == 40
        assert score.estimate(clusters=[at // 4 for at in range(40)]).units == 10


def test_few_items_and_perfect_ones_are_not_certain() -> None:
    one = corpus_bleu(["a b c d e"], [["a b c d f"]]).estimate()
    assert 0.0 < one.low < one.value < one.high < 100.0
    perfect = corpus_bleu(["the cat sat on it"] * 20, [["the cat sat on it"]] * 20).estimate()
    assert (perfect.value, perfect.high) == pytest.approx((100.0, 100.0))
    assert perfect.low == pytest.approx(83.9, abs=0.1)  # as a proportion of 20 of 20


@pytest.mark.parametrize(
    ("answers", "references", "words"),
    [
        ([], [], "0 answers and 0 lists"),
        (["x"], [["x"], ["y"]], "1 answers and 2 lists"),
        (["x", "y"], [["x"], []], r"1 of them empty \(items \[1\]\)"),
        (["x"], ["x"], r"1 of them empty \(items \[0\]\)"),
    ],
)
def test_items_need_references(answers: list[str], references: list[list[str]], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        corpus_chrf(answers, references)


def test_unknown_tokenizers_are_named() -> None:
    with pytest.raises(ValueError, match=r"no tokenizer 'zhh'\. Use one of .*zh"):
        corpus_bleu(["x"], [["x"]], tokenize="zhh")


def test_without_sacrebleu_the_command_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(ImportError, match=r"BLEU and chrF need sacrebleu: pip install 'megatrain\[eval\]'"):
        corpus_bleu(["x"], [["x"]])
