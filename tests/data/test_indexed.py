"""Token stores against the published layout, in both directions, and every damage with its error."""

import os
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatrain.data.indexed import TokenStore, TokenStoreError, TokenStoreWriter, best_dtype, describe

DOCUMENTS = [[1, 2, 3], [], [40000, 5], [6]]


@pytest.fixture
def prefix(tmp_path):
    prefix = tmp_path / "corpus.v1_text_document"
    with TokenStoreWriter(prefix, "u2") as writer:
        for document in DOCUMENTS:
            writer.add_document(document)
    return prefix


def laid_out_by_hand(prefix, code=8, dtype="<u2", lengths=(3, 2, 4), documents=(0, 2, 3), magic=b"MMIDIDX\x00\x00", version=1):
    """The two files, byte by byte from the specification; returns the tokens."""
    tokens = np.arange(sum(lengths)).astype(dtype)
    offsets = [sum(lengths[:i]) * np.dtype(dtype).itemsize for i in range(len(lengths))]
    index = magic + struct.pack("<Q", version) + struct.pack("<B", code) + struct.pack("<QQ", len(lengths), len(documents))
    index += b"".join(struct.pack("<i", n) for n in lengths)
    index += b"".join(struct.pack("<q", n) for n in offsets)
    index += b"".join(struct.pack("<q", n) for n in documents)
    prefix.with_name(prefix.name + ".idx").write_bytes(index)
    prefix.with_name(prefix.name + ".bin").write_bytes(tokens.tobytes())
    return tokens


def idx(prefix):
    return prefix.with_name(prefix.name + ".idx")


def binary(prefix):
    return prefix.with_name(prefix.name + ".bin")


def test_numpy_opens_a_store_written_here_by_the_published_layout(prefix):
    index = idx(prefix).read_bytes()
    assert index[:9] == b"MMIDIDX\x00\x00"
    assert struct.unpack_from("<QBQQ", index, 9) == (1, 8, 4, 5)
    assert np.frombuffer(index, "<i4", 4, 34).tolist() == [3, 0, 2, 1]
    assert np.frombuffer(index, "<i8", 4, 34 + 16).tolist() == [0, 6, 6, 10]
    assert np.frombuffer(index, "<i8", 5, 34 + 48).tolist() == [0, 1, 2, 3, 4]
    assert len(index) == 34 + 12 * 4 + 8 * 5
    assert np.fromfile(binary(prefix), "<u2").tolist() == [1, 2, 3, 40000, 5, 6]


@pytest.mark.parametrize(("code", "dtype"), [(1, "u1"), (2, "i1"), (3, "<i2"), (4, "<i4"), (5, "<i8"), (8, "<u2")], ids=str)
def test_a_store_laid_out_by_hand_opens_here(tmp_path, code, dtype):
    tokens = laid_out_by_hand(tmp_path / "hand", code, dtype)
    store = TokenStore(tmp_path / "hand")
    assert (len(store), store.documents, store.tokens, store.dtype) == (3, 2, 9, np.dtype(dtype))
    assert store.lengths.tolist() == [3, 2, 4]
    assert [store.sequence(i).tolist() for i in range(3)] == [tokens[:3].tolist(), tokens[3:5].tolist(), tokens[5:].tolist()]
    assert [store.document(i).tolist() for i in range(2)] == [tokens[:5].tolist(), tokens[5:].tolist()]
    assert store.document_lengths().tolist() == [5, 4]
    store.sequence(0)[0] = 1  # the reader's own
    assert store.sequence(0).tolist() == tokens[:3].tolist()


@given(st.lists(st.lists(st.integers(0, 300), max_size=9), max_size=9), st.sampled_from(["u2", "i4", "i8"]))
def test_what_is_written_is_read(tmp_path_factory, documents, dtype):
    prefix = tmp_path_factory.mktemp("store") / "s"
    with TokenStoreWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add_document(document)
    store = TokenStore(prefix)
    assert [store.document(i).tolist() for i in range(store.documents)] == documents
    assert store.tokens == sum(map(len, documents))
    assert isinstance(describe(prefix), str)


