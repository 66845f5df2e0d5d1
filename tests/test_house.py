"""Habits that no linter knows: file sizes, names, packaging lists, pinned versions, documentation that points somewhere."""

import ast
import configparser
import re
import subprocess
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import pytest
from step_files import step_files

ROOT = Path(__file__).resolve().parents[1]
LONGEST, LONGEST_BESIDE = 600, 540
"""Lines of a source file, which is about one thing and can be read alone; and of a file of tests or scripts."""
LONGEST_FUNCTION = 60

CODE = [
    path for folder in ("megatrain", "kernels", "launch", "tests", "docs") for path in sorted((ROOT / folder).rglob("*.py"))
]
PACKAGE = [path for path in CODE if path.relative_to(ROOT).parts[0] in ("megatrain", "kernels")]
SCRIPTS = [*sorted((ROOT / "launch").glob("*.sh")), ROOT / ".ci/run"]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]


@cache
def tree(path: Path) -> ast.Module:
    """A file's syntax, of which parsing is most of the work here."""
    return ast.parse(path.read_text())


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.fixture(scope="module")
def setup() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def requirements(setup: configparser.ConfigParser) -> set[str]:
    """Names of all direct dependencies, extras included."""
    lines = setup["options"]["install_requires"].split("\n")
    for extra in setup["options.extras_require"].values():
        lines += extra.split("\n")
    names = {re.split(r"[\s<>=!~;\[]", line.strip())[0].lower() for line in lines if line.strip() and not line.startswith("#")}
    return names - {"megatrain"}


def test_files_are_short() -> None:
    lengths = {name(path): len(path.read_text().splitlines()) for path in CODE}
    package = {name(path) for path in PACKAGE}
    assert {file: lines for file, lines in lengths.items() if lines > (LONGEST if file in package else LONGEST_BESIDE)} == {}


