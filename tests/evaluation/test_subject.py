"""The tasks of lm-evaluation-harness, read by ourselves, give what the harness finds through the adapter, item by item."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
from harness_tasks import items, write_model, write_tasks
from tokenizer_models import bilingual

from megatrain.evaluation.prompts import Manner
from megatrain.evaluation.subject import Subject
from megatrain.evaluation.tasks import load_tasks
from megatrain.inference.opening import opened
from megatrain.parallel.mesh import MeshShape, ParallelContext
from megatrain.testing import simulate

NAMES = ["choices", "rolls", "writes"]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """(what we find, what the harness finds)."""
    from megatrain.evaluation.harness import MegatrainLM

    folder = tmp_path_factory.mktemp("native")
    write_model(folder / "model", bilingual())
    tasks = load_tasks([str(write_tasks(folder / "tasks"))])
    # The harness puts a blank before Chinese answers, too.
    tasks = [replace(task, keys=replace(task.keys, target_delimiter=" ")) for task in tasks]
    with pytest.MonkeyPatch.context() as patch, opened(folder / "model") as model:
        patch.setenv("HF_DATASETS_OFFLINE", "1")
        import lm_eval
        from lm_eval.tasks import TaskManager

        manager = TaskManager(include_path=str(folder / "tasks"), include_defaults=False)
        theirs = lm_eval.simple_evaluate(model=MegatrainLM(model), tasks=NAMES, task_manager=manager, bootstrap_iters=0)
        subject = Subject(model.engine, model.codec, model.ctx)
        ours = {result.task.name: result for result in subject.results(subject.prepare(tasks, Manner()))}
    return ours, theirs


@pytest.mark.filterwarnings("ignore")
def test_native_tasks_are_the_adapters_item_by_item(both):
    ours, theirs = both
    asked = items(theirs, "choices")
    mine = [total for one in ours["choices"].outcomes for total in (*one.record["logprobs"], *one.record["unconditional"])]
    assert len(mine) == 52
    assert mine == pytest.approx([total for total, _ in asked], rel=1e-6)
    assert [one.record["logprob"] for one in ours["rolls"].outcomes] == pytest.approx(items(theirs, "rolls"), rel=1e-6)
    assert [one.record["answer"] for one in ours["writes"].outcomes] == items(theirs, "writes")


@pytest.mark.filterwarnings("ignore")
def test_metrics_are_the_harness(both):
    ours, theirs = both
    assert list(ours["choices"].estimates.metrics) == ["acc", "acc_norm", "acc_bytes", "acc_pmi"]
    names = {"acc_pmi": "acc_mutual_info"}
    for name, estimate in ours["choices"].estimates.metrics.items():
        assert estimate.value == pytest.approx(theirs["results"]["choices"][f"{names.get(name, name)},none"])
    bits = theirs["results"]["rolls"]["bits_per_byte,none"]
    assert ours["rolls"].estimates.metrics["bits_per_byte"].value == pytest.approx(bits, rel=1e-6)
    assert ours["choices"].asked.truncated == 1


LAYOUTS = [MeshShape(tp=2), MeshShape(pp=2), MeshShape(tp=2, dp=2)]
SETTINGS = {
    "gpt": ({"seq_length": 256}, {}, ["quiz_zh", "cloze_zh", "sentiment_en", "text_zh", "topic_en"]),
    "glm": ({"seq_length": 128, "family": "glm"}, {"objective": "glm"}, ["quiz_en", "infill_zh", "text_en"]),
}


@pytest.mark.parametrize("family", SETTINGS)
def test_every_layout_gives_the_same(make_subject, family):
    model, data, names = SETTINGS[family]
    tasks = load_tasks(names, limit=2)

    def answers(ctx):
        subject = make_subject(model, data, ctx)
        results = list(subject.results(subject.prepare(tasks, Manner(num_fewshot=1))))
        return [one.values | {"answer": one.record.get("answer")} for result in results for one in result.outcomes]

    alone = answers(ParallelContext.single())
    for layout in LAYOUTS:
        ranks = simulate(layout, answers)
        assert all(rank == ranks[0] for rank in ranks)
        for found, wanted in zip(ranks[0], alone, strict=True):
            assert found.pop("answer") == wanted.get("answer")
            assert found == pytest.approx({key: value for key, value in wanted.items() if key != "answer"}, rel=1e-5)


def test_a_chat_with_a_model_of_blanks(glm):
    with pytest.raises(ValueError, match="--chat: this model fills blanks, and is asked through them"):
        glm.prepare(load_tasks(["quiz_en"], limit=1), Manner(chat=object()))


def test_a_tokenizer_of_another_model(gpt):
    small = replace(gpt, engine=SimpleNamespace(vocab_size=200, max_length=256))
    with pytest.raises(
        ValueError, match=r"the tokenizer bytes made token 239 of a task, and the model's vocabulary has 200 tokens"
    ):
        small.prepare(load_tasks(["cloze_zh"], limit=2), Manner())
