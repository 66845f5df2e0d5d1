"""What started a run is kept: script, config, command, environment without secrets, packages."""

import stat

from megatrain.records.provenance import HIDDEN, keep


def test_everything_is_there_and_no_secret(tmp_path):
    config, script = tmp_path / "c.yaml", tmp_path / "job.sbatch"
    config.write_text("model: {}  # as it was given\n")
    script.write_text("#!/bin/bash\n")
    env = {
        "MEGATRAIN_SCRIPT": str(script),
        "HOME": "/root",
        "WANDB_API_KEY": "hush",
        "HF_TOKEN": "hush",
        "db_password": "hush",
        "https_proxy": "http://me:hush@proxy:8080",
        "TEXT": "two\nlines",
    }
    folder = keep(tmp_path / "run", config, env, ["python", "-m", "megatrain", "train", "c d.yaml"])
    assert folder.parent == tmp_path / "run/launches"
    assert (folder / "c.yaml").read_text() == config.read_text() and (folder / "job.sbatch").read_text() == script.read_text()
    assert (folder / "command.txt").read_text() == "python -m megatrain train 'c d.yaml'\n"
    said = (folder / "environment.txt").read_text()
    assert "hush" not in said and f"HF_TOKEN={HIDDEN}\n" in said and "HOME=/root\n" in said and "TEXT=two\\nlines\n" in said
    assert stat.S_IMODE((folder / "environment.txt").stat().st_mode) == 0o600
    assert "torch==" in (folder / "packages.txt").read_text()


def test_each_start_has_its_own(tmp_path):
    folders = {keep(tmp_path, None, {"MEGATRAIN_SCRIPT": "/nowhere"}, []) for _ in range(3)}
    assert len(folders) == 3
