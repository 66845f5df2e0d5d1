"""launch/install.sh with stand-ins for the interpreter and pip: what it asks for, in which order, what it says when stuck."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ("bash", "cat", "cksum", "sed", "tee", "awk", "tail", "rm", "ls", "dirname", "grep", "mkdir", "chmod")

INTERPRETER = """#!/bin/bash
echo "$*" >> "$PIP_CALLS"
case "$*" in
    *version_info*) exit {version} ;;
    *ensurepip*) exit {ensurepip} ;;
    --version) echo "Python {shown}" ;;
    "-m venv"*) mkdir -p "$4/bin"; : > "$4/pyvenv.cfg"; cat "$0" > "$4/bin/python"; chmod +x "$4/bin/python" ;;
    "-m pip --version") exit {pip} ;;
    *torch.__version__*) exit 1 ;;
    *"install"*"torch==2.13.0+cpu"*"--extra-index-url"*) exit {cpu_index} ;;
    *"install"*"torch==2.13.0+cpu"*) exit {cpu_configured} ;;
esac
"""
DEFAULTS = {"version": 0, "ensurepip": 0, "shown": "3.12.0", "pip": 0, "cpu_index": 0, "cpu_configured": 0}


class Machine:
    """A folder with a checkout, a PATH that holds only what is put there, and a record of all calls of python."""

    def __init__(self, folder: Path) -> None:
        self.checkout, self.bin, self.record = folder / "a check out", folder / "bin", folder / "calls"
        (self.checkout / "launch").mkdir(parents=True)
        self.bin.mkdir()
        for name in ("launch/install.sh", "launch/constraints.txt", "setup.cfg", "pyproject.toml"):
            shutil.copy(ROOT / name, self.checkout / name)
        for tool in TOOLS:
            (self.bin / tool).symlink_to(shutil.which(tool) or f"/bin/{tool}")
        self.tool("uname", "#!/bin/bash\necho Linux\n")

    def tool(self, name: str, text: str) -> None:
        """Put a command on the PATH."""
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def python(self, name: str = "python3", **behaviour: object) -> None:
        self.tool(name, INTERPRETER.format(**{**DEFAULTS, **behaviour}))

    def install(self, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        env = {"PATH": str(self.bin), "PIP_CALLS": str(self.record), "HOME": str(self.bin), **environment}
        command = ["bash", str(self.checkout / "launch/install.sh"), *words]
        return subprocess.run(command, env=env, cwd="/", capture_output=True, text=True, timeout=60, check=False)

    def calls(self, part: str) -> list[str]:
        """Calls of any python that contain `part`, in order."""
        return [line for line in self.record.read_text().splitlines() if part in line] if self.record.exists() else []


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_cpu_wheel_from_the_configured_sources(machine: Machine) -> None:
    machine.python(pip=1)
    done = machine.install("test")
    assert done.returncode == 0, done.stderr
    (torch,) = machine.calls("torch==")
    assert "torch==2.13.0+cpu" in torch and "--extra-index-url" not in torch
    assert any(call.endswith(f"-e {machine.checkout}[test]") for call in machine.calls("--no-build-isolation"))


def test_cpu_index_then_default_with_a_note(machine: Machine) -> None:
    machine.python(pip=1, cpu_configured=1)
    assert "several gigabytes" not in machine.install().stdout
    machine.python(pip=1, cpu_configured=1, cpu_index=1)
    machine.record.unlink()
    done = machine.install(MEGATRAIN_VENV=str(machine.bin / "other"))
    asked = [call.split("torch==")[1] for call in machine.calls("torch==")]
    assert asked[0] == "2.13.0+cpu"
    assert asked[1].startswith("2.13.0+cpu --extra-index-url https://download.pytorch.org/whl/cpu")
    assert asked[2] == "2.13.0"
    assert "several gigabytes" in done.stdout


@pytest.mark.parametrize("system", ["Darwin", "Linux with a GPU"])
def test_default_wheel_where_it_is_the_right_one(machine: Machine, system: str) -> None:
    machine.python(pip=1)
    if system == "Darwin":
        machine.tool("uname", "#!/bin/bash\necho Darwin\n")
    else:
        machine.tool("nvidia-smi", "#!/bin/bash\necho 'GPU 0: NVIDIA H100'\n")
    assert machine.install().returncode == 0
    assert [call.split("torch==")[1] for call in machine.calls("torch==")] == ["2.13.0"]


def test_second_call_does_nothing_and_a_change_installs_again(machine: Machine) -> None:
    machine.python(pip=1)
    machine.install("test")
    machine.python(pip=0)
    machine.record.unlink()
    for words in (["test"], []):
        done = machine.install(*words)
        assert (done.returncode, done.stdout) == (0, "")
    assert machine.calls("") == []
    with (machine.checkout / "launch/constraints.txt").open("a") as file:
        file.write("six==1.17.0\n")
    machine.install("test")
    assert machine.calls("pip install") != []


def test_old_python(machine: Machine) -> None:
    machine.python(version=1, shown="3.8.18")
    done = machine.install()
    assert done.returncode == 1
    assert "needs Python 3.10 or newer; python3 here is Python 3.8.18" in done.stderr


def test_newer_python_beside_an_old_one(machine: Machine) -> None:
    machine.python(version=1, shown="3.8.18")
    machine.python("python3.11", pip=1, shown="3.11.9")
    done = machine.install()
    assert done.returncode == 0, done.stderr
    assert "3.11.9" in done.stdout


def test_ensurepip_missing(machine: Machine) -> None:
    machine.python(ensurepip=1, pip=1)
    done = machine.install()
    assert done.returncode == 1
    assert "sudo apt install python3-venv" in done.stderr


def test_a_folder_that_is_no_environment_is_left_alone(machine: Machine) -> None:
    machine.python(pip=1)
    photos = machine.bin / "photos"
    photos.mkdir()
    (photos / "1.jpg").touch()
    done = machine.install(MEGATRAIN_VENV=str(photos))
    assert done.returncode == 1
    assert "no virtual environment" in done.stderr
    assert (photos / "1.jpg").exists()


def test_unknown_extra(machine: Machine) -> None:
    done = machine.install("tests")
    assert done.returncode == 1
    assert "Use nothing, test or dev" in done.stderr


def test_pip_failure_shows_the_end_of_its_output(machine: Machine) -> None:
    machine.python(pip=1)
    text = (machine.bin / "python3").read_text()
    machine.tool("python3", text.replace("esac", '    *install*-e*) echo "ERROR: no such package"; exit 1 ;;\nesac'))
    done = machine.install()
    assert done.returncode == 1
    assert "ERROR: no such package" in done.stderr
    assert "install.log" in done.stderr
    assert not list(Path(os.fspath(machine.checkout)).glob(".venv/megatrain-installed*"))
