"""`megatrain data prepare` and the verbs of its stages: starts workers, shows how far they are, and says what came of it."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import xxhash

from megatrain.config.load import load_sections
from megatrain.config.source import ConfigError
from megatrain.corpus.cleaning.augment import MARK
from megatrain.corpus.final import place, placed
from megatrain.corpus.foresight import Ids, require_files, require_languages, require_models, require_rules
from megatrain.corpus.mapping import BREAKS
from megatrain.corpus.on_ray import run_on_ray
from megatrain.corpus.perplexity import PART
from megatrain.corpus.phases import Preparation, Verb
from megatrain.corpus.prepare_config import PrepareConfig
from megatrain.corpus.work.chores import LEASES, Phase
from megatrain.corpus.work.leases import Leases
from megatrain.corpus.work.pool import ending_in_order, run_workers
from megatrain.corpus.work.shift import work_on
from megatrain.data.bar import bar
from megatrain.files import whole
from megatrain.stderr import note

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
"""A source's name, of which names of files are made."""
RESERVED = ("blend", "prepared", "tokenizer", "work", "documents", "held_out")


Start = Callable[[Sequence[str], int | None, Callable[[], None]], None]
"""Runs workers by their words, so many or as many as fit, and looks now and then, until all have ended."""


def load_config(path: str, overrides: Sequence[str], verb: Verb = "prepare") -> PrepareConfig:
    """The config of a preparation up to a stage. Raises ConfigError, and ValueError for a tokenizer or thresholds that do not fit."""
    return _loaded(path, overrides, verb)[0]


def preparation_of(path: str, overrides: Sequence[str], verb: Verb) -> tuple[PrepareConfig, Preparation]:
    """The config, and what is to be done by it. Raises what `load_config` does, and ReadError for input that cannot be read."""
    config, ids = _loaded(path, overrides, verb)
    return config, Preparation(config, verb, ids)


def _loaded(path: str, overrides: Sequence[str], verb: Verb) -> tuple[PrepareConfig, Ids]:
    config: PrepareConfig = load_sections(PrepareConfig, path, overrides)
    for number, source in enumerate(config.read.sources):
        if not NAME.fullmatch(source.name) or source.name in RESERVED or source.name.endswith("_valid"):
            raise ConfigError(
                f"read.sources[{number}].name={source.name!r} becomes a name of files: letters, digits, `.`, `_` and `-`, not first, "
                f"not with _valid at the end, and none of {', '.join(RESERVED)}. Use for example web_en."
            )
        if own := sorted({BREAKS, MARK, PART} & {*source.keep}):
            raise ConfigError(
                f"read.sources[{number}].keep has {own[0]!r}, which is the name of a mark that a preparation sets itself, so that the "
                "field would be lost. Rename it in the files, or leave it out."
            )
    names = [source.name for source in config.read.sources]
    unknown = [name for name in config.augment.sources if name not in names]
    if unknown:
        raise ConfigError(
            f"augment.sources has {unknown[0]!r}, which is none of read.sources: {', '.join(names)}. Use one of these."
        )
    if config.tokenize.tokenizer is not None and config.tokenize.vocab_size is not None:
        raise ConfigError(
            f"tokenize.tokenizer={config.tokenize.tokenizer!r} and tokenize.vocab_size={config.tokenize.vocab_size}: a tokenizer is either "
            "given or trained. Leave one of them out."
        )
    if config.tokenize.eod is not None and not config.tokenize.append_eod:
        raise ConfigError(
            f"tokenize.eod={config.tokenize.eod!r} has no effect with tokenize.append_eod=false, which ends no document. Leave one out."
        )
    require_languages(config)
    require_rules(config)
    require_files(config)
    return config, require_models(config) if verb == "prepare" else None


def prepare(main: Callable[[list[str]], int], verb: Verb, path: str, overrides: Sequence[str]) -> str:
    """Do all that a verb means with the workers that run.on names; what was made, as a line. main: the command line."""
    config, preparation = preparation_of(path, overrides, verb)
    published = preparation.published
    names = placed(Path(config.output.dir), published.root, preparation.key)
    if names is None:
        leases = Leases(published.root / LEASES, float("inf"), preparation.key)
        leases.require_alone(leases.signs().values(), first=True)
        leases.forgive()
        words = ["data", verb, str(_frozen(path, published.root)), *overrides, "--worker"]
        starts: dict[str, Start] = {"local": _run_here, "slurm": _run_in_job, "ray": partial(run_on_ray, main)}
        with Onlooker(preparation) as watch:
            starts[config.run.on](words, config.run.workers, watch.look)
            watch.look()
        for alarm in watch.alarms:
            note(f"look at this: {alarm}")
        names = place(preparation.made(), published, preparation.key)
    if not config.output.keep_work:
        published.clear()
    return f"{config.output.dir}: {', '.join(dict.fromkeys(map(_short, names)))}"


