"""The text that is sent for an item: description, examples, what is asked; or the same as the turns of a chat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from megatrain.evaluation.few_shot import shots_for
from megatrain.evaluation.questions import MASK, Question, delimiter
from megatrain.evaluation.task_keys import TaskKeys
from megatrain.evaluation.tasks import EvalTask


class ChatFormat(Protocol):
    """A model's chat template."""

    def prompt(self, messages: Sequence[tuple[str, str]]) -> str:
        """The text of (role, content) turns, up to where the assistant's answer begins."""

    def encode(self, text: str) -> Sequence[int]:
        """Token ids of such a text, in which the template's special tokens are tokens."""

    @property
    def ends(self) -> frozenset[int]:
        """Tokens that end an answer."""

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end an answer."""


@dataclass(frozen=True)
class Manner:
    """How tasks are asked."""

    num_fewshot: int | None = None
    """Examples before each item; None: as each task says."""
    seed: int = 1234
    """Examples and drawn answers are a function of it and the item."""
    chat: ChatFormat | None = None
    """None: plain text."""
    refuse_long: bool = False
    """Whether an item that is longer than the model is an error, not cut from the left."""

    def shots(self, task: EvalTask) -> int:
        """Number of examples before each item of a task."""
        if task.keys.output_type == "loglikelihood_rolling":
            return 0
        return task.keys.num_fewshot if self.num_fewshot is None else self.num_fewshot


def contexts_of(task: EvalTask, manner: Manner) -> list[str]:
    """The text before the answer of each question. Raises TaskError where there are not enough examples."""
    count, first = manner.shots(task), task.keys.fewshot_config.sampler == "first_n"
    return [
        context_of(task.keys, one, shots_for(one, task.examples, count, manner.seed, first=first), manner.chat)
        for one in task.questions
    ]


def context_of(keys: TaskKeys, question: Question, shots: Sequence[Question], chat: ChatFormat | None) -> str:
    """The text before the answer of a question."""
    if chat is not None:
        turns = [("system", keys.description.strip())] if keys.description.strip() else []
        for shot in shots:
            turns += [("user", _user(keys, shot)), ("assistant", shot.targets[0])]
        return chat.prompt([*turns, ("user", _user(keys, question))])
    return keys.description + "".join(solved(keys, shot) + keys.fewshot_delimiter for shot in shots) + question.text


def answer_of(keys: TaskKeys, question: Question, answer: str, chat: ChatFormat | None) -> str:
    """The text that follows the context if an answer is given."""
    if chat is not None:
        return answer
    return answer + question.after if _has_blank(keys) else delimiter(keys, answer) + answer


def solved(keys: TaskKeys, question: Question) -> str:
    """A question with its right answer."""
    answer = question.targets[0]
    if keys.output_type == "infilling":
        return MASK.sub(lambda _: answer, question.text)
    return question.text + answer_of(keys, question, answer, None)


def _has_blank(keys: TaskKeys) -> bool:
    """Whether choices go into a blank."""
    return keys.doc_to_choice is not None and keys.output_type in ("cloze", "loglikelihood")


def _user(keys: TaskKeys, question: Question) -> str:
    """The question of a user; a blank is shown."""
    return f"{question.text}___{question.after}" if _has_blank(keys) else question.text
