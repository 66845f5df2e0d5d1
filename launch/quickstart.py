"""From nothing to a trained model, samples of its text and answers to tasks; `bash launch/quickstart.sh` installs megatrain and runs this.

Each step is a `megatrain` verb that is printed before it runs, so that this script is also a list of what to type. What a step
makes lies in a folder named after everything it depends on (text, config, layout, minutes): a second run finds it there and
goes on to the next step, a changed input makes a new folder beside the old, and an interrupted step starts again or, in
training, goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import inf
from pathlib import Path
from statistics import mean

import quickstart_glm
import torch
from running import Failed, call, interrupt, key, once, publish, say, step, verb

from megatrain.config.budget import warmup_steps
from megatrain.config.load import load
from megatrain.config.schema import Config, CorpusConfig
from megatrain.data.baselines import consumed_rows, count_pairs, held_out_pairs, interpolated_bigram, unigram_entropy
from megatrain.data.held_out import build_held_out
from megatrain.data.indexed import TokenStore
from megatrain.data.prepare import stdlib_corpus
from megatrain.data.sources import build_samples
from megatrain.data.tokenizer import load_tokenizer
from megatrain.records.plot import draw_loss
from megatrain.records.rows import read_metrics

ROOT = Path(__file__).resolve().parents[1]
DEFAULT_MINUTES = 6.0
"""Of training; with the installation and all other steps this stays under 10 minutes on 2 cores."""
HELD_OUT = 0.05
"""Share of the standard library's documents that is never trained on: some 300 kilobytes."""
HELD_OUT_BYTES = 300_000
"""About as much of a user's text, if that is at most a tenth of it."""
PROBE_STEPS = 16
"""Steps of the run that measures the speed; the first half warms up."""
SLACK = 1.1
"""How much slower than in its best step the machine is expected to be."""
TOLERANCE = 0.15
"""Share of the minutes that training may end early or late, as far as can be told halfway, before the plan is changed."""
EVALUATIONS = 4
MAX_EPOCHS = 8
"""More passes over a small text than this would only learn it by heart."""
REDUCED_STEPS = 30
CORPUS = "launch/configs/prepare_quickstart.yaml"
MODELS = {"gpt": "launch/configs/quickstart.yaml", "glm": "launch/configs/glm_tiny.yaml"}
PROMPTS = ("def ", "class Queue", "Return the ")
SAMPLE_TOKENS = 32
"""New tokens for each of these prompts at each evaluation: a second or two."""
TASKS = {"next_token": ("python_choice", "text_en"), "glm": ("python_choice", "infill_en")}
"""By data.objective."""


@dataclass(frozen=True)
class Layout:
    """What this machine trains with."""

    device: str
    ranks: int
    sequence_parallel: bool
    precision: str
    why: str


def main() -> int:
    """Run the steps that are not done yet; the exit code."""
    options = parse()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)
    started = time.monotonic()
    try:
        config = load(options.config).config
        options.dir.mkdir(parents=True, exist_ok=True)
        layout = choose_layout(config, options.dir)
        say(f"Training {layout.why}.")
        data = prepare(options, config)
        run, steps = train(options, config, layout, data)
        if config.data.objective == "glm":
            quickstart_glm.compare(run)
            quickstart_glm.sample(run, None if options.text is None else raw(data) / "valid.jsonl")
        else:
            compare(config, data, run, steps)
            sample(options, data, run)
        solve(config, run)
        if options.reduced:
            require_learning(run)
    except Failed as failure:
        print(f"\nquickstart: {failure}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nquickstart: interrupted. The same command goes on from here.", file=sys.stderr)
        return 130
    next_steps(options, run, time.monotonic() - started)
    return 0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="bash launch/quickstart.sh", description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument("--minutes", type=float, default=DEFAULT_MINUTES, metavar="N", help="of training (default %(default)s)")
    parser.add_argument("--text", nargs="+", type=Path, metavar="PATH", help="your own text: files, or folders of them")
    parser.add_argument(
        "--dir", type=Path, default=ROOT / "runs/quickstart", help="where everything goes (default runs/quickstart)"
    )
    parser.add_argument(
        "--model", choices=MODELS, default="gpt", help="what to train: a GPT (default), or a GLM that fills blanks"
    )
    parser.add_argument("--config", type=Path, metavar="YAML", help="what to train, in full (default: by --model)")
    parser.add_argument("--reduced", action="store_true", help=f"{REDUCED_STEPS} steps only; exit code 1 unless the loss falls")
    options = parser.parse_args()
    options.config = options.config or ROOT / MODELS[options.model]
    if not options.minutes > 0:
        parser.error(f"--minutes {options.minutes} must be greater than 0, for example --minutes {DEFAULT_MINUTES}")
    for path in options.text or ():
        if not path.exists():
            parser.error(f"--text {path}: there is no such file or folder")
    return options


