"""Models of SentencePiece: its own ids, control tokens that text cannot forge, a place wherever a tokenizer goes."""

import hashlib
import io
import sys

import pytest
import sentencepiece

from megatrain.cli.main import main
from megatrain.config.schema import DataConfig
from megatrain.data.boundaries import TokenizerError
from megatrain.data.indexed import TokenStore
from megatrain.data.prepare.tokenize import tokenize_files
from megatrain.data.stream import GrowingText
from megatrain.data.tokenizer import load_tokenizer
from megatrain.data.tokenizers.fast_engine import hard_texts
from megatrain.verbs.export_tokenizer import files_of

TEXTS = [
    "the quick brown fox jumps over the lazy dog",
    "今天天气很好 我们去公园散步",
    "naïve café ① ｆｕｌｌ",
    "def main(): return 0",
] * 50


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pieces")
    for kind in ("bpe", "unigram"):
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXTS),
            model_writer=model,
            vocab_size=330,
            model_type=kind,
            byte_fallback=True,
            character_coverage=0.99,
            hard_vocab_limit=False,
            user_defined_symbols=["<user>"],
            minloglevel=2,
        )
        (folder / f"{kind}.model").write_bytes(model.getvalue())
    return folder


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_ids_and_texts_are_those_of_the_library(folder, kind):
    tokenizer = load_tokenizer(folder / f"{kind}.model")
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(folder / f"{kind}.model"))
    texts = [*hard_texts(["</s>", "<s>", "<user>"]), *TEXTS[:4], "", "a </s> b"]
    encoded = tokenizer.encode_batch(texts)
    assert encoded.ids.tolist() == [token for text in texts for token in oracle.encode(text)]
    assert encoded.lengths.tolist() == [len(oracle.encode(text)) for text in texts]
    for text in texts:
        ids = tokenizer.encode(text)
        assert ids == oracle.encode(text) and tokenizer.decode(ids) == oracle.decode(ids)
        assert not {tokenizer.special_id("</s>"), tokenizer.special_id("<s>")} & set(ids)
    for text in ("the dog", "unknown ж letters 🙂", "我们 </s>"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
        growing = GrowingText(tokenizer)
        assert "".join(map(growing.push, tokenizer.encode(text))) + growing.finish() == text


def test_a_character_begun_waits_and_a_broken_one_does_not(folder):
    tokenizer = load_tokenizer(folder / "bpe.model")
    data = [tokenizer.id_of(f"<0x{byte:02X}>") for byte in b"\xf0\x9f\x98\x80\xff\xe4\xbd\xe4"]
    text = GrowingText(tokenizer, tokenizer.encode("the"))
    assert [text.push(token) for token in data] == ["", "", "", "😀", "\ufffd", "", "", "\ufffd\ufffd"]
    assert text.finish() == "\ufffd"
    assert tokenizer.decode(data) == "😀\ufffd\ufffd\ufffd\ufffd"


def test_names_ends_and_unknown_ids(folder):
    tokenizer = load_tokenizer(folder / "bpe.model")
    assert (tokenizer.eod, tokenizer.beginning.bos, tokenizer.beginning.first) == (2, 1, None)
    assert (tokenizer.name_of(2), tokenizer.id_of("<user>"), tokenizer.special_id("<user>")) == ("</s>", 3, None)
    assert tokenizer.id_of("no such piece") is None
    assert tokenizer.decode([*tokenizer.encode("the"), 2, 1_000_000]) == "the</s>"
    assert not tokenizer.divisible and tokenizer.template() == ()
    assert load_tokenizer(folder / "bpe.model", "<user>", "<s>").beginning.first == 1
    with pytest.raises(TokenizerError, match=r"eod=<none>: .*bpe\.model has no such token"):
        load_tokenizer(folder / "bpe.model", "<none>")


def test_it_is_told_by_its_contents(folder, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((folder / "bpe.model").read_bytes())
    assert load_tokenizer(tmp_path / "tokenizer.json").identity == (
        "sentencepiece " + hashlib.sha256((folder / "bpe.model").read_bytes()).hexdigest()
    )


def test_a_store_is_made_with_it(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("the lazy dog")
    (tmp_path / "t.model").write_bytes((folder / "unigram.model").read_bytes())
    report = tokenize_files(["a.txt"], "t.model", "s", append_eod=True)
    tokenizer = load_tokenizer("t.model")
    assert TokenStore("s").document(0).tolist() == [*tokenizer.encode("the lazy dog"), 2] and report.engine == ""
    assert main(["data", "inspect", "t.model"]) == 0
    assert f"vocabulary {tokenizer.vocab_size:,}" in capsys.readouterr().out
    assert main(["data", "inspect", "s", "--token", "0"]) == 0
    assert "text 'the lazy dog</s>'" in capsys.readouterr().out


def test_a_damaged_model_is_one_clear_error(folder, tmp_path):
    data = (folder / "bpe.model").read_bytes()
    for damaged in (data[:100], b"\x0a" + b"\xff" * 50, b"\x0a\x00", data.replace(b"<user>", b"<us\xffr>", 1)):
        (tmp_path / "t.model").write_bytes(damaged)
        with pytest.raises(TokenizerError, match=r"t\.model is not a model of SentencePiece: ") as caught:
            load_tokenizer(tmp_path / "t.model")
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_without_the_library_the_command_is_named(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(TokenizerError, match=r"which needs it: pip install 'megatrain\[sentencepiece\]'"):
        load_tokenizer(folder / "bpe.model")


def test_it_is_not_exported(folder):
    with pytest.raises(TokenizerError, match=r"bpe\.model is a model of SentencePiece, which has no tokenizer\.json to export"):
        files_of(DataConfig(tokenizer=str(folder / "bpe.model")), 128)
