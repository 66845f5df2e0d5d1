"""Tokenizer files of an exported model, as `transformers.pipeline("text-generation", DIR)` reads them.

tokenizer.json            the run's own; `bytes` as a byte-level BPE without merges, whose ids are the bytes
tokenizer_config.json     its class and special tokens
special_tokens_map.json   the special tokens again, for readers that look there
generation_config.json    the tokens that end a text

Files beside the run's tokenizer are copied unchanged, unless the config names other special tokens (data.eod, data.bos).
A prompt begins with the same tokens there as in `megatrain generate`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as LibraryTokenizer
from tokenizers import decoders, models, pre_tokenizers

from megatrain.config.schema import DataConfig
from megatrain.data.boundaries import (
    END_OF_TEXT,
    GENERATION,
    LARGEST_COMPANION,
    SPECIAL_TOKENS,
    TOKENIZER_CONFIG,
    Ending,
    TokenizerError,
)
from megatrain.data.tokenizer import JsonTokenizer, load_tokenizer
from megatrain.data.tokenizers.rank_file import byte_letters
from megatrain.untrusted import parse_json, read_beside

PADS = ("<pad>", "[PAD]", "<|pad|>", "<|padding|>", "<|endoftext|>")


@dataclass(frozen=True)
class TokenizerFiles:
    """Contents to write into the directory of a model."""

    texts: dict[str, str]
    """File name -> content."""
    ids: dict[str, Any]
    """Ids of the special tokens, for config.json."""


def files_of(data: DataConfig, positions: int) -> TokenizerFiles:
    """The files for a run with tokenizer `data.tokenizer` and a model of `positions` positions. Raises TokenizerError."""
    name = str(data.tokenizer)
    own = byte_level(data) if name == "bytes" else load_tokenizer(name, data.eod, data.bos)
    if not isinstance(own, JsonTokenizer):
        raise TokenizerError(
            f"{name} is a model of SentencePiece, which has no tokenizer.json to export. Put the tokenizer.json of the same model in its "
            "place (transformers' AutoTokenizer.from_pretrained(...).save_pretrained(...) writes it)."
        )
    beside = {} if name == "bytes" else _other_files(Path(name).parent)
    ending = _ending(own)
    tokens = {"eos_token": ending.eod, "bos_token": own.beginning.bos, "pad_token": _pad(own, ending)}
    named = {role: own.name_of(token) for role, token in tokens.items() if token is not None}
    ids = {f"{role}_id": token for role, token in tokens.items()}
    changed = (data.eod, data.bos) != (None, None)
    texts: dict[str, str] = dict(beside)
    texts["tokenizer.json"] = _with_opening(own)
    if changed or TOKENIZER_CONFIG not in beside:
        new = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": positions,
            "clean_up_tokenization_spaces": False,
        }
        added = {} if data.bos is None else {"add_bos_token": own.beginning.first is not None}
        texts[TOKENIZER_CONFIG] = _json({**new, **_loaded(beside, TOKENIZER_CONFIG), **named, **added})
    if changed or SPECIAL_TOKENS not in beside:
        texts[SPECIAL_TOKENS] = _json({**_loaded(beside, SPECIAL_TOKENS), **named})
    if changed or GENERATION not in beside:
        stops = list(ending.stops)
        said = ids | {"eos_token_id": stops if len(stops) > 1 else ending.eod}
        texts[GENERATION] = _json({**_loaded(beside, GENERATION), **said})
    return TokenizerFiles(texts, ids)


def byte_level(data: DataConfig) -> JsonTokenizer:
    """The `bytes` tokenizer as a tokenizer.json: a BPE of 256 tokens without merges, and an end-of-document token."""
    vocab = {letter: value for value, letter in enumerate(byte_letters())}
    library = LibraryTokenizer(models.BPE(vocab, []))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens([END_OF_TEXT])
    return JsonTokenizer(library, "bytes", None, data.eod, data.bos)


def _other_files(folder: Path) -> dict[str, str]:
    """File name -> text of the other tokenizer files in a tokenizer's directory."""
    names = (TOKENIZER_CONFIG, SPECIAL_TOKENS, GENERATION, "chat_template.jinja", "chat_template.json")
    found: dict[str, str] = {}
    for name in names:
        if (folder / name).is_file():
            try:
                found[name] = read_beside(folder / name, LARGEST_COMPANION).decode("utf-8-sig")
            except ValueError as error:
                raise TokenizerError(f"{folder / name} cannot be read: {error}") from None
    return found


def _loaded(beside: dict[str, str], name: str) -> dict[str, Any]:
    found = parse_json(beside.get(name, "{}"), unique=False)
    return found if isinstance(found, dict) else {}


def _ending(own: JsonTokenizer) -> Ending:
    """The tokens that end a document; none if that is ambiguous, as no training used them then."""
    try:
        return own.ending
    except TokenizerError:
        return Ending(None)


def _pad(own: JsonTokenizer, ending: Ending) -> int | None:
    """A token to pad batches with: the tokenizer's pad token, or else the end of a document; None if it has neither."""
    return next((token for name in PADS if (token := own.special_id(name)) is not None), ending.eod)


def _with_opening(own: JsonTokenizer) -> str:
    """The tokenizer.json, set to put before a text the tokens that `generate` puts before a prompt, and none after it."""
    description = json.loads(own.to_json())
    opening = own.beginning.opening
    if own.added("x") != (opening, ()):
        names = [own.name_of(token) for token in opening]
        pieces = [{"SpecialToken": {"id": name, "type_id": 0}} for name in names]
        texts = [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}]
        tokens = {name: {"id": name, "ids": [token], "tokens": [name]} for name, token in zip(names, opening, strict=True)}
        single, pair = [*pieces, texts[0]], [*pieces, *texts]
        description["post_processor"] = {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": tokens}
    return json.dumps(description, indent=2, ensure_ascii=False) + "\n"


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
