"""A disk that does not answer, in a save that training waits for: the rank and the file are named, on every rank."""

import jobs
import pytest

BLOCKED = """
import os, sys, time
from megatrain.cli.main import main

def never_answers(descriptor):
    time.sleep(1000)

if os.environ["RANK"] == "1":
    os.fsync = never_answers
sys.exit(main())
"""


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """How the two ranks of such a run ended."""
    folder, port = tmp_path_factory.mktemp("hangs"), jobs.free_port()
    (folder / "blocked.py").write_text(BLOCKED)
    tree = jobs.tiny(jobs.write_store(folder / "data"), folder / "run", checkpoint={"timeout_seconds": 2.0}, train={"steps": 3})
    config = jobs.write_config(folder / "config.yaml", tree)
    with jobs.Job(folder / "job") as job:
        for rank in range(2):
            env = {
                **jobs.environment(rank, 2, port),
                "GLIBC_TUNABLES": "",
            }  # else it would start itself anew, without the patch
            job.fork([str(folder / "blocked.py"), "train", str(config)], env)
        return job.finish()


def test_a_disk_that_does_not_answer_is_named_with_its_file_on_every_rank(ended):
    for rank, end in enumerate(ended):
        assert end.code == 1 and "Traceback" not in end.err
        assert f"megatrain: rank {rank} ends after a hang; to blame: rank 1\n    rank 1 has come to no end for " in end.err
        assert (
            "/run/checkpoints/.saving_step_00000003/" in end.err and ".safetensors (checkpoint.timeout_seconds=2)\n" in end.err
        )


def test_the_verdict_has_the_stacks_of_all_ranks(ended):
    assert ended[0].err.count("    rank 0 is at\n") == ended[0].err.count("    rank 1 is at\n") == 1, ended[0].err
