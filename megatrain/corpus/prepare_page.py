"""docs/prepare.md, made from the schema: `python -m megatrain.corpus.prepare_page > docs/prepare.md`. A test compares the two."""

from __future__ import annotations

import sys

from megatrain.config.reference import tables
from megatrain.corpus.duplicates.parameters import LeakSet
from megatrain.corpus.ngram_choices import LanguageModelConfig
from megatrain.corpus.prepare_config import PrepareConfig
from megatrain.corpus.reading.choices import SourceConfig

HEAD = """# Keys of a preparation

<!-- Made by `python -m megatrain.corpus.prepare_page > docs/prepare.md`. Change the classes that it shows, not this page. -->

`megatrain data prepare CONFIG.yaml [section.key=value ...]` reads one YAML file with these sections; [data.md](data.md) has an example.
What a file may say, and how errors tell, is as for runs ([config.md](config.md)): unknown keys are refused with the nearest one, nothing
is coerced, and what is left out has its default. `megatrain data read`, `clean`, `filter` and `dedup` take the same file and end at that
stage.
"""


def prepare_page() -> str:
    """The whole page."""
    return HEAD + tables(
        PrepareConfig,
        {
            "read": [("\nA source of `read.sources`:\n\n", SourceConfig)],
            "dedup": [("\nA set of `dedup.leaks.sets`:\n\n", LeakSet)],
            "perplexity": [("\nA model of `perplexity.models`:\n\n", LanguageModelConfig)],
        },
    )


if __name__ == "__main__":
    sys.stdout.write(prepare_page())
