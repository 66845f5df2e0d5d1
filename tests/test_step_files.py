"""The training step can be read: so many files, so many lines, and no more."""

from pathlib import Path

from step_files import COUNTED, LEFT_OUT, ROOT, step_files

MOST_FILES, MOST_LINES = 15, 4200
"""Upper bounds, which only ever fall."""


def test_the_step_has_no_more_files_and_lines() -> None:
    files = step_files()
    table = "\n".join(f"{lines:5} {file}" for file, lines in files.items())
    said = f"the step has {sum(files.values())} lines in {len(files)} files, at most {MOST_LINES} in {MOST_FILES}:\n{table}"
    assert len(files) <= MOST_FILES, said
    assert sum(files.values()) <= MOST_LINES, said


def test_what_is_left_out_is_there() -> None:
    places = [ROOT / "megatrain" / name.replace(".", "/") for name in (*LEFT_OUT, *COUNTED)]
    places = [ROOT / "kernels" if place.name == "kernels" else place for place in places]
    assert [str(place) for place in places if not place.is_dir() and not place.with_suffix(".py").exists()] == []


def test_imports_are_followed_to_their_end(tmp_path: Path) -> None:
    sources = {
        "training.py": "from megatrain.parallel.mesh import Axis\nfrom megatrain.data import loader\nimport torch\n",
        "parallel/__init__.py": "from megatrain.optim.clip import clip\n",
        "parallel/mesh.py": "from megatrain.transport.group import Group\n\n\ndef later():\n    import megatrain.optim.clip\n",
        "data/loader.py": "from megatrain.data.store import Store\n",
        "data/store.py": "",
        "transport/group.py": "from megatrain.models.gpt import GPT\n",
        "models/gpt.py": "",
        "optim/clip.py": "from megatrain.training import Run\n",
    }
    for name, source in sources.items():
        file = tmp_path / "megatrain" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source)
    assert step_files(tmp_path) == {"data/loader.py": 1, "optim/clip.py": 1, "parallel/mesh.py": 5, "training.py": 3}
