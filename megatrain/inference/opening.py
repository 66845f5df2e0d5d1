"""A trained model, ready to be asked: `opened` joins the world, loads weights and tokenizer, and gives an `Engine`.

with opened("runs/demo/checkpoints") as model:                # or a Hugging Face directory; under torchrun: parallel.* overrides
    answers = model.engine.run([Request(tuple(model.codec.encode("def main")), 64)])
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from megatrain.assembly import layer_pieces, mesh_shape
from megatrain.checkpoint.load import find
from megatrain.checkpoint.together import together
from megatrain.companions import TOKENIZER, tokenizer_beside
from megatrain.config.schema import Config
from megatrain.data.samples.infilling import Sentinels
from megatrain.data.samples.sentinels import NAMES, resolve
from megatrain.data.tokenizer import Tokenizer, load_tokenizer
from megatrain.huggingface.model_files import COMPANION_FOLDER, is_hf, load_hf, read_config
from megatrain.inference.engine import Engine, EngineSettings
from megatrain.inference.glm_positions import Marks
from megatrain.inference.paged_model import ForwardModel
from megatrain.inference.plain import marks_of_hf
from megatrain.inference.text_places import LEFT_TO_RIGHT, TextPlaces, closed, places_after
from megatrain.inference.trained import laid_out, load_chunks, saved_config, say_damaged
from megatrain.init_from import config_of_hf, declared
from megatrain.models.gpt import GPT, build_gpt, logical_parameters
from megatrain.models.layers import Build
from megatrain.parallel.mesh import ParallelContext, Rows
from megatrain.parallel.pipeline_parallel import Unsharded
from megatrain.parallel.portion import Portion
from megatrain.runtime.distributed import Session, connect
from megatrain.runtime.interface import launched
from megatrain.training import schedule_of

PIECES = "tokenizer.model"
"""The tokenizer of a Hugging Face directory that has no tokenizer.json: a model of SentencePiece, or a rank file of tiktoken."""


@dataclass(frozen=True)
class TokenizerWish:
    """The tokenizer that a command line names; what is None is the run's."""

    path: str | None = None
    eod: str | None = None
    bos: str | None = None


@dataclass(frozen=True)
class Opened:
    """A model on this rank, with what belongs to it."""

    source: Path
    """The checkpoint (a step directory) or the Hugging Face directory."""
    config: Config
    """The config of the run that made it, in the layout at hand."""
    session: Session
    ctx: ParallelContext
    weights: ForwardModel
    engine: Engine
    wish: TokenizerWish
    tokenizer: Callable[[], Tokenizer]
    """The tokenizer; raises ValueError where none is known."""

    @property
    def codec(self) -> Tokenizer:
        """The model's tokenizer. Raises ValueError where none is known."""
        return self.tokenizer()

    @property
    def is_first(self) -> bool:
        """Whether this rank speaks for all."""
        return self.ctx.world.rank == 0

    @functools.cached_property
    def marks(self) -> Marks | None:
        """The tokens that determine the positions of a prompt; None where it is read from left to right."""
        if is_hf(self.source):
            return marks_of_hf(read_config(self.source))
        ids = self._sentinels
        return None if ids is None else Marks(ids.sop, ids.gmask, ids.mask)

    def closed(self, tokens: Sequence[int]) -> list[int]:
        """A text's tokens as a prompt: with the marks behind it that a Hugging Face directory's ChatGLM-6B answers to, else as they are."""
        marks = self.marks if is_hf(self.source) else None
        return list(tokens) if marks is None else closed(tokens, marks)

    @property
    def tokenizer_folders(self) -> list[Path]:
        """Folders of the tokenizer's files, and of those of the model that the weights came from: a chat template may be there."""
        name, came = _name(self.wish, self.config, self.source), self.source.parent / COMPANION_FOLDER
        folders = [] if name is None or name == "bytes" else [Path(name).parent]
        return list(dict.fromkeys([*folders, self.source if is_hf(self.source) else came]))

    @functools.cached_property
    def named_ids(self) -> Mapping[str, int]:
        """Ids that the run, or config.json of ChatGLM-6B, gives GLM's tokens, by their names: its tokenizer may not know them."""
        if is_hf(self.source):
            config, marks = read_config(self.source), self.marks
            named = {} if marks is None else {"[gMASK]": marks.gmask, "[MASK]": marks.mask, "<sop>": marks.sop}
            return named | ({"<eop>": config["eos_token_id"]} if named and isinstance(config.get("eos_token_id"), int) else {})
        ids = self._sentinels
        return {} if ids is None else {spelled: token for name, token in asdict(ids).items() for spelled in NAMES[name]}

    @functools.cached_property
    def _sentinels(self) -> Sentinels | None:
        glm = self.config.data.objective == "glm" and not is_hf(self.source)
        return resolve(self.config.data.glm, self.engine.codec, self.engine.vocab_size)[0] if glm else None

    def places(self, tokens: Sequence[int]) -> TextPlaces:
        """Positions of a prompt's tokens and of what follows them."""
        marks = self.marks
        return LEFT_TO_RIGHT if marks is None else places_after(tokens, marks, self.config.model.two_dimensional)


