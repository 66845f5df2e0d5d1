"""Every source has a test of its name, tests/ROOM/test_FILE.py, or a line in tests/sources.yaml that says where it is tested."""

import ast
from functools import cache
from pathlib import Path

import yaml

TESTS = Path(__file__).parent
ROOT = TESTS.parent
TABLE = yaml.safe_load((TESTS / "sources.yaml").read_text())
HOMES = {"": ROOT / "megatrain", "kernels/": ROOT / "kernels"}
SOURCES = {
    prefix + path.relative_to(home).as_posix(): path
    for prefix, home in HOMES.items()
    for path in sorted(home.rglob("*.py"))
    if path.name != "__main__.py"
}
"""By its path under the package; a room's __init__.py is there to be imported."""
FILES = sorted(source for source in SOURCES if not source.endswith("__init__.py"))


def module(source: str) -> str:
    return ".".join(("megatrain", *Path(source).with_suffix("").parts)).removesuffix(".__init__")


MODULES = {module(source): path for source, path in SOURCES.items()}


@cache
def imports(path: Path) -> frozenset[str]:
    """Dotted names of what a file may import, late imports included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return frozenset(found)


def reaches(test: Path, name: str) -> bool:
    """Whether a test imports a module, or one that imports it, or names it."""
    direct = imports(test)
    return name in direct or any(name in imports(MODULES[i]) for i in direct & MODULES.keys()) or name in test.read_text()


def own(source: str) -> Path:
    """The test of a source's name."""
    path = Path(source)
    return TESTS / path.parent / f"test_{path.name}"


def test_every_source_says_where_it_is_tested() -> None:
    missing = [source for source in FILES if not own(source).exists() and source not in TABLE]
    assert missing == [], "write tests/ROOM/test_FILE.py, or a line 'FILE: TEST' in tests/sources.yaml"
    assert [source for source in TABLE if source not in FILES] == [], "lines of tests/sources.yaml whose file is no more"
    assert [source for source in TABLE if own(source).exists()] == [], "lines that are not needed: there is a test of that name"
    assert list(TABLE) == sorted(TABLE), "tests/sources.yaml is in order"


def test_what_the_table_names_tests_it() -> None:
    assert [test for test in TABLE.values() if not (TESTS / test).exists()] == []
    strangers = {source: test for source, test in TABLE.items() if not reaches(TESTS / test, module(source))}
    assert strangers == {}, "the test imports neither the module, nor one that imports it, and does not name it"


def test_a_test_that_knows_nothing_of_a_module_is_a_stranger(tmp_path: Path) -> None:
    test = tmp_path / "test_x.py"
    for text, name, reached in (
        ("from megatrain.parallel import rng", "parallel.rng", True),
        ("from megatrain.kernels.attention_dropout import Dropout", "kernels.dispatch", True),  # imports it
        ("import subprocess  # python -m megatrain.parallel.rng", "parallel.rng", True),
        ("import megatrain.transport.group", "parallel.rng", False),
    ):
        test.write_text(text)
        imports.cache_clear()
        assert reaches(test, f"megatrain.{name}") == reached, text