def test_a_document_written_in_parts(tmp_path):
    with TokenStoreWriter(tmp_path / "s", "u2") as writer:
        writer.write(np.array([1, 2]))
        writer.write(np.array([3, 4, 5]))
        writer.end_documents([4])
        writer.write(np.array([6]))
        writer.end_documents([2])
    store = TokenStore(tmp_path / "s")
    assert [store.document(i).tolist() for i in range(2)] == [[1, 2, 3, 4], [5, 6]]


def test_tokens_of_no_document_are_not_published(tmp_path):
    with (
        pytest.raises(TokenStoreError, match="last 1 tokens belong to no document"),
        TokenStoreWriter(tmp_path / "s", "u2") as writer,
    ):
        writer.write(np.array([1, 2]))
        writer.end_documents([1])
    with pytest.raises(TokenStoreError, match="add up to 3; 2 were written"), TokenStoreWriter(tmp_path / "s", "u2") as writer:
        writer.write(np.array([1, 2]))
        writer.end_documents([3])
    assert not list(tmp_path.iterdir())


def test_a_failure_publishes_nothing_and_leaves_the_old_store(prefix):
    before = {p.name: p.read_bytes() for p in prefix.parent.iterdir()}
    with pytest.raises(RuntimeError, match="stop"), TokenStoreWriter(prefix, "u2") as writer:
        writer.add_document([9, 9, 9])
        raise RuntimeError("stop")
    assert {p.name: p.read_bytes() for p in prefix.parent.iterdir()} == before


def test_a_store_is_replaced_whole(prefix):
    with TokenStoreWriter(prefix, "i4") as writer:
        writer.add_document([70000])
    assert TokenStore(prefix).document(0).tolist() == [70000]
    assert len(list(prefix.parent.iterdir())) == 2


@pytest.mark.parametrize(("dtype", "bad"), [("u2", 65536), ("u2", -1), ("i1", 128), ("i4", 2**31)])
def test_ids_that_would_wrap_are_refused(tmp_path, dtype, bad):
    with (
        pytest.raises(TokenStoreError, match=f"token id {bad} does not fit"),
        TokenStoreWriter(tmp_path / "s", dtype) as writer,
    ):
        writer.add_document([1, bad])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", ["f4", "f8", "u4", "?"])
def test_dtypes_without_a_code_are_refused(tmp_path, dtype):
    with pytest.raises(TokenStoreError, match="cannot hold"):
        TokenStoreWriter(tmp_path / "s", dtype)


def test_tokens_must_be_flat_integers(tmp_path):
    with TokenStoreWriter(tmp_path / "s", "u2") as writer:
        for wrong in ([0.5, 1.0], [[1, 2], [3, 4]]):
            with pytest.raises(TokenStoreError, match="flat array of integers"):
                writer.add_document(wrong)


@pytest.mark.parametrize(("vocab", "name"), [(257, "uint16"), (65499, "uint16"), (65500, "int32"), (250000, "int32")])
def test_best_dtype_is_megatrons(vocab, name):
    assert best_dtype(vocab).name == name


def test_best_dtype_of_nothing():
    with pytest.raises(ValueError, match="at least 1"):
        best_dtype(0)


def patched(path, offset, layout, value):
    content = bytearray(path.read_bytes())
    struct.pack_into(layout, content, offset, value)
    path.write_bytes(content)


def fairseq_index(prefix):
    """What fairseq would have written: no documents, in the header neither."""
    content, count = idx(prefix).read_bytes(), len(TokenStore(prefix))
    return content[:26] + content[34 : 34 + 12 * count]


