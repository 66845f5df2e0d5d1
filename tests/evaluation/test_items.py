import pytest

from megatrain.evaluation.items import Item, TaskError, read_items


def test_objects_a_line(tmp_path):
    path = tmp_path / "items.jsonl"
    path.write_bytes('\ufeff{"q": "中"}\n\n  \n{"q": "b", "n": 1}\r\n'.encode())
    first, second = read_items(path)
    (tmp_path / "pair.jsonl").write_bytes(b'{"a": "\\ud83d\\ude00"}')
    assert read_items(tmp_path / "pair.jsonl")[0].fields == {"a": "\U0001f600"}
    assert (first.line, first.fields, second.line, second.fields) == (1, {"q": "中"}, 4, {"q": "b", "n": 1})
    assert read_items(path, 1) == (first,)
    assert Item("x", 9, {"n": 1, "q": "b"}).identity == second.identity != first.identity


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"a": 1}\n{"a": }\n', "items.jsonl:2: the line is not JSON: Expecting value at character 7."),
        (b'{"a": 1}\n\n[1]\n', "items.jsonl:3: the line is no object."),
        (b'{"a": 1, "a": 2}\n', "items.jsonl:1: the line cannot be read: a key appears twice among ['a', 'a']."),
        (b'{"a": "' + b"\xff" + b'"}\n', "items.jsonl:1: byte 7 of the line is not UTF-8."),
        (b'{"a": "\\ud83d"}\n', "items.jsonl:1: the line has half of a character (a lone surrogate), which is no text."),
        (b"\n \n", "items.jsonl has no items. Write a JSON object a line"),
        ('{"a": 1}'.encode("utf-16"), "items.jsonl: this is UTF-16, not UTF-8. Convert it: iconv -f utf-16 -t utf-8 OLD > NEW"),
    ],
)
def test_what_is_broken_is_told_with_file_and_line(tmp_path, data, message):
    path = tmp_path / "items.jsonl"
    path.write_bytes(data)
    with pytest.raises(TaskError) as caught:
        read_items(path)
    assert message in str(caught.value)


def test_files_that_are_none(tmp_path):
    with pytest.raises(
        TaskError, match=r"nothing\.jsonl: no such file of items\. Paths in a task's file start at that file's folder\."
    ):
        read_items(tmp_path / "nothing.jsonl")
    with pytest.raises(TaskError, match="cannot be read: Is a directory"):
        read_items(tmp_path)
