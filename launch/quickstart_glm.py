"""What the quickstart does otherwise for a GLM: blanks are judged beside the frequencies of what fills them, and are filled."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from running import publish, say, step, verb

from megatrain.config.load import load
from megatrain.config.schema import Config
from megatrain.data.held_out import Evaluated
from megatrain.data.loader import batch_places
from megatrain.data.samples.sentinels import NAMES
from megatrain.data.sources import open_sources
from megatrain.data.tokenizer import load_tokenizer
from megatrain.records.plot import draw_loss
from megatrain.records.rows import read_metrics

PROMPTS = (
    "def area([MASK]):\n    return width * height\n",
    "    def close(self):\n        self.[MASK].close()\n        self.file = None\n",
    "for i in range([MASK]):\n    print(i)\n",
)


def tokenizer_size(config: Config) -> int:
    """Entries of the tokenizer: all of the vocabulary but GLM's special tokens."""
    whole = config.model.vocab_size or 0
    return whole - len(NAMES) if config.data.objective == "glm" else whole


def compare(run: Path) -> None:
    """Validation loss of each objective beside the entropy of its targets' own frequencies."""
    config = load(run / "config.yaml").config
    tokenizer = load_tokenizer(config.data.tokenizer or "bytes")
    _, _, sets = open_sources(config, config.model.vocab_size or tokenizer.vocab_size, tokenizer, train=False)
    last = read_metrics(run / "metrics.jsonl")[1][-1]
    entropies = {name: targets_entropy(judged) for name, judged in sets.items()}
    publish(run / "comparison.json", json.dumps({"unigram": entropies, "model": last["valid_losses"], "step": last["step"]}))
    draw_loss(run / "metrics.jsonl", run / "loss.png", {f"unigram, {name}": value for name, value in entropies.items()})
    step("how good is it? Mean loss on blanks of the held-out text in nats a token; lower is better")
    say(f"{'':20} {'frequencies alone':>18} {'this model':>12}")
    for name, entropy in entropies.items():
        say(f"{name:20} {entropy:18.3f} {last['valid_losses'][name]:12.3f}")
    say(f"blanks of which every token would be right: {100 * last['cloze_accuracy']:.1f}%")


def targets_entropy(judged: Evaluated) -> float:
    """Nats a target of the held-out targets' own frequencies: no model that ignores the text falls below."""
    batch = judged.batch(0, batch_places(len(judged), 1, 0, 1))
    counts = np.bincount(batch.labels[batch.loss_weights > 0])
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())


def sample(run: Path, documents: Path | None) -> None:
    """Blanks that the model fills: in code, or in the first lines of these documents."""
    step("what it fills blanks with")
    for prompt in PROMPTS if documents is None else with_blanks(documents, len(PROMPTS)):
        say(prompt)
        verb("generate", run / "checkpoints", "--prompt", prompt, "--max-tokens", 20, "--beams", 4)


def with_blanks(documents: Path, count: int) -> list[str]:
    """The first words of held-out documents, the fifth of them blank."""
    with documents.open(encoding="utf-8") as lines:
        texts = [json.loads(line)["text"].split() for line, _ in zip(lines, range(count), strict=False)]
    return [" ".join([*words[:4], "[MASK]", *words[5:12]]) for words in texts if len(words) > 5]
