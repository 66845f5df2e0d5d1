import json

import pytest

from megatrain.config.source import ConfigError
from megatrain.evaluation.contamination import words_of
from megatrain.evaluation.items import TaskError
from megatrain.evaluation.prompts import Manner, contexts_of
from megatrain.evaluation.tasks import SHIPPED, load_tasks, shipped_names

KINDS = {
    "cloze_en": "cloze", "cloze_zh": "cloze", "infill_en": "infilling", "infill_zh": "infilling", "python_choice": "multiple_choice",
    "qa_en": "generate_until", "qa_zh": "generate_until", "quiz_en": "multiple_choice", "quiz_zh": "multiple_choice",
    "sentiment_en": "classification", "sentiment_zh": "classification", "text_en": "loglikelihood_rolling",
    "text_zh": "loglikelihood_rolling", "topic_en": "classification", "topic_zh": "classification", "translate_en_zh": "generate_until",
}  # fmt: skip


def write(folder, name="mine", rows=({"q": "1?", "a": "1"}, {"q": "2?", "a": "2"}), **keys):
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"output_type": "generate_until", "items": f"{name}.jsonl", "doc_to_text": "q", "doc_to_target": "a", **keys}
    (folder / f"{name}.yaml").write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in given.items()))
    return folder / f"{name}.yaml"


def test_the_shipped_tasks_are_found_by_name_and_can_be_asked():
    tasks = load_tasks(shipped_names())
    assert {task.name: task.keys.output_type for task in tasks} == KINDS
    for task in tasks:
        assert 20 <= len(task.questions) <= 60, task.name
        assert len({one.item.identity for one in task.questions}) == len(task.questions), task.name
        assert task.warnings == ()
        assert len(contexts_of(task, Manner(num_fewshot=3))) == len(task.questions)
        if task.keys.output_type == "multiple_choice":
            shares = [sum(one.right == (place,) for one in task.questions) / len(task.questions) for place in range(4)]
            assert min(shares) > 0.1 and max(shares) < 0.4, task.name  # no place is a good guess
    assert [task.name for task in load_tasks([str(SHIPPED)])] == shipped_names()


def test_no_shipped_item_is_a_copy_of_another_tasks():
    sentences = [" ".join(words_of(one.text)) for task in load_tasks(shipped_names()) for one in task.questions if one.text]
    assert len(set(sentences)) == len(sentences)


def test_files_folders_names_and_limits(tmp_path):
    write(tmp_path / "set", "one")
    path = write(tmp_path / "set", "two", task="second")
    tasks = load_tasks([str(tmp_path / "set")])
    assert [task.name for task in tasks] == ["one", "second"]
    (short,) = load_tasks([str(path)], limit=1)
    assert [one.text for one in short.questions] == ["1?"] and len(short.examples) == 2
    with pytest.raises(ConfigError, match=r"two tasks have the name one: .*one\.yaml and .*one\.yaml\. Give one another name"):
        load_tasks([str(tmp_path / "set"), str(tmp_path / "set/one.yaml")])
    with pytest.raises(ConfigError, match=r"--tasks quiz_em: no task has this name\. Did you mean quiz_en\?"):
        load_tasks(["quiz_em"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"the folder has no \.yaml file"):
        load_tasks([str(tmp_path / "empty")])
    with pytest.raises(ConfigError, match=r"nothing\.yaml: no such file"):
        load_tasks([str(tmp_path / "nothing.yaml")])


def test_splits(tmp_path):
    for name in ("asked", "shown"):
        write(tmp_path, name, rows=[{"q": f"{name}?", "a": "x"}])
    files = {"train": "shown.jsonl", "test": "asked.jsonl"}
    path = write(
        tmp_path,
        items=None,
        dataset_path="json",
        dataset_kwargs={"data_files": files},
        test_split="test",
        training_split="train",
    )
    (task,) = load_tasks([str(path)])
    assert ([one.text for one in task.questions], [one.text for one in task.examples]) == (["asked?"], ["shown?"])
    path = write(tmp_path, items=None, dataset_kwargs={"data_files": files}, test_split="tset")
    with pytest.raises(ConfigError, match=r"mine\.yaml: test_split is tset, and dataset_kwargs\.data_files has train, test\."):
        load_tasks([str(path)])
    path = write(tmp_path, items=None, dataset_kwargs={"data_files": files})
    with pytest.raises(ConfigError, match=r"data_files has train, test\. Say which is asked: `test_split: NAME`\."):
        load_tasks([str(path)])


def test_the_hash_is_of_what_is_asked(tmp_path):
    def identity(name, **keys):
        return load_tasks([str(write(tmp_path / name, **keys))])[0].identity

    same = identity("a")
    assert same == identity("b", task="other", metadata={"version": 2})
    others = [identity("c", num_fewshot=1), identity("d", rows=[{"q": "1?", "a": "1"}]), identity("e", description="d")]
    assert len({same, *others}) == 4
    assert load_tasks([str(tmp_path / "a/mine.yaml")], limit=1)[0].identity == same
    with pytest.raises(TaskError, match=r"mine\.jsonl:2: there is no field 'a'"):
        identity("f", rows=[{"q": "1?", "a": "1"}, {"q": "2?"}])
