"""docs/config.md, made from the schema: `python -m megatrain.config.reference > docs/config.md`.

A test compares the committed page with `reference()`, so that the page cannot fall behind the code.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from megatrain.config.keys import Knob, choices, fields_of, knobs, show, type_name
from megatrain.config.knob import Range
from megatrain.config.schema import Config, CorpusConfig, WeightsConfig

HEAD = """# Configuration

<!-- Made by `python -m megatrain.config.reference > docs/config.md`. Change megatrain/config/schema.py, not this page. -->

A run is one YAML file and any number of overrides:

<!-- run `optim.lr=1e-3` as `optim.lr=1e-3 train.steps=4 optim.warmup_steps=2`: minutes -->
```
megatrain train launch/configs/gpt_tiny.yaml data.train=data/train data.tokenizer=tokenizer.json optim.lr=1e-3
```

- The file has one mapping per section below; what it leaves out has its default. An override is `section.key=value`, its value
  read as YAML, and replaces what the file says; the same key twice is an error, in the file and on the command line.
- An unknown key is an error that names the file, the line and the nearest known key. Nothing is coerced, but an integer serves
  as a number, and so does `1e-4`. Put text that looks like something else in quotes (`"010"`, `"no"`).
- Tags, anchors and aliases of YAML are refused. Relative paths start at the working directory, wherever the file lies; `~` at the beginning
  of a path is the home directory, and what is saved keeps it as it was written.
- A corpus list may be written as one path, as a list of paths, or in full:
  `[{path: PREFIX, weight: 0.7}, {path: OTHER, weight: 0.3}]`.
- `log.dir/config.yaml` holds every value of a run, each with its origin as a comment; `megatrain train` takes it again.
- A value that cannot have an effect is refused, with the keys that it hangs on: *Has an effect when ...* below. One that equals the
  default passes, so that a whole config can be pasted; so does what hangs on how many processes there are, or on whether there is
  held-out text. Keys of a preset, of `model.init_from` and of the family that have no effect beside the given ones are left at
  their defaults.
- The second column has the type of a value and its range; of a list, that of each element. An integer is at most 2147483647, another
  number at most 1e15, where nothing else is said. `in [0, 1)` means from 0, below 1; `in (0, 1]` above 0, at most 1. NaN and infinity
  are refused everywhere.
- Values marked *later* are known, but refused in this release with a message that says why.
"""

ELEMENTS = {
    CorpusConfig: "A corpus of `data.train` or `data.valid`, as a mapping:",
    WeightsConfig: "A piece of `data.schedule`, with one of the first three:",
}
"""Element of a list of the section `data` -> what stands above the table of its keys."""
TABLE = "| key | values | default | what it does |\n| --- | --- | --- | --- |\n"


def reference() -> str:
    """The whole page: one table per section of the schema."""
    return HEAD + tables(Config, {"data": [(f"\n{above}\n\n", cls) for cls, above in ELEMENTS.items()]})


def tables(schema: Any, elements: Mapping[str, Sequence[tuple[str, Any]]]) -> str:
    """A table for each section of a schema, and behind it one for each class of mappings that its lists hold.

    elements: (what stands above its table, class) by section.
    """
    parts: list[str] = []
    for section, cls in fields_of(schema).items():
        parts.append(f"\n## {section}\n\n{str(cls.__doc__).partition(chr(10))[0]}\n\n{TABLE}")
        for knob in knobs(schema):
            if knob.section == section:
                does = f"{knob.doc}{_effect(knob)}{_later(knob)}".replace("|", r"\|")  # a bare one would end the cell
                parts.append(f"| `{knob.name}` | {_values(knob.kind, knob.range)} | `{show(knob.default)}` | {does} |\n")
        parts += [_elements(above, of) for above, of in elements.get(section, ())]
    return "".join(parts)


def _elements(above: str, cls: Any) -> str:
    """The table of the keys of a mapping in a list."""
    kinds, rows = fields_of(cls), []
    for item in dataclasses.fields(cls):
        default = "" if item.default in ("", ()) else f"`{show(item.default)}`"
        rows.append(
            f"| `{item.name}` | {_values(kinds[item.name], item.metadata['range'])} | {default} | {item.metadata['doc']} |\n"
        )
    return f"{above}{TABLE}{''.join(rows)}"


def _values(kind: Any, within: Range) -> str:
    """A type and range: `integer or null: 1 to 65536`, `list of integer: each 1 or more`."""
    name = type_name(kind)
    words = within.words("number" not in name)
    return f"{name}: {'each ' if name.startswith('list') else ''}{words}" if words else name


def _effect(knob: Knob) -> str:
    """The text that says when the knob has an effect; empty if always."""
    return f" *Has an effect when {knob.effect.words}.*" if knob.effect else ""


def _later(knob: Knob) -> str:
    """The text that says which values of the knob are refused in this release, and why; empty if none."""
    if knob.deferred is None:
        return ""
    now = choices(f"`{show(value)}`" for value in knob.deferred.released)
    return f" *Later: all but {now} ({knob.deferred.why}).*"


if __name__ == "__main__":
    sys.stdout.write(reference())
