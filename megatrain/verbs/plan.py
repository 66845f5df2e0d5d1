"""`megatrain plan`: the timeline of a step's pipeline, and the memory of copies, before the run is started."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatrain.assembly import layer_pieces
from megatrain.config.load import load
from megatrain.init_from import shapes_of
from megatrain.plan.memory import copies_note
from megatrain.plan.timeline import as_text, describe, plan_timeline
from megatrain.program import vocabulary
from megatrain.runtime.flops import parameter_count


def main(path: str, overrides: Sequence[str], devices: int | None, png: Path | None) -> int:
    """`megatrain plan`: print the figures and the timeline of one step, and draw it. Returns 0.

    devices: number of devices; None: as many as one replica needs.
    """
    config = load(path, overrides, shapes_of).config
    p = config.parallel
    replica = p.tensor_parallel_size * p.pipeline_parallel_size * p.context_parallel_size
    timeline = plan_timeline(config, devices or replica)
    pieces, _ = layer_pieces(config, vocabulary(config))
    print(describe(timeline, pieces))  # noqa: T201
    note = copies_note(config, parameter_count(config.model, vocabulary(config)), devices or replica)
    if note:
        print(note)  # noqa: T201
    print(as_text(timeline))  # noqa: T201
    if png is not None:
        from megatrain.plan.picture import draw_timeline  # noqa: PLC0415  matplotlib, which the text does without

        schedule = timeline.schedule
        title = f"{schedule.name}: step bubble {100 * timeline.step_bubble:.1f}%"
        draw_timeline([(title, timeline)], png)
        print(f"drawn: {png}")  # noqa: T201
    return 0
