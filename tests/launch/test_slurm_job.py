"""What a SLURM job does when its step has ended, by the step's exit code and the markers in log.dir."""

import shlex
import subprocess
from pathlib import Path

import pytest

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
BEFORE, NOW = "{stopped by the job before}", "{stopped by this job}"


@pytest.mark.parametrize(
    ("code", "preempted", "diverged", "again", "ends"),
    [
        (0, "", "", False, 0),
        (75, NOW, "", True, 75),
        (137, NOW, "", True, 137),
        (137, BEFORE, "", False, 137),
        (1, NOW, "", False, 1),
        # training went wrong: never again by itself, also where srun's code is that of a rank that it killed
        (76, "", NOW, False, 76),
        (76, BEFORE, NOW, False, 76),
        (143, "", NOW, False, 76),
        (137, NOW, NOW, False, 76),
        (75, NOW, BEFORE, True, 75),
        (0, "", BEFORE, False, 0),
    ],
)
def test_only_a_job_that_stopped_early_goes_back_into_the_queue(tmp_path, code, preempted, diverged, again, ends):
    for name, text in (("preempted", preempted), ("diverged", diverged)):
        if text:
            (tmp_path / name).write_text(text)
    script = f"""
        set -euo pipefail
        root={shlex.quote(str(LAUNCH.parent))} SLURM_JOB_ID=7 dir={shlex.quote(str(tmp_path))}
        . "$root/launch/slurm_job.sh"
        code={code} before='{BEFORE}' diverged='{BEFORE}'
        if stopped_early; then echo "again $code"; else echo "over $code"; fi
    """
    done = subprocess.run(["bash", "-c", script], check=False, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{'again' if again else 'over'} {ends}\n", "")
