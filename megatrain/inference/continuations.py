"""Fixed prompts, which a model continues, or whose blanks it fills if it is a GLM; many side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatrain.config.asked import SamplesConfig
from megatrain.config.schema import Config
from megatrain.data.samples.sentinels import resolve
from megatrain.data.tokenizer import Tokenizer, prompt_ids
from megatrain.inference.engine import Engine
from megatrain.inference.infill import Filling, parsed
from megatrain.inference.requests import Request, Sampling
from megatrain.inference.text_plans import Plan, PlannedText, PlanSettings, filled, write, written

Text = tuple[str, int, str]
"""(text, number of tokens, why it ended: an engine's `Finish`), as a list where it comes from another rank."""


@dataclass(frozen=True)
class FixedPrompt:
    """A prompt as tokens."""

    text: str
    parts: tuple[tuple[int, ...], ...]
    """The texts around the blanks; of a model that reads from left to right one, with what opens a text."""
    masks: tuple[int, ...]
    """The mask token of each blank; none for a model that reads from left to right."""
    asked: Request
    """Limits, sampling and seed; its tokens where there are no blanks."""

    @property
    def longest(self) -> int:
        """Number of tokens that there may be at the end."""
        return sum(map(len, self.parts)) + max(len(self.masks), 1) * (self.asked.max_tokens + 2) + 1


class Continuations:
    """Fixed prompts of a run."""

    def __init__(self, config: Config, codec: Tokenizer, engine: Engine) -> None:
        """The prompts of log.samples. Raises ValueError where one does not fit the model."""
        self.codec, asked = codec, config.log.samples
        self._glm = resolve(config.data.glm, codec, engine.vocab_size) if config.data.objective == "glm" else None
        self.prompts = [self._prompt(asked, number, text) for number, text in enumerate(asked.prompts)]
        for number, prompt in enumerate(self.prompts):
            try:
                self._require(engine, prompt)
            except ValueError as error:
                raise ValueError(f"log.samples.prompts[{number}]: {error}") from error

    def _prompt(self, asked: SamplesConfig, number: int, text: str) -> FixedPrompt:
        greedy = asked.temperature == 0
        sampling = Sampling(greedy=True) if greedy else Sampling(temperature=asked.temperature, top_p=asked.top_p)
        request = Request((0,), asked.max_tokens, sampling, asked.seed + number)
        if self._glm is not None:
            texts, masks = parsed(text, self._glm[0])
            parts = tuple(tuple(map(int, self.codec.encode(part))) for part in texts)
            return FixedPrompt(text, parts, tuple(masks), request)
        tokens = tuple(prompt_ids(self.codec, self.codec.encode(text)))
        return FixedPrompt(text, (tokens,), (), replace(request, tokens=tokens, ends=frozenset(self.codec.ending.stops)))

    def _require(self, engine: Engine, prompt: FixedPrompt) -> None:
        """Raise ValueError where a prompt does not fit the model."""
        if self._glm is not None:
            self._filling(engine, prompt)
            return
        count, most = len(prompt.asked.tokens), engine.max_length
        if not 1 <= count <= most:
            raise ValueError(f"it has {count} tokens, and model.max_positions is {most}. Use a prompt of 1 to {most} tokens.")

    def _filling(self, engine: Engine, prompt: FixedPrompt) -> Filling:
        if self._glm is None:
            raise ValueError("a model that reads from left to right fills no blanks.")
        return Filling(engine, prompt.parts, prompt.masks, *self._glm)

    def written(self, engine: Engine, prompts: Sequence[FixedPrompt]) -> list[list[Text]]:
        """The texts that the model writes for each prompt: one, or one for each blank (collective over the engine's ranks)."""
        found: dict[int, PlannedText] = {}
        write(engine, [self._plan(engine, prompt) for prompt in prompts], found.__setitem__)
        texts = [found[number].pieces or (found[number],) for number in range(len(prompts))]
        return [[(text.text, len(text.tokens), text.finish) for text in of] for of in texts]

    def _plan(self, engine: Engine, prompt: FixedPrompt) -> Plan[PlannedText]:
        """The plan of a prompt's text, which ends where the positions do."""
        manner = PlanSettings(self.codec, engine.max_length, engine.vocab_size, goes_on=False)
        if self._glm is None:
            return written(prompt.asked, manner, prompt.asked.tokens)
        texts, _ = parsed(prompt.text, self._glm[0])
        return filled(self._filling(engine, prompt), texts, prompt.parts, prompt.asked, manner, lambda _piece: None)
