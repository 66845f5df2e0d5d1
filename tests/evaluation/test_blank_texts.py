import pytest
import torch

from megatrain.evaluation.blank_texts import BlankTexts
from megatrain.evaluation.items import TaskError
from megatrain.evaluation.prompts import Manner
from megatrain.evaluation.tasks import load_tasks
from megatrain.inference.requests import Request
from megatrain.kernels.attention_mask import AttentionMask
from megatrain.models.batch import MicroBatch


@pytest.fixture
def texts(glm):
    return glm.texts(Manner())


def parts(texts, one):
    """Part A and part B of what is scored, with names for special tokens, and the numbers of its positions."""
    names = {token: name for name, token in texts.special.masks.items()} | {texts.special.sop: "<", texts.special.eop: ">"}
    names[texts.special.opening[0]] = "^"
    window = one.windows[0]
    shown = "".join(names.get(token) or chr(token) for token in window.tokens)
    first, second = window.places.positions(0, len(window.tokens))
    return shown, window.first, window.places.prefix, first.tolist(), second.tolist()


def test_a_context_without_a_blank_gets_one_at_its_end(texts):
    (one,) = texts.pairs([("ab ", "cd")])
    assert parts(texts, one) == ("^ab[gMASK]< cd", 5, 4, [0, 1, 2, 3, 3, 3, 3, 3], [0, 0, 0, 0, 1, 2, 3, 4])
    assert one.tokens == 3
    prompt = texts.prompt("ab", 4)
    assert prompt.tokens == one.windows[0].tokens[:5] and prompt.places.prefix == 4


def test_the_text_of_a_blank_ends_in_an_end_of_piece(texts):
    (one,) = texts.pairs([("a [MASK]b", "c")])
    assert parts(texts, one) == ("^a[MASK]b< c>", 5, 4, [0, 1, 2, 3, 2, 2, 2, 2], [0, 0, 0, 0, 1, 2, 3, 4])
    assert one.tokens == 3
    with pytest.raises(ValueError, match="the text has 2 blanks, and one is filled"):
        texts.pairs([("[MASK][gMASK]", "c")])


def test_long_texts_lose_their_beginning(texts):
    (one,) = texts.pairs([("x" * 200 + "[MASK]" + "y" * 10, "c")])
    assert one.cut and len(one.windows[0].tokens) - 1 <= texts.max_length
    assert parts(texts, one)[0].endswith("x[MASK]yyyyyyyyyy<c>")
    assert len(texts.prompt("x" * 200, 20).tokens) + 20 <= texts.max_length + 1
    document = texts.document("0123456789" * 30)
    assert document.tokens == 300 == sum(len(one.tokens) - one.first for one in document.windows)
    assert max(len(one.tokens) - 1 for one in document.windows) <= texts.max_length


def test_text_behind_a_blank_is_not_cut(texts):
    with pytest.raises(
        ValueError, match="the text behind the blank has 200 tokens and the answer 2, and the model has 128 positions"
    ):
        texts.pairs([("x[MASK]" + "y" * 200, "c")])


def test_scores_are_those_of_the_training_forward(glm, texts):
    """The engine's log-probabilities of part B and those of the model's own forward, over the layout that training uses."""
    (one,) = texts.pairs([("The cat [MASK] fish.", "eats")])
    window = one.windows[0]
    (answer,) = glm.engine.run([Request(window.tokens, 0, score_from=window.first, places=window.places)])
    first, second = window.places.positions(0, len(window.tokens))
    column, rows = torch.tensor(window.tokens)[:, None], (torch.from_numpy(one)[:, None] for one in (first, second))
    places, inside = rows
    mask = AttentionMask(prefix=torch.tensor([window.places.prefix]))
    samples = torch.zeros(1, dtype=torch.int64)
    batch = MicroBatch(column, column, torch.ones(column.shape), places, samples, mask=mask, block_positions=inside)
    (chunk,) = glm.engine.model.weights.chunks
    with torch.no_grad():
        logits = chunk.head.logits(chunk(None, batch))[:, 0]
    wanted = logits.log_softmax(-1)[window.first - 1 : -1].gather(1, column[window.first :])[:, 0]
    assert [of.logprob for of in answer.prompt] == pytest.approx(wanted.tolist(), abs=1e-5)


def test_infilling_needs_a_model_of_blanks(gpt, glm):
    (task,) = load_tasks(["infill_en"], limit=2)
    with pytest.raises(
        TaskError, match=r"infill_en\.yaml: infilling needs a model that fills blanks, a GLM, and this one goes from"
    ):
        gpt.prepare([task], Manner())
    (result,) = glm.results(glm.prepare([task], Manner()))
    assert set(result.estimates.metrics) == {"acc", "perplexity", "exact_match", "f1"}
    assert isinstance(glm.texts(Manner()), BlankTexts)