def test_functions_are_short() -> None:
    long = {
        f"{name(path)}: {node.name}": node.end_lineno - node.lineno + 1
        for path in CODE
        for node in ast.walk(tree(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno - node.lineno >= LONGEST_FUNCTION
    }
    assert long == {}


def test_package_list_is_the_folders(setup: configparser.ConfigParser) -> None:
    folders = {name(path.parent) for root in ("megatrain", "kernels") for path in (ROOT / root).rglob("__init__.py")}
    folders = {(folder if folder.startswith("megatrain") else f"megatrain/{folder}").replace("/", ".") for folder in folders}
    assert set(setup["options"]["packages"].split()) == folders
    with_code = {path.parent for path in PACKAGE}
    assert {name(folder) for folder in with_code if not (folder / "__init__.py").exists()} == set()


def test_no_grab_bags_and_no_packages_in_tests() -> None:
    assert [name(path) for path in CODE if path.stem in ("utils", "util", "common", "helpers", "misc")] == []
    rooms = [ROOT / "tests" / room for room in ("harness", "references", "grids", "faults")]
    beside = [path for path in (ROOT / "tests").rglob("*.py") if not path.name.startswith("test_") and path.parent not in rooms]
    assert [name(path) for path in beside if path.name != "conftest.py"] == []
    assert [name(path) for path in ROOT.glob("tests/**/__init__.py")] == []


def test_nothing_is_left_to_do() -> None:
    marker = re.compile(r"#.*\b(TODO|FIXME|XXX|HACK)\b")
    assert [name(path) for path in PACKAGE if marker.search(path.read_text())] == []


def imported_names(tree: ast.AST) -> set[str]:
    """Dotted names of what a file imports, and `torch.x` for each attribute of torch it uses; prose does not count."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            names.add(f"{node.value.id}.{node.attr}")
    return names


def test_only_the_transport_and_the_launchers_agent_name_torch_distributed() -> None:
    imports = {name(path): imported_names(tree(path)) for path in PACKAGE}
    users = {file for file, names in imports.items() if any(used.startswith("torch.distributed") for used in names)}
    assert {user for user in users if not user.startswith(("megatrain/transport/", "megatrain/lifecycle/agent"))} == set()


def test_only_runtime_launch_and_the_agent_know_the_launcher_variables() -> None:
    variables = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID"}
    readers = set()
    for path in PACKAGE:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in variables:
                readers.add(name(path))
    assert readers <= {"megatrain/runtime/launch.py", "megatrain/lifecycle/agent_logs.py"}  # the second is the launcher


def test_every_dependency_is_pinned_and_explained(setup: configparser.ConfigParser) -> None:
    pinned = {
        re.split(r"==", line)[0]
        for line in (ROOT / "launch/constraints.txt").read_text().splitlines()
        if not line.startswith("#")
    }
    page = (ROOT / "docs/dependencies.md").read_text().lower()
    wanted = requirements(setup)
    assert wanted - pinned - {"triton"} == set()  # torch's CUDA builds pin triton themselves
    assert {package for package in wanted if f"`{package}`" not in page} == set()


SAME_NAMES = {
    "choices": ["megatrain/corpus/cleaning/choices.py", "megatrain/corpus/reading/choices.py"],
    "config": ["megatrain/config", "megatrain/huggingface/config.py"],
    "data": ["megatrain/cli/data.py", "megatrain/data"],
    "doctor": ["megatrain/cli/doctor.py", "megatrain/doctor"],
    "gpt": ["megatrain/data/samples/gpt.py", "megatrain/models/gpt.py"],
    "load": ["megatrain/checkpoint/load.py", "megatrain/config/load.py"],
    "model": ["megatrain/config/model.py", "megatrain/ngram/model.py"],
    "ngram": ["megatrain/cli/ngram.py", "megatrain/ngram"],
    "plan": ["megatrain/plan", "megatrain/verbs/plan.py"],
    "reading": ["megatrain/corpus/reading", "megatrain/ngram/reading.py"],
    "report": ["megatrain/corpus/report", "megatrain/ngram/report.py"],
    "rules": ["megatrain/corpus/rules", "megatrain/doctor/rules.py"],
    "text": ["megatrain/inference/text.py", "megatrain/ngram/text.py"],
    "units": ["megatrain/corpus/reading/units.py", "megatrain/ngram/units.py"],
}
"""Modules of one name, where the name of the package tells them apart."""


def test_names_of_modules_and_classes_are_given_once() -> None:
    places: dict[str, list[str]] = {}
    classes: dict[str, list[str]] = {}
    for path in PACKAGE:
        module = path.parent if path.stem == "__init__" else path
        places.setdefault(module.stem, []).append(name(module))
        for node in tree(path).body:
            if isinstance(node, ast.ClassDef):
                classes.setdefault(node.name, []).append(name(path))
    assert {module: sorted(paths) for module, paths in places.items() if len(paths) > 1} == SAME_NAMES
    assert {made: paths for made, paths in classes.items() if len(paths) > 1} == {}


def is_own(node: ast.Attribute) -> bool:
    return isinstance(node.value, ast.Name) and node.value.id == "self"


def methods_of(trees: Iterable[ast.AST]) -> set[str]:
    """Names of methods that are no fields of another class: whoever assigns to such a name of an object replaces its method."""
    classes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    methods = {part.name for made in classes for part in made.body if isinstance(part, ast.FunctionDef)}
    declared = {ast.unparse(part.target) for made in classes for part in made.body if isinstance(part, ast.AnnAssign)}
    stored = [node for made in classes for node in ast.walk(made) if isinstance(node, ast.Attribute)]
    return methods - declared - {node.attr for node in stored if isinstance(node.ctx, ast.Store) and is_own(node)}


def replaced_methods(tree: ast.AST, methods: set[str]) -> list[str]:
    """Where a file gives another object than `self` a method or a class, or an attribute whose name is not written there."""
    found = []
    for node in ast.walk(tree):
        given = isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Load)
        if given and (node.attr == "__class__" or (node.attr in methods and not is_own(node))):
            found.append(ast.unparse(node))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("setattr", "delattr", "object.__setattr__"):
            found.append(ast.unparse(node))
    return found


def test_no_module_replaces_a_method_of_another_object() -> None:
    bad = "loader.batch = f\nsetattr(run, name, f)\nself.batch = 1\nrun.x.__class__ = Seen\nloader.size = 2"
    assert replaced_methods(ast.parse(bad), {"batch"}) == ["loader.batch", "setattr(run, name, f)", "run.x.__class__"]
    trees = {name(path): tree(path) for path in PACKAGE}
    methods = methods_of(trees.values())
    assert {"batch", "reduce", "new_weights"} <= methods
    assert {file: found for file, tree in trees.items() if (found := replaced_methods(tree, methods))} == {}
    # Where the name is a field of another class, mypy tells; nobody may tell it not to.
    assert [name(path) for path in PACKAGE if "method-assign" in path.read_text()] == []


@pytest.mark.parametrize("script", SCRIPTS, ids=name)
def test_scripts_are_bash_3(script: Path) -> None:
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 0, done.stderr
    newer = re.compile(r"\b(mapfile|readarray|coproc)\b|declare -[An]|local -n|\$\{\w+(,,|\^\^)|&>>|\|&|;;&")
    assert newer.findall(script.read_text()) == []
    text = script.read_text()
    assert not text.startswith("#!") or "set -euo pipefail" in text  # a file without #! is sourced by one that has it


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text())
    local = [target for target in targets if "://" not in target and not target.startswith("mailto:")]
    assert [target for target in local if not (page.parent / target).exists()] == []


def test_the_index_lists_every_page() -> None:
    index = (ROOT / "docs/index.md").read_text()
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in ROOT.glob("docs/**/*.md")} - {"index.md"}
    assert {page for page in pages if f"({page})" not in index} == set()


def test_benchmarks_have_one_folder_and_an_index() -> None:
    index = (ROOT / "docs/benchmarks.md").read_text().split("## The scripts\n")[1]
    assert set(re.findall(r"`(\w+\.py)`", index)) == {
        path.name for path in (ROOT / "docs/benchmarks").iterdir() if path.is_file()
    }
    assert [name(path) for path in CODE if "benchmarks" not in path.parts and re.search(r"_speed$|^compare_", path.stem)] == []


@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in ("CHANGELOG.md", "chronicle.md")], ids=name)
def test_paths_lead_somewhere(page: Path) -> None:
    """Paths from the root of the checkout; those two pages tell of what was."""
    paths = re.findall(
        r"(?<![\w/.-])(?:docs|kernels|launch|megatrain|tests)/[\w/-]+\.(?:md|py|sbatch|sh|txt|yaml)\b", page.read_text()
    )
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_files_named_in_readme_and_index_exist() -> None:
    files = {name(path) for path in ROOT.rglob("*") if ".venv" not in path.parts}
    for page in (ROOT / "README.md", ROOT / "docs/index.md"):
        named = {file.removeprefix("../") for file in re.findall(r"[\w./-]+\.(?:py|sh|yaml|sbatch|md)\b", page.read_text())}
        assert {file for file in named if not any(f"/{path}".endswith(f"/{file}") for path in files)} == set()


def test_readme_says_how_long_the_step_is() -> None:
    said = re.search(
        r"one training step with all of them is (\d+) files of some ([\d,]+) lines", (ROOT / "README.md").read_text()
    )
    assert said is not None
    lengths = step_files().values()
    assert (int(said[1]), round(sum(lengths), -2)) == (len(lengths), int(said[2].replace(",", "")))


def test_readme_shows_the_two_commands() -> None:
    readme = (ROOT / "README.md").read_text()
    assert "bash launch/quickstart.sh" in readme
    assert "bash launch/test.sh" in readme


def docstrings(tree: ast.AST) -> list[str]:
    """Every docstring, those after assignments included."""
    bodies = [body for node in ast.walk(tree) if isinstance(body := getattr(node, "body", None), list)]
    values = [statement.value for body in bodies for statement in body if isinstance(statement, ast.Expr)]
    return [value.value for value in values if isinstance(value, ast.Constant) and isinstance(value.value, str)]


def test_docstrings_name_their_subject() -> None:
    assert docstrings(ast.parse('"""Of it."""\nx = 1\n"""What it is."""')) == ["Of it.", "What it is."]
    begins = re.compile(r"\s*(Of|What|Whatever|Those|That)\b")
    found = {name(path): [text for text in docstrings(tree(path)) if begins.match(text)] for path in PACKAGE}
    assert {file: texts for file, texts in found.items() if texts} == {}
