"""tiktoken's rank files (`cl100k_base.tiktoken`; LLaMA 3's tokenizer.model) as a BPE of the `tokenizers` library, with the same ids.

A line is a token's bytes in base64 and its id, which is the rank of its merge. What words are, and which special tokens there are, the
file does not say: they follow from its name where it is one of OpenAI's, or stand beside it in FILE.json:

    {"pattern": "cl100k_base", "special_tokens": {"<|end_of_text|>": 128001}}

where the pattern is a name out of PATTERNS or a regular expression.
"""

from __future__ import annotations

import binascii
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as LibraryTokenizer

from megatrain.data.boundaries import END_OF_TEXT, LARGEST_COMPANION, TokenizerError
from megatrain.files import brief
from megatrain.untrusted import parse_json, read_beside

LINE = re.compile(rb"([A-Za-z0-9+/]+={0,2}) ([0-9]{1,9})\r?\n?")
MOST_TOKENS, LONGEST_TOKEN, MOST_WORK = 1 << 21, 1 << 11, 1 << 28
"""Tokens, bytes of one, and bytes that are looked at to find all ways to merge them."""
_ENDINGS = r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n%s]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SHORT = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_CASED = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]%s[\p{Ll}\p{Lm}\p{Lo}\p{M}]%s" + f"{_SHORT}?|"
_GPT2, _GPT4 = "", f"{_SHORT}|[^\\r\\n\\p{{L}}\\p{{N}}]?\\p{{L}}+|{_ENDINGS % ''}"
PATTERNS = {
    "gpt2": _GPT2,
    "r50k_base": _GPT2,
    "p50k_base": _GPT2,
    "p50k_edit": _GPT2,
    "cl100k_base": _GPT4,
    "o200k_base": _CASED % ("*", "+") + _CASED % ("+", "*") + _ENDINGS % "/",
}
"""Words by name, as regular expressions; "": GPT-2's, which the library has built in. Without possessive quantifiers, which mean something
else to it, and which change no match."""
_FILL = {"<|fim_prefix|>": 100258, "<|fim_middle|>": 100259, "<|fim_suffix|>": 100260, "<|endofprompt|>": 100276}
SPECIAL = {
    "gpt2": {END_OF_TEXT: 50256},
    "r50k_base": {END_OF_TEXT: 50256},
    "p50k_base": {END_OF_TEXT: 50256},
    "p50k_edit": {END_OF_TEXT: 50256, "<|fim_prefix|>": 50281, "<|fim_middle|>": 50282, "<|fim_suffix|>": 50283},
    "cl100k_base": {END_OF_TEXT: 100257, **_FILL},
    "o200k_base": {END_OF_TEXT: 199999, "<|endofprompt|>": 200018},
}
"""Special tokens of OpenAI's files (tiktoken, `tiktoken_ext/openai_public.py`)."""


class RankRules(NamedTuple):
    """The rules that a rank file leaves out."""

    pattern: str
    special: Mapping[str, int]


def is_rank_file(data: bytes) -> bool:
    """Whether a file begins as a rank file does."""
    return LINE.match(data) is not None


def library_of(data: bytes, path: Path) -> LibraryTokenizer:
    """The tokenizer of a rank file. Raises TokenizerError."""
    rules = _rules(path)
    ranks = _ranks(data, path)
    vocab, merges = _merged(ranks)
    taken = {rank: token for token, rank in vocab.items()}
    for name, token in rules.special.items():
        if token in taken or name in vocab:
            raise TokenizerError(f"{path}: the special token {name} ({token}) is one of the ranks already, or there twice.")
        taken[token] = name
    # In the vocabulary, since the library numbers other special tokens itself. A word that is a token is that token, as in tiktoken.
    library = LibraryTokenizer(models.BPE(vocab | dict(rules.special), merges, ignore_merges=True))
    library.pre_tokenizer = _words(rules.pattern, path)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in rules.special])
    library.encode_special_tokens = True
    for name, token in rules.special.items():
        if any(token in library.encode(text, add_special_tokens=False).ids for text in (name, f" {name}", f"{name} ")):
            raise TokenizerError(f"{path}: by its pattern {name} is one word, so that text could forge the special token.")
    return library


