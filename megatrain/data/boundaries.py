"""The tokens that end and begin a document, for which each maker of tokenizers has names of its own.

end       the one asked for (`data.eod`, `--eod`), else eos_token of tokenizer_config.json or special_tokens_map.json beside the
          tokenizer, else eos_token_id of generation_config.json, else a special token with one of the names in ENDS
begin     the one asked for (`data.bos`, `--bos`), else bos_token, which is put first if tokenizer_config.json says
          add_bos_token, or if the tokenizer.json itself adds tokens only before a text, this one among them

If several tokens are possible, it is an error that names them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from megatrain.files import HEAD_BYTES, OneLine, brief, not_text
from megatrain.untrusted import parse_json, read_beside

END_OF_TEXT = "<|endoftext|>"
ENDS = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<｜end▁of▁sentence｜>", "<eos>", "[EOS]")
"""Names of GPT-2, BLOOM and LLaMA 2, LLaMA 3, DeepSeek, Gemma, and BERT-like ones. The first has no other use, and wins."""
BEGINNINGS = ("<s>", "<|begin_of_text|>", "<｜begin▁of▁sentence｜>", "<bos>", "[BOS]", "<|startoftext|>")
NONE = "none"
"""Value of data.eod and data.bos: no such token."""
TOKENIZER_CONFIG, SPECIAL_TOKENS, GENERATION = "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"

LARGEST_TOKENIZER, LARGEST_COMPANION = 1 << 27, 1 << 25
"""Bytes of a tokenizer.json, of which one of 256,000 tokens has some 30 million, and of a file beside it."""

TokenRequest = int | str | None
"""A token as data.eod, data.bos or --eod give it: an id, a name or `none`; None: to be found."""


class TokenizerError(OneLine, ValueError):
    """A tokenizer that cannot be loaded, trained or used in this way; the message says which one and what to do."""


class Names(Protocol):
    """Something that has names for tokens."""

    def name_of(self, token: int) -> str:
        """The name of a token."""


class Vocabulary(Names, Protocol):
    """The functions of a tokenizer that are used here."""

    @property
    def label(self) -> str:
        """The tokenizer's name in messages."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""

    def id_of(self, name: str) -> int | None:
        """The id of the token of this name, special or not; None if there is none."""

    def special_id(self, name: str) -> int | None:
        """The id of the special token of this name; None if there is none."""

    def template(self) -> tuple[int, ...]:
        """The tokens that the file itself adds before a text; () if it adds any after it."""


@dataclass(frozen=True)
class NamedToken:
    """A token that is meant where its name is written by a program, a chat template for one."""

    name: str
    token: int
    special: bool = True
    """Whether it is never found in text."""
    eats_left: bool = False
    """Whether white space before it goes."""
    eats_right: bool = False
    """Whether white space after it goes."""


@dataclass(frozen=True)
class Ending:
    """The tokens that end a document."""

    eod: int | None
    stops: tuple[int, ...] = ()
    """Tokens at which generated text ends: eod, and those of generation_config.json."""
    origin: str = ""
    """The place where eod was found, for messages."""


@dataclass(frozen=True)
class Beginning:
    """The tokens that begin a document."""

    bos: int | None
    """The token for the beginning, whether it is put there or not."""
    first: int | None = None
    """The token put before each document: bos, or None."""
    opening: tuple[int, ...] = ()
    """The tokens put before a prompt: `first`, or all that the tokenizer.json adds before a text."""
    origin: str = ""
    """Why they are put first, for messages."""

    def before(self, ids: Sequence[int]) -> list[int]:
        """The tokens of a text after those that open one, never twice: a chat template or a caller may have put some of them already."""
        opening = self.opening
        if ids and opening and ids[0] == opening[0]:
            return list(ids)
        put = next((n for n in range(len(opening), 0, -1) if tuple(ids[:n]) == opening[-n:]), 0)
        return [*opening[: len(opening) - put], *ids]


