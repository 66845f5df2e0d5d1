"""The kinds of files that the program reads: a whole one, how it is changed, how it is read, and whether a change may pass."""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import json
import random
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import mutations
import numpy as np
import torch
import xxhash
import yaml
import zstandard


@dataclass(frozen=True)
class FileKind:
    """One kind of file, or of several that belong together."""

    make: Callable[[Path], None]
    """Writes whole ones into an empty folder."""
    read: Callable[[Path], Any]
    """Reads them as the program does; returns what has been read, to be compared."""
    changes: dict[str, mutations.Change]
    """Pattern of files -> how one of them is changed."""
    sealed: bool = False
    """Whether a change that passes must not change what is read."""


# --- checkpoints -------------------------------------------------------------------------------------------------------------


def _checkpoint(folder: Path) -> None:
    from megatrain.checkpoint.save import Contents, save
    from megatrain.config.load import dump, from_dict
    from megatrain.parallel.mesh import ParallelContext
    from megatrain.parallel.param import Init, ParamSpec, Split
    from megatrain.parallel.portion import Partition, Portion, TensorElements

    specs = (
        ParamSpec("embedding.tokens", (11, 6), Split(0, 11, pad=True)),
        ParamSpec("layers.0.attention.query.weight", (16, 6), Split(0, 8)),
        ParamSpec("final_norm.weight", (6,), partial_over="tp", decay=False, init=Init("constant", 1.0)),
    )
    portions = {
        kind: {
            spec.name: Portion(
                spec, 0, int(np.prod(spec.shape)), TensorElements(torch.randn(spec.shape).view(-1)), Partition(0, 1 << 20)
            )
            for spec in specs
        }
        for kind in ("weights", "exp_avg")
    }
    save(folder, Contents(3, {"samples": 96}, dump(from_dict({}))), portions, ParallelContext.single())


def _read_checkpoint(folder: Path) -> Any:
    from megatrain.checkpoint.load import find, read_weights, verify

    path = find(folder)
    verify(path)
    return [(name, tensor.tolist()) for name, tensor in sorted(read_weights(path).items())]


def _read_manifest(folder: Path) -> Any:
    from megatrain.checkpoint.load import read_weights
    from megatrain.checkpoint.manifest import read_manifest

    path = next(folder.glob("step_*"))
    read_manifest(path)
    return sorted(read_weights(path, check=False))


def _signed(data: bytes, draw: random.Random) -> bytes:
    """A manifest that a stranger has changed, with the checksum that it then has."""
    tree = json.loads(data)
    body = {key: value for key, value in tree.items() if key != "checksum"}
    changed = mutations.of_tree(body, draw)
    text = json.dumps({"checksum": "0" * 32, **changed} if isinstance(changed, dict) else changed, indent=1).encode()
    for name, bomb in mutations.BOMBS.items():
        text = text.replace(f'"{name}"'.encode(), bomb)
    return text.replace(b"0" * 32, xxhash.xxh3_128_hexdigest(text).encode(), 1)


# --- Hugging Face ------------------------------------------------------------------------------------------------------------

GPT2 = {
    "model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    "vocab_size": 40,
    "n_positions": 16,
    "n_embd": 8,
    "n_layer": 1,
    "n_head": 2,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
    "initializer_range": 0.02,
}
LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 40,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "hidden_act": "silu",
    "max_position_embeddings": 16,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
    "rope_scaling": None,
    "tie_word_embeddings": False,
}


