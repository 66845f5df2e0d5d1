"""The timeline of one step's pipeline, simulated with the FLOPs of each virtual stage, as text; `picture.py` draws it.

Times are in units of the mean forward of a virtual stage. A matrix costs as much in its input gradient, and again in its weight
gradient, as in the forward; attention has no weights, so both of its gradients count as input gradients, as do those of the head,
whose weight gradient is never postponed (`parallel/tensor_parallel.py`). Communication counts as free.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from megatrain.assembly import layer_pieces, require_schedule
from megatrain.config.schema import Config
from megatrain.config.validate import require_effects, validate_step
from megatrain.parallel.schedules import Kind
from megatrain.parallel.simulator import Costs, Event, Timeline, simulate
from megatrain.program import vocabulary
from megatrain.runtime.flops import forward_flops, matrix_flops
from megatrain.training import schedule_of

LETTERS: dict[Kind, str] = {"forward": "F", "backward": "B", "backward_input": "B", "backward_weight": "W"}


def costs_of(config: Config, vocab_size: int) -> Costs:
    """Simulated cost of each instruction of each virtual stage, in units of the mean forward."""
    block, head = forward_flops(config.model, vocab_size)
    matrices = matrix_flops(config.model)
    pieces, _ = layer_pieces(config, vocab_size)
    last = len(pieces) - 1
    forward = [len(piece) * block + head * (v == last) for v, piece in enumerate(pieces)]
    weight = [len(piece) * matrices for piece in pieces]
    both = [2 * cost for cost in forward]
    unit = sum(forward) / len(forward)
    return Costs(
        forward=[cost / unit for cost in forward],
        backward_input=[(b - w) / unit for b, w in zip(both, weight, strict=True)],
        backward_weight=[cost / unit for cost in weight],
    )


def plan_timeline(config: Config, devices: int) -> Timeline:
    """Simulate one step of a config on `devices` devices. Raises ConfigError if the config does not suit them."""
    validate_step(config, devices)
    require_effects(config)
    require_schedule(config)
    train = config.train
    micro_batches = train.global_batch_size // (train.micro_batch_size * config.data_parallel_size(devices))
    return simulate(schedule_of(config, micro_batches), costs_of(config, vocabulary(config)))


def describe(timeline: Timeline, layers: Sequence[range]) -> str:
    """The figures of a timeline as text, a line for each stage."""
    schedule = timeline.schedule
    lines = [
        f"schedule {schedule.name}: {schedule.stages} stages x {schedule.chunks} chunks, {schedule.micro_batches} micro-batches",
        f"step bubble: {100 * timeline.step_bubble:.1f}% of all devices' time",
        "stage  layers                 busy  device bubble  saved states at most",
    ]
    for stage in range(schedule.stages):
        own = [layers[schedule.virtual(stage, chunk)] for chunk in range(schedule.chunks)]
        ranges = ", ".join(f"{part.start}-{part.stop - 1}" if len(part) > 1 else f"{part.start}" for part in own)
        busy, idle = 100 * timeline.busy(stage) / timeline.makespan, 100 * timeline.device_bubble(stage)
        lines.append(f"{stage:5}  {ranges:20} {busy:5.1f}%  {idle:12.1f}%  {timeline.peak(stage):20}")
    return "\n".join(lines)


def as_text(timeline: Timeline, width: int = 120) -> str:
    """A timeline as text, a row for each stage: the instruction in each slice of time, with its micro-batch if it fits; dots are idle."""
    events = [event for stage in timeline.stages for event in stage]
    unit = min(event.end - event.start for event in events)
    digits = len(str(timeline.schedule.micro_batches - 1)) + 2
    slices = round(timeline.makespan / unit)
    numbered = slices * digits <= width
    if not numbered:
        slices = min(slices, width)
    step = timeline.makespan / slices
    rows = []
    for number, stage in enumerate(timeline.stages):
        starts = [event.start for event in stage]
        cells = [_at(stage, starts, (place + 0.5) * step) for place in range(slices)]
        texts = [_label(cell, numbered) for cell in cells]
        joined = "".join(text.ljust(digits) for text in texts) if numbered else "".join(texts)
        rows.append(f"stage {number:3} |{joined.rstrip()}")
    return "\n".join(rows)


def _at(events: Sequence[Event], starts: Sequence[float], time: float) -> Event | None:
    """The event that runs at a time, or None; `starts`: the start of each event, ascending."""
    place = bisect_right(starts, time) - 1
    return events[place] if place >= 0 and time < events[place].end else None


def _label(event: Event | None, numbered: bool) -> str:
    if event is None:
        return "."
    letter = LETTERS[event.instruction.kind]
    letter = letter.lower() if event.instruction.chunk else letter
    return f"{letter}{event.instruction.micro_batch}" if numbered else letter
