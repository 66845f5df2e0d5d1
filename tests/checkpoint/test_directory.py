"""The order of the checkpoints of a directory is that of their saves, whatever clocks say."""

import itertools
import json
import os
from dataclasses import replace
from types import SimpleNamespace

import pytest

from megatrain.checkpoint import save as saving
from megatrain.checkpoint.directory import catalogue, latest, tidy
from megatrain.checkpoint.load import newest
from megatrain.checkpoint.manifest import read_manifest
from megatrain.checkpoint.together import CheckpointError
from megatrain.parallel.mesh import ParallelContext

SINGLE = ParallelContext.single()


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def order(directory):
    """Steps of the checkpoints, newest first."""
    return [int(path.name[5:]) for path, _, _ in catalogue(directory)]


def rewrite(path, **changes):
    (path / "manifest.json").write_bytes(replace(read_manifest(path), **changes).to_bytes())


CLOCKS = {"set back": [9000.0, 5400.0, 5401.0, 1.0], "stopped": [9000.0] * 4, "right": [1.0, 2.0, 3.0, 4.0]}


@pytest.mark.parametrize("times", CLOCKS.values(), ids=CLOCKS)
@pytest.mark.parametrize("steps", [(100, 200, 300, 400), (100, 300, 200, 100)], ids=["on", "back"])
def test_the_newest_is_the_one_that_was_saved_last(tmp_path, state, monkeypatch, times, steps):
    clock = itertools.chain(times)
    monkeypatch.setattr(saving, "time", SimpleNamespace(**vars(saving.time) | {"time": lambda: next(clock)}))
    for count, step in enumerate(steps, 1):
        path = state.save(SINGLE, tmp_path, step, keep=2)
        os.utime(path, (times[count - 1], times[count - 1]))
        kept = list(dict.fromkeys(steps[:count][::-1]))[:2]
        assert order(tmp_path) == kept and latest(tmp_path) == path.name == newest(tmp_path).name
        assert read_manifest(path).serial == count
        tidy(tmp_path, SINGLE)  # as the next start of the run does
        assert latest(tmp_path) == path.name
    assert names(tmp_path) == ["latest", *sorted(f"step_{step:08d}" for step in kept)]


def test_checkpoints_of_earlier_releases_have_no_number_and_are_older(tmp_path, state):
    for step in (100, 200, 300):
        rewrite(state.save(SINGLE, tmp_path, step), serial=0, saved_at=1e9 - step)
    assert order(tmp_path) == [300, 200, 100]
    (tmp_path / "latest").write_text("step_00000200\n")  # that run went back
    assert order(tmp_path) == [200, 300, 100]
    assert read_manifest(state.save(SINGLE, tmp_path, 150)).serial == 1
    assert order(tmp_path) == [150, 300, 200, 100]
    text = (tmp_path / "step_00000100/manifest.json").read_text()
    assert json.loads(text)["serial"] == 0


def test_one_whose_manifest_cannot_be_read_stands_where_its_step_is(tmp_path, state):
    for step in (100, 200, 300):
        state.save(SINGLE, tmp_path, step)
    (tmp_path / "step_00000200/manifest.json").write_text("{")
    os.utime(tmp_path / "step_00000200", (9e9, 9e9))
    assert order(tmp_path) == [300, 200, 100]
    assert read_manifest(state.save(SINGLE, tmp_path, 150)).serial == 4
    assert order(tmp_path) == [200, 150, 300, 100]
    assert newest(tmp_path).name == "step_00000150"


def test_strange_things_in_the_places_of_its_files_are_put_aside_and_no_link_is_followed(tmp_path, state):
    victim, folder = tmp_path / "victim", tmp_path / "ck"
    victim.write_text("precious")
    first = state.save(SINGLE, folder, 100)
    (folder / "latest").unlink()
    (folder / "latest").mkdir()
    (folder / "latest/note").write_text("mine")
    (folder / ".latest_draft").symlink_to(victim)
    (folder / ".saving_step_00000200").symlink_to(tmp_path)
    assert latest(folder) == "" and newest(folder) == first
    tidy(folder, SINGLE)
    assert latest(folder) == first.name and (folder / "damaged_latest/note").read_text() == "mine"
    (folder / ".latest_draft").mkdir()
    (folder / "latest").unlink()
    (folder / "latest").symlink_to(victim)
    second = state.save(SINGLE, folder, 200)
    assert latest(folder) == second.name and names(folder) == ["damaged_latest", "latest", first.name, second.name]
    assert victim.read_text() == "precious"


def test_a_serial_that_readers_refuse_is_never_saved(tmp_path, state):
    state.save(SINGLE, tmp_path, 100)
    path = state.save(SINGLE, tmp_path, 200)
    rewrite(path, serial=2**53 - 1)
    said = rf"{tmp_path} has a checkpoint with the serial 9007199254740991, and larger ones are not read.*Move that checkpoint away"
    with pytest.raises(CheckpointError, match=said):
        state.save(SINGLE, tmp_path, 300)
    rewrite(path, serial=2**63 - 1)
    ((_, manifest, reason), (_, _, fine)) = catalogue(tmp_path)
    assert (
        manifest is None
        and fine == ""
        and reason.startswith(f"{path}/manifest.json cannot be used: '9223372036854775807' is not")
    )
    assert newest(tmp_path).name == "step_00000100"
    assert read_manifest(state.save(SINGLE, tmp_path, 300)).serial == 2
