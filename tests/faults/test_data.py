"""Data that lies: files that change under a run. The run ends with the file's name, on every layout, whoever met it."""

import time

import jobs
import numpy as np
import pytest

LAYOUTS = {"dp 2": {}, "tp 2 x pp 2": {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}}


def cut(store):
    with store.with_name("store.bin").open("r+b") as file:
        file.truncate(100)


def overwrite(store):
    with store.with_name("store.bin").open("r+b") as file:
        file.write(np.full(4000, 300, np.uint16).tobytes())


DAMAGE = {
    "truncated": (cut, r"store.bin was truncated while it was in use: it has 100 bytes, and had 8000"),
    "overwritten with ids beyond the vocabulary": (overwrite, "store.bin: token id 300 at token"),
}


@pytest.mark.fault(
    injection="a token file is {what} under a run", promise="the error names file and offset", bound=15, layout="{layout}"
)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("what", DAMAGE)
def test_a_token_file_changes_under_a_run(tmp_path, measured, what, layout):
    damage, message = DAMAGE[what]
    store = jobs.write_store(tmp_path / "store")
    config = jobs.tiny(store, tmp_path / "run", train={"steps": 100_000}, parallel=LAYOUTS[layout])
    size = 2 if layout == "dp 2" else 4
    with jobs.start(tmp_path / "job", [str(jobs.write_config(tmp_path / "c.yaml", config))], size=size) as job:
        assert jobs.wait_for_rows(job, tmp_path / "run", 3)
        began = time.monotonic()
        damage(store)
        ended = job.finish()
    measured.detected(time.monotonic() - began)
    assert [end.code for end in ended] == [1] * size
    assert all(message in end.err for end in ended), ended
