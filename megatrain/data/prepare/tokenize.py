"""Text files, or documents as they come, to a token store: one pass, constant memory (text_store.py).

Long documents do not delay others: with a divisible tokenizer (bytes, or GPT-2's kind, as `data tokenizer` trains) they are cut at
places that no token crosses, and their pieces are encoded in parallel. Other tokenizers get each document whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from megatrain.data.bar import bar
from megatrain.data.origins import FilePlace
from megatrain.data.prepare.read import Lines, read_pieces, total_bytes
from megatrain.data.prepare.text_store import TextStoreWriter, TokenizeReport
from megatrain.data.tokenizer import Tokenizer, load_tokenizer
from megatrain.data.tokenizers.fast_engine import AUTO, encode_with


def tokenize_files(
    inputs: Sequence[str | Path],
    tokenizer: str | Path | Tokenizer,
    output: str | Path,
    workers: int = 1,
    append_eod: bool = False,
    key: str | Lines = "text",
    engine: str = AUTO,
) -> TokenizeReport:
    """Writes the documents of `inputs` to the token store `output` (a prefix), one document each, in order.

    `workers` threads encode. `append_eod` ends each document with the tokenizer's separator; each begins with the token that the tokenizer
    puts first (data/boundaries.py). The store's record keeps these tokens. engine: what encodes (data/tokenizers/fast_engine.py); all
    give the same store. On failure nothing is published and no temporary file stays. Raises ReadError, TokenizerError,
    EngineDiffersError, TokenStoreError, ValueError.
    """
    own = load_tokenizer(tokenizer) if isinstance(tokenizer, (str, Path)) else tokenizer
    if not inputs:
        raise ValueError("there is nothing to tokenise: give --input FILE...")
    size = total_bytes(inputs)

    def write(encoder: Tokenizer) -> TokenizeReport:
        writer = TextStoreWriter(output, encoder, workers, append_eod)
        with bar("tokenize", size, in_bytes=True) as advance, writer as store:
            for piece in read_pieces(inputs, key, encoder.divisible, advance):
                store.add(*piece)
        return writer.report

    report, said = encode_with(own, engine, write)
    if not report.documents:
        raise ValueError(f"there is no document in {', '.join(map(str, inputs))}: no store is written. Give files with text.")
    return replace(report, engine=said)


def tokenize_documents(
    documents: Iterable[tuple[str, FilePlace]],
    tokenizer: Tokenizer,
    output: str | Path,
    workers: int = 1,
    append_eod: bool = False,
) -> TokenizeReport:
    """Writes documents (text, origin) to the token store `output`, in order, as `tokenize_files` does.

    Without text nothing is written, and the report has no documents. For several stores at once, or gigatoken: TextStoreWriter and
    `encode_with`.
    """
    with TextStoreWriter(output, tokenizer, workers, append_eod) as store:
        for text, origin in documents:
            store.add_document(text, origin)
    return store.report
