"""The harness' items with its own `hf` backend, and under every layout, are the same."""

import random
from types import SimpleNamespace

import pytest
import torch
from harness_tasks import close, hf_backend, items, write_model, write_tasks
from tokenizer_models import KINDS, bilingual

from megatrain.chat.templates import open_chat
from megatrain.config.load import from_dict
from megatrain.data.tokenizer import JsonTokenizer, load_tokenizer
from megatrain.evaluation.generation_arguments import GenerationArguments
from megatrain.evaluation.joins import joined
from megatrain.evaluation.prepared import LeftToRightTexts
from megatrain.evaluation.prompts import Manner
from megatrain.evaluation.scoring import sums_of
from megatrain.evaluation.subject import Subject
from megatrain.evaluation.tasks import load_tasks
from megatrain.inference.engine import Engine, EngineSettings
from megatrain.inference.opening import hf_chunks, opened
from megatrain.inference.paged_model import ForwardModel
from megatrain.inference.requests import Sampling
from megatrain.inference.trained import laid_out
from megatrain.init_from import config_of_hf
from megatrain.parallel.mesh import MeshShape
from megatrain.parallel.pipeline_parallel import Unsharded
from megatrain.testing import simulate
from megatrain.training import schedule_of

pytestmark = pytest.mark.filterwarnings("ignore")  # the harness' and transformers' own
TASKS = ["choices", "rolls", "writes"]
LAYOUTS = [MeshShape(tp=2), MeshShape(pp=2), MeshShape(tp=2, dp=2)]


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """Folders of a model, one that puts <s> before a text, and tasks."""
    folder = tmp_path_factory.mktemp("harness")
    write_model(folder / "model", bilingual())
    write_model(folder / "opening", bilingual(True), opening=True)
    write_tasks(folder / "tasks")
    return folder


