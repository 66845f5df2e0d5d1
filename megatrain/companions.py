"""Files kept beside the checkpoints of a run, so that text can be generated and models exported when the originals are gone.

checkpoints/step_00000200/   ...
checkpoints/tokenizer/       the run's tokenizer (data.tokenizer) as tokenizer.json, and the other tokenizer files beside it; a model of
                             SentencePiece has that name too, as files are told by their contents
checkpoints/hf/              config.json and tokenizer files of the Hugging Face directory that the weights came from
"""

from __future__ import annotations

import shutil
import stat
from dataclasses import replace
from pathlib import Path

from megatrain.checkpoint.together import ContentError
from megatrain.config.schema import Config, DataConfig
from megatrain.data.boundaries import GENERATION, SPECIAL_TOKENS, TOKENIZER_CONFIG
from megatrain.data.tokenizer import JsonTokenizer, Tokenizer, load_tokenizer
from megatrain.data.tokenizers.fitting import trained_path
from megatrain.data.tokenizers.rank_file import is_rank_file
from megatrain.files import head_of, require_own, whole
from megatrain.huggingface.model_files import CHAT_TEMPLATES, COMPANION_FOLDER, copy_files
from megatrain.untrusted import leads_out

TOKENIZER, TOKENIZER_FOLDER = "tokenizer.json", "tokenizer"
BESIDE = (TOKENIZER_CONFIG, SPECIAL_TOKENS, GENERATION, "chat_template*", CHAT_TEMPLATES)
"""Other files of a tokenizer, beside tokenizer.json."""


def keep_tokenizer(config: Config) -> None:
    """Copy a run's tokenizer and the files beside it to its checkpoint directory. Raises OSError that names the file, or a link there."""
    source, folder = config.data.tokenizer, Path(config.checkpoint_dir) / TOKENIZER_FOLDER
    if source is None or source == "bytes" or folder.resolve() == Path(source).resolve().parent:
        return
    require_own(folder, stat.S_ISDIR)  # a link would survive the removal
    shutil.rmtree(folder, ignore_errors=True)  # an earlier tokenizer, which the config no longer names
    copy_files(Path(source).parent, folder, BESIDE)
    copy_files(Path(source).parent, folder, (Path(source).name,), TOKENIZER)
    copy_files(Path(source).parent, folder, (trained_path(Path(source).name).name,), trained_path(TOKENIZER).name)
    kept = folder / TOKENIZER
    if kept.is_file() and is_rank_file(head_of(kept)):  # what words are follows from its name, and files beside that
        tokenizer = load_tokenizer(source)
        if isinstance(tokenizer, JsonTokenizer):
            with whole(kept, text=True) as file:
                file.write(tokenizer.to_json())


def take_along(source: Path, target: Path) -> None:
    """Copy the tokenizer and Hugging Face files beside the checkpoints of one directory to another directory.

    Raises ContentError where a folder or a file is a link that leads out, OSError where a link stands where it would write.
    """
    for name in (TOKENIZER_FOLDER, COMPANION_FOLDER):
        if leads_out(source / name):
            raise ContentError(f"{source / name} is not copied: it is a link that leads out, to {(source / name).resolve()}.")
        if (source / name).is_dir() and (source / name).resolve() != (target / name).resolve():
            require_own(target / name, stat.S_ISDIR)
            copy_files(source / name, target / name, ("*", CHAT_TEMPLATES))


def with_kept_tokenizer(data: DataConfig, checkpoint: Path) -> DataConfig:
    """The data section of the run that saved a checkpoint; if its tokenizer was kept, that copy is data.tokenizer."""
    kept = checkpoint.parent / TOKENIZER_FOLDER / TOKENIZER
    return replace(data, tokenizer=str(kept)) if data.tokenizer != "bytes" and kept.is_file() else data


def tokenizer_beside(data: DataConfig, checkpoint: Path) -> str | None:
    """The tokenizer of a checkpoint's model: the run's, or else the one that came with its first weights."""
    came = checkpoint.parent / COMPANION_FOLDER / TOKENIZER
    return str(came) if data.tokenizer is None and came.is_file() else data.tokenizer


def tokenizer_of(config: Config) -> Tokenizer | None:
    """The tokenizer of a config, if it has one. Raises TokenizerError."""
    data = config.data
    return None if data.tokenizer is None else load_tokenizer(data.tokenizer, data.eod, data.bos)