def choose_layout(config: Config, folder: Path) -> Layout:
    """Tensor parallelism as the config says, on GPUs where there are enough, else on CPU processes."""
    ranks, sequence_parallel = config.parallel.tensor_parallel_size, config.parallel.sequence_parallel
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if 0 < gpus < ranks:
        precision = gpu_precision()
        why = f"NCCL allows one process per GPU, so tensor_parallel_size=1 instead of {ranks}"
        return Layout("cuda", 1, False, precision, f"on one GPU, {precision}; {why}")
    if gpus:
        precision = gpu_precision()
        return Layout(
            "cuda", ranks, sequence_parallel, precision, f"on {ranks} GPUs, tensor_parallel_size={ranks}, {precision}"
        )
    choice = folder / "cpu_precision.txt"  # measured once, so that noise cannot change the layout of a run that goes on
    if not choice.exists():
        publish(choice, "bf16" if bf16_is_faster() else "fp32")
    precision = choice.read_text()
    why = f"on {ranks} CPU processes, tensor_parallel_size={ranks}, {precision} (the faster precision here)"
    return Layout("cpu", ranks, sequence_parallel, precision, why)


def gpu_precision() -> str:
    """bf16 on every GPU since 2020."""
    return "bf16" if torch.cuda.is_bf16_supported() else "fp32"


def bf16_is_faster(size: int = 768) -> bool:
    """Whether this CPU multiplies bfloat16 matrices much faster than float32 ones (AMX, AVX-512 BF16); most do not."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        matrix = torch.ones(size, size, dtype=dtype)
        times = []
        for _ in range(5):
            start = time.perf_counter()
            torch.mm(matrix, matrix)
            times.append(time.perf_counter() - start)
        seconds[dtype] = min(times)
    return seconds[torch.bfloat16] * 1.5 < seconds[torch.float32]


# --- text to token stores -----------------------------------------------------------------------------------------------------


def prepare(options: argparse.Namespace, config: Config) -> Path:
    """The folder of tokenizer.json and of the token stores train and valid; each step only where its result is missing."""
    data = options.dir / f"data_{text_key(options.text, config)}"
    data.mkdir(parents=True, exist_ok=True)
    raw(data).mkdir(exist_ok=True)
    texts = {name: raw(data) / f"{name}.jsonl" for name in ("train", "valid")}
    vocabulary, tokenizer = str(quickstart_glm.tokenizer_size(config)), data / "tokenizer.json"
    once(data / "corpus.done", "the text, a share of it held out", lambda: build_corpus(raw(data), options.text))
    words: list[object] = ["data", "tokenizer", "--input", texts["train"], "--vocab-size", vocabulary, "--output", tokenizer]
    once(data / "tokenizer.done", f"a tokenizer of {vocabulary} entries", partial(verb, *words))
    kind = "text" if options.text else "code"
    sources = [{"name": name, "paths": [str(text)], "kind": kind, "rules": []} for name, text in texts.items()]
    words = [
        "data",
        "prepare",
        ROOT / CORPUS,
        f"read.sources={json.dumps(sources)}",
        f"tokenize.tokenizer={tokenizer}",
        f"output.dir={data}",
    ]
    once(data / "prepared.done", "its tokens, of cleaned text without copies", partial(verb, *words))
    missing = [name for name in texts if not (data / f"{name}.idx").exists()]
    if missing:
        raise Failed(f"all documents of {texts[missing[0]]} were removed, as {data / 'REPORT.md'} says. Give more text.")
    counts = {name: TokenStore(data / name).tokens for name in texts}
    say(f"{counts['train']:,} tokens to train on, {counts['valid']:,} held out: {data}")
    return data


def raw(data: Path) -> Path:
    """The folder of the text of which a folder of token stores is made."""
    return data.with_name(data.name.replace("data_", "text_"))


def text_key(paths: Sequence[Path] | None, config: Config) -> str:
    """Names the text and the vocabulary: the interpreter's version, or the paths, sizes and times of all files."""
    size = quickstart_glm.tokenizer_size(config)
    if paths is None:
        return key([size, sys.version])
    return key([size, [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files(paths)]])


