"""The arguments of `megatrain generate`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

from megatrain.cli.arguments import (
    finite,
    index,
    positive,
    positive_number,
    probability,
    seed,
    share,
    stop_text,
    temperature,
    text,
)
from megatrain.cli.imports import imports

MAX_TOKENS, MAX_TOKENS_CHAT = 64, 512
_CHOOSES = {"--temperature": "temperature", "--top-k": "top_k", "--top-p": "top_p", "--min-p": "min_p"}


def add_generate(
    verbs: Any, add_verb: Callable[..., argparse.ArgumentParser], checkpoint: str, refuse: Callable[[str], int]
) -> None:
    """Add `generate` to the verbs. checkpoint: what CKPT may be; refuse: says what is wrong and gives the exit code."""
    example = (
        'megatrain generate runs/demo/checkpoints --prompt "def main" --max-tokens 100 --temperature 0.8\n'
        "  megatrain generate runs/demo/checkpoints --input prompts.jsonl --output texts.jsonl --n 4\n"
        "  megatrain generate HF_DIR --chat"
    )
    parser = add_verb(
        verbs, "generate", partial(_generate, refuse), "continue texts with a trained model, or talk to it", example
    )
    parser.add_argument("checkpoint", metavar="CKPT", help=f"{checkpoint}, or a Hugging Face directory")
    parser.add_argument(
        "overrides", metavar="parallel.key=value", nargs="*", help="the layout, under torchrun (default: one process)"
    )
    what = parser.add_argument_group("what is continued: one of these").add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--prompt",
        action="append",
        type=text,
        metavar="TEXT",
        help="the text to continue; a GLM fills its [MASK], [sMASK] and [gMASK]; may be given several times",
    )
    what.add_argument(
        "--input",
        type=text,
        metavar="FILE|-",
        help='a file, or standard input: one text, or rows {"prompt": TEXT} or {"messages": [...]} (docs/generate.md)',
    )
    what.add_argument("--chat", action="store_true", help="talk to the model, line by line, in its chat template")
    _add_texts(parser)
    _add_choice(parser)


def _add_texts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output", type=text, metavar="FILE|-", help="write rows of JSON there (default: text; rows for rows of --input)"
    )
    parser.add_argument(
        "--max-tokens", type=positive, metavar="N", help=f"tokens to add (default {MAX_TOKENS}; --chat {MAX_TOKENS_CHAT})"
    )
    parser.add_argument(
        "--stop", action="append", type=stop_text, metavar="TEXT", help="end before this text; may be given several times"
    )
    parser.add_argument("--n", type=positive, default=1, metavar="N", help="texts for each prompt, with the seeds after --seed")
    parser.add_argument("--seed", type=seed, default=1234, metavar="N", help="seed of the samples (default 1234)")
    parser.add_argument(
        "--logprobs", type=index, metavar="K", help="rows: log-probabilities of the tokens, and of the K most probable ones"
    )
    parser.add_argument(
        "--chat-template",
        type=text,
        metavar="NAME|FILE",
        help="a built-in one, one of the model's, or a file (default: the model's)",
    )
    parser.add_argument("--system", type=text, metavar="TEXT", help="--chat: what the model is told at the beginning")
    parser.add_argument("--tokenizer", metavar="PATH", help="a tokenizer's file or `bytes` (default: the one of the run)")
    parser.add_argument("--eod", type=text, metavar="TOKEN", help="ends the text; a name, an id or `none` (default: the run's)")
    parser.add_argument("--bos", type=text, metavar="TOKEN", help="goes before the prompt; likewise (default: the run's)")


def _add_choice(parser: argparse.ArgumentParser) -> None:
    how = parser.add_argument_group("how the next token is chosen")
    how.add_argument("--greedy", action="store_true", help="the most probable one; goes with none of the next four")
    how.add_argument("--temperature", type=temperature, metavar="T", help="divides the logits before sampling (default 1.0)")
    how.add_argument("--top-k", type=positive, metavar="K", help="sample among the K most probable (default: all)")
    how.add_argument(
        "--top-p", type=probability, metavar="P", help="sample among the fewest that together have P (default: all)"
    )
    how.add_argument(
        "--min-p", type=share, metavar="P", help="sample among those at least P times as probable as the most probable one"
    )
    how.add_argument(
        "--repetition-penalty",
        type=positive_number,
        default=1.0,
        metavar="R",
        help="above 1: tokens of prompt and text become rarer",
    )
    how.add_argument(
        "--presence-penalty", type=finite, default=0.0, metavar="A", help="subtracted from the logits of the text's tokens"
    )
    how.add_argument(
        "--frequency-penalty", type=finite, default=0.0, metavar="A", help="likewise, for each time that it has them"
    )
    how.add_argument(
        "--beams", type=positive, metavar="N", help="beam search for the most probable text, N side by side; 1 is --greedy"
    )
    how.add_argument(
        "--length-penalty",
        type=finite,
        metavar="A",
        help="beams: above 0 favours longer texts (default 0; arXiv:1609.08144)",
    )


def wrong_use(arguments: argparse.Namespace) -> str | None:
    """The message for arguments that do not go together; None if they do."""
    given = [name for name, field in _CHOOSES.items() if getattr(arguments, field) is not None] + [
        "--greedy"
    ] * arguments.greedy
    several = (arguments.beams or 1) > 1
    penalties = (arguments.repetition_penalty, arguments.presence_penalty, arguments.frequency_penalty) != (1.0, 0.0, 0.0)
    if (arguments.greedy and len(given) > 1) or (arguments.beams is not None and given):
        which = "--greedy takes" if arguments.beams is None else f"--beams {arguments.beams} looks for"
        return f"{which} what is most probable, so {given[0]} means nothing. Leave one out."
    if arguments.length_penalty is not None and not several:
        return "--length-penalty ranks texts of several beams, and there is one. Leave it out, or use --beams 4."
    if arguments.n > 1 and (arguments.greedy or arguments.beams is not None):
        which = "--greedy" if arguments.greedy else f"--beams {arguments.beams}"
        return f"{which} gives one text for a prompt, {arguments.n} times the same. Leave --n out."
    if several and (penalties or arguments.logprobs is not None):
        return (
            f"--beams {arguments.beams} ranks whole texts by the model's own probabilities: leave penalties and --logprobs out."
        )
    return _wrong_place(arguments)


def _wrong_place(arguments: argparse.Namespace) -> str | None:
    if arguments.chat:
        wrong = {
            "--output": arguments.output,
            "--logprobs": arguments.logprobs,
            "--n": arguments.n if arguments.n > 1 else None,
        }
        if found := [name for name, value in wrong.items() if value is not None]:
            return f"--chat shows one answer after the other, so {found[0]} means nothing. Leave it out, or use --input with messages."
    elif arguments.system is not None:
        return '--system goes with --chat. In rows it is a message: {"role": "system", "content": TEXT}.'
    if arguments.logprobs is not None and arguments.output is None and arguments.input is None:
        return "--logprobs are told in rows of JSON. Add --output FILE, or --output - for standard output."
    return None


def complete(arguments: argparse.Namespace) -> None:
    """Fill in what was not given."""
    arguments.length_penalty = 0.0 if arguments.length_penalty is None else arguments.length_penalty
    arguments.temperature = 1.0 if arguments.temperature is None else arguments.temperature
    arguments.stop = tuple(arguments.stop or ())
    if arguments.max_tokens is None:
        arguments.max_tokens = MAX_TOKENS_CHAT if arguments.chat else MAX_TOKENS


def _generate(refuse: Callable[[str], int], arguments: argparse.Namespace) -> int:
    if said := wrong_use(arguments):
        return refuse(said)
    complete(arguments)
    with imports():
        from megatrain.verbs.generate import main as generate

    return generate(arguments)
