"""Find the newest copy in memory that the machines of a run hold between them, and give each machine the files that it lacks.

    machine 0    files of its ranks, and of those of machine 1, as far as it keeps them (machines.py)
    machine 1    nothing: it has come in the place of one that is lost

A copy is whole if each of its files is on some machine. Every byte is verified before any state is overwritten: what lies here by the ranks
of the machine, what comes by who takes it in. A file that is damaged counts as missing, and comes from another machine that has it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from megatrain.checkpoint.directory import write_file
from megatrain.checkpoint.load import check_contents, needed_files
from megatrain.checkpoint.machines import Machines
from megatrain.checkpoint.manifest import MANIFEST, STEP_NAME, Manifest, open_file, read_manifest
from megatrain.checkpoint.together import CheckpointError, DamagedCheckpointError, together
from megatrain.parallel.mesh import ParallelContext
from megatrain.parallel.portion import Portions
from megatrain.transport.consensus import broadcast_text, gather_texts
from megatrain.transport.group import TransportError
from megatrain.transport.handover import Handover, Parcel
from megatrain.transport.leftovers import is_private, require_private

_SHOWN = 4
"""Most damaged files that a note lists."""


class Listing(NamedTuple):
    """A copy as one machine has it."""

    sum_: str
    """Checksum of its manifest."""
    files: int
    """Number of its files, on all machines."""
    here: frozenset[int]
    """Numbers of those that are here, with the size that the manifest says."""


class Whole(NamedTuple):
    """A copy whose files are all on some machine."""

    name: str
    sum_: str


class Copy(NamedTuple):
    """A copy that the machines hold between them."""

    path: Path
    """Its directory on this machine, which may not exist yet."""
    text: str
    """The manifest as it is in its file."""
    manifest: Manifest
    held: tuple[frozenset[int], ...]
    """Machine -> numbers of the files that it has."""


class Delivery(NamedTuple):
    """A file that one rank hands to another."""

    file: int
    giver: int
    taker: int


def newest_whole(machines: Sequence[Mapping[str, Listing]]) -> tuple[Whole | None, str]:
    """The newest whole copy of those that the machines list, and "", or why there is none; "" too where none lists any."""
    found: dict[Whole, set[int]] = {}
    counts: dict[Whole, int] = {}
    for listed in machines:
        for name, listing in listed.items():
            one = Whole(name, listing.sum_)
            found.setdefault(one, set()).update(listing.here)
            counts[one] = listing.files
    newest = sorted(found, key=lambda one: (int(one.name.rpartition("_")[2]), len(found[one])), reverse=True)
    for one in newest:
        if len(found[one]) == counts[one]:
            return one, ""
    if not newest:
        return None, ""
    first, step = newest[0], int(newest[0].name.rpartition("_")[2])
    missing = counts[first] - len(found[first])
    return (
        None,
        f"the copy of step {step} in memory is not used: {missing} of its {counts[first]} files are on no machine any more",
    )


def deliveries(needed: Sequence[frozenset[int]], held: Sequence[frozenset[int]], machines: Machines) -> list[Delivery]:
    """Who hands which file to whom, so that every machine has the files that it needs; ranks of a machine take turns.

    needed, held: machine -> numbers of files. Raises KeyError with the number of a file that no machine has.
    """
    plan, given = [], [0] * machines.number
    for machine, (wants, has) in enumerate(zip(needed, held, strict=True)):
        for turn, file in enumerate(sorted(wants - has)):
            holders = [other for other, files in enumerate(held) if file in files]
            if not holders:
                raise KeyError(file)
            giver = min(holders, key=lambda other: given[other])
            plan.append(Delivery(file, machines.turn(giver, given[giver]), machines.turn(machine, turn)))
            given[giver] += 1
    return plan


def steps_in(folder: Path) -> list[Path]:
    """The copies in a folder; none where it is not this user's alone."""
    return [path for path in folder.iterdir() if STEP_NAME.fullmatch(path.name)] if is_private(folder) else []


def newest_copy(folder: Path, ctx: ParallelContext, machines: Machines) -> tuple[Copy | None, str]:
    """The newest copy that the machines hold whole between them (collective), and "", or why there is none, as `newest_whole`.

    folder: of this machine.
    """
    here: dict[str, Listing] = {}
    with together(ctx):
        if machines.leads(ctx.world.rank):
            here = {path.name: listing for path in steps_in(folder) if (listing := _list(path)) is not None}
    text = json.dumps({name: [one.sum_, one.files, sorted(one.here)] for name, one in here.items()})
    texts = gather_texts(text, ctx.world.group, ctx.device)
    listed = [_listings(json.loads(texts[ranks[0]])) for ranks in machines.ranks]
    whole, why = newest_whole(listed)
    if whole is None:
        return None, why
    having = [number for number, one in enumerate(listed) if whole.name in one and one[whole.name].sum_ == whole.sum_]
    said, source = "", machines.ranks[having[0]][0]
    with together(ctx):
        if ctx.world.rank == source:
            said = (folder / whole.name / MANIFEST).read_text()
            Manifest.from_bytes(said.encode())
    said = broadcast_text(said, ctx.world.group, ctx.device, source)
    held = tuple(one[whole.name].here if number in having else frozenset() for number, one in enumerate(listed))
    return Copy(folder / whole.name, said, Manifest.from_bytes(said.encode()), held), ""


