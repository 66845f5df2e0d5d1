"""Does each rule of quality decide as datatrove's filter of the same name? By table of words (docs/rules.md).

    python docs/benchmarks/rules_agreement.py PEER TEXTS.jsonl [--language zh]

PEER is the Python of an environment with datatrove 0.10.1, spacy, jieba and nltk; TEXTS.jsonl has a field "text" a line. datatrove cuts
words and sentences with spaCy. Each of its rules is asked alone, since its filters stop at the first that a document breaks.
"""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

QUALITY = {
    "words.least": "min_doc_words",
    "words.most": "max_doc_words",
    "mean_length.least": "min_avg_word_length",
    "mean_length.most": "max_avg_word_length",
    "hashes": "max_symbol_word_ratio",
    "bullets": "max_bullet_lines_ratio",
    "cut_lines": "max_ellipsis_lines_ratio",
    "letters": "max_non_alpha_words_ratio",
    "stop_words": "min_stop_words",
}
REPETITION = {
    "lines": "dup_line_frac",
    "line_letters": "dup_line_char_frac",
    "paragraphs": "dup_para_frac",
    "paragraph_letters": "dup_para_char_frac",
}
TABLES = {"en": ("blanks", "marks", "spacy"), "zh": ("han", "jieba")}
SETS = {"en": ("gopher", "fineweb"), "zh": ("fineweb2_zh", "fineweb2_zh")}
"""Our sets with the rules of (Gopher's filters, FineWeb's filter), by language."""


def texts_of(path: str) -> list[str]:
    """The texts of a file."""
    return [json.loads(line)["text"] for line in Path(path).read_text(encoding="utf-8").splitlines()]


def peer_rules(language: str, thresholds: dict[str, float]) -> dict[str, Callable[[Any], Any]]:
    """datatrove's rules by our names, each alone: they say of a document whether it stays."""
    from datatrove.pipeline.filters import c4_filters, fineweb_quality_filter, gopher_quality_filter, gopher_repetition_filter

    for module in (gopher_quality_filter, gopher_repetition_filter, fineweb_quality_filter):
        module.split_into_words = functools.lru_cache(4)(module.split_into_words)
    gopher, fineweb = SETS[language]
    rules: dict[str, Callable[[Any], Any]] = {}
    peers = {"en": "en", "zh": "cmn_Hani"}[language]
    more = {"language": peers} | (
        {"stop_words": list("的年在月是和日了於·為有被人中为他與後也而由")} if language == "zh" else {}
    )
    for name, key in QUALITY.items():
        alone = dict.fromkeys(QUALITY.values()) | {key: thresholds[f"{gopher}.{name}"]}
        rules[f"{gopher}.{name}"] = gopher_quality_filter.GopherQualityFilter(**alone, **more).filter
    none: dict[str, Any] = dict.fromkeys(REPETITION.values()) | {"top_n_grams": (), "dup_n_grams": ()}
    found = {key: thresholds.get(f"{gopher}.{name}") for name, key in REPETITION.items()}
    alone_of: dict[str, dict[str, Any]] = {
        name: {key: found[key]} for name, key in REPETITION.items() if found[key] is not None
    }
    alone_of |= {f"top_{n}": {"top_n_grams": ((n, thresholds[f"{gopher}.top_{n}"]),)} for n in (2, 3, 4)}
    alone_of |= {f"again_{n}": {"dup_n_grams": ((n, thresholds[f"{gopher}.again_{n}"]),)} for n in range(5, 11)}
    for name, values in alone_of.items():
        rules[f"{gopher}.{name}"] = gopher_repetition_filter.GopherRepetitionFilter(**none | values, language=peers).filter
    no_lines = {
        "line_punct_thr": -1,
        "short_line_thr": 9,
        "char_duplicates_ratio": 9,
        "new_line_ratio": 1e9,
        "language": peers,
    }
    keys = {
        "ended_lines": "line_punct_thr",
        "short_lines": "short_line_thr",
        "same_letters": "char_duplicates_ratio",
        "feeds": "new_line_ratio",
    }
    for name, key in keys.items():
        if f"{fineweb}.{name}" in thresholds:
            value = thresholds[f"{fineweb}.{name}"]
            rules[f"{fineweb}.{name}"] = fineweb_quality_filter.FineWebQualityFilter(**no_lines | {key: value}).filter
    if language == "en":
        off = {"filter_lorem_ipsum": False, "filter_curly_bracket": False, "min_num_sentences": -1}
        on = {"lorem_ipsum": "filter_lorem_ipsum", "curly_bracket": "filter_curly_bracket"}
        rules |= {f"c4.{name}": c4_filters.C4QualityFilter(**off | {key: True}).filter for name, key in on.items()}
        rules["c4.sentences"] = c4_filters.C4QualityFilter(**off | {"min_num_sentences": 5}).filter
    return rules


def as_peer(path: str, language: str, thresholds: dict[str, float]) -> Iterator[list[str]]:
    """The rules that each text breaks, as datatrove has it."""
    from datatrove.data import Document

    rules = peer_rules(language, thresholds)
    for text in texts_of(path):
        yield [name for name, rule in rules.items() if rule(Document(text=text, id="")) is not True]


def ours(path: str, names: list[str], table: Any) -> list[list[str]]:
    """The rules that each text breaks, as we have it."""
    from megatrain.corpus.document import Document, Tally
    from megatrain.corpus.rules.judge import rules_step

    lines = [f"c4.{name}" for name in ("citations", "long_word", "line_end", "line_words", "javascript", "policy")]
    steps = [rules_step([name for name in names if not name.startswith("c4.")], {}, table)]
    if any(name.startswith("c4.") for name in names):  # by itself: the others see the whole text
        steps.append(rules_step([*lines, *(name for name in names if name.startswith("c4."))], {}, table))
    return [[name for step in steps for name in step(Document(text, "", "", 0), Tally())] for text in texts_of(path)]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer")
    parser.add_argument("texts")
    parser.add_argument("--language", choices=SETS, default="en")
    given = parser.parse_args()
    if given.peer == "-":  # we are the peer
        for broken in as_peer(given.texts, given.language, json.load(sys.stdin)):
            print(json.dumps(broken))
        return
    from megatrain.corpus.rules.rulebook import RULES

    wanted = {*SETS[given.language], *(["c4"] if given.language == "en" else [])}
    thresholds = {
        name: rule.threshold
        for name, rule in RULES.items()
        if rule.of in wanted and rule.acts == "document" and not name.endswith((".ellipses", ".probability"))
    }
    command = [given.peer, __file__, "-", given.texts, "--language", given.language]
    said = subprocess.run(command, input=json.dumps(thresholds), capture_output=True, text=True, check=True).stdout
    peer = [json.loads(line) for line in said.splitlines()]
    tables = TABLES[given.language]
    found = {table: ours(given.texts, list(thresholds), table) for table in tables}
    print(f"| rule | datatrove removes | {' | '.join(tables)} |\n| --- | --- |{' --- |' * len(tables)}")
    for name in thresholds:
        same = {table: sum((name in a) == (name in b) for a, b in zip(peer, found[table], strict=True)) for table in tables}
        cells = " | ".join(f"{same[table] / len(peer):.4f}" for table in tables)
        print(f"| `{name}` | {sum(name in broken for broken in peer) / len(peer):.4f} | {cells} |")


if __name__ == "__main__":
    main()