def files(paths: Sequence[Path]) -> list[Path]:
    """The files among and below the paths."""
    return [file for path in paths for file in (sorted(path.rglob("*")) if path.is_dir() else [path]) if file.is_file()]


def build_corpus(data: Path, text: Sequence[Path] | None) -> None:
    """train.jsonl and valid.jsonl, one document a line."""
    size = sum(file.stat().st_size for file in files(text or ()))
    made = stdlib_corpus.build(data, min(0.1, HELD_OUT_BYTES / max(size, 1)) if text else HELD_OUT, text)
    source = "your text" if text else "the source of Python's standard library"
    say(f"{source}: {made.train_documents} documents of {made.train_bytes / 1e6:.1f} MB to train on")
    say(
        f"{made.valid_documents} documents of {made.valid_bytes / 1e6:.1f} MB held out, to see what it makes of text it has not read"
    )


# --- training -----------------------------------------------------------------------------------------------------------------


def train(options: argparse.Namespace, config: Config, layout: Layout, data: Path) -> tuple[Path, int]:
    """The run folder and its number of steps, trained to the end."""
    inputs = [
        options.config.read_text(),
        (layout.device, layout.ranks, layout.sequence_parallel, layout.precision),
        data.name,
        torch.__version__,
    ]
    length = f"{REDUCED_STEPS}_steps" if options.reduced else f"{options.minutes:g}_minutes"
    run = options.dir / f"{length}_{key(inputs)}"
    plan = run / "plan.json"
    if not plan.exists():
        steps = REDUCED_STEPS if options.reduced else plan_steps(options, config, layout, data, key(inputs))
        run.mkdir(parents=True, exist_ok=True)
        publish(plan, json.dumps({"steps": steps}))
    steps = json.loads(plan.read_text())["steps"]
    if (run / "checkpoints" / f"step_{steps:08d}" / "manifest.json").exists():
        say(f"trained already: {run}")
        return run, steps
    step("training")
    change = partial(change_of_plan, run, inf if options.reduced else options.minutes * 60, most_steps(config, data))
    while not train_as_planned(options.config, config, layout, data, run, steps, change):
        planned, steps = steps, change(steps) or steps
        publish(plan, json.dumps({"steps": steps}))
        pace = "slower" if steps < planned else "faster"
        step(f"this machine is {pace} than it was measured: {steps} steps instead of {planned}; going on from the checkpoint")
    return run, steps


