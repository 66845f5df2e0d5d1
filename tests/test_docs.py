"""Every command of README.md and docs/ is run as it is written, page by page, in a fresh copy of the tree with a small text.

A block without a language, or of `bash`, holds commands; `python` a program; `yaml` a part of a config; `text` what is shown. A comment
in the line above a block leaves out what begins so, or runs it smaller; nothing else is left out, so a new command is run, or fails:

    <!-- not run `bash launch/gpu_checks.sh`: needs a GPU -->
    <!-- run `--steps 2000` as `--steps 20`: minutes -->

The pages are run by `bash launch/docs_checks.sh`, and by CI.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jobs
import pytest
import yaml

from megatrain.config.keys import fields_of
from megatrain.config.load import from_dict, load_sections
from megatrain.corpus.prepare_config import PrepareConfig

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
COMMANDS, LANGUAGES = ("", "bash", "sh"), ("", "bash", "sh", "python", "yaml", "text")
MARK = re.compile(r"<!-- (not run|run) `([^`]+)`(?: as `([^`]+)`)?: (\S.*) -->")
LEFT_OUT = 17
"""Commands that are not run, of all pages; a number that only falls."""
BARE = (
    "README.md",
    "blends.md",
    "cleaning.md",
    "controls.md",
    "data.md",
    "memory.md",
    "models.md",
    "ngram.md",
    "report.md",
    "testing.md",
    "tokenizers.md",
    "verify.md",
)
"""Pages whose reader needs no more than a text."""
READER = {
    "glm.md": "import torch, megatrain; input_ids = torch.arange(2, 10)[None]; "
    "position_ids = torch.arange(8).expand(1, 2, 8); sep = torch.tensor([3])",
    "huggingface.md": "import torch; input_ids = torch.arange(8)[None]",
}
"""What a program takes from its reader."""


@dataclass(frozen=True)
class Block:
    """A block of a page."""

    page: str
    line: int
    language: str
    text: str
    marks: tuple[str, ...] = ()
    """The comments above it."""

    @property
    def parts(self) -> list[str]:
        """Its commands, one a line; a program is one part."""
        if self.language not in COMMANDS:
            return [self.text]
        lines = self.text.replace("\\\n", " ").splitlines()
        return [line for line in lines if line.strip() and not line.startswith("#")]

    @property
    def left_out(self) -> list[str]:
        """How the parts begin that are not run."""
        return [found[2] for mark in self.marks if (found := MARK.fullmatch(mark)) and found[1] == "not run"]

    @property
    def smaller(self) -> list[tuple[str, str]]:
        """What stands in a part, and what is run in its place."""
        return [(found[2], found[3]) for mark in self.marks if (found := MARK.fullmatch(mark)) and found[1] == "run"]

    def to_run(self) -> list[str]:
        """Its parts but for those left out, with their reduced sizes."""
        kept = [part for part in self.parts if not part.startswith(tuple(self.left_out))]
        for large, small in self.smaller:
            kept = [part.replace(large, small) for part in kept]
        return kept


def blocks(page: Path) -> list[Block]:
    found, opened, marks = [], None, []
    for number, line in enumerate(page.read_text().splitlines(), 1):
        fence = re.fullmatch(r"\s*```+\s*(\S*).*", line)
        if fence and opened is None:
            opened = (number, fence[1], [])
        elif fence:
            found.append(Block(page.name, opened[0], opened[1], "\n".join(opened[2]), tuple(marks)))
            opened, marks = None, []
        elif opened is not None:
            opened[2].append(line)
        else:
            marks = [*marks, line.strip()] if line.strip().startswith("<!--") else []
    assert opened is None, f"{page.name}:{opened[0]}: a block that does not end"
    return found


BLOCKS = [block for page in PAGES for block in blocks(page)]
RUNNABLE = [block for block in BLOCKS if block.language not in ("text", "yaml")]


def idle_marks(block: Block) -> list[str]:
    """Comments above a block that are none of a known form, or change nothing in it."""
    known = [mark for mark in block.marks if (found := MARK.fullmatch(mark)) and (found[1] == "run") == bool(found[3])]
    idle = [begins for begins in block.left_out if not any(part.startswith(begins) for part in block.parts)]
    idle += [large for large, _ in block.smaller if not any(large in part for part in block.parts)]
    return [mark for mark in block.marks if mark not in known] + idle


def test_every_block_says_what_it_is():
    assert [block for block in BLOCKS if block.language not in LANGUAGES] == []
    commands = re.compile(r"(megatrain|python3?|bash|torchrun|srun|sbatch|pip|make|cat|tail|[A-Z_]+=\S+)\s+[\w./-]")
    assert [block for block in BLOCKS if block.language == "text" and commands.match(block.text)] == []


def test_what_is_not_run_as_written_says_why():
    assert [(f"{block.page}:{block.line}", idle) for block in BLOCKS if (idle := idle_marks(block))] == []
    begins = re.compile("<!-- *(?:not )?run")
    marked = sum(len(begins.findall(page.read_text())) for page in PAGES)
    shown = sum(len(begins.findall(block.text)) for block in BLOCKS)
    assert marked - shown == sum(len(block.marks) for block in RUNNABLE), "a mark stands in the line above a block of commands"


def test_few_commands_are_left_out():
    total, run = sum(len(block.parts) for block in RUNNABLE), sum(len(block.to_run()) for block in RUNNABLE)
    assert total > 60
    assert total - run <= LEFT_OUT


def test_parts_of_configs_have_keys_that_exist(tmp_path):
    """Sections of a training run, or of a preparation."""
    for block in BLOCKS:
        if block.language == "yaml":
            tree = yaml.safe_load(block.text)
            if tree.keys() <= fields_of(PrepareConfig).keys():
                (tmp_path / "part.yaml").write_text(block.text)
                load_sections(PrepareConfig, tmp_path / "part.yaml")
            else:
                from_dict(tree)


def test_a_new_block_cannot_escape(tmp_path):
    page = tmp_path / "new.md"
    page.write_text(
        "```\n# first\nmegatrain nonsense \\\n  --more  # why\n\nls\n```\n\n```python\na = 1\n\nb\n```\n\n  ```text\nx\n  ```\n"
    )
    found = blocks(page)
    assert [(block.line, block.language) for block in found] == [(1, ""), (9, "python"), (15, "text")]
    assert found[0].to_run() == ["megatrain nonsense    --more  # why", "ls"]
    assert found[1].to_run() == ["a = 1\n\nb"]


def test_marks_leave_out_and_reduce(tmp_path):
    page = tmp_path / "marked.md"
    marks = ["<!-- not run `sbatch`: no cluster -->", "<!-- run `--steps 2000` as `--steps 20`: minutes -->"]
    page.write_text("\n".join([*marks, "```", "sbatch job", "python a.py --steps 2000", "```", "", "```", "ls", "```"]))
    first, second = blocks(page)
    assert (first.to_run(), second.to_run()) == (["python a.py --steps 20"], ["ls"])
    assert idle_marks(first) == []
    wrong = [
        "<!-- not run `make`: x -->",
        "<!-- not run `sbatch` -->",
        "<!-- run `sbatch`: why -->",
        "<!-- run `-x` as `-y`: z -->",
    ]
    page.write_text("\n".join([*wrong, "```", "sbatch job", "```"]))
    (block,) = blocks(page)
    assert idle_marks(block) == [wrong[1], wrong[2], "make", "-x"]


def run(house: Path, part: str, language: str, page: str) -> None:
    """A part of a page at the root of a copy, with the reader's home and this environment's programs."""
    env = {
        key: value for key, value in os.environ.items() if not key.startswith((*jobs.LAUNCHERS, "OMP_", "PYTEST_", "TRITON_"))
    }
    bin_folder = Path(sys.executable).parent
    env |= {
        "PATH": f"{bin_folder}:{env['PATH']}",
        "HOME": str(house / "home"),
        "PYTHON": sys.executable,
        "MEGATRAIN_VENV": sys.prefix,
        "PET_MASTER_PORT": str(jobs.free_port()),  # torchrun's --master-port: another page may be run at the same time
    }
    program = f"{READER.get(page, '')}\n{part}"
    command = [sys.executable, "-c", program] if language == "python" else ["bash", "-c", part]
    done = subprocess.run(command, cwd=house, env=env, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, f"{page}: {part}\n{done.stdout[-2000:]}{done.stderr[-3000:]}"


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree with a small text (corpus.jsonl, corpus.txt, other.txt, crawl.jsonl) and labels (ann.jsonl, bob.jsonl)."""
    house = tmp_path_factory.mktemp("bare") / "house"
    shutil.copytree(ROOT, house, ignore=shutil.ignore_patterns(".git", ".venv", ".*_cache", "runs", "build"))
    texts = [path.read_text() for path in sorted(ROOT.glob("megatrain/parallel/*.py"))]
    for name in ("corpus.jsonl", "crawl.jsonl"):
        (house / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (house / "corpus.txt").write_text("\n".join(texts))
    (house / "other.txt").write_text(texts[-1])
    for rater, labels in (("ann", ("good", "bad", "good")), ("bob", ("good", "bad", "bad"))):
        rows = [{"item": f"crawl.jsonl:{number}", "label": label} for number, label in enumerate(labels)]
        (house / f"{rater}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (house / "home").mkdir()
    return house


def config() -> dict[str, dict[str, Any]]:
    """The config of a reader, run.yaml."""
    return {
        "model": {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "seq_length": 16},
        "data": {"train": "data/train", "tokenizer": "tokenizer.json"},
        "optim": {"warmup_steps": 2},
        "train": {"steps": 4, "global_batch_size": 8, "micro_batch_size": 2, "precision": "fp32"},
        "log": {"dir": "runs/demo"},
    }


@pytest.fixture(scope="module")
def furnished(bare: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a reader of a page other than those of BARE has by then: a tokenizer, stores, a config, a run."""
    house = tmp_path_factory.mktemp("furnished") / "house"
    shutil.copytree(bare, house)
    for command in (
        "megatrain data tokenizer --input corpus.jsonl --vocab-size 1000 --output tokenizer.json",
        "megatrain data tokenize --input corpus.jsonl --tokenizer tokenizer.json --output data/train --append-eod",
        "megatrain data tokenize --input corpus.jsonl --tokenizer bytes --output runs/docs",
        "megatrain data tokenize --input corpus.jsonl --tokenizer bytes --output runs/pipeline/train",
    ):
        run(house, command, "bash", "furnished")
    jobs.write_config(house / "run.yaml", config())
    run(house, "megatrain train run.yaml", "bash", "furnished")
    return house


def refurnish(house: Path, page: str) -> None:
    """Replaces and adds what readers of some pages have in another way."""
    tree = config()
    if page == "benchmarks.md":  # as the quickstart leaves its data
        folder = house / "runs/quickstart/data_small"
        folder.mkdir(parents=True)
        shutil.copy(house / "tokenizer.json", folder)
        for file in (house / "data").glob("train.*"):
            shutil.copy(file, folder)
        tokenize = "megatrain data tokenize --input other.txt --tokenizer tokenizer.json --append-eod --output"
        run(house, f"{tokenize} {folder / 'valid'}", "bash", page)
    if page == "glm.md":
        tree["model"] |= {"family": "glm", "seq_length": 64, "position": "rope_2d", "vocab_size": 1008}
        tree["data"] |= {"objective": "glm"}
    if page == "generate.md":
        tree["model"] |= {"seq_length": 256}
    if page == "huggingface.md":
        tree["model"] |= {"seq_length": 64}
        qwen3(house / "home/models/qwen3-0.6b")
        shutil.copy(house / "tokenizer.json", house / "home/models/qwen3-0.6b/tokenizer.json")
    if tree != config():
        shutil.rmtree(house / "runs/demo")
        jobs.write_config(house / "run.yaml", tree)
        run(house, "megatrain train run.yaml", "bash", page)
    if page == "huggingface.md":  # the reader's config has the shapes of the model that it starts from
        tree["model"] = {"seq_length": 16}
        jobs.write_config(house / "run.yaml", {**tree, "log": {"dir": "runs/from_hf"}})


def qwen3(folder: Path) -> None:
    """A Qwen3 of two small layers, as transformers writes it."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    sizes = {"vocab_size": 1000, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
    Qwen3ForCausalLM(Qwen3Config(**sizes)).save_pretrained(folder)


@pytest.mark.docs
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("page", sorted({block.page for block in RUNNABLE if block.to_run()}))
def test_a_page_as_it_is_written(page, request, tmp_path):
    parts = [(part, block.language) for block in RUNNABLE if block.page == page for part in block.to_run()]
    house = tmp_path / "house"
    shutil.copytree(request.getfixturevalue("bare" if page in BARE else "furnished"), house)
    refurnish(house, page)
    for part, language in parts:
        run(house, part, language, page)