def _ranks(data: bytes, path: Path) -> dict[bytes, int]:
    """Bytes of each token -> its rank. Raises TokenizerError that names the line."""
    ranks: dict[bytes, int] = {}
    at, number = 0, 0
    while at < len(data):
        number += 1
        found = LINE.match(data, at)
        if found is None:
            raise TokenizerError(
                f"{path}:{number}: not a line of a rank file, bytes in base64 and a rank: {brief(repr(data[at : at + 40]))}"
            )
        at = found.end()
        try:
            token, rank = binascii.a2b_base64(found[1]), int(found[2])
        except ValueError as error:
            raise TokenizerError(f"{path}:{number}: {brief(found[1].decode())} is not base64 ({error}).") from None
        if not 0 < len(token) <= LONGEST_TOKEN or token in ranks or number > MOST_TOKENS:
            what = f"a token of {len(token):,} bytes" if token not in ranks else "a token that was there before"
            raise TokenizerError(
                f"{path}:{number}: {what}; at most {MOST_TOKENS:,} tokens of {LONGEST_TOKEN:,} bytes are read."
            )
        ranks[token] = rank
    if len(set(ranks.values())) != len(ranks):
        raise TokenizerError(f"{path}: two tokens have the same rank.")
    if missing := [value for value in range(256) if bytes((value,)) not in ranks]:
        raise TokenizerError(
            f"{path}: the byte 0x{missing[0]:02x} is no token, and {len(missing)} are not; a rank file has all 256."
        )
    if (work := sum(len(token) ** 2 for token in ranks)) > MOST_WORK:
        raise TokenizerError(
            f"{path}: its tokens are too long to merge ({work:,} bytes to look at, {MOST_WORK:,} at the most)."
        )
    return ranks


def _merged(ranks: Mapping[bytes, int]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """(vocabulary, merges) in the letters of byte-level tokenizers. All ways to divide a token in two are merges of its rank."""
    letters = byte_letters()
    spelled = {token: "".join(letters[value] for value in token) for token in ranks}
    merges = []
    for token, rank in ranks.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ranks and right in ranks:
                merges.append((rank, ranks[left], ranks[right], spelled[left], spelled[right]))
    merges.sort()
    return {spelled[token]: rank for token, rank in ranks.items()}, [(left, right) for *_, left, right in merges]


def byte_letters() -> list[str]:
    """The letter for each byte in byte-level vocabularies (GPT-2's encoder.py): the byte's own character if it is printable."""
    seen = [*range(ord("!"), ord("~") + 1), *range(ord("\u00a1"), ord("\u00ac") + 1), *range(ord("\u00ae"), ord("\u00ff") + 1)]
    unseen = [value for value in range(256) if value not in seen]
    return [chr(value) if value in seen else chr(256 + unseen.index(value)) for value in range(256)]


def _words(pattern: str, path: Path) -> Any:
    """The division of a text into words. Raises TokenizerError for a pattern that is no regular expression."""
    if not pattern:
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    try:
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
    except Exception as error:  # the library raises plain Exception
        raise TokenizerError(f"{path}.json: its pattern is no regular expression: {brief(error)}") from None
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _rules(path: Path) -> RankRules:
    """Pattern and special tokens, from the file beside or by the name. Raises TokenizerError where neither says."""
    beside = path.with_name(f"{path.name}.json")
    name = path.name.removesuffix(".tiktoken")
    try:
        found = parse_json(read_beside(beside, LARGEST_COMPANION))
        pattern, special = found["pattern"], found.get("special_tokens", {})
        "".join((pattern, *special)).encode()  # half of a surrogate pair is no text
        if not all(special) or not all(type(id) is int and 0 <= id < 1 << 31 for id in special.values()):
            raise ValueError("pattern is a text, and special_tokens an object of ids")
        return RankRules(PATTERNS.get(pattern, pattern), special)
    except FileNotFoundError:
        pass
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise TokenizerError(f"{beside}, which says what words are, cannot be read ({brief(error)}).") from None
    if name not in PATTERNS:
        raise TokenizerError(
            f"{path} is a rank file of tiktoken, which does not say what words are, and its name is none of {', '.join(PATTERNS)}. Write "
            f'{beside.name} beside it: {{"pattern": "cl100k_base", "special_tokens": {{"{END_OF_TEXT}": 100257}}}}, with the pattern '
            "of its model, a regular expression or one of these names."
        )
    return RankRules(PATTERNS[name], SPECIAL[name])
