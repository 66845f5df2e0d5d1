"""The vocabulary of a preparation."""

from pathlib import Path

from megatrain.corpus.document import Document
from megatrain.corpus.shards import writing
from megatrain.corpus.stores import TOKENIZER, learn
from megatrain.data.tokenizer import load_tokenizer
from megatrain.data.tokenizers.fitting import trained_on


def test_a_vocabulary_is_trained_on_a_sample_of_the_documents(tmp_path: Path) -> None:
    with writing(tmp_path / "documents.jsonl.zst") as write:
        for number in range(100):
            write(Document(f"Document number {number:03}.", "source", "file", number))
    assert learn(lambda: [tmp_path / "documents.jsonl.zst"], 260, 250, tmp_path, lambda _: None) == {"entries": 260}
    record = trained_on(tmp_path / TOKENIZER, load_tokenizer(tmp_path / TOKENIZER).identity)
    assert record is not None
    assert (record.documents, record.text_bytes, record.sample) == (12, 240, 250)
