"""Trains byte-level BPE and Unigram tokenizers, and keeps what they were trained on: `TOKENIZER.trained.json` beside the file.

Both have all 256 bytes and GPT-2's words, so that any text in any script survives encode and decode, and gigatoken or pieces of a long
document change nothing. The same text gives the same file: the library's Unigram, whose sums follow the order of a hash table, has
its scores rounded, which makes them alike, and its pieces sorted.
"""

from __future__ import annotations

import heapq
import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import xxhash
from tokenizers import Tokenizer as LibraryTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from megatrain.data.boundaries import END_OF_TEXT, TokenizerError
from megatrain.data.draws import hash64
from megatrain.data.prepare.read import Lines, TextPiece, read_pieces
from megatrain.data.tokenizer import SMALLEST_VOCAB, JsonTokenizer
from megatrain.files import brief, make_folder, whole
from megatrain.untrusted import parse_json, read_plain

BPE, UNIGRAM = KINDS = ("bpe", "unigram")
SAMPLE_SEED = 1234
_DIGITS, _STEP, _STEPS = 5, 1e-4, 300
"""Decimals of a Unigram's scores; the library's step between the scores of bytes that it has not met, and how many there are at most."""
_END = b"\xff"
"""Ends a document in the hash; UTF-8 has no such byte."""
_LARGEST = 1 << 16
LONGEST_WORD = 1024
"""Letters of a word that is trained on whole. The library takes the square of a word's length, hours for a megabyte without a blank."""
_LONG = re.compile(rf"(?<![^\W_])[^\W_]{{{LONGEST_WORD},}}|(?<![\W_])[\W_]{{{LONGEST_WORD},}}")
"""Runs of letters and digits, or of all else, within which every longer word lies. Each is looked at from its beginning alone."""


@dataclass(frozen=True)
class TrainedOn:
    """The text that a tokenizer was trained on."""

    kind: str
    identity: str
    """Identity of the tokenizer (`Tokenizer.identity`)."""
    vocab_size: int
    text: str
    """XXH3-128 of the text: of each document its UTF-8 and a byte 255."""
    text_bytes: int
    documents: int
    sample: int | None
    """Bytes that the sample was limited to; None: all of the text."""

    def __str__(self) -> str:
        part = "" if self.sample is None else ", a sample"
        return f"{self.kind}, trained on {self.documents:,} documents, {self.text_bytes:,} bytes (hash {self.text}{part})"


def trained_path(tokenizer: str | Path) -> Path:
    """The file beside a tokenizer that says what it was trained on."""
    return Path(f"{tokenizer}.trained.json")


def trained_on(tokenizer: str | Path, identity: str) -> TrainedOn | None:
    """The text that a tokenizer of this identity was trained on; None if that is not known. Raises TokenizerError for a damaged file."""
    path = trained_path(tokenizer)
    try:
        found = parse_json(read_plain(path, _LARGEST))
        record = TrainedOn(**{item.name: found[item.name] for item in fields(TrainedOn)})
        numbers = (record.vocab_size, record.text_bytes, record.documents, 0 if record.sample is None else record.sample)
        if any(type(number) is not int for number in numbers) or any(
            type(said) is not str for said in (record.kind, record.identity, record.text)
        ):
            raise ValueError("a value is of another type")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise TokenizerError(
            f"{path}, which says what the tokenizer was trained on, cannot be read ({brief(error)}). Take it away."
        ) from None
    return record if record.identity == identity else None


