"""Small tokenizers of the kinds that others use, made on the spot."""

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

WORDS = ("once", "upon", "a", "time", "the", "cat")


def sentencepiece(kind="strip", eos="</s>", template=False):
    """LLaMA's kind: blanks are `▁`, unknown characters are bytes; ids 0 to 2 are <unk>, <s> and the end.

    kind: how a blank before the first word is put and taken away: by Metaspace (Mistral), or by a normaliser and a stripping decoder.
    """
    vocab = {"<unk>": 0, "<s>": 1, eos: 2} | {f"<0x{value:02X}>": 3 + value for value in range(256)}
    merges = []
    for word in WORDS:
        spelled = f"▁{word}"
        for character in spelled:
            vocab.setdefault(character, len(vocab))
        for n in range(2, len(spelled) + 1):
            if spelled[:n] not in vocab:
                merges.append((spelled[: n - 1], spelled[n - 1]))
                vocab[spelled[:n]] = len(vocab)
    made = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.add_special_tokens([AddedToken(token, special=True) for token in ("<unk>", "<s>", eos)])
    if kind == "metaspace":
        made.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
        made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace("▁", prepend_scheme="first")])
    else:
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        stripping = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        made.decoder = decoders.Sequence(stripping)
    if template:
        made.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 1)])
    return made


def byte_level():
    """GPT-2's kind, whose tokens are pieces of bytes."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens(["<|endoftext|>"])
    from tokenizers import trainers

    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    made.train_from_iterator([" ".join(WORDS)] * 3, trainer)
    return made


# The first is the last byte of 国 with the first of another character: a token that holds parts of two.
MERGES = "½ å,w e,we r,A n,An s,Ans wer,Ġ P,ĠP ar,a r,i s,ĠPar is,ä ¸,ä¸ Ń,å Ľ,åĽ ½,ä¸Ń åĽ½,Ċ Ċ,Ġ Ġ,Ġ a,. Ċ"


def bilingual(template=False):
    """GPT-2's kind with merges chosen by hand; template: its file puts <s> before a text."""
    pieces = [tuple(pair.split(" ")) for pair in MERGES.split(",")]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = ["<|endoftext|>", "<s>", *alphabet, *(name for pair in pieces for name in (*pair, "".join(pair)))]
    library = Tokenizer(models.BPE({name: n for n, name in enumerate(dict.fromkeys(names))}, pieces))
    library.pre_tokenizer, library.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    library.add_special_tokens(["<|endoftext|>", "<s>"])
    if template:
        library.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 1)])
    return library


def wordpiece():
    """BERT's kind: lower case, a blank between words that are not continued by `##`."""
    words = ["[UNK]", "[CLS]", "[SEP]", *WORDS, ".", "##s", "##up"]
    made = Tokenizer(models.WordPiece({word: n for n, word in enumerate(words)}, unk_token="[UNK]"))
    made.add_special_tokens(["[UNK]", "[CLS]", "[SEP]"])
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece(cleanup=True)
    made.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", "[CLS] $A [SEP] $B [SEP]", [("[CLS]", 1), ("[SEP]", 2)]
    )
    return made


KINDS = {
    "llama": sentencepiece,
    "mistral": lambda: sentencepiece("metaspace"),
    "gpt2": byte_level,
    "bert": wordpiece,
}
