"""A pattern stands for what Python's `glob` finds, but that no folder is left out in silence and that links which lead back end."""

import glob
import os
from pathlib import Path

import pytest

from megatrain.corpus.reading.choices import ReadConfig, SourceConfig
from megatrain.corpus.reading.matching import matching
from megatrain.corpus.reading.units import cut_units
from megatrain.data.prepare.read import ReadError

FILES = ("a.txt", "b.md", "x/a.txt", "x/y/a.txt", "x/y/z/c[1].txt", "中 文/书.txt", ".hidden/a.txt", "x/.a.txt", "x-/a.txt")


@pytest.fixture
def tree(tmp_path, monkeypatch):
    for name in FILES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "gone").symlink_to("nowhere")
    (tmp_path / "itself").symlink_to("itself")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("within", ["", "./", "../{name}/", "{tree}/"])
@pytest.mark.parametrize(
    "pattern",
    [
        *(
            "*",
            "*.txt",
            "**",
            "**/*",
            "**/*.txt",
            "**/**/a.txt",
            "x/**",
            "x/**/a.txt",
            "**/y/**/*.txt",
            "**/y/a.txt",
            "*/*",
            "*/a.txt",
        ),
        *(
            ".*/*",
            "[xy]/*",
            "[!x]/*",
            "x/./a.txt",
            "x/y/../*.txt",
            "x//a.*",
            "x/y/z/c[[]1].txt",
            "中 文/*",
            "*.t?t",
            "a.txt/*",
            "no/**",
        ),
    ],
)
def test_it_finds_what_glob_finds(tree, within, pattern):
    pattern = within.format(tree=tree, name=tree.name) + pattern
    files = sorted(path for path in matching(pattern) if Path(path).is_file())
    found = glob.glob(pattern, recursive=True)  # noqa: PTH207
    expected = sorted({os.path.normpath(path) for path in found if Path(path).is_file()})
    assert sorted(set(map(os.path.normpath, files))) == expected
    assert len(set(files)) == len(files)


def test_links_that_lead_back_end(tree):
    """glob would go around the two of them for ever."""
    for name in ("x/back", "x/y/again", "back"):
        (tree / name).symlink_to(tree)
    assert sorted(matching("x/**/*.txt")) == [
        "x/a.txt",
        "x/back/a.txt",
        "x/back/x-/a.txt",
        "x/back/中 文/书.txt",
        "x/y/a.txt",
        "x/y/z/c[1].txt",
    ]
    (unit,) = cut_units(ReadConfig((SourceConfig("all", ("**/*.txt", "**/*.md")),)))
    assert [part.file for part in unit.parts] == [
        "a.txt",
        "b.md",
        "x-/a.txt",
        "x/a.txt",
        "x/y/a.txt",
        "x/y/z/c[1].txt",
        "中 文/书.txt",
    ]


@pytest.mark.parametrize("pattern", ["**/*.txt", "x/*/*.txt", "*/y/*"])
def test_a_folder_that_cannot_be_looked_into_is_named(tree, monkeypatch, pattern):
    listed = os.listdir

    def refusing(path):
        if str(path) == "x/y":
            raise PermissionError(13, "Permission denied", path)
        return listed(path)

    monkeypatch.setattr(os, "listdir", refusing)
    with pytest.raises(ReadError) as error:
        cut_units(ReadConfig((SourceConfig("all", (pattern,)),)))
    assert str(error.value) == (
        f"all: {pattern}: 'x/y' cannot be looked into (Permission denied), and what lies in it would be missing. Allow it, or name "
        "paths beside it."
    )
