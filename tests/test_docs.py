"""Every command of README.md and docs/ is run as it is written, page by page, in a fresh copy of the tree with a small text.

A block without a language, or of `bash`, holds commands; `python` a program; `yaml` a part of a config; `text` what is shown. What cannot
be run here stands in ELSEWHERE with the reason; nothing else is left out, so a new block is run, or fails.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import jobs
import pytest
import yaml

from megatrain.config.load import from_dict

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
COMMANDS, LANGUAGES = ("", "bash", "sh"), ("", "bash", "sh", "python", "yaml", "text")
MEASURES, CLUSTER = "a measurement of minutes", "needs several machines or SLURM: launch/slurm_checks.sh, network_checks.sh"
ELSEWHERE = {
    "README.md": {
        "bash launch/quickstart.sh": "ten minutes: tests/end_to_end/test_quickstart.py",
        "bash launch/test.sh": "these tests",
        "pip install -e .": "changes the environment of the tests: tests/test_packaging.py",
        "bash launch/install.sh": "changes the environment of the tests: tests/launch/test_install.py",
        'eval "$(bash launch/virtual_cluster.sh start)"': CLUSTER,
        "cat docs/*.md >corpus.txt": "part of the commands for the cluster",
        "NPROC_PER_NODE=2 sbatch": CLUSTER,
        "tail -F slurm.out": CLUSTER,
    },
    "benchmarks.md": {"python docs/benchmarks/": MEASURES},
    "checkpoint_format.md": {"import json": "tests/checkpoint/test_format_page.py"},
    "glm.md": {"bash launch/quickstart.sh": "ten minutes: tests/end_to_end/test_quickstart.py"},
    "kernels.md": {
        "python -m pytest tests/kernels/test_triton.py": "minutes, and a part of these tests",
        "bash launch/gpu_checks.sh": "needs a GPU",
    },
    "launching.md": {"NNODES=2": CLUSTER, "sbatch": CLUSTER, "srun": CLUSTER},
    "testing.md": {"import pytest": "tests/testing/test_page.py"},
    "watching.md": {"tail -f": "has no end", "tensorboard": "a server, which has no end"},
}
"""By page: how a command or program begins, and why it is not run here or where it is."""
QUICK = ("README.md",)
"""Pages that CI runs; the others are slow."""
BARE = ("README.md", "controls.md", "data.md", "memory.md", "models.md", "ngram.md", "verify.md")
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

    @property
    def parts(self) -> list[str]:
        """Its commands, one a line; a program is one part."""
        if self.language not in COMMANDS:
            return [self.text]
        lines = self.text.replace("\\\n", " ").splitlines()
        return [line for line in lines if line.strip() and not line.startswith("#")]


def blocks(page: Path) -> list[Block]:
    found, opened = [], None
    for number, line in enumerate(page.read_text().splitlines(), 1):
        fence = re.fullmatch(r"\s*```+\s*(\S*).*", line)
        if fence and opened is None:
            opened = (number, fence[1], [])
        elif fence:
            found.append(Block(page.name, opened[0], opened[1], "\n".join(opened[2])))
            opened = None
        elif opened is not None:
            opened[2].append(line)
    assert opened is None, f"{page.name}:{opened[0]}: a block that does not end"
    return found


BLOCKS = [block for page in PAGES for block in blocks(page)]


def reason(page: str, part: str) -> str:
    return next((why for begins, why in ELSEWHERE.get(page, {}).items() if part.startswith(begins)), "")


def test_every_block_says_what_it_is():
    assert [block for block in BLOCKS if block.language not in LANGUAGES] == []
    commands = re.compile(r"(megatrain|python3?|bash|torchrun|srun|sbatch|pip|make|cat|tail|[A-Z_]+=\S+)\s+[\w./-]")
    assert [block for block in BLOCKS if block.language == "text" and commands.match(block.text)] == []


def test_what_is_left_out_is_there():
    there = {(block.page, part) for block in BLOCKS for part in block.parts}
    stale = [
        (page, begins)
        for page, few in ELSEWHERE.items()
        for begins in few
        if not any(of == page and part.startswith(begins) for of, part in there)
    ]
    assert stale == []


def test_parts_of_configs_have_keys_that_exist():
    for block in BLOCKS:
        if block.language == "yaml":
            from_dict(yaml.safe_load(block.text))


def test_a_new_block_cannot_escape(tmp_path):
    page = tmp_path / "new.md"
    page.write_text(
        "```\n# first\nmegatrain nonsense \\\n  --more  # why\n\nls\n```\n\n```python\na = 1\n\nb\n```\n\n  ```text\nx\n  ```\n"
    )
    found = blocks(page)
    assert [(block.line, block.language) for block in found] == [(1, ""), (9, "python"), (15, "text")]
    assert found[0].parts == ["megatrain nonsense    --more  # why", "ls"]
    assert found[1].parts == ["a = 1\n\nb"]
    assert [reason("new.md", part) for part in found[0].parts] == ["", ""]


def run(house: Path, part: str, language: str, page: str) -> None:
    """A part of a page at the root of a copy, with the reader's home and this environment's programs."""
    env = {key: value for key, value in os.environ.items() if not key.startswith((*jobs.LAUNCHERS, "OMP_"))}
    bin_folder = Path(sys.executable).parent
    env |= {
        "PATH": f"{bin_folder}:{env['PATH']}",
        "HOME": str(house / "home"),
        "PYTHON": sys.executable,
        "MEGATRAIN_VENV": sys.prefix,
    }
    program = f"{READER.get(page, '')}\n{part}"
    command = [sys.executable, "-c", program] if language == "python" else ["bash", "-c", part]
    done = subprocess.run(command, cwd=house, env=env, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, f"{page}: {part}\n{done.stdout[-2000:]}{done.stderr[-3000:]}"


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """A copy of the tree with a small text: corpus.jsonl, corpus.txt, other.txt, crawl.jsonl."""
    shutil.copytree(
        ROOT, tmp_path / "house", ignore=shutil.ignore_patterns(".git", ".venv", ".*_cache", "__pycache__", "runs", "build")
    )
    house = tmp_path / "house"
    texts = [path.read_text() for path in sorted(ROOT.glob("megatrain/parallel/*.py"))]
    for name in ("corpus.jsonl", "crawl.jsonl"):
        (house / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (house / "corpus.txt").write_text("\n".join(texts))
    (house / "other.txt").write_text(texts[-1])
    (house / "home").mkdir()
    return house


def furnish(house: Path, page: str) -> None:
    """What a reader of a page other than the README has by then: a tokenizer, stores, a config, a run."""
    for command in (
        "megatrain data tokenizer --input corpus.jsonl --vocab-size 1000 --output tokenizer.json",
        "megatrain data tokenize --input corpus.jsonl --tokenizer tokenizer.json --output data/train --append-eod",
        "megatrain data tokenize --input corpus.jsonl --tokenizer bytes --output runs/docs",
        "megatrain data tokenize --input corpus.jsonl --tokenizer bytes --output runs/pipeline/train",
    ):
        run(house, command, "bash", page)
    tree = {
        "model": {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "seq_length": 16},
        "data": {"train": "data/train", "tokenizer": "tokenizer.json"},
        "optim": {"warmup_steps": 2},
        "train": {"steps": 4, "global_batch_size": 8, "micro_batch_size": 2, "precision": "fp32"},
        "log": {"dir": "runs/demo"},
    }
    if page == "glm.md":
        tree["model"] |= {"family": "glm", "seq_length": 64, "position": "rope_2d", "vocab_size": 1008}
        tree["data"] |= {"objective": "glm"}
    if page == "huggingface.md":
        tree["model"] |= {"seq_length": 64}
        qwen3(house / "home/models/qwen3-0.6b")
        shutil.copy(house / "tokenizer.json", house / "home/models/qwen3-0.6b/tokenizer.json")
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


WITH_PARTS = [page.name for page in PAGES if any(b.page == page.name and b.language not in ("text", "yaml") for b in BLOCKS)]


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("page", [p if p in QUICK else pytest.param(p, marks=pytest.mark.slow) for p in WITH_PARTS])
def test_a_page_as_it_is_written(page, house):
    parts = [
        (part, block.language)
        for block in BLOCKS
        if block.page == page and block.language not in ("text", "yaml")
        for part in block.parts
    ]
    parts = [(part, language) for part, language in parts if not reason(page, part)]
    if parts and page not in BARE:
        furnish(house, page)
    for part, language in parts:
        run(house, part, language, page)
