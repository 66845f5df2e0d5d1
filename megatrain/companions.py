"""What travels with weights, beside the checkpoints of a run, so that text can be written and models exported when the originals are gone.

checkpoints/step_00000200/   ...
checkpoints/tokenizer/       the run's tokenizer (data.tokenizer) as tokenizer.json, and the files beside it that say more of it
checkpoints/hf/              config.json and tokenizer files of the directory of Hugging Face that the weights came from
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from megatrain.config.schema import Config, DataConfig
from megatrain.data.boundaries import GENERATION, SPECIAL_TOKENS, TOKENIZER_CONFIG
from megatrain.huggingface.files import COMPANION_FOLDER, copy_files

TOKENIZER, TOKENIZER_FOLDER = "tokenizer.json", "tokenizer"
BESIDE = (TOKENIZER_CONFIG, SPECIAL_TOKENS, GENERATION, "chat_template*")
"""Files that say more of a tokenizer."""


def keep_tokenizer(config: Config) -> None:
    """Copy a run's tokenizer and what lies beside it to beside its checkpoints. Raises OSError, which names the file."""
    source, folder = config.data.tokenizer, Path(config.checkpoint_dir) / TOKENIZER_FOLDER
    if source is None or source == "bytes" or folder.resolve() == Path(source).resolve().parent:
        return
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier tokenizer, which the config no longer names
    copy_files(Path(source).parent, folder, BESIDE)
    copy_files(Path(source).parent, folder, (Path(source).name,), TOKENIZER)


def take_along(source: Path, target: Path) -> None:
    """Copy what lies beside the checkpoints in one directory to another one."""
    for name in (TOKENIZER_FOLDER, COMPANION_FOLDER):
        if (source / name).is_dir() and (source / name).resolve() != (target / name).resolve():
            copy_files(source / name, target / name, ("*",))


def with_kept_tokenizer(data: DataConfig, checkpoint: Path) -> DataConfig:
    """The data section of the run that saved a checkpoint, its tokenizer as it was then where that was kept."""
    kept = checkpoint.parent / TOKENIZER_FOLDER / TOKENIZER
    return replace(data, tokenizer=str(kept)) if data.tokenizer != "bytes" and kept.is_file() else data


def tokenizer_beside(data: DataConfig, checkpoint: Path) -> str | None:
    """The tokenizer that texts of a checkpoint's model are in: the run's, or the one that its weights came with."""
    came = checkpoint.parent / COMPANION_FOLDER / TOKENIZER
    return str(came) if data.tokenizer is None and came.is_file() else data.tokenizer