@contextmanager
def opened(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    tokenizer: TokenizerWish = TokenizerWish(),
    dtype: torch.dtype = torch.float32,
    settings: EngineSettings = EngineSettings(),  # noqa: B008
) -> Iterator[Opened]:
    """The model at `path`: a checkpoint, a directory of checkpoints or of a run, or a Hugging Face directory.

    overrides: its layout, as `parallel.tensor_parallel_size=2`, over the ranks that torchrun or srun has started (collective over them).
    dtype: of weights and activations. Raises CheckpointError, ConfigError, LaunchError or TransportError.
    """
    source = Path(path) if is_hf(Path(path)) else find(Path(path), say_damaged)
    launch = launched(os.environ)
    saved = config_of_hf(source) if is_hf(source) else saved_config(source)
    config = laid_out(saved, overrides, launch.world_size)
    session = connect(launch, config.parallel, config.train.hang_timeout_seconds)
    try:
        ctx = ParallelContext.build(session.world, mesh_shape(config.parallel, launch.world_size), session.device)
        load = hf_chunks if is_hf(source) else load_chunks
        chunks = load(source, config, ctx, dtype)
        weights = ForwardModel(ctx, chunks, schedule_of(config, 1, backward=False), Unsharded())
        find_tokenizer = functools.cache(lambda: _tokenizer(tokenizer, config, source))
        codec = find_tokenizer() if _known(tokenizer, config, source) else None
        engine = Engine(weights, codec, settings)
        yield Opened(source, config, session, ctx, weights, engine, tokenizer, find_tokenizer)
    finally:
        session.close()


def hf_chunks(path: Path, config: Config, ctx: ParallelContext, dtype: torch.dtype) -> list[GPT]:
    """This rank's chunks of a Hugging Face directory's model, in the layout of `config`; collective over the world of `ctx`."""
    vocab_size = config.model.vocab_size or 0
    with together(ctx):
        specs = declared(path, config.model, vocab_size)[2]
    build = Build(Rows(ctx.tp), dtype, ctx.device, config.model, vocab_size, config.train.seed)
    chunks = build_gpt(build, *layer_pieces(config, vocab_size), ctx.pp.rank)
    portions = {p.spec.name: Portion.whole(p.spec, p) for p in logical_parameters(chunks)}
    load_hf(path, config.model, portions, {name: spec.shape for name, spec in specs.items()}, ctx)
    return [chunk.eval() for chunk in chunks]


def _known(wish: TokenizerWish, config: Config, source: Path) -> bool:
    """Whether a tokenizer is named anywhere."""
    return _name(wish, config, source) is not None


def _name(wish: TokenizerWish, config: Config, source: Path) -> str | None:
    if wish.path is not None or not is_hf(source):
        return wish.path or tokenizer_beside(config.data, source)
    return next((str(source / name) for name in (TOKENIZER, PIECES) if (source / name).is_file()), None)


def _tokenizer(wish: TokenizerWish, config: Config, source: Path) -> Tokenizer:
    """The tokenizer of the command line, or else the run's, or else the one that came with the weights."""
    name, data = _name(wish, config, source), config.data
    if name is None:
        whose = (
            f"{source} has no {TOKENIZER} and no {PIECES}"
            if is_hf(source)
            else "the run of this checkpoint has no data.tokenizer"
        )
        raise ValueError(f"{whose}. Give one: --tokenizer TOKENIZER.json, or bytes.")
    if name != "bytes" and not Path(name).is_file():
        origin = "--tokenizer" if wish.path else "data.tokenizer of the checkpoint's run"
        raise ValueError(f"{origin} is {name}, and there is no such file here. Say where it is: --tokenizer TOKENIZER.json.")
    return load_tokenizer(name, data.eod if wish.eod is None else wish.eod, data.bos if wish.bos is None else wish.bos)
