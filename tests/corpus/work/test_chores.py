"""Chores are published whole or not at all, once, and checked when they are read."""

import json

import pytest

from megatrain.corpus.work.chores import Chore, Phase, Published, WorkError, key_of


def writer(text):
    def run(folder, progress):
        (folder / "out.txt").write_text(text)
        progress(len(text))
        return {"letters": len(text)}

    return run


def phase(*texts, key="0123456789abcdef"):
    return Phase("read", key, [Chore(f"unit_{i}", len(text), writer(text)) for i, text in enumerate(texts)])


def test_a_task_is_published_with_its_facts_and_hashes(tmp_path):
    published, work, said = Published(tmp_path), phase("words"), []
    assert not published.is_done(work, "unit_0")
    published.publish(work, work.chores[0], said.append)
    assert published.is_done(work, "unit_0") and said == [5]
    assert published.facts(work, "unit_0") == {"letters": 5}
    assert published.file(work, "unit_0", "out.txt").read_text() == "words"
    assert published.file(work, "unit_0", "out.txt") == tmp_path / "read-0123456789ab/unit_0/out.txt"
    assert [path.name for path in (tmp_path / work.name).iterdir()] == ["unit_0"]


def test_a_task_that_fails_leaves_nothing(tmp_path):
    def fail(folder, progress):
        (folder / "half.txt").write_text("half")
        raise OSError(28, "No space left on device")

    work = Phase("read", "0" * 16, [Chore("unit_0", 1, fail)])
    with pytest.raises(OSError, match="No space"):
        Published(tmp_path).publish(work, work.chores[0], lambda _: None)
    assert list((tmp_path / work.name).iterdir()) == []


def test_the_first_of_two_workers_publishes(tmp_path):
    published, work = Published(tmp_path), phase("words")

    def late(folder, progress):
        published.publish(work, work.chores[0], progress)
        return writer("others")(folder, progress)

    published.publish(work, Chore("unit_0", 1, late), lambda _: None)
    assert published.facts(work, "unit_0") == {"letters": 5}
    assert [path.name for path in (tmp_path / work.name).iterdir()] == ["unit_0"]


def test_a_changed_file_is_named(tmp_path):
    work = phase("words")
    Published(tmp_path).publish(work, work.chores[0], lambda _: None)
    (tmp_path / work.name / "unit_0/out.txt").write_text("wards")
    with pytest.raises(WorkError, match=r"out.txt was changed after it was written\. Remove .*unit_0, and it is made again"):
        Published(tmp_path).file(work, "unit_0", "out.txt")
    for damage in ("{", "[]", "{}", '{"files": [], "facts": {}}'):
        (tmp_path / work.name / "unit_0/done.json").write_text(damage)
        with pytest.raises(WorkError, match=r"done\.json is damaged or gone\. Remove .*unit_0, and it is made again"):
            Published(tmp_path).facts(work, "unit_0")
    (tmp_path / work.name / "unit_0/done.json").unlink()
    with pytest.raises(WorkError, match=r"done\.json is damaged or gone"):
        Published(tmp_path).file(work, "unit_0", "out.txt")


def test_a_size_is_compared_where_that_must_do(tmp_path):
    work = phase("words")
    Published(tmp_path).publish(work, work.chores[0], lambda _: None)
    out = tmp_path / work.name / "unit_0/out.txt"
    out.write_text("wards")
    assert Published(tmp_path).file(work, "unit_0", "out.txt", whole=False) == out
    out.write_text("word")
    with pytest.raises(WorkError, match=r"out\.txt was changed"):
        Published(tmp_path).file(work, "unit_0", "out.txt", whole=False)
    out.unlink()
    with pytest.raises(WorkError, match=r"out\.txt was changed"):
        Published(tmp_path).file(work, "unit_0", "out.txt")


def test_folders_of_other_keys_and_of_lost_workers(tmp_path):
    published, old, new = Published(tmp_path), phase("a", key="1" * 16), phase("b", key="2" * 16)
    for work in (old, new):
        published.publish(work, work.chores[0], lambda _: None)
    assert published.done(old) == published.done(new) == {"unit_0"}
    (tmp_path / new.name / ".unit_0.17.ab.part").mkdir()
    published.sweep(new)
    assert [path.name for path in (tmp_path / new.name).iterdir()] == ["unit_0"]
    published.clear()
    assert list(tmp_path.iterdir()) == [] and published.done(new) == set()


def test_keys_are_the_same_for_ever():
    assert key_of("a", {"b": 1, "a": [1.5, None]}) == key_of("a", json.loads('{"a": [1.5, null], "b": 1}'))
    assert key_of("a", 1) != key_of("a", 2)
    assert key_of("文") == "3b4e01d6ca015044b3987667cc85893a"