@pytest.mark.parametrize("lengths", [[], [4, 0, 1]])
def test_an_index_of_fairseq_is_read_a_sequence_a_document(tmp_path, lengths):
    path = tmp_path / "s"
    with TokenStoreWriter(path, "u2") as writer:
        writer.add_documents(np.arange(sum(lengths)), lengths)
    idx(path).write_bytes(fairseq_index(path))
    assert idx(path).stat().st_size == 26 + 12 * len(lengths)
    store = TokenStore(path)
    assert (store.documents, store.tokens) == (len(lengths), sum(lengths))
    assert store.document_lengths().tolist() == lengths
    assert f"sequences  {len(lengths)}   (fairseq's index: a sequence is a document)" in describe(path)
    if lengths:
        assert [store.document(n).tolist() for n in range(3)] == [[0, 1, 2, 3], [], [4]]


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 988097824\n"
DAMAGE = {
    "no idx": (lambda p: idx(p).unlink(), r"no file .*\.idx.*data tokenize"),
    "no bin": (lambda p: binary(p).unlink(), r"no file .*\.bin"),
    "empty idx": (lambda p: idx(p).write_bytes(b""), "truncated: 0 bytes"),
    "header cut": (lambda p: idx(p).write_bytes(idx(p).read_bytes()[:20]), "truncated: 20 bytes, but the header alone has 34"),
    "arrays cut": (lambda p: idx(p).write_bytes(idx(p).read_bytes()[:-1]), "truncated: 121 bytes, but 4 sequences and 5"),
    "idx too long": (lambda p: idx(p).write_bytes(idx(p).read_bytes() + b"x"), "damaged: 123 bytes"),
    "modes": (lambda p: idx(p).write_bytes(idx(p).read_bytes() + b"\0" * 4), "multimodal"),
    "legacy": (lambda p: idx(p).write_bytes(b"TNTIDX\x00\x00" + bytes(60)), "legacy index .*fairseq adds 1 to every id"),
    "fairseq's cut": (
        lambda p: idx(p).write_bytes(fairseq_index(p)[:-8]),
        "truncated: 66 bytes, but 4 seq.*fairseq writes it, 74",
    ),
    "cut after the header of fairseq": (
        lambda p: idx(p).write_bytes(idx(p).read_bytes()[:30]),
        "truncated: 30 bytes, but 4 seq",
    ),
    "pointer idx": (lambda p: idx(p).write_bytes(POINTER), "this is a Git LFS pointer, not the file itself.*git lfs pull"),
    "pointer bin": (lambda p: binary(p).write_bytes(POINTER), r"\.bin: this is a Git LFS pointer"),
    "magic": (lambda p: idx(p).write_bytes(b"PK" + bytes(60)), "not a Megatron index: it starts with b'PK"),
    "version": (lambda p: patched(idx(p), 9, "<Q", 2), "index version 2; only version 1"),
    "float 6": (lambda p: patched(idx(p), 17, "<B", 6), "dtype code 6: floating point"),
    "float 7": (lambda p: patched(idx(p), 17, "<B", 7), "dtype code 7: floating point"),
    "code 9": (lambda p: patched(idx(p), 17, "<B", 9), "dtype code 9: uint32 of fairseq"),
    "code 11": (lambda p: patched(idx(p), 17, "<B", 11), "dtype code 11: unknown"),
    "bin shorter": (
        lambda p: binary(p).write_bytes(binary(p).read_bytes()[:-2]),
        "shorter than its index says: 10 bytes.*= 12 bytes",
    ),
    "bin longer": (lambda p: binary(p).write_bytes(bytes(13)), "longer than its index says: 13 bytes"),
    "bin empty": (lambda p: binary(p).write_bytes(b""), "shorter than its index says: 0 bytes"),
    "offsets": (lambda p: patched(idx(p), 34 + 16 + 16, "<q", 8), "sequence 2 is said to start at byte 8 .* put it at byte 6"),
    "first offset": (lambda p: patched(idx(p), 34 + 16, "<q", 2), "sequence 0 is said to start at byte 2 .* byte 0"),
    "length": (lambda p: patched(idx(p), 34, "<i", -3), "sequence 0 has length -3"),
    "documents": (lambda p: patched(idx(p), 34 + 48 + 8, "<q", 4), r"boundaries must rise from 0 to 4"),
    "last document": (lambda p: patched(idx(p), 34 + 48 + 32, "<q", 5), r"boundaries must rise from 0 to 4"),
    "counts": (lambda p: patched(idx(p), 18, "<Q", 2**60), "truncated"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_each_damage_gives_one_clear_error(prefix, kind):
    damage, message = DAMAGE[kind]
    damage(prefix)
    with pytest.raises(TokenStoreError, match=message) as caught:
        TokenStore(prefix)
    assert prefix.name in str(caught.value)


def test_a_prefix_with_a_suffix_is_explained(prefix):
    with pytest.raises(TokenStoreError, match=r"named by its prefix: use .*corpus\.v1_text_document\."):
        TokenStore(f"{prefix}.idx")


def test_an_empty_store_opens(tmp_path):
    with TokenStoreWriter(tmp_path / "s", "u2"):
        pass
    store = TokenStore(tmp_path / "s")
    assert (len(store), store.documents, store.tokens) == (0, 0, 0)
    assert "documents  0" in describe(tmp_path / "s")


def test_places_outside_are_refused(prefix):
    store = TokenStore(prefix)
    for place in (-1, 4):
        with pytest.raises(IndexError, match=r"not in 0\.\.3"):
            store.sequence(place)
        with pytest.raises(IndexError, match=r"not in 0\.\.3"):
            store.document_bounds(place)


def test_describe_tells_the_numbers(prefix):
    text = describe(prefix)
    for part in ("uint16", "documents  4", "tokens     6", "12 bytes", "ids 1 to 40000"):
        assert part in text


def test_ids_outside_the_vocabulary_are_named_with_file_offset_and_document(prefix):
    store = TokenStore(prefix)
    store.verify_ids(65536)
    store.verify_ids(40001)
    with pytest.raises(
        TokenStoreError, match=r"\.bin: token id 40000 at token 3 \(byte 6\) of document 2 .*model\.vocab_size=40000"
    ):
        store.verify_ids(40000)
    assert store.read(4, 6, 7).tolist() == [5, 6]


def test_tokens_that_are_overwritten_under_a_reader_are_refused(prefix):
    """The store is small, and was checked when it was opened."""
    store = TokenStore(prefix)
    store.verify_ids(50000)
    patched(binary(prefix), 8, "<H", 50001)
    with pytest.raises(TokenStoreError, match=r"\.bin: token id 50001 at token 4 \(byte 8\) of document 2 is outside"):
        store.read(3, 5, 50000)
    assert store.read(0, 3, 50000).tolist() == [1, 2, 3]


def test_a_store_that_is_cut_under_a_reader_is_an_error_and_no_signal(prefix):
    store = TokenStore(prefix)
    with binary(prefix).open("r+b") as file:
        file.truncate(9)
    assert store.document(0).tolist() == [1, 2, 3]
    with pytest.raises(
        TokenStoreError,
        match=r"\.bin was truncated while it was in use: it has 9 bytes, and had 12, so that tokens 3 to 4 of document 2 cannot be read",
    ):
        store.document(2)
    with idx(prefix).open("r+b") as file:
        file.truncate(90)
    for use in (lambda: store.document_bounds(0), lambda: store.sequence(0), store.document_lengths, store.identity):
        with pytest.raises(TokenStoreError, match=r"\.idx was truncated while it was in use: it has 90 bytes, and had 122, "):
            use()


def test_an_index_that_is_overwritten_under_a_reader_is_refused(prefix):
    store = TokenStore(prefix)
    patched(idx(prefix), 34 + 16 + 16, "<q", 200)
    with pytest.raises(
        TokenStoreError, match=r"\.idx was changed while it was in use: document 2 is said to be tokens 100 to 4 of 6"
    ):
        store.document(2)


def test_a_file_that_cannot_be_read_is_named(prefix, monkeypatch):
    def broken(*_):
        raise OSError(5, "Input/output error")

    store = TokenStore(prefix)
    monkeypatch.setattr("os.preadv", broken)
    with pytest.raises(OSError, match=r"Input/output error \(while reading\): '.*\.bin'"):
        store.document(0)


def test_a_read_that_comes_in_parts_is_put_together(prefix, monkeypatch):
    real = os.preadv
    monkeypatch.setattr("os.preadv", lambda file, rooms, at: real(file, [rooms[0][:3]], at))
    assert TokenStore(prefix).read(0, 6).tolist() == [1, 2, 3, 40000, 5, 6]


def test_negative_ids_are_outside_too(tmp_path):
    with TokenStoreWriter(tmp_path / "s", "i4") as writer:
        writer.add_document([1, -7])
    with pytest.raises(TokenStoreError, match="token id -7 at token 1"):
        TokenStore(tmp_path / "s").verify_ids(1 << 20)


def test_identity_follows_the_index_and_the_sizes(prefix, tmp_path):
    before = TokenStore(prefix).identity()
    assert TokenStore(prefix).identity() == before
    with TokenStoreWriter(tmp_path / "other", "u2") as writer:
        writer.add_document([1, 2, 3])
    assert TokenStore(tmp_path / "other").identity() != before
