"""What started a run is kept: script, config, command, environment without secrets, packages."""

import stat

import pytest

from megatrain.records.provenance import HIDDEN, keep, masked

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
    env = kept | dict.fromkeys(SECRETS.split(), "hush")
    folder = keep(tmp_path / "run", config, env, ["megatrain", "train", "c d.yaml", "data.path=https://me:hush@host/a"])
    assert folder.parent == tmp_path / "run/launches"
    assert (folder / "c.yaml").read_text() == config.read_text()
    assert (folder / "job.sbatch").read_text() == (
        f"#!/bin/bash\nexport WANDB_API_KEY={HIDDEN} OMP_NUM_THREADS=2\ncurl -H 'Authorization: Bearer {HIDDEN}'\n"
    )
    assert (folder / "command.txt").read_text() == f"megatrain train 'c d.yaml' data.path=https://{HIDDEN}@host/a\n"
    assert (folder / "environment.txt").read_text() == (
        f"HOME=/root\nLC_ALL=ok, Password={HIDDEN};x=1\nMEGATRAIN_SCRIPT={script}\nNCCL_DEBUG=two\\nlines\nSLURM_JOB_ID=17\n"
        "# 15 other variables are not kept\n"
    )
    assert stat.S_IMODE((folder / "environment.txt").stat().st_mode) == 0o600
    assert "torch==" in (folder / "packages.txt").read_text()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://me:hu@sh/x@proxy:8080", "http://(not kept)@proxy:8080"),
        ("https://hush@github.com/a", "https://(not kept)@github.com/a"),
        ("Server=db;Password=hush;Database=d", "Server=db;Password=(not kept);Database=d"),
        ("DB_PASS='hush and hush' x", "DB_PASS=(not kept) x"),
        ('{"api_key": "hush", "n": 1}', '{"api_key": (not kept), "n": 1}'),
        ("https://h/a?sig=hush&x=1", "https://h/a?sig=(not kept)&x=1"),
        ("--password hush --steps 3", "--password (not kept) --steps 3"),
        ("ghp_0123456789abcdef", "(not kept)"),
        ("log.dir=a data.tokenizer=a.json", "log.dir=a data.tokenizer=a.json"),
        ("bypass=1 path=/a compat: yes http://host:80/a", "bypass=1 path=/a compat: yes http://host:80/a"),
    ],
)
def test_what_looks_like_a_secret_in_a_text_is_masked(text, shown):
    assert masked(text) == shown


def test_each_start_has_its_own(tmp_path):
    folders = {keep(tmp_path, None, {"MEGATRAIN_SCRIPT": "/nowhere"}, []) for _ in range(3)}
    assert len(folders) == 3