def find_ending(vocabulary: Vocabulary, folder: Path | None, asked: TokenRequest = None) -> Ending:
    """The tokens that end a document. folder: directory of the files beside the tokenizer; asked: `data.eod`.

    Raises TokenizerError if several tokens are possible, or the one asked for does not exist.
    """
    if asked == NONE:
        return Ending(None, (), f"eod={NONE}")
    listed = _ids(vocabulary, _json_object(folder, GENERATION).get("eos_token_id"))
    eod, origin = _end(vocabulary, folder, listed) if asked is None else _requested(vocabulary, "eod", asked)
    return Ending(eod, tuple(dict.fromkeys((*(() if eod is None else (eod,)), *listed))), origin)


def find_beginning(vocabulary: Vocabulary, folder: Path | None, asked: TokenRequest = None) -> Beginning:
    """The tokens that begin a document; as `find_ending`, asked: `data.bos`."""
    if asked is not None:
        begin, origin = _requested(vocabulary, "bos", asked)
        return Beginning(begin, begin, () if begin is None else (begin,), origin)
    template, config = vocabulary.template(), _json_object(folder, TOKENIZER_CONFIG)
    begin = _begin(vocabulary, folder, template)
    added = config.get("add_bos_token")
    if added is False:
        return Beginning(begin)
    if added is True and begin is not None:
        return Beginning(begin, begin, (begin,), f"add_bos_token of {TOKENIZER_CONFIG}")
    first = begin if begin in template else None
    return Beginning(begin, first, template, "the tokenizer.json, which puts it first" if template else "")


def token_of(vocabulary: Vocabulary, asked: int | str) -> int | None:
    """The id of a token given by name, or as an id in digits; None if there is no such token."""
    named = vocabulary.id_of(asked) if isinstance(asked, str) else None
    if named is not None:
        return named
    number = int(asked) if isinstance(asked, int) or (asked.isascii() and asked.isdigit() and len(asked) < 10) else -1
    return number if 0 <= number < vocabulary.vocab_size else None


def shown(names: Names, tokens: Sequence[int]) -> str:
    """Tokens as text for messages: '<s>' (1)."""
    return ", ".join(f"'{brief(names.name_of(token))}' ({token})" for token in tokens)


def _requested(vocabulary: Vocabulary, role: str, asked: int | str) -> tuple[int | None, str]:
    if asked == NONE:
        return None, f"{role}={NONE}"
    found = token_of(vocabulary, asked)
    if found is None:
        raise TokenizerError(
            f"{role}={asked}: {vocabulary.label} has no such token; its ids are 0..{vocabulary.vocab_size - 1}. "
            f"Give a name or an id that it has, or {role}={NONE}.{_token_names(vocabulary)}"
        )
    return found, f"{role}={asked}"


def _token_names(vocabulary: Vocabulary) -> str:
    found = [token for name in (*ENDS, *BEGINNINGS) if (token := vocabulary.special_id(name)) is not None]
    return f" It has {shown(vocabulary, found)}." if found else ""


def _end(vocabulary: Vocabulary, folder: Path | None, generation: tuple[int, ...]) -> tuple[int | None, str]:
    """(token that ends a document, where it was found), from the files beside the tokenizer or by name; (None, "") if there is none."""
    declared = _declared(vocabulary, folder, "eos_token")
    if len(set(declared.values())) > 1:
        raise _several(vocabulary, declared.values(), " and ".join(declared))
    if declared:
        origin, end = next(iter(declared.items()))
        return end, origin
    if generation:
        named = [token for token in generation if vocabulary.name_of(token) in ENDS] if len(generation) > 1 else generation
        if len(named) != 1:
            raise _several(vocabulary, generation, GENERATION)
        return named[0], GENERATION
    oldest = vocabulary.id_of(END_OF_TEXT)
    if oldest is not None:
        return oldest, "its name"
    known = [token for name in ENDS if (token := vocabulary.special_id(name)) is not None]
    if len(known) > 1:
        raise _several(vocabulary, known, "its names")
    return (known[0], "its name") if known else (None, "")


