"""Text files, or documents as they come, to a token store: one pass, constant memory (text_store.py).

Long documents do not delay others: with a divisible tokenizer (bytes, or GPT-2's kind, as `data tokenizer` trains) they are cut at
places that no token crosses, and their pieces are encoded in parallel. Other tokenizers get each document whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from megatrain.data.bar import bar
from megatrain.data.boundaries import TokenRequest
from megatrain.data.origins import FilePlace
from megatrain.data.prepare.read import Lines, read_pieces, total_bytes
from megatrain.data.prepare.text_store import TextStoreWriter, TokenizeReport
from megatrain.data.tokenizer import Tokenizer, load_tokenizer


def tokenize_files(
    inputs: Sequence[str | Path],
    tokenizer: str | Path | Tokenizer,
    output: str | Path,
    workers: int = 1,
    append_eod: bool = False,
    key: str | Lines = "text",
    eod: TokenRequest = None,
    bos: TokenRequest = None,
) -> TokenizeReport:
    """Writes the documents of `inputs` to the token store `output` (a prefix), one document each, in order.

    `workers` threads encode. `append_eod` ends each document with the tokenizer's separator, `eod` with that token; each begins with
    `bos`, or with the token that the tokenizer puts first (data/boundaries.py). The store's record keeps these tokens. On failure
    nothing is published and no temporary file stays. Raises ReadError, TokenizerError, TokenStoreError, ValueError.
    """
    encoder = load_tokenizer(tokenizer, eod, bos) if isinstance(tokenizer, (str, Path)) else tokenizer
    writer = TextStoreWriter(output, encoder, workers, append_eod, eod)
    if not inputs:
        raise ValueError("there is nothing to tokenise: give --input FILE...")
    size = total_bytes(inputs)
    with bar("tokenize", size, in_bytes=True) as advance, writer as store:
        for piece in read_pieces(inputs, key, encoder.divisible, advance):
            store.add(*piece)
    if not writer.report.documents:
        raise ValueError(f"there is no document in {', '.join(map(str, inputs))}: no store is written. Give files with text.")
    return writer.report


def tokenize_documents(
    documents: Iterable[tuple[str, FilePlace]],
    tokenizer: Tokenizer,
    output: str | Path,
    workers: int = 1,
    append_eod: bool = False,
    eod: TokenRequest = None,
) -> TokenizeReport:
    """Writes documents (text, origin) to the token store `output`, in order, as `tokenize_files` does; eod: the one that the tokenizer was
    loaded with.

    Without text nothing is written, and the report has no documents. For several stores at once: `add_document`.
    """
    with TextStoreWriter(output, tokenizer, workers, append_eod, eod) as store:
        for text, origin in documents:
            store.add_document(text, origin)
    return store.report
