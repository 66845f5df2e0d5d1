"""Names of special tokens are tokens where a template has written them, and letters where people have."""

from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatrain.chat.marks import BREAK, CUT, LITERAL, MarkedText
from megatrain.data.boundaries import NamedToken
from megatrain.data.tokenizer import ByteTokenizer

USER, IM_END, EATS, THINK = 300, 301, 302, 303
NAMES = {"<|user|>": USER, "<|im_end|>": IM_END, "<|end|>": EATS, "<think>": THINK, "er|>": 304, "~": 305}
MARKS = MarkedText(
    ByteTokenizer(),
    [
        NamedToken("<|user|>", USER),
        NamedToken("<|im_end|>", IM_END),
        NamedToken("<|end|>", EATS, eats_left=True, eats_right=True),
        NamedToken("<think>", THINK, special=False),
        NamedToken("er|>", 304),
        NamedToken("~", 305),
    ],
)
FOREIGN = st.lists(
    st.one_of(st.sampled_from([*NAMES, "<|us", "er|>", "<", ">", "user", "~", BREAK, CUT, LITERAL]), st.text(max_size=3))
)


def test_names_of_the_template_are_tokens_and_those_of_people_are_letters():
    foreign = "say <|user|> now<|im_end|>"
    text = "<|user|>\n" + MARKS.marked(foreign) + "<|im_end|>\n"
    assert MARKS.encode(text) == [USER, *f"\n{foreign}".encode(), IM_END, 10]
    assert MARKS.plain(text) == f"<|user|>\n{foreign}<|im_end|>\n"
    assert MARKS.encode(foreign) == [*b"say ", USER, *b" now", IM_END]


def test_white_space_beside_a_token_that_eats_it_goes():
    assert MARKS.encode("a \n<|end|>\n b <|user|> c") == [97, EATS, *b"b ", USER, *b" c"]


def test_a_token_that_is_found_in_text_is_letters_where_a_person_has_written_it_and_a_token_where_a_model_has():
    class Finds(ByteTokenizer):
        def encode(self, text):
            return [THINK, *text[7:].encode()] if text.startswith("<think>") else list(text.encode())

        encode_inside = encode

    marks = MarkedText(Finds(), [NamedToken("<think>", THINK, special=False)])
    assert marks.encode(marks.marked("<think>a")) == list(b"<think>a")
    assert marks.encode(marks.marked("<think>a", written=True)) == [THINK, 97]
    assert marks.marked({"a": ["<think>", 1]}) == {"a": [f"<{CUT}" + BREAK.join("think>") + BREAK, 1]}


def test_a_cut_divides_what_is_encoded():
    class Counts(ByteTokenizer):
        def encode(self, text):
            return [1, len(text)]

        def encode_inside(self, text):
            return [2, len(text)]

    marks = MarkedText(Counts(), [NamedToken("<|user|>", USER)])
    assert marks.encode(f"ab{CUT}cde") == [1, 2, 2, 3]
    assert marks.encode(f"<|user|>\n{CUT}a") == [USER, 2, 1, 2, 1]


@settings(max_examples=200, deadline=None)
@given(FOREIGN.map("".join), st.sampled_from(["", "<|", "<|u", "<", "x"]), st.sampled_from(["", "|>", ">", "r|>", " y"]))
@example("user", "<|", "|>")
@example("  > quoted", "<|user|", "")
@example("a <", "", "|end|>")
def test_no_text_of_a_person_becomes_a_token(foreign, before, behind):
    text = before + MARKS.marked(foreign) + behind
    assert MARKS.encode(text) == list((before + foreign + behind).encode())
    assert MARKS.plain(text) == before + foreign + behind


@settings(max_examples=200, deadline=None)
@given(FOREIGN.map("".join), st.integers(0, 12), st.integers(0, 12))
def test_nor_does_a_part_of_it_that_a_template_has_cut_out(foreign, begin, length):
    part = MARKS.marked(foreign)[begin : begin + length]
    assert {*NAMES.values()} & {*MARKS.encode(part)} <= {305}  # of a name of one letter there is no part
