"""Wheel, sdist and editable installation, built offline from a copy of the checkout, inspected and imported."""

import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("megatrain", "kernels", "setup.cfg", "pyproject.toml", "README.md", "LICENSE")

IMPORT = """
import importlib.metadata, megatrain, megatrain.kernels, megatrain.config.schema
print(megatrain.__file__, megatrain.kernels.__file__, importlib.metadata.version("megatrain"), sep="\\n")
"""


def python(*args: str, cwd: Path) -> str:
    """Run this interpreter; its stdout."""
    done = subprocess.run([sys.executable, *args], cwd=cwd, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def hook(name: str, source: Path, target: Path) -> Path:
    """Call a build-backend hook as pip does, without isolation; the file it made."""
    target.mkdir(parents=True)
    made = python("-c", f"import setuptools.build_meta as b; print(b.{name}({str(target)!r}))", cwd=source).splitlines()[-1]
    return target / made


def imported(folder: Path, cwd: Path) -> list[str]:
    """Import megatrain from `folder`, its .pth files included, beside this environment's packages but not its own megatrain."""
    paths = [str(folder), sysconfig.get_paths()["purelib"]]
    return python(
        "-S", "-c", f"import sys, site; sys.path += {paths!r}; site.addsitedir({paths[0]!r}){IMPORT}", cwd=cwd
    ).splitlines()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what packaging reads, in a path with a space, so that no build output lands in the checkout."""
    copy = tmp_path_factory.mktemp("a checkout")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hook("build_wheel", source, tmp_path_factory.mktemp("wheel") / "dist")


def modules(root: Path) -> set[str]:
    """Every source file, under the name it has once installed."""
    package = {path.relative_to(root).as_posix() for path in root.glob("megatrain/**/*.py")}
    return package | {f"megatrain/{path.relative_to(root).as_posix()}" for path in root.glob("kernels/**/*.py")}


def data(root: Path) -> set[str]:
    """Every other file among the sources: tasks that are found by name, and what says that there are types."""
    files = [path for path in root.glob("megatrain/**/*") if path.is_file() and path.suffix not in (".py", ".pyc")]
    return {path.relative_to(root).as_posix() for path in files}


def test_wheel_holds_every_module_and_nothing_else(wheel: Path, source: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        files = {name for name in archive.namelist() if ".dist-info/" not in name}
        metadata = {Path(name).name: archive.read(name).decode() for name in archive.namelist() if ".dist-info/" in name}
    assert files == modules(source) | data(source)
    assert {
        "megatrain/py.typed",
        "megatrain/serving/page.html",
        "megatrain/evaluation/shipped/quiz_en.yaml",
        "megatrain/evaluation/shipped/quiz_en.jsonl",
    } <= files
    assert "megatrain = megatrain.cli.main:main" in metadata["entry_points.txt"]
    assert "Apache License" in metadata["LICENSE"]
    headers = Parser().parsestr(metadata["METADATA"])
    assert headers["Name"] == "megatrain"
    assert headers["Requires-Python"] == ">=3.10"
    assert set(headers.get_all("Provides-Extra")) == {
        "test",
        "dev",
        "cpu",
        "gpu",
        "ngram",
        "data",
        "html",
        "chinese",
        "parquet",
        "ray",
        "sentencepiece",
        "tiktoken",
        "chat",
        "eval",
        "harness",
        "serve",
    }


def test_wheel_imports(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    package, kernels, version = imported(tmp_path / "site", tmp_path)
    assert Path(package) == tmp_path / "site/megatrain/__init__.py"
    assert Path(kernels) == tmp_path / "site/megatrain/kernels/__init__.py"
    assert version in wheel.name


def test_sdist_builds_the_same_wheel(wheel: Path, source: Path, tmp_path: Path) -> None:
    sdist = hook("build_sdist", source, tmp_path / "dist")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    unpacked = tmp_path / sdist.name.removesuffix(".tar.gz")
    assert (unpacked / "LICENSE").exists() and (unpacked / "README.md").exists()
    again = hook("build_wheel", unpacked, tmp_path / "wheel")
    with zipfile.ZipFile(wheel) as first, zipfile.ZipFile(again) as second:
        assert set(first.namelist()) == set(second.namelist())


def test_editable_imports_the_checkout(source: Path, tmp_path: Path) -> None:
    editable = hook("build_editable", source, tmp_path / "dist")
    with zipfile.ZipFile(editable) as archive:
        archive.extractall(tmp_path / "site")
    package, kernels, _ = imported(tmp_path / "site", tmp_path)
    assert Path(package) == source / "megatrain/__init__.py"
    assert Path(kernels) == source / "kernels/__init__.py"


def test_top_level_kernels_is_in_nobodys_way() -> None:
    """At the root of a checkout transformers finds a folder of the name of a package that it looks for."""
    code = (
        "import importlib.util; assert importlib.util.find_spec('kernels').origin == 'ROOT/kernels/__init__.py'\n"
        "from transformers import Trainer\n"
        "from transformers.utils import is_kernels_available\n"
        "print(Trainer.__module__, is_kernels_available(), importlib.util.find_spec('kernels.norm'))\n"
        "import kernels.norm"
    ).replace("ROOT", str(ROOT))
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == "transformers.trainer False None\n", done.stderr
    assert done.stderr.splitlines()[-1] == "ModuleNotFoundError: No module named 'kernels.norm'"
