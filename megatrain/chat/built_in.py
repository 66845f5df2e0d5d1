"""Chat templates that are built in, for models whose directories have none.

    chatglm    ChatGLM-6B      [Round 0]\\n问：Q\\n答：A\\n[Round 1]\\n问：Q\\n答：[gMASK]<sop>A<eop>
    chatglm2   ChatGLM2-6B     [gMASK]sop[Round 1]\\n\\n问：Q\\n\\n答：A\\n\\n[Round 2]\\n\\n问：Q\\n\\n答：A</s>
    chatglm3   ChatGLM3-6B     [gMASK]sop<|system|>\\n S<|user|>\\n Q<|assistant|>\\n A          ended by </s>, <|user|> or <|observation|>
    glm4       GLM-4           [gMASK]<sop><|system|>\\nS<|user|>\\nQ<|assistant|>\\nA           likewise
    chatml     Qwen and others <|im_start|>user\\nQ<|im_end|>\\n<|im_start|>assistant\\nA<|im_end|>\\n
    alpaca     Alpaca          Below is an instruction ... ### Instruction:\\nQ\\n\\n### Response:\\nA</s>

A single question of ChatGLM-6B is the question alone. Texts of ChatGLM3 and GLM-4 are encoded apart from the line before them, answers of
ChatGLM2 apart from the question. Sources: the tokenizers of the THUDM models (their behaviour, not their code), OpenAI's ChatML, and the
prompt of stanford_alpaca.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from megatrain.chat.conversation import ASSISTANT, SYSTEM, USER, ChatError, ChatMessage
from megatrain.chat.marks import CUT
from megatrain.data.boundaries import NamedToken
from megatrain.data.samples.sentinels import NAMES
from megatrain.data.tokenizer import Tokenizer

Write = Callable[[Sequence[ChatMessage], bool], str]
"""The text of messages and whether an answer is asked for: the last message, if it is the assistant's, is left open where it is not."""


@dataclass(frozen=True)
class BuiltIn:
    """A template that is built in."""

    name: str
    write: Write
    tokens: tuple[str, ...] = ()
    """Special tokens that it writes."""
    ends: tuple[str, ...] = ()
    """Special tokens that end an answer, besides those of the tokenizer."""
    stops: tuple[str, ...] = ()
    """Texts that end an answer."""
    leading: str = ""
    """Text before an answer that is no part of it."""
    opened: bool = False
    """Whether the tokens that open a text come before it."""
    roles: tuple[str, ...] = (SYSTEM, USER, ASSISTANT)


