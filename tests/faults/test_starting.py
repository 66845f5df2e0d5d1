"""A rank that is frozen as the ranks meet, at any moment: the others end within the limit and name it, and nothing is left."""

import random
import signal
import time

import jobs
import psutil
import pytest
from breaking import await_that, codes, count, no_process_is_left, said

LIMIT = 8.0


@pytest.mark.fault(
    injection="SIGSTOP of rank {victim} within 0.8 s of having read its config",
    promise="the others end and name it, and it is killed",
    bound="{limit} + 10",
    layout="dp 2",
)
@pytest.mark.parametrize(("victim", "limit"), [(0, LIMIT), (1, LIMIT)])
@pytest.mark.timeout(3600)
def test_a_rank_that_is_frozen_as_the_ranks_meet(house, measured, victim, limit):
    for turn in range(count("MEGATRAIN_FAULTS_TRIES", 2)):
        name, seconds = f"meet_{victim}_{turn}", random.SystemRandom().uniform(0.0, 0.8)
        words = [f"train.{key}_timeout_seconds={limit}" for key in ("start", "hang")]
        words += [f"checkpoint.timeout_seconds={limit}", "train.steps=100000"]
        with jobs.start(house.folder / f"job_{name}", house.words("dp 2", name, *words), 2) as job:
            of = psutil.Process(job.processes[victim].pid)
            await_that(of.children, "its monitor begins")
            time.sleep(seconds)
            frozen = time.monotonic()
            job.processes[victim].send_signal(signal.SIGSTOP)
            ended = job.finish(jobs.SECONDS + limit)
        measured.detected(time.monotonic() - frozen)
        no_process_is_left(house.run(name))
        assert codes(ended)[1 - victim] == 1 and codes(ended)[victim] == -signal.SIGKILL, (seconds, said(ended))
        words = ended[1 - victim].err
        assert f"rank {victim}" in words or f"ranks [{victim}] did not come" in words, (seconds, words)