def train_as_planned(
    file: Path, config: Config, layout: Layout, data: Path, run: Path, steps: int, change: Callable[[int], int | None]
) -> bool:
    """Train to the last of `steps` (True), or until `change(steps)` is another number, with the state saved (False)."""
    every = -(-steps // EVALUATIONS)
    overrides = [
        *(f"train.steps={steps}", f"optim.warmup_steps={min(warmup_steps(config), steps // 5)}"),
        *(f"train.eval_every={every}", f"checkpoint.save_every={every}", f"data.valid={data / 'valid'}"),
        *(f"log.dir={run}", f"log.every={max(1, steps // 40)}"),
    ]
    if data.name == f"data_{text_key(None, config)}":  # the prompts are code
        prompts = quickstart_glm.PROMPTS if config.data.objective == "glm" else PROMPTS
        overrides += [f"log.samples.prompts={json.dumps(prompts)}", f"log.samples.max_tokens={SAMPLE_TOKENS}"]
        overrides.append("log.samples.temperature=0.8")
    return launch(file, layout, data, overrides, lambda: change(steps) is not None)


def change_of_plan(run: Path, seconds: float, longest: int, steps: int) -> int | None:
    """How many steps, `longest` at most, to make instead of `steps`, so that training takes its `seconds`; None: the plan is good.

    Asked from the middle on, when a busy moment no longer weighs much. What counts is the time in steps and evaluations, so that
    interruptions cost nothing.
    """
    if not (run / "metrics.jsonl").exists():
        return None
    rows, evaluations = read_metrics(run / "metrics.jsonl")
    spent = sum(row["step_seconds"] for row in rows) + sum(row["eval_seconds"] for row in evaluations)
    if not rows or spent < seconds / 2:
        return None
    done, pace = len(rows), spent / len(rows)
    if abs(steps * pace - seconds) <= TOLERANCE * seconds:
        return None
    better = max(done + 1, REDUCED_STEPS, min(int(seconds / pace), longest))
    return None if better == steps else better


def plan_steps(options: argparse.Namespace, config: Config, layout: Layout, data: Path, name: str) -> int:
    """How many steps fit into the minutes, from the speed of a few; an evaluated batch counts as a third of a step."""
    step(f"measuring the speed for {PROBE_STEPS} steps, to see how many fit into {options.minutes:g} minutes")
    probe = options.dir / f"probe_{name}"
    shutil.rmtree(probe, ignore_errors=True)
    overrides = [f"train.steps={PROBE_STEPS}", "optim.warmup_steps=1", "checkpoint.resume=never"]
    overrides += [f"log.dir={probe}", "log.to=[]", f"log.every={PROBE_STEPS // 2}"]
    started = time.monotonic()
    launch(options.config, layout, data, overrides)
    elapsed = time.monotonic() - started
    rows, _ = read_metrics(probe / "metrics.jsonl")
    # The best step, not the median: a busy moment must not plan a run that is far too short.
    seconds = SLACK * min(row["step_seconds"] for row in rows[PROBE_STEPS // 2 :])
    start_up = max(0.0, elapsed - sum(row["step_seconds"] for row in rows))
    shutil.rmtree(probe, ignore_errors=True)

    tokens = config.train.global_batch_size * config.model.seq_length
    evaluation = EVALUATIONS * TokenStore(data / "valid").tokens / tokens * seconds / 3
    steps = max(REDUCED_STEPS, int((options.minutes * 60 - start_up - evaluation) / seconds))
    longest = most_steps(config, data)
    say(f"{tokens / seconds:,.0f} tokens/s: {steps} steps of {tokens:,} tokens fit")
    if steps > longest:
        say(f"that is more than {MAX_EPOCHS} passes over the text, so {longest} steps are enough")
    return min(steps, longest)


def most_steps(config: Config, data: Path) -> int:
    """MAX_EPOCHS passes over the text."""
    tokens = config.train.global_batch_size * config.model.seq_length
    return max(REDUCED_STEPS, MAX_EPOCHS * TokenStore(data / "train").tokens // tokens)


def launch(
    config: Path, layout: Layout, data: Path, overrides: Sequence[str], stop: Callable[[], bool] = lambda: False
) -> bool:
    """`megatrain train` on all ranks of the layout; False if it was stopped because `stop()` said so."""
    return call(
        *("bash", ROOT / "launch/local.sh", layout.ranks, config),
        *(f"parallel.device={layout.device}", f"parallel.tensor_parallel_size={layout.ranks}"),
        *(f"parallel.sequence_parallel={str(layout.sequence_parallel).lower()}", f"train.precision={layout.precision}"),
        *(f"data.train={data / 'train'}", f"data.tokenizer={data / 'tokenizer.json'}", *overrides),
        stop=stop,
    )


# --- what came out ------------------------------------------------------------------------------------------------------------


def compare(config: Config, data: Path, run: Path, steps: int) -> None:
    """Validation loss beside what counting words reaches with the same tokens: a table, comparison.json, lines in loss.png."""
    _, evaluations = read_metrics(run / "metrics.jsonl")
    corpora = {name: [CorpusConfig(str(data / name))] for name in ("train", "valid")}
    vocabulary, seq_length = load_tokenizer(data / "tokenizer.json").vocab_size, config.model.seq_length
    samples = build_samples(corpora["train"], seq_length, config.train.seed)
    counts = count_pairs(consumed_rows(samples, steps * config.train.global_batch_size), vocabulary)
    evaluated = config.train.eval_batches * config.train.global_batch_size  # 0: all of it
    contexts, labels = held_out_pairs(build_held_out(corpora["valid"], seq_length)[""], evaluated)
    bigram = interpolated_bigram(counts, contexts, labels).cross_entropy
    losses = {"unigram": unigram_entropy(counts, labels).own_entropy, "bigram": bigram, "model": evaluations[-1]["valid_loss"]}
    publish(run / "comparison.json", json.dumps({**losses, "steps": steps}))
    draw_loss(run / "metrics.jsonl", run / "loss.png", {name: losses[name] for name in ("unigram", "bigram")})
    step("how good is it? Mean loss on the held-out text in nats a token; lower is better")
    say(f"{'knowing how frequent each token is (unigram)':56} {losses['unigram']:.3f}")
    say(f"{'knowing the token before it as well (bigram)':56} {losses['bigram']:.3f}")
    say(f"{'this model':56} {losses['model']:.3f}")


def sample(options: argparse.Namespace, data: Path, run: Path) -> None:
    """What the model writes, after beginnings that fit the text it has read."""
    step("what it writes")
    for prompt in PROMPTS if options.text is None else beginnings(raw(data) / "valid.jsonl", len(PROMPTS)):
        words: list[object] = ["generate", run / "checkpoints", "--prompt", prompt]
        words += ["--max-tokens", 60, "--temperature", 0.8, "--top-k", 40]
        verb(*words)


def solve(config: Config, run: Path) -> None:
    """Two tasks that come with megatrain; so small a model knows hardly more than chance."""
    step("how it does on tasks: the share that is right, or bits a byte, with 95% intervals")
    verb("eval", run / "checkpoints", "--tasks", *TASKS[config.data.objective])


def beginnings(documents: Path, count: int) -> list[str]:
    """The first words of held-out documents."""
    with documents.open(encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line, _ in zip(lines, range(count), strict=False)]
    return [" ".join(text.split()[:6]) for text in texts if text.strip()]


def require_learning(run: Path) -> None:
    """Raises Failed unless the mean loss of the last fifth of the steps lies below that of the first fifth."""
    losses = [row["loss"] for row in read_metrics(run / "metrics.jsonl")[0]]
    part = max(1, len(losses) // 5)
    first, last = mean(losses[:part]), mean(losses[-part:])
    if not last < first:
        raise Failed(f"the loss did not fall: {first:.3f} over the first {part} steps, {last:.3f} over the last")
    say(f"the loss fell from {first:.3f} to {last:.3f}")


def next_steps(options: argparse.Namespace, run: Path, seconds: float) -> None:
    """Where everything lies and what to try."""
    samples = f"\n  what it wrote, as it learnt   {run / 'samples.md'}" if (run / "samples.md").exists() else ""
    print(f"""
Done in {seconds / 60:.1f} minutes.
  the loss curve                {run / "loss.png"}
  every step's numbers          {run / "metrics.jsonl"}{samples}
  the weights                   {run / "checkpoints"}

What to try next:
  bash launch/quickstart.sh --minutes 40                   train longer
  bash launch/quickstart.sh --text PATH...                 train on your own text
  edit {options.config} and run it again:
      other sizes and learning rates (docs/config.md has every key), or another layout: with tensor_parallel_size: 1 and
      sequence_parallel: false the losses of the first steps stay the same, the speed does not
  {sys.executable} -m megatrain generate "{run / "checkpoints"}" --prompt "import "
To chat (it has read code, and was never taught to answer: expect nonsense; docs/huggingface.md has models that were taught):
  {sys.executable} -m megatrain generate "{run / "checkpoints"}" --chat --chat-template alpaca
  {sys.executable} -m megatrain serve "{run / "checkpoints"}" --chat-template alpaca     a page and OpenAI's API at http://127.0.0.1:8000;
      needs {sys.executable} -m pip install '{ROOT}[serve]'
""")


if __name__ == "__main__":
    sys.exit(main())
