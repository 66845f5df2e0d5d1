"""What started a run is kept: script, config, command, environment without secrets, packages."""

import importlib.metadata
import stat

from megatrain.records.provenance import keep
from megatrain.records.secrets import HIDDEN

SECRETS = """MYSQL_PWD SSH_PASS GITHUB_PAT BEARER WANDB_API_KEY HF_TOKEN db_password SESSION OPENAI MEGATRAIN_SECRET SLURM_JWT NCCL_AUTH
PYTHON_KEYRING_PASSWORD DATABASE_URL CONNECTION"""


def test_everything_is_there_and_no_secret(tmp_path):
    config, script = tmp_path / "c.yaml", tmp_path / "job.sbatch"
    config.write_text("model: {}  # as it was given\n")
    script.write_text(
        "#!/bin/bash\nexport WANDB_API_KEY=hush OMP_NUM_THREADS=2\ncurl -H 'Authorization: Bearer hushhushhush'\n"
    )
    kept = {
        "MEGATRAIN_SCRIPT": str(script),
        "HOME": "/root",
        "SLURM_JOB_ID": "17",
        "NCCL_DEBUG": "two\nlines",
        "LC_ALL": "ok, Password=hush;x=1",
    }
    said = {"SLURM_EXPORT_ENV": "ALL,A=hush", "SLURM_JOB_COMMENT": "pw hush", "SLURM_JOB_EXTRA": "hush"}
    env = kept | said | dict.fromkeys(SECRETS.split(), "hush")
    folder = keep(tmp_path / "run", config, env, ["megatrain", "train", "c d.yaml", "data.path=https://me:hush@host/a"])
    assert folder.parent == tmp_path / "run/launches"
    assert (folder / "c.yaml").read_text() == config.read_text()
    assert (folder / "job.sbatch").read_text() == (
        f"#!/bin/bash\nexport WANDB_API_KEY={HIDDEN} OMP_NUM_THREADS=2\ncurl -H 'Authorization: {HIDDEN}'\n"
    )
    assert (folder / "command.txt").read_text() == f"megatrain train 'c d.yaml' data.path=https://{HIDDEN}@host/a\n"
    assert (folder / "environment.txt").read_text() == (
        f"HOME=/root\nLC_ALL=ok, Password={HIDDEN};x=1\nMEGATRAIN_SCRIPT={script}\nNCCL_DEBUG=two\\nlines\nSLURM_JOB_ID=17\n"
        "# 18 other variables are not kept\n"
    )
    assert stat.S_IMODE((folder / "environment.txt").stat().st_mode) == 0o600
    packages = (folder / "packages.txt").read_text().splitlines()
    for one in importlib.metadata.distributions():
        assert f"{one.metadata['Name']}=={one.version}" in packages


def test_each_start_has_its_own(tmp_path):
    folders = {keep(tmp_path, None, {"MEGATRAIN_SCRIPT": "/nowhere"}, []) for _ in range(3)}
    assert len(folders) == 3