def _begin(vocabulary: Vocabulary, folder: Path | None, template: tuple[int, ...]) -> int | None:
    """The token that begins a document, from the files beside the tokenizer, the tokens that it adds, or by name; None if there is none."""
    declared = _declared(vocabulary, folder, "bos_token")
    known = [token for name in BEGINNINGS if (token := vocabulary.special_id(name)) is not None]
    generation = _ids(vocabulary, _json_object(folder, GENERATION).get("bos_token_id"))
    alone = known if len(known) == 1 else []
    return next(iter((*declared.values(), *(token for token in template if token in known), *generation, *alone)), None)


def _declared(vocabulary: Vocabulary, folder: Path | None, role: str) -> dict[str, int]:
    """File beside the tokenizer -> the id that it gives for `role`. Raises TokenizerError for a token that does not exist."""
    found: dict[str, int] = {}
    for file in (TOKENIZER_CONFIG, SPECIAL_TOKENS):
        name = _json_object(folder, file).get(role)
        name = name.get("content") if isinstance(name, dict) else name
        if isinstance(name, str) and name:
            token = vocabulary.id_of(name)
            if token is None:
                option = "eod" if role == "eos_token" else "bos"
                raise TokenizerError(
                    f"{file} beside {vocabulary.label} says that its {role} is {name!r}, and it has no such token. Is it of another "
                    f"tokenizer? Say which token is meant: data.{option} in a config, --{option} of `data tokenize` and `generate`; "
                    f"or {NONE}."
                )
            found[file] = token
    return found


def _ids(vocabulary: Vocabulary, given: Any) -> tuple[int, ...]:
    """The ids in a value of generation_config.json, one or a list, without those that the tokenizer lacks."""
    listed = given if isinstance(given, list) else [given]
    return tuple(n for n in listed if type(n) is int and 0 <= n < vocabulary.vocab_size)


def _several(vocabulary: Vocabulary, tokens: Any, origin: str) -> TokenizerError:
    names = shown(vocabulary, tuple(dict.fromkeys(tokens)))
    return TokenizerError(
        f"which token ends a document is not clear for {vocabulary.label}: by {origin} it may be {names}. Say which: data.eod in a "
        f"config, --eod of `data tokenize` and `generate`, by name or id; or {NONE}."
    )


def _json_object(folder: Path | None, file: str) -> dict[str, Any]:
    """A JSON object in a file beside the tokenizer; {} if the file is missing. Raises TokenizerError if it cannot be read."""
    if folder is None:
        return {}
    try:
        data = read_beside(folder / file, LARGEST_COMPANION)
        if problem := not_text(data[:HEAD_BYTES]):
            raise ValueError(problem)
        found = parse_json(data.decode("utf-8-sig"), unique=False)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise TokenizerError(
            f"{folder / file}, which says what begins and ends a document, cannot be read ({error}). Mend it or take it away."
        ) from None
    return found if isinstance(found, dict) else {}


class FromFile:
    """A tokenizer of a file, beside which other files may tell what ends and begins a document: looked for when it is first asked for,
    since it may be ambiguous, and is not always needed.
    """

    def __init__(self, folder: Path | None, eod: TokenRequest, bos: TokenRequest) -> None:
        """folder: directory of the files. eod, bos: the tokens asked for, which must exist. Raises TokenizerError."""
        self._folder, self._asked = folder, (eod, bos)
        _ = eod is not None and self.ending, bos is not None and self.beginning

    @cached_property
    def ending(self: Any) -> Ending:
        """The tokens that end a document. Raises TokenizerError if several are possible."""
        return find_ending(self, self._folder, self._asked[0])

    @cached_property
    def beginning(self: Any) -> Beginning:
        """The tokens that begin a document. Raises TokenizerError."""
        return find_beginning(self, self._folder, self._asked[1])

    @property
    def eod(self) -> int | None:
        """Id of the token that ends a document."""
        ending: Ending = self.ending
        return ending.eod