def _list(path: Path) -> Listing | None:
    """A copy in this machine's memory; None where its manifest cannot be used."""
    try:
        manifest = read_manifest(path)
    except CheckpointError:
        return None
    sizes = {file.name: file.stat().st_size for file in path.iterdir() if file.is_file() and not file.is_symlink()}
    here = frozenset(number for number, row in enumerate(manifest.files) if sizes.get(row.name) == row.bytes)
    return Listing(manifest.checksum, len(manifest.files), here)


def _listings(said: dict[str, tuple[str, int, list[int]]]) -> dict[str, Listing]:
    return {name: Listing(sum_, files, frozenset(here)) for name, (sum_, files, here) in said.items()}


def complete(
    copy: Copy, portions: Portions, ctx: ParallelContext, machines: Machines, meet: Callable[[], Handover], seconds: float
) -> list[str]:
    """Verify every byte of a copy, and give each machine the files that its ranks need for `portions` (collective).

    meet: makes this rank's Handover (collective); called where a file is to be moved. seconds: limit of the moving. Returns what was
    damaged on a machine and has come from another, as text.

    Raises DamagedCheckpointError on every rank where a file that is needed is whole on no machine, ContentError where the copy does not
    fit the portions, CheckpointError where a file cannot be moved.
    """
    check_contents(copy.manifest, portions, ctx)
    path, manifest, rank = copy.path, copy.manifest, ctx.world.rank
    mine = machines.machine(rank)
    place, size = machines.share(rank)
    damaged: dict[int, str] = {}
    needs: list[int] = []
    with together(ctx):
        for number in sorted(copy.held[mine])[place::size]:
            try:
                open_file(path, manifest.files[number], manifest.block_bytes).verify_all()
            except DamagedCheckpointError as error:
                damaged[number] = str(error)
        names = needed_files(manifest, portions, ctx)
        needs = [number for number, row in enumerate(manifest.files) if row.name in names and number not in copy.held[mine]]
    texts = gather_texts(json.dumps([sorted(damaged.items()), needs]), ctx.world.group, ctx.device)
    said = [json.loads(text) for text in texts]
    bad = [
        {number: f"on rank {ranks[0]}'s machine {why}" for other in ranks for number, why in said[other][0]}
        for ranks in machines.ranks
    ]
    held = [files - bad[number].keys() for number, files in enumerate(copy.held)]
    needed = [frozenset(bad[number]).union(*(said[other][1] for other in ranks)) for number, ranks in enumerate(machines.ranks)]
    reasons = [why for one in bad for why in one.values()]
    try:
        plan = deliveries(needed, held, machines)
    except KeyError as error:
        file = manifest.files[error.args[0]].name
        why = next((one[error.args[0]] for one in bad if error.args[0] in one), f"{file} is on no machine")
        raise DamagedCheckpointError(why) from None
    if plan:
        _deliver(copy, plan, ctx, meet, seconds)
    with together(ctx):
        if place == 0 and not (path / MANIFEST).is_file():
            _make(path)
            write_file(path / MANIFEST, copy.text.encode())
    return reasons[:_SHOWN]


def _deliver(copy: Copy, plan: Sequence[Delivery], ctx: ParallelContext, meet: Callable[[], Handover], seconds: float) -> None:
    """Hand files over as planned (collective). Raises CheckpointError."""
    path, rank, label = copy.path, ctx.world.rank, f"the copy {copy.path.name}, again"
    try:
        handover = meet()
    except TransportError as error:
        raise CheckpointError(str(error)) from error
    try:
        with together(ctx):
            _make(path)
            handover.expect(label, path)
        with together(ctx):
            for taker in dict.fromkeys(one.taker for one in plan if one.giver == rank):
                rows = [copy.manifest.files[one.file] for one in plan if (one.giver, one.taker) == (rank, taker)]
                try:
                    handover.send(taker, label, [Parcel(path / row.name, row.bytes, row.blocks) for row in rows], seconds)
                except TransportError as error:
                    raise CheckpointError(str(error)) from error
        with together(ctx):
            for row in (copy.manifest.files[one.file] for one in plan if one.taker == rank):
                if handover.taken.get(row.name) != (row.bytes, row.blocks):
                    raise DamagedCheckpointError(f"{path / row.name} did not come as the manifest describes it")
    finally:
        handover.close()


def _make(path: Path) -> None:
    """Make the directory of a copy, for this user alone."""
    for one in (path.parent, path):
        one.mkdir(mode=0o700, exist_ok=True)
    require_private(path.parent)