def train_tokenizer(
    inputs: Sequence[str | Path],
    vocab_size: int,
    output: str | Path,
    key: str | Lines = "text",
    kind: str = BPE,
    sample: int | None = None,
) -> int:
    """Trains a tokenizer on the documents of `inputs` and writes it to `output`, the whole file or nothing; returns its size.

    The size is smaller than `vocab_size` if the text has too few words to merge. The same input gives the same file. sample: UTF-8
    bytes of text at most, of pieces chosen by a fixed seed, all of which are in memory. Raises TokenizerError (vocab_size below 257, no
    text) and the errors of reading.
    """
    if vocab_size < SMALLEST_VOCAB:
        raise TokenizerError(
            f"vocab_size={vocab_size} is too small for a byte-level tokenizer: 256 bytes and {END_OF_TEXT} make 257. "
            f"Common sizes are 4096 to 50257."
        )
    if kind not in KINDS:
        raise TokenizerError(f"--kind {kind}: use one of {', '.join(KINDS)}.")
    pieces = read_pieces(inputs, key)  # words never reach across pieces
    seen = _Hashed(pieces if sample is None else sampled_pieces(pieces, sample))
    library = _trained(seen, vocab_size, kind)
    if not seen.text_bytes:
        limit = f" within --sample {sample}; give more" if sample is not None else ""
        raise TokenizerError(f"{', '.join(map(str, inputs)) or 'the list of inputs'}: no text to train a tokenizer on{limit}.")
    made = JsonTokenizer(library)
    record = TrainedOn(kind, made.identity, made.vocab_size, seen.hash(), seen.text_bytes, seen.documents, sample)
    path = Path(output)
    make_folder(path.parent)
    trained_path(path).unlink(missing_ok=True)
    with whole(path, text=True) as file:
        file.write(library.to_str(pretty=True))
    with whole(trained_path(path), text=True) as file:
        file.write(json.dumps(asdict(record)) + "\n")
    return made.vocab_size


def sampled_pieces(pieces: Iterable[TextPiece], most: int, seed: int = SAMPLE_SEED) -> Iterator[TextPiece]:
    """Pieces of at most so many bytes together, in their order: those with the smallest hashes of their numbers. One pass."""
    kept: list[tuple[int, int, int, TextPiece]] = []
    size = 0
    for number, piece in enumerate(pieces):
        length = len(piece.text.encode())
        heapq.heappush(kept, (-hash64(hash64(seed) ^ number), number, length, piece))
        size += length
        while size > most:
            size -= heapq.heappop(kept)[2]
    yield from (piece for _, _, _, piece in sorted(kept, key=lambda row: row[1]))


def in_words(text: str) -> list[str]:
    """A text, cut within words of more than LONGEST_WORD letters."""
    cuts = [at for run in _LONG.finditer(text) for at in range(run.start() + LONGEST_WORD, run.end(), LONGEST_WORD)]
    return [text[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]


def _trained(texts: Iterator[list[str]], vocab_size: int, kind: str) -> LibraryTokenizer:
    library = LibraryTokenizer(models.BPE() if kind == BPE else models.Unigram())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    make = trainers.BpeTrainer if kind == BPE else trainers.UnigramTrainer
    trainer = make(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=sys.stderr.isatty(),
    )
    library.train_from_iterator(texts, trainer)
    if kind == UNIGRAM:
        settle(library)
    return library


def settle(library: LibraryTokenizer) -> None:
    """Round the scores of a Unigram, and sort its pieces; bytes that are not in the text, which the library numbers in the order of a hash
    table, get the lowest score.
    """
    first, *rest = json.loads(library.to_str())["model"]["vocab"]
    lowest = min(score for _, score in rest)

    def settled(piece: str, score: float) -> float:
        steps = (score - lowest) / _STEP
        unmet = len(piece) == 1 and steps < _STEPS and abs(steps - round(steps)) < 1e-6
        return round(lowest if unmet else score, _DIGITS)

    pieces = sorted(((piece, settled(piece, score)) for piece, score in rest), key=lambda row: (-row[1], row[0]))
    library.model = models.Unigram([tuple(first), *pieces], None, False)


class _Hashed:
    """Passes the texts of pieces on, in words that can be trained on, and keeps the hash and size of all."""

    def __init__(self, pieces: Iterable[TextPiece]) -> None:
        self._pieces = iter(pieces)
        self._digest: Any = xxhash.xxh3_128()
        self.text_bytes = self.documents = 0

    def __iter__(self) -> _Hashed:
        return self

    def __next__(self) -> list[str]:
        piece = next(self._pieces)
        data = piece.text.encode()
        self._digest.update(data)
        self.text_bytes += len(data)
        if piece.last:
            self._digest.update(_END)
            self.documents += 1
        return in_words(piece.text)

    def hash(self) -> str:
        """The hash of all texts so far, as 32 digits."""
        return str(self._digest.hexdigest())