@pytest.fixture(scope="module")
def evaluated(here):
    """(lm) -> the harness' results for a model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_OFFLINE", "1")
        patch.setenv("HF_HUB_OFFLINE", "1")
        import lm_eval
        from lm_eval.tasks import TaskManager

        manager = TaskManager(include_path=str(here / "tasks"), include_defaults=False)
        yield lambda lm, tasks=TASKS, **how: lm_eval.evaluate(lm, manager.load(tasks), bootstrap_iters=0, **how)


def instances(*arguments):
    return [SimpleNamespace(args=given) for given in arguments]


def watched(engine):
    """The requests that an engine gets from now on."""
    asked, add = [], engine.add
    engine.add = lambda request: asked.append(request) or add(request)
    return asked


def test_items_are_those_of_the_hf_backend(here, evaluated):
    from megatrain.evaluation.harness import MegatrainLM

    theirs = evaluated(hf_backend(here / "model"))
    with opened(here / "model") as model:
        lm = MegatrainLM(model)
        ours, info = evaluated(lm), lm.get_model_info()
    for task in TASKS:
        close(items(ours, task), items(theirs, task))
        wanted = {name: value for name, value in theirs["results"][task].items() if isinstance(value, float)}
        assert wanted == pytest.approx({name: ours["results"][task][name] for name in wanted}, rel=1e-5)
    assert lm.counts == {"requests": 61, "spanned": 0, "truncated": 5}  # 4 choices after a long context, and a document
    assert info["model"] == f"megatrain {here / 'model'}" and info["model_dtype"] == "float32"
    assert info["layout"] == {"tp": 1, "pp": 1, "dp": 1, "world": 1, "expert_parallel_size": 1} and info["counts"] == lm.counts


def test_what_opens_a_text_is_put_once(here, evaluated):
    """The hf backend puts <s> twice before a document if it is let."""
    from megatrain.evaluation.harness import MegatrainLM

    with opened(here / "opening") as model:
        ours = evaluated(MegatrainLM(model), ["choices", "rolls"])
    theirs = hf_backend(here / "opening")
    found = evaluated(theirs, ["choices", "rolls"])
    close(items(ours, "choices"), items(found, "choices"))
    assert all(abs(a - b) > 0.5 for a, b in zip(items(found, "rolls"), items(ours, "rolls"), strict=True))
    how = {"apply_chat_template": True, "system_instruction": "中国"}
    chats = evaluated(theirs, ["choices", "writes"], **how)
    theirs.add_bos_token = False
    close(items(ours, "rolls"), items(evaluated(theirs, ["rolls"]), "rolls"))
    with opened(here / "opening") as model:
        lm = MegatrainLM(model, open_chat(model.codec, [here / "opening"]))
        asked = watched(model.engine)
        ours = evaluated(lm, ["choices", "writes"], **how)
    for task in ("choices", "writes"):
        close(items(ours, task), items(chats, task))
    im_start, im_end = (model.codec.special_id(name) for name in ("<|im_start|>", "<|im_end|>"))
    assert all(request.tokens.count(1) <= 1 for request in asked) and any(request.tokens.count(1) for request in asked)
    written = [request for request in asked if request.max_tokens]
    assert len(written) == 5 and all(request.tokens[:2] == (1, im_start) and im_end in request.ends for request in written)
    assert lm.chat_template(True) == f"of {here / 'opening'}" and lm.tokenizer_name != MegatrainLM(model).tokenizer_name


def test_native_tasks_are_the_adapters_item_by_item(here, evaluated):
    """From the same files."""
    from megatrain.evaluation.harness import MegatrainLM

    with opened(here / "model") as model:
        theirs = evaluated(MegatrainLM(model))
        subject = Subject(model.engine, model.codec, model.ctx)
        tasks = load_tasks([str(here / "tasks" / f"{task}.yaml") for task in TASKS], None)
        ours = {one.task.name: one.outcomes for one in subject.results(subject.prepare(tasks, Manner()))}
    for sample, outcome in zip(theirs["samples"]["choices"], ours["choices"], strict=True):
        sums = [total for ((total, _),) in sample["resps"]]
        assert outcome.record["logprobs"] + outcome.record["unconditional"] == pytest.approx(sums, rel=1e-6)
        names = {"acc": "acc", "acc_norm": "acc_norm", "acc_bytes": "acc_bytes", "acc_pmi": "acc_mutual_info"}
        assert {name: outcome.values[name] for name in names} == {name: sample[of] for name, of in names.items()}
    close([-one.values["nats"] for one in ours["rolls"]], items(theirs, "rolls"))
    assert [one.record["answer"] for one in ours["writes"]] == items(theirs, "writes")


PAIRS = [
    *(("Where is it", f" {place}") for place in ("Paris", "巴黎", "an Answer")),
    ("Ans", "wer"),
    ("", "中国"),
    ("Paris " * 120, "Answer"),
    ("中", "国" * 120),
    *(("Where is it " * 4, place) for place in ("Paris", "is")),
]
TEXTS = [("Ans wer is Paris. " * n,) for n in (0, 1, 12)]
WRITTEN = [(f"Ans {n} 中国", {"until": ["a"], "max_gen_toks": 12}) for n in range(3)]
DRAWN = [("Ans", {"max_gen_toks": 12, "do_sample": True, "temperature": 0.9, "top_p": 0.9})] * 3


def asked(lm):
    """Everything that a model can be asked."""
    return (
        lm.loglikelihood(instances(*PAIRS)),
        lm.loglikelihood_rolling(instances(*TEXTS)),
        lm.generate_until(instances(*WRITTEN, *DRAWN)),
        dict(lm.counts),
    )


def model_on(ctx, folder):
    """A model on a simulated rank."""
    sizes = [f"parallel.tensor_parallel_size={ctx.tp.size}", f"parallel.pipeline_parallel_size={ctx.pp.size}"]
    config, codec = laid_out(config_of_hf(folder), sizes, ctx.world.size), load_tokenizer(folder / "tokenizer.json")
    chunks = hf_chunks(folder, config, ctx, torch.float32)
    weights = ForwardModel(ctx, chunks, schedule_of(config, 1, backward=False), Unsharded())
    engine = Engine(weights, codec, EngineSettings(cache_tokens=4096))
    return SimpleNamespace(
        source=folder,
        config=config,
        marks=None,
        ctx=ctx,
        weights=weights,
        engine=engine,
        codec=codec,
        is_first=ctx.world.rank == 0,
    )


@pytest.fixture(scope="module")
def alone(here):
    from megatrain.evaluation.harness import MegatrainLM

    with opened(here / "model") as model:
        return asked(MegatrainLM(model))


def test_every_layout_gives_the_same(here, alone):
    from megatrain.evaluation.harness import MegatrainLM

    scores, documents, texts, counts = alone
    assert counts == {"requests": 18, "spanned": 1, "truncated": 2}
    assert documents[0] == 0.0 and len(set(texts[3:])) == 3  # each repeat is drawn anew
    for layout in LAYOUTS:
        ranks = simulate(layout, lambda ctx: asked(MegatrainLM(model_on(ctx, here / "model"))))
        assert all(rank == ranks[0] for rank in ranks)
        close(ranks[0][0], scores)
        close(ranks[0][1], documents)
        assert ranks[0][2:] == (texts, counts)


def test_nothing_depends_on_what_is_asked_beside_it(here, alone):
    from megatrain.evaluation.harness import MegatrainLM

    with opened(here / "model") as model:
        lm = MegatrainLM(model)
        close([lm.loglikelihood(instances(pair))[0] for pair in PAIRS], alone[0])
        close(lm.loglikelihood(instances(*PAIRS[::-1]))[::-1], alone[0])
        assert lm.generate_until(instances(*DRAWN, *WRITTEN[:1])) == [*alone[2][3:], alone[2][0]]
        assert MegatrainLM(model, seed=1).generate_until(instances(*DRAWN))[0] != alone[2][3]


def test_a_model_that_fills_blanks_is_asked_through_them(glm):
    from megatrain.evaluation.harness import MegatrainLM

    config = from_dict({"model": {"family": "glm", "vocab_size": 272}, "data": {"objective": "glm", "tokenizer": "bytes"}})
    lm = MegatrainLM(
        SimpleNamespace(source="glm", config=config, marks=None, ctx=glm.ctx, engine=glm.engine, codec=glm.codec, is_first=True)
    )
    pairs = [("Where is it", " here"), ("It was [MASK].", "great")]
    found = lm.loglikelihood(instances(*pairs))
    assert found == sums_of(glm.engine, [one.windows for one in glm.texts(Manner()).pairs(pairs)])
    onward = LeftToRightTexts(glm.codec, glm.engine.max_length).pairs(pairs)
    assert all(
        abs(a - b) > 0.1 for (a, _), (b, _) in zip(found, sums_of(glm.engine, [one.windows for one in onward]), strict=True)
    )
    asked = watched(glm.engine)
    lm.generate_until(instances((pairs[1][0], {"max_gen_toks": 4})))
    (request,) = asked
    assert request.tokens == (259, *b"It was", 260, *b".", 257)  # [CLS], [MASK] and <sop>
    assert request.places.prefix == 9 and 271 in request.sampling.never


def test_ranks_that_ask_for_different_things_say_so(here):
    from megatrain.evaluation.harness import MegatrainLM

    def work(ctx):
        lm = MegatrainLM(model_on(ctx, here / "model"))
        with pytest.raises(ValueError, match=r"different loglikelihood requests \(\d on this one\)\. .* fixed seed.*use_cache"):
            lm.loglikelihood(instances(*PAIRS[: 1 + ctx.world.rank]))
        return lm.loglikelihood(instances(PAIRS[0]))

    found = simulate(MeshShape(dp=2), work)
    assert found[0] == found[1]


def test_what_cannot_be_asked(here, caplog):
    from megatrain.evaluation.harness import MegatrainLM

    with opened(here / "model") as model:
        lm = MegatrainLM(model)
        with pytest.raises(
            ValueError, match=r"max_gen_toks=96 leaves no room .* the model's 96 positions\. Use a number from 1 to 95"
        ):
            lm.generate_until(instances(("Ans", {"max_gen_toks": 96})))
        with pytest.raises(ValueError, match="was given no chat template: MegatrainLM"):
            lm.apply_chat_template([{"role": "user", "content": "Ans"}])
        assert lm.chat_template(False) is None and (lm.rank, lm.world_size) == (0, 1)
        with caplog.at_level("WARNING"):
            lm.generate_until(instances(*[("Ans", {"until": ["\\n"], "max_gen_toks": 1})] * 2))
        assert [record.getMessage()[:38] for record in caplog.records] == ["`until` has a backslash and an n: in Y"]
        assert lm.max_gen_toks == 48 and len(lm.tokenizer_name) == 24


@pytest.mark.parametrize(
    ("given", "sampling", "until", "length"),
    [
        ({}, Sampling(greedy=True), (), None),
        ({"until": "\n", "max_gen_toks": 5}, Sampling(greedy=True), ("\n",), 5),
        ({"until": ["", "a", "a"], "max_new_tokens": 6, "max_tokens": 7}, Sampling(greedy=True), ("a",), 6),
        ({"temperature": 0.7, "top_p": 0.9}, Sampling(temperature=0.7, top_p=0.9), (), None),
        ({"do_sample": True, "top_k": 4}, Sampling(top_k=4), (), None),
        ({"do_sample": True, "temperature": 0.0}, Sampling(greedy=True), (), None),
        ({"do_sample": False, "temperature": 0.8}, Sampling(greedy=True), (), None),
        ({"num_beams": 1, "seed": 4, "min_p": 0.1, "do_sample": True}, Sampling(min_p=0.1), (), None),
    ],
)
def test_how_a_text_is_written(given, sampling, until, length):
    found = GenerationArguments.of(given)
    assert (found.sampling, found.until, found.max_tokens, found.seed) == (sampling, until, length, given.get("seed"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"length_penalty": 2},
            "the generation argument length_penalty is not known here. Known are do_sample, frequency_penalty",
        ),
        ({"num_beams": 3}, "num_beams=3: a task gets one text for each request. Use num_beams=1"),
        ({"temperature": -1.0}, "temperature=-1.0"),
    ],
)
def test_arguments_that_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        GenerationArguments.of(given)


PIECES = [
    "Ans",
    "wer",
    "on",
    "ce",
    " ",
    "\n",
    "Paris",
    " Paris",
    "中",
    "国",
    "川",
    "once",
    " upon",
    " a",
    "cat",
    "s",
    "😀",
    ".",
    "\u3000",
]


@pytest.mark.parametrize("kind", [*KINDS, "bilingual"])
def test_joins_are_the_harness_own_where_no_token_spans_them(kind):
    """And where one does, no letter is lost, which the harness' are."""
    from lm_eval.api.model import TemplateLM

    codec, draw, spanned = JsonTokenizer({**KINDS, "bilingual": bilingual}[kind]()), random.Random(kind), 0
    theirs = SimpleNamespace(backend="causal", tok_encode=codec.encode)
    for _ in range(600):
        context, answer = ("".join(draw.choices(PIECES, k=draw.randint(1, 3))) for _ in range(2))
        if context.strip() and answer.strip():
            (join,) = joined(codec, [(context, answer)])
            spanned += join.spanned
            if not join.spanned:
                assert [[*join.context], [*join.continuation]] == list(TemplateLM._encode_pair(theirs, context, answer))
            elif kind in ("gpt2", "bilingual"):
                assert codec.decode([*join.context, *join.continuation]) == context + answer
    assert spanned or kind == "bert"
