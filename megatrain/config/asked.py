"""Keys of questions that a run asks its own model between steps: prompts to continue (log.samples), tasks to solve (eval)."""

from __future__ import annotations

from dataclasses import dataclass

from megatrain.config.effects import Effect, given
from megatrain.config.knob import knob

PROMPTED, TASKED = given("log.samples.prompts"), given("eval.tasks")
DRAWN = PROMPTED & Effect(
    "log.samples.temperature is above 0", ("log.samples.temperature",), lambda config: config.log.samples.temperature > 0
)


@dataclass(frozen=True)
class SamplesConfig:
    """Texts that a run lets its model write between steps, to be read by people."""

    prompts: tuple[str, ...] = knob(
        (),
        "Texts that the model continues: in `samples.md`, TensorBoard and the console. A GLM fills the blanks of a prompt: [MASK], [sMASK] "
        "and [gMASK].",
        not_empty=True,
        use=("Once upon a time",),
    )
    every: int | None = knob(
        None,
        "Steps between samples; 0 means only at the end, null as train.eval_every.",
        PROMPTED,
        at_least=0,
        use=100,
    )
    max_tokens: int = knob(64, "Tokens of a continuation, or of each blank, at most.", PROMPTED, above=0, at_most=1 << 20)
    temperature: float = knob(
        0.0,
        "Logits are divided by it; 0 takes the most probable token, so that steps compare.",
        PROMPTED,
        at_least=0,
        at_most=100,
    )
    top_p: float | None = knob(
        None,
        "Tokens are drawn among the most probable ones that have this probability together; null: among all.",
        DRAWN,
        above=0,
        at_most=1,
        use=0.9,
    )
    seed: int = knob(
        0,
        "Prompt n is continued with seed + n: at every step and under every layout with the same random numbers.",
        DRAWN,
        at_least=0,
    )


@dataclass(frozen=True)
class EvalConfig:
    """Tasks that a run solves with its running weights, as `megatrain eval --tasks` does with those of a checkpoint."""

    tasks: tuple[str, ...] = knob(
        (), "Tasks: names of those that come with megatrain, .yaml files, or folders of them.", not_empty=True, use=("quiz_en",)
    )
    every: int | None = knob(
        None, "Steps between them; 0 means only at the end, null as train.eval_every.", TASKED, at_least=0, use=1000
    )
    limit: int | None = knob(
        None, "Items of each task that are asked, from the first one on; null: all.", TASKED, above=0, use=200
    )
    num_fewshot: int | None = knob(
        None, "Solved examples before each item; null: as each task says.", TASKED, at_least=0, at_most=1000, use=5
    )
