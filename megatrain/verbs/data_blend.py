"""`megatrain data blend`: what a run will read of each corpus, before it is started."""

from __future__ import annotations

from collections.abc import Sequence

from megatrain.companions import tokenizer_of
from megatrain.config.budget import budget_of
from megatrain.config.load import load
from megatrain.config.validate import validate_data
from megatrain.data.seen import dealt, report, warnings
from megatrain.data.sources import open_sources
from megatrain.init_from import shapes_of
from megatrain.program import vocabulary


def main(path: str, overrides: Sequence[str]) -> int:
    """Print how often each corpus of a config will have been seen, and its shares on the way. Returns 0.

    Raises ConfigError, TokenStoreError, and ValueError where the corpora do not last to the end of the run.
    """
    config = load(path, overrides, shapes_of).config
    validate_data(config)
    _, samples, _ = open_sources(config, vocabulary(config), tokenizer_of(config))
    if samples is None:
        raise ValueError("data.train is empty")
    end = dealt(config, samples).terms.end
    print(f"a run of {budget_of(config).total_steps():,} steps, {end:,} samples")  # noqa: T201
    for line in (*report(config, samples), *warnings(config, samples)):
        print(line)  # noqa: T201
    return 0