def work(verb: Verb, path: str, overrides: Sequence[str]) -> str:
    """Be one worker among others, until all is done: in job arrays, on other machines, and for `prepare`; nothing to say."""
    config, preparation = preparation_of(path, overrides, verb)
    published, key = preparation.published, preparation.key
    with ending_in_order():
        if placed(Path(config.output.dir), published.root, key) is None:
            work_on(preparation.phases(), published, config.run.stuck_seconds, key)
            place(preparation.made(), published, key)
    return ""


def _frozen(path: str, folder: Path) -> Path:
    """A copy of a config, which workers read in its place: one that begins late must not find it edited."""
    text = Path(path).read_bytes()
    copy = folder / f"config-{xxhash.xxh3_64_hexdigest(text)}.yaml"
    with whole(copy) as file:
        file.write(text)
    return copy


def _run_here(words: Sequence[str], count: int | None, look: Callable[[], None]) -> None:
    """Workers of this machine."""
    run_workers([sys.executable, "-m", "megatrain", *words], count or len(os.sched_getaffinity(0)), look)


def _run_in_job(words: Sequence[str], count: int | None, look: Callable[[], None]) -> None:
    """Workers of the SLURM job that this process runs in. Raises ConfigError outside of one."""
    if "SLURM_JOB_ID" not in os.environ:
        raise ConfigError(
            "run.on=slurm, and this is no SLURM job. Submit one (sbatch --array 0-63 launch/prepare.sbatch CONFIG.yaml), or begin with "
            "salloc."
        )
    tasks = ["--ntasks", str(count)] if count else []
    run_workers(["srun", *tasks, "--cpus-per-task", "1", sys.executable, "-m", "megatrain", *words], 1, look)


def _short(name: str) -> str:
    """The folder of a result, or its name; a token store's without that of its files."""
    return f"{name.partition('/')[0]}/" if "/" in name else re.sub(r"\.(bin|idx|meta\.json|documents)$", "", name)


class Onlooker:
    """Looks at what workers have published: a bar on a terminal, and a line for each phase."""

    def __init__(self, preparation: Preparation) -> None:
        self._published = preparation.published
        self._phases = preparation.phases()
        self._leases = Leases(self._published.root / LEASES, float("inf"))
        self._phase: Phase | None = None
        self._bar = ExitStack()
        self.alarms: list[str] = []
        self._next()

    def __enter__(self) -> Onlooker:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()
        self._leases.leave()

    def look(self) -> None:
        """Tell what has been done since the last look."""
        while self._phase is not None and self._published.done(self._phase) >= {chore.name for chore in self._phase.chores}:
            self._advance(self._total - self._shown)
            if self._phase.title == "report":
                self.alarms = self._published.facts(self._phase, "all")["alarms"]
            if self._phase.chores:
                self._bar.close()
                note(
                    f"{self._phase.title:10} {len(self._phase.chores):7,} done in {time.monotonic() - self._phase_began:.1f} s"
                )
            self._next()
        if self._phase is not None:
            self._show(self._phase)

    def _next(self) -> None:
        """Go to the next phase."""
        self._bar.close()
        self._phase, self._phase_began, self._shown = next(self._phases, None), time.monotonic(), 0
        if self._phase is not None:
            self._total = sum(chore.size for chore in self._phase.chores)
            self._advance = self._bar.enter_context(
                bar(self._phase.title, self._total, in_bytes=self._total > len(self._phase.chores))
            )

    def _show(self, phase: Phase) -> None:
        signs, published, done = self._leases.signs(), self._published.done(phase), 0
        for chore in phase.chores:
            sign = signs.get(f"{phase.name}.{chore.name}")
            done += chore.size if chore.name in published else min(sign.done, chore.size) if sign else 0
        if done > self._shown:
            self._advance(done - self._shown)
            self._shown = done
