"""samples.md: the text of a model is text there, whatever it is, and each step stands once."""

import pytest

from megatrain.records.samples_page import SamplesRow, SampleText, add_samples, as_markdown, console_lines

HOSTILE = "# no heading\n## step 7\n```\n<script>\x1b[31m\u202e\r **bold**"


def row(step, *samples):
    return SamplesRow(
        step, 1000 * step, "the most probable tokens", samples or (SampleText("Once", (f" at {step}",), (3,), (True,)),)
    )


def test_the_page_reads_as_it_is_written(tmp_path):
    blanks = SampleText("a[MASK]b[MASK]", ("x\n\ny", ""), (4, 0), (True, False), blanks=True)
    add_samples(tmp_path / "samples.md", row(5, SampleText("Once", (" upon",), (1,), (False,)), blanks))
    assert (tmp_path / "samples.md").read_text() == (
        "# Samples\n\n## step 5\n\n5,000 training tokens; the most probable tokens\n\n"
        "**Prompt 1**\n\n    Once\n\nContinuation: 1 tokens, cut at the limit\n\n     upon\n\n"
        "**Prompt 2**\n\n    a[MASK]b[MASK]\n\nBlank 1: 4 tokens, ended by the model\n\n    x\n    \n    y\n\n"
        "Blank 2: 0 tokens, cut at the limit\n\n(nothing)\n"
    )


def test_text_of_the_model_is_neither_markdown_nor_a_terminal_code_nor_a_heading_of_the_page(tmp_path):
    path = tmp_path / "samples.md"
    hostile = SampleText(HOSTILE, (HOSTILE,), (9,), (True,))
    add_samples(path, row(5, hostile))
    add_samples(path, row(6, hostile))
    lines = path.read_text().splitlines()
    assert [line for line in lines if line.startswith("#")] == ["# Samples", "## step 5", "## step 6"]
    assert lines.count("    ## step 7") == 4 and lines.count(r"    <script>\x1b[31m\u202e\r **bold**") == 4
    assert all(letter.isprintable() for letter in as_markdown(hostile).replace("\n", ""))
    assert console_lines(row(5, hostile)).count("\n") == 1


def test_a_step_that_comes_again_takes_the_place_of_what_stood_there_and_of_what_followed(tmp_path):
    path = tmp_path / "samples.md"
    for step in (5, 10, 15):
        add_samples(path, row(step))
    add_samples(path, row(10, SampleText("Once", (" again",), (1,), (True,))))
    text = path.read_text()
    assert "## step 5\n" in text and text.count("## step 10\n") == 1 and "## step 15" not in text
    assert " at 5" in text and " again" in text and " at 10" not in text


def test_the_console_has_three_prompts_and_the_ends_of_long_texts():
    long = SampleText("p" * 200 + "END", ("BEGIN" + "t" * 200,), (205,), (False,))
    lines = console_lines(row(5, *[long] * 5)).split("\n")
    assert lines[0] == "samples at step 5 | the most probable tokens |" and len(lines) == 5
    assert lines[1] == f'  "{"p" * 97}END" -> "BEGIN{"t" * 95}"...' and lines[4] == "  ... and 2 more in samples.md"


def test_a_link_is_not_written_through(tmp_path):
    (tmp_path / "samples.md").symlink_to(tmp_path / "other")
    with pytest.raises(OSError, match="is a link"):
        add_samples(tmp_path / "samples.md", row(5))
