"""The library as one meets it at a prompt: its names, its help, and a program that ends without a word more than it was told to say."""

import pydoc
import subprocess
import sys

import jobs

import megatrain


def test_names_and_help():
    assert [name for name in dir(megatrain) if not name.startswith("_")] == ["build", "load", "train", "train_step"]
    assert megatrain.__version__ and "__version__" in dir(megatrain)
    page = pydoc.plain(pydoc.render_doc(megatrain))
    functions = page[page.index("\nFUNCTIONS") :]
    assert [name for name in megatrain.__all__ if f"\n    {name}(" not in functions] == []


def test_a_program_ends_quietly(tmp_path):
    """What nobody closed is closed without the modules that are gone by then: the claim of the checkpoints, the loader, the world."""
    tree = jobs.tiny(jobs.write_store(tmp_path / "data"), tmp_path / "run", train={"steps": 4})
    config = jobs.write_config(tmp_path / "run.yaml", tree)
    code = (
        "import abc, megatrain, megatrain.checkpoint.directory as directory\n"
        f"run = megatrain.build({str(config)!r})\n"
        "print(megatrain.train_step(run).step)\n"
        "megatrain.train(run)\n"
        f"model = megatrain.load({str(tmp_path / 'run')!r})\n"
        "abc.kept = run, directory\n"  # modules go last imported first: the run goes when `directory` has none of its names
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=jobs.environment(), capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("1\n")