def _safetensors(folder: Path) -> None:
    from safetensors.torch import save_file

    tensors = {
        "a": torch.randn(3, 5),
        "b.weight": torch.ones(7, dtype=torch.bfloat16),
        "é": torch.zeros(0),
        "s": torch.tensor(4),
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def _read_safetensors(folder: Path) -> Any:
    from megatrain.checkpoint.tensor_file import TensorFile

    with TensorFile(folder / "model.safetensors") as file:
        return [(name, str(file.tensor(name).dtype), file.tensor(name).double().sum().item()) for name in file.entries]


def _change_header(data: bytes, draw: random.Random) -> bytes:
    """Of the header's tree, with the length that it then has; or of any bytes."""
    if draw.random() < 0.4:
        return mutations.of_bytes(data, draw)
    length = int.from_bytes(data[:8], "little")
    header = mutations.text_of(mutations.of_tree(json.loads(data[8 : 8 + length]), draw))
    claimed = draw.choice((len(header), len(header), len(header), length, *mutations.INTEGERS))
    return claimed.to_bytes(8, "little") + header + data[8 + length :]


def _config(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(LLAMA))
    (folder / "gpt2").mkdir()
    (folder / "gpt2/config.json").write_text(json.dumps(GPT2))


def _read_config(folder: Path) -> Any:
    from megatrain.config.load import from_dict
    from megatrain.config.validate import validate
    from megatrain.huggingface.model_files import model_keys

    for path in (folder, folder / "gpt2"):
        validate(from_dict({"model": model_keys(path), "data": {"train": "x", "tokenizer": "bytes"}}), 1)


def _tokenizers(folder: Path) -> None:
    from sentencepiece import SentencePieceTrainer
    from tokenizer_models import byte_level, sentencepiece

    from megatrain.data.tokenizers.fitting import train_tokenizer

    byte_level().save(str(folder / "a.json"))
    (folder / "b").mkdir()
    sentencepiece("metaspace", template=True).save(str(folder / "b/tokenizer.json"))
    (folder / "b/tokenizer_config.json").write_text(
        json.dumps({"eos_token": "</s>", "bos_token": "<s>", "add_bos_token": True})
    )
    (folder / "b/generation_config.json").write_text(json.dumps({"eos_token_id": [2], "bos_token_id": 1}))
    (folder / "b/special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "</s>"}}))
    tokens = [*(bytes((value,)) for value in range(256)), b"on", b"ce", b"once", b"\xc3\xa9"]
    rows = (base64.b64encode(token) + f" {rank}\n".encode() for rank, token in enumerate(tokens))
    (folder / "own.tiktoken").write_bytes(b"".join(rows))
    (folder / "own.tiktoken.json").write_text(json.dumps({"pattern": "cl100k_base", "special_tokens": {"<|endoftext|>": 300}}))
    model = io.BytesIO()
    texts = iter(["once upon a time"] * 20)
    options = {"vocab_size": 280, "byte_fallback": True, "hard_vocab_limit": False, "minloglevel": 2}
    SentencePieceTrainer.train(sentence_iterator=texts, model_writer=model, **options)
    (folder / "own.model").write_bytes(model.getvalue())
    (folder / "a.txt").write_text("once upon a time")
    train_tokenizer([folder / "a.txt"], 260, folder / "c.json")
    (folder / "a.txt").unlink()


def _read_tokenizers(folder: Path) -> Any:
    from megatrain.data.store_record import describe_tokenizer
    from megatrain.data.tokenizer import load_tokenizer

    for name in ("a.json", "b/tokenizer.json", "own.tiktoken", "own.model", "c.json"):
        describe_tokenizer(str(folder / name))
        tokenizer = load_tokenizer(folder / name)
        ids, _ = tokenizer.encode_batch(["once upon a time é"])
        tokenizer.decode(ids.tolist())


# --- n-gram models -------------------------------------------------------------------------------------------------------------

ARPA = b"""\\data\\
ngram 1=6
ngram 2=4
ngram 3=1

\\1-grams:
-2.0 <unk>
-99 <s> -0.5
-1.0 </s>
-0.4 a -0.2
-0.6 bb -0.1
-0.7 \xe5\xad\x97 -0.15

\\2-grams:
-0.3 <s> a -0.7
-0.2 a bb -0.3
-0.1 bb </s>
-0.25 bb \xe5\xad\x97

\\3-grams:
-0.05 <s> a bb

\\end\\
"""


def _arpa(folder: Path) -> None:
    import bz2
    import lzma

    (folder / "m.arpa").write_bytes(ARPA)
    for name, pack in (("gz", gzip.compress), ("xz", lzma.compress), ("bz2", bz2.compress), ("zst", zstandard.compress)):
        (folder / f"m.{name}").write_bytes(pack(ARPA))


def _score(folder: Path) -> Any:
    from megatrain.ngram import load

    asked = ["a bb", "bb 字 a", "x a", ""]
    found = [(path.name, score) for path in sorted(folder.iterdir()) for score in load(path).score(asked)]
    assert all(np.isfinite(score.log10) for _, score in found), found
    return found


def _binary(folder: Path) -> None:
    from megatrain.ngram.arpa_in import read_arpa
    from megatrain.ngram.binary import write_binary
    from megatrain.ngram.build import model_of

    (folder / "m.arpa").write_bytes(ARPA)
    for name, bits in (("m.bin", 0), ("q.bin", 3)):
        write_binary(model_of(read_arpa(folder / "m.arpa")), folder / name, bits)
    (folder / "m.arpa").unlink()


def _change_model(data: bytes, draw: random.Random) -> bytes:
    """Of the header or the sections, with the checksums that they then have."""
    from megatrain.ngram import binary

    length = int.from_bytes(data[8:12], "little")
    said, body = json.loads(data[12 : 12 + length]), bytearray(data[12 + length :])
    said.pop("crc32")
    offset, _, count = said["sections"]["checksums"]
    if draw.random() < 0.5:
        changed = mutations.of_tree(said, draw)
        said = changed if isinstance(changed, dict) else said
    else:
        at = draw.randrange(offset)
        body[at : at + 8] = draw.choice(mutations.INTEGERS).to_bytes(8, "little")
        del body[offset + 8 * count :]
        sections = sorted(row[0] for row in said["sections"].values())
        parts = zip(sections, [*sections[1:], offset], strict=True)
        sums = [xxhash.xxh3_64_intdigest(body[a:b]).to_bytes(8, "little") for a, b in parts if a < b <= offset]
        body[offset:] = b"".join(sums).ljust(-(-8 * count // 64) * 64, b"\0")
        said["xxh3"] = xxhash.xxh3_128_hexdigest(bytes(body[offset:]))
    try:
        return binary.MAGIC + binary._header(said) + bytes(body)
    except (ValueError, OverflowError):  # a number of hundreds of digits
        return data[:-1]


# --- text --------------------------------------------------------------------------------------------------------------------

ROWS = b"".join(
    json.dumps({"text": f"line {n} é\n" * 3, "id": n, "more": {"a": [1, 2.5, None]}}).encode() + b"\n" for n in range(20)
)
TEXT = "zeile eins\r\nдва 日本語 🙂\n".encode() * 30


def _jsonl(folder: Path) -> None:
    (folder / "a.jsonl").write_bytes(ROWS)
    (folder / "a.txt").write_bytes(TEXT)


@cache
def _bomb(kind: str, of: bytes) -> bytes:
    """A megabyte or less that unpacks to 120 MB."""
    block = of * ((1 << 20) // len(of))
    if kind == "zst":
        packer = zstandard.ZstdCompressor(level=3).compressobj()
        return b"".join(packer.compress(block) for _ in range(120)) + packer.flush()
    packer = zlib.compressobj(6, zlib.DEFLATED, 31)
    return b"".join(packer.compress(block) for _ in range(120)) + packer.flush()


def _change_packed(kind: str, data: bytes, draw: random.Random) -> bytes:
    """Of the compressed bytes, or of what they hold; or a bomb."""
    chance = draw.random()
    if chance < 0.01:
        return _bomb(kind, draw.choice((b"\n", b"x", b"[],", b'{"text": "')))
    if chance < 0.6:
        return mutations.of_bytes(data, draw)
    pack = zstandard.ZstdCompressor(write_checksum=True).compress if kind == "zst" else gzip.compress
    whole = zstandard.ZstdDecompressor().decompressobj().decompress(data) if kind == "zst" else gzip.decompress(data)
    return pack(mutations.of_lines(whole, draw))


def _packed(kind: str, folder: Path) -> None:
    pack = zstandard.ZstdCompressor(write_checksum=True).compress if kind == "zst" else gzip.compress
    for name, data in (("a.jsonl", ROWS), ("a.txt", TEXT)):
        (folder / f"{name}.{kind}").write_bytes(pack(data))


def _read_text(folder: Path) -> Any:
    from megatrain.data.prepare.read import read_documents, read_pieces, total_bytes

    paths = sorted(folder.iterdir())
    total_bytes(paths)
    for read in (read_pieces, read_documents):
        for piece in read(paths):
            len(piece.text)


# --- the corpus pipeline ------------------------------------------------------------------------------------------------------


def _corpus_rows(folder: Path) -> None:
    _jsonl(folder)
    _packed("gz", folder)
    _packed("zst", folder)


def _change_corpus(data: bytes, draw: random.Random) -> bytes:
    kind = {b"\x1f\x8b": "gz", b"\x28\xb5": "zst"}.get(data[:2])
    return mutations.of_lines(data, draw) if kind is None else _change_packed(kind, data, draw)


def _warc(folder: Path) -> None:
    body = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Encoding: gzip\r\n\r\n" + gzip.compress(TEXT)
    record = b"WARC/1.0\r\nWARC-Type: response\r\nContent-Length: %d\r\n\r\n%b\r\n\r\n" % (len(body), body)
    (folder / "a.warc").write_bytes(record * 3)


def _read_corpus(folder: Path) -> Any:
    """Reads what can be read, and then stops at what cannot."""
    from megatrain.corpus.document import Tally
    from megatrain.corpus.reading.choices import ReadConfig, SourceConfig
    from megatrain.corpus.reading.documents import read_unit
    from megatrain.corpus.reading.units import cut_units

    for on_error in ("skip", "stop"):
        config = ReadConfig((SourceConfig("all", (f"{folder}/*",), keep=("id", "more")),), on_error=on_error, unit_bytes=1000)
        for unit in cut_units(config):
            for document in read_unit(unit, config, Tally()):
                document.text.encode()
                json.dumps(document.marks)


# --- stores, configs -----------------------------------------------------------------------------------------------------------


def _store(folder: Path) -> None:
    from megatrain.data.prepare.tokenize import tokenize_files

    (folder / "a.jsonl").write_bytes(ROWS)
    tokenize_files([folder / "a.jsonl"], "bytes", folder / "s", append_eod=True)
    (folder / "a.jsonl").unlink()


def _read_store(folder: Path) -> Any:
    from megatrain.data.describing import describe_token
    from megatrain.data.indexed import TokenStore
    from megatrain.data.store_record import describe, read_record

    store = TokenStore(folder / "s")
    store.verify_ids(257)
    read_record(store)
    describe(str(folder / "s"))
    describe_token(str(folder / "s"), store.tokens - 1)
    return sum(int(store.document(i).sum()) for i in range(store.documents)) + int(store.document_lengths().sum())


def _yaml(folder: Path) -> None:
    tree = {
        "model": {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "seq_length": 16, "vocab_size": 101},
        "data": {"train": [{"path": "x", "weight": 0.5}], "tokenizer": "bytes"},
        "optim": {"lr": 1e-2, "betas": [0.9, 0.95]},
        "train": {"steps": 8, "global_batch_size": 8, "micro_batch_size": 4},
    }
    (folder / "c.yaml").write_text("# a config\n" + yaml.safe_dump(tree))


def _read_yaml(folder: Path) -> Any:
    from megatrain.config.load import load
    from megatrain.config.validate import validate

    validate(load(folder / "c.yaml").config, 1)


def _prompts(folder: Path) -> None:
    template = "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}{% endfor %}"
    config = {
        "chat_template": [{"name": "default", "template": template}],
        "bos_token": {"content": "<s>"},
        "eos_token": "</s>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(template)
    rows = [{"prompt": "Once", "stop": ["x"], "n": 2}, {"messages": [{"role": "user", "content": "a"}], "temperature": 0.5}]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _read_prompts(folder: Path) -> Any:
    from megatrain.chat.conversation import conversation_of
    from megatrain.chat.templates import open_chat
    from megatrain.data.tokenizer import ByteTokenizer
    from megatrain.verbs.prompt_rows import Wishes, read_input, rows_of_text

    path = str(folder / "rows.jsonl")
    rows, _ = rows_of_text(read_input(path), path, Wishes())
    chat = open_chat(ByteTokenizer(), [folder])
    said = conversation_of([{"role": "user", "content": "a"}])
    return [chat.prompt(messages).tokens for messages in (said, *(row.messages for row in rows if row.messages))]


KINDS = {
    "checkpoint": FileKind(_checkpoint, _read_checkpoint, {"step_*/*": mutations.of_bytes}, sealed=True),
    "manifest": FileKind(_checkpoint, _read_manifest, {"step_*/manifest.json": _signed}),
    "safetensors": FileKind(_safetensors, _read_safetensors, {"*.safetensors": _change_header}),
    "config.json": FileKind(_config, _read_config, {"**/config.json": mutations.of_json}),
    "tokenizer": FileKind(
        _tokenizers,
        _read_tokenizers,
        {"**/*.json": mutations.of_json, "*.tiktoken": mutations.of_lines, "*.model": mutations.of_bytes},
    ),
    "arpa": FileKind(_arpa, _score, {"*.arpa": mutations.of_lines, "m.[gxbz]*": mutations.of_bytes}),
    "ngram": FileKind(_binary, _score, {"*": mutations.of_bytes}, sealed=True),
    "ngram_forged": FileKind(_binary, _score, {"*": _change_model}),
    "jsonl": FileKind(_jsonl, _read_text, {"*": mutations.of_lines}),
    "gz": FileKind(partial(_packed, "gz"), _read_text, {"*": partial(_change_packed, "gz")}),
    "zst": FileKind(partial(_packed, "zst"), _read_text, {"*": partial(_change_packed, "zst")}),
    "corpus": FileKind(_corpus_rows, _read_corpus, {"*": _change_corpus}),
    "warc": FileKind(_warc, _read_corpus, {"*": mutations.of_bytes}),
    "store": FileKind(
        _store,
        _read_store,
        {**dict.fromkeys(("*.idx", "*.bin", "*.documents"), mutations.of_bytes), "*.json": mutations.of_json},
    ),
    "prompts": FileKind(
        _prompts,
        _read_prompts,
        {"*.json": mutations.of_json, "*.jinja": mutations.of_lines, "*.jsonl": mutations.of_lines},
    ),
    "yaml": FileKind(_yaml, _read_yaml, {"*": mutations.of_yaml}),
}


def digest(found: Any) -> str:
    """What has been read, in short."""
    return hashlib.sha256(repr(found).encode("utf-8", "surrogatepass")).hexdigest()


def snapshot(folder: Path) -> dict[str, bytes]:
    """Path under a folder -> contents of each file in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(_files(folder.rglob("*")))}


def _files(paths: Iterable[Path]) -> list[Path]:
    return [path for path in paths if path.is_file()]


def changed_file(kind: FileKind, folder: Path, draw: random.Random) -> tuple[Path, bytes]:
    """One file of a folder, drawn, and what it becomes."""
    pattern = draw.choice(list(kind.changes))
    path = draw.choice(sorted(_files(folder.glob(pattern))))
    return path, kind.changes[pattern](path.read_bytes(), draw)