_GMASK, _SOP, _EOP = "[gMASK]", "<sop>", "<eop>"
_SPELLED = {_GMASK: NAMES["gmask"], _SOP: NAMES["sop"], _EOP: NAMES["eop"]}
"""Names that tokenizers of GLM have for one token."""
_CHATGLM2_PIECES = 64789
"""Pieces of the tokenizer.model of ChatGLM2 and 3; the tokens below are numbered behind them."""
_BEHIND = ("[MASK]", _GMASK, "[sMASK]", _SOP, _EOP, "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
_ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"


def controls_of(template: BuiltIn, codec: Tokenizer, given: Mapping[str, int]) -> list[NamedToken]:
    """The special tokens that a template writes. given: ids that the tokenizer does not know. Raises ChatError for one that is missing."""
    known = {token.name: token for token in codec.named_tokens}
    found = []
    for name in (*template.tokens, *template.ends):
        own = next((known[spelled] for spelled in (name, *_SPELLED.get(name, ())) if spelled in known), None)
        if name in given:
            found.append(NamedToken(name, given[name]))
        elif own is not None:
            found.append(replace(own, name=name))
        elif codec.vocab_size == _CHATGLM2_PIECES and name in _BEHIND:
            found.append(NamedToken(name, _CHATGLM2_PIECES + _BEHIND.index(name)))
        else:
            raise ChatError(
                f"the chat template {template.name} needs the special token {name}, and {codec.label} has none of that name. Choose "
                "another template: --chat-template alpaca needs no special tokens."
            )
    return found


def require_roles(template: BuiltIn, messages: Sequence[ChatMessage]) -> None:
    """Raise ChatError for a role that a template does not know, or turns that it cannot write."""
    for number, message in enumerate(messages):
        if message.role not in template.roles:
            raise ChatError(
                f"messages[{number}] is of role {message.role}, and the chat template {template.name} has only "
                f"{', '.join(template.roles)}. Put its text into a message of role user."
            )
    if not any(message.role == USER for message in messages):
        raise ChatError(f"the chat template {template.name}: the conversation has no message of role user.")
    begun = int(messages[0].role == SYSTEM)
    for number, message in enumerate(messages[begun:], begun):
        if message.role == SYSTEM:
            raise ChatError(f"messages[{number}] is of role system, which is only the first of a conversation.")
        if "observation" in template.roles:
            continue
        expected = (USER, ASSISTANT)[(number - begun) % 2]
        if message.role != expected:
            raise ChatError(
                f"messages[{number}] is of role {message.role}, where {expected} is expected: user and assistant take turns, and the "
                "user begins."
            )


def _chatglm(messages: Sequence[ChatMessage], ask: bool) -> str:
    return _rounds(messages, 0, "\n", single=True) + f"{_GMASK}{_SOP}" + _open(messages, ask)


def _chatglm2(messages: Sequence[ChatMessage], ask: bool) -> str:
    return f"{_GMASK}{_SOP}" + _rounds(messages, 1, "\n\n", single=False) + CUT + _open(messages, ask)


def _rounds(messages: Sequence[ChatMessage], first: int, line: str, single: bool) -> str:
    """Questions and answers, numbered from `first`, up to the last question; single: whether a question alone stands as it is."""
    questions = [message.content for message in messages if message.role == USER]
    answers = [message.content for message in messages if message.role == ASSISTANT]
    if single and len(questions) == 1:
        return questions[0]
    rounds = [f"[Round {n}]{line}问：{question}{line}答：" for n, question in enumerate(questions, first)]
    return "".join(asked + (f"{answers[n]}{line}" if n + 1 < len(rounds) else "") for n, asked in enumerate(rounds))


def _open(messages: Sequence[ChatMessage], ask: bool) -> str:
    return "" if ask else messages[-1].content


def _chatglm3(messages: Sequence[ChatMessage], ask: bool) -> str:
    turns = [f"<|{_observed(message.role)}|>\n{CUT}{message.content}" for message in messages]
    return "".join([_GMASK, _SOP, *turns, "<|assistant|>" if ask else ""])


def _observed(role: str) -> str:
    return "observation" if role == "tool" else role


def _chatml(messages: Sequence[ChatMessage], ask: bool) -> str:
    turns = [f"<|im_start|>{message.role}\n{message.content}<|im_end|>\n" for message in messages]
    return "".join(turns) + "<|im_start|>assistant\n" if ask else "".join(turns).removesuffix("<|im_end|>\n")


def _alpaca(messages: Sequence[ChatMessage], ask: bool) -> str:
    begun = messages[0].role == SYSTEM
    text = f"{messages[0].content}\n\n" if begun else _ALPACA
    heads = {USER: "### Instruction:\n", ASSISTANT: "### Response:\n"}
    turns = [f"{heads[message.role]}{message.content}" for message in messages[begun:]]
    return text + "\n\n".join([*turns, heads[ASSISTANT]] if ask else turns)


_GLM_ROLES = (SYSTEM, USER, ASSISTANT, "observation", "tool")
_GLM_TOKENS = (_GMASK, _SOP, "<|system|>", "<|assistant|>")
_GLM_ENDS = ("<|user|>", "<|observation|>")
BUILT_IN = {
    template.name: template
    for template in (
        BuiltIn("chatglm", _chatglm, (_GMASK, _SOP), (_EOP,), roles=(USER, ASSISTANT)),
        BuiltIn("chatglm2", _chatglm2, (_GMASK, _SOP), roles=(USER, ASSISTANT)),
        BuiltIn("chatglm3", _chatglm3, _GLM_TOKENS, _GLM_ENDS, leading="\n", roles=_GLM_ROLES),
        BuiltIn("glm4", _chatglm3, _GLM_TOKENS, _GLM_ENDS, leading="\n", roles=_GLM_ROLES),
        BuiltIn("chatml", _chatml, ("<|im_start|>",), ("<|im_end|>",), opened=True),
        BuiltIn("alpaca", _alpaca, stops=("\n\n### Instruction:",), opened=True),
    )
}
"""The templates by name."""
