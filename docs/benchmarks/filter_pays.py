"""Does filtering pay? A small GPT on raw text and on filtered text, in bits a byte of clean text that neither has.

    python docs/benchmarks/filter_pays.py WORK --steps 500 --seeds 1 2 3 --output docs/images/filter_pays.png

gather    real text of this machine as a crawl would have it (filter_pays_text.py);
prepare   `megatrain data prepare` twice: `raw` reads alone (no cleaning, no rule, no copy removed), `filtered` has the defaults of
          the house and keeps English and Chinese. One tokenizer, trained on a part of the raw text, the same weights of the sources, the
          same number of tokens in training, so that nothing but the filter differs;
held out  paragraphs of prose from documents that were set aside by hash before, without those of which either arm has a passage of
          13 words (20 Chinese characters);
train     `megatrain train` on one thread, a run for each arm and seed; curves as a PNG, all figures in WORK/filter_pays.json.

What is in WORK already is not done again, but for the picture. Where the machine has no Chinese text, English alone is compared.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from filter_pays_text import crawled, gather, prose_of
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from megatrain.corpus.duplicates.passages import Lengths, Worded
from megatrain.corpus.shards import documents_of
from megatrain.records.rows import read_metrics

ARMS = ("raw", "filtered")
WEIGHTS = {"crawl": 0.8, "code": 0.1, "chinese": 0.1}
AS_READ = {
    "mojibake": False,
    "markup": False,
    "controls": False,
    "form": "none",
    "boilerplate": False,
    "blanks": False,
    "personal": [],
}
HELD_OUT = {"english": 120_000, "chinese": 40_000}
"""Most bytes of each set."""
MOST = 4000
"""Most bytes of a document held out, about, so that there are many."""
LENGTHS = Lengths.of(13, 20, 8)
VOCABULARY = 4096
SAMPLE = 16 << 20
"""Bytes that the tokenizer is trained on."""
MODEL = {
    "model": {"num_layers": 3, "hidden_size": 128, "num_attention_heads": 4, "seq_length": 256, "vocab_size": VOCABULARY}
    | {"norm": "rmsnorm", "activation": "swiglu", "position": "rope", "bias": False},
    "optim": {"lr": 3e-3, "min_lr": 3e-4, "warmup_steps": 20, "weight_decay": 0.1, "betas": [0.9, 0.95]},
    "train": {"global_batch_size": 4, "micro_batch_size": 4, "eval_batches": 0},
    "checkpoint": {"save_every": 0, "resume": "never"},
    "log": {"every": 50, "to": []},
}


def megatrain(*words: str, into: Path) -> dict[str, float]:
    """Run a verb with its output in a file -> seconds of wall and of processors. Raises CalledProcessError."""
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    with into.open("w") as file:
        command = [sys.executable, "-m", "megatrain", *words]
        subprocess.run(command, check=True, stdout=file, stderr=subprocess.STDOUT, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": round(time.monotonic() - begin, 1), "cpu_seconds": round(used, 1)}


def weights_of(work: Path) -> dict[str, float]:
    """The weights of the sources that this machine has text for."""
    return {name: weight for name, weight in WEIGHTS.items() if (work / f"{name}.jsonl").stat().st_size}


def prepare(work: Path, arm: str, workers: int, every: int) -> dict[str, float]:
    """Token stores of an arm."""
    raw = arm == "raw"
    sources = [
        {"name": "crawl", "paths": [str(work / "crawl.jsonl"), *crawled(every)]},
        {"name": "code", "paths": [str(work / "code.jsonl")], "kind": "code", "language": "en"},
        {"name": "chinese", "paths": [str(work / "chinese.jsonl")], "language": "zh"},
    ]
    weights = weights_of(work)
    sources = [
        source | {"weight": weights[source["name"]]} | ({"rules": []} if raw else {})
        for source in sources
        if source["name"] in weights
    ]
    config: dict[str, Any] = {
        "read": {"sources": sources, "unit_bytes": 16 << 20},
        "tokenize": {"held_out": 0, "tokenizer": str(work / "tokenizer.json")},
        "output": {"dir": str(work / arm)},
        "run": {"workers": workers},
    }
    config |= {"clean": AS_READ, "dedup": {"exact": "none", "near": False}} if raw else {"language": {"keep": ["en", "zh"]}}
    (work / f"{arm}.yaml").write_text(json.dumps(config, indent=1))
    return megatrain("data", "prepare", str(work / f"{arm}.yaml"), into=work / f"{arm}.log")


def documents(work: Path) -> Iterator[str]:
    """What both arms train on."""
    for arm in ARMS:
        for path in sorted((work / arm / "documents").rglob("*.zst")):
            yield from (document.text for document in documents_of(path))


def hold_out(work: Path) -> dict[str, dict[str, int]]:
    """Token stores valid_english and valid_chinese -> what they have."""
    aside = [json.loads(line) for line in (work / "aside.jsonl").read_text().splitlines()]
    random.Random(1).shuffle(aside)
    paragraphs = [(row["set"], number, text) for number, row in enumerate(aside) for text in prose_of(row["text"], row["set"])]
    passages = [Worded.of(text, LENGTHS).passages(LENGTHS.passage) for _, _, text in paragraphs]
    wanted = np.unique(np.concatenate([np.empty(0, np.uint64), *passages]))
    seen = np.zeros(len(wanted), bool)
    for text in documents(work) if len(wanted) else ():
        has = Worded.of(text, LENGTHS).passages(LENGTHS.passage)
        at = np.minimum(np.searchsorted(wanted, has), len(wanted) - 1)
        seen[at[wanted[at] == has]] = True
    found: dict[str, dict[str, int]] = {}
    for name, most in HELD_OUT.items():
        texts: dict[int, list[str]] = {}
        told: set[str] = set()
        size = leaked = 0
        for (one, number, text), has in zip(paragraphs, passages, strict=True):
            if one == name and seen[np.searchsorted(wanted, has)].any():
                leaked += 1
            elif one == name and size < most and text not in told and len("".join(texts.get(number, [])).encode()) < MOST:
                texts.setdefault(number, []).append(text)
                told.add(text)
                size += len(text.encode()) + 2
        lines = [json.dumps({"text": "\n\n".join(parts) + "\n"}, ensure_ascii=False) + "\n" for parts in texts.values()]
        (work / f"valid_{name}.jsonl").write_text("".join(lines))
        words = ["--input", str(work / f"valid_{name}.jsonl"), "--output", str(work / f"valid_{name}"), "--append-eod"]
        if texts:
            megatrain("data", "tokenize", *words, "--tokenizer", str(work / "tokenizer.json"), into=work / "tokenize.log")
        found[name] = {"bytes": size, "documents": len(texts), "paragraphs_leaked": leaked}
    return found


def sets_of(held_out: dict[str, dict[str, int]]) -> list[str]:
    """The sets that have text; says which have none on this machine, as in a slim container. Ends the program where English has none."""
    sets = [name for name, found in held_out.items() if found["bytes"]]
    if "english" not in sets:
        sys.exit(
            "filter_pays.py: this machine has no English prose to hold out. Install man pages: apt-get install manpages man-db"
        )
    for name in held_out.keys() - sets:
        print(
            f"no {name.title()} text to hold out on this machine (man pages, messages of programs): English alone is compared"
        )
    return sets


def train(work: Path, sets: Sequence[str], arm: str, seed: int, steps: int) -> dict[str, Any]:
    """A run -> its curves, {set: {step: bits a byte}}, and the bits a byte at its end."""
    run = work / f"run_{arm}_{seed}_{steps}"
    data = {
        "train": [{"path": str(work / arm / name), "weight": weight} for name, weight in weights_of(work).items()],
        "valid": {name: [{"path": str(work / f"valid_{name}")}] for name in sets},
        "tokenizer": str(work / "tokenizer.json"),
    }
    config = {key: dict(section) for key, section in MODEL.items()} | {"data": data}
    config["train"] |= {"steps": steps, "seed": seed, "eval_every": max(1, steps // 5)}
    config["log"] |= {"dir": str(run)}
    run.mkdir(exist_ok=True)
    (run / "config.yaml").write_text(json.dumps(config, indent=1))
    megatrain("train", str(run / "config.yaml"), into=run / "log.txt")
    scored = run / "eval.jsonl"
    megatrain("eval", str(run / "checkpoints"), "--json", into=scored)
    last = {row["set"]: row for row in map(json.loads, scored.read_text().splitlines()) if row["set"] in sets}
    rows = read_metrics(run / "metrics.jsonl")[1]
    curves = {
        name: {row["step"]: row["valid_losses"][name] * of["bits_per_byte"] / of["loss"] for row in rows}
        for name, of in last.items()
    }
    bits = {name: of["bits_per_byte"] for name, of in last.items()}
    return {"arm": arm, "seed": seed, "steps": steps, "curves": curves, "bits_per_byte": bits}


def draw(runs: list[dict[str, Any]], sets: Sequence[str], tokens: int, path: Path) -> None:
    """Both arms' curves over each set."""
    figure = Figure(figsize=(10, 4.2), dpi=110, layout="constrained")
    for axes, name in zip(figure.subplots(1, len(sets), squeeze=False)[0], sets, strict=True):
        for arm, colour in zip(ARMS, ("tab:red", "tab:blue"), strict=True):
            for number, run in enumerate(run for run in runs if run["arm"] == arm):
                curve = {int(step): bits for step, bits in run["curves"][name].items()}
                at = [step * tokens / 1e6 for step in curve]
                axes.plot(at, list(curve.values()), color=colour, linewidth=1.2, label=None if number else arm)
        axes.set(title=f"clean {name.title()} text held out", xlabel="million tokens", ylabel="bits a byte")
        axes.legend(title="three seeds each")
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(str(path))


def main() -> None:
    """Do what is not done yet; draw and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--workers", type=int, default=1, help="of a preparation; and runs at a time, of one thread each")
    parser.add_argument(
        "--every", type=int, default=1, metavar="N", help="of the text each N-th document alone: to try all of it out"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/filter_pays.png"))
    args = parser.parse_args()
    work = args.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    state = work / "filter_pays.json"
    done: dict[str, Any] = json.loads(state.read_text()) if state.exists() else {"runs": []}

    def keep(**more: Any) -> None:
        done.update(more)
        state.write_text(json.dumps(done, indent=1))

    if "text" not in done:
        keep(text=gather(work, args.every))
    if "tokenizer" not in done:
        inputs = [
            "--input",
            *(str(work / f"{name}.jsonl") for name in weights_of(work)),
            "--output",
            str(work / "tokenizer.json"),
        ]
        sample = ["--vocab-size", str(VOCABULARY), "--sample", str(SAMPLE)]
        keep(tokenizer=megatrain("data", "tokenizer", *inputs, *sample, into=work / "tokenizer.log"))
    for arm in ARMS:
        if arm not in done:
            keep(**{arm: prepare(work, arm, args.workers, args.every)})
    if "held_out" not in done:
        keep(held_out=hold_out(work))
    sets = sets_of(done["held_out"])
    had = {(run["arm"], run["seed"], run["steps"]) for run in done["runs"]}
    wanted = [(arm, seed) for seed in args.seeds for arm in ARMS if (arm, seed, args.steps) not in had]
    with ThreadPoolExecutor(args.workers) as pool:
        for run in pool.map(lambda one: train(work, sets, *one, args.steps), wanted):
            keep(runs=[*done["runs"], run])
    runs = [run for run in done["runs"] if run["seed"] in args.seeds and run["steps"] == args.steps]
    draw(runs, sets, MODEL["train"]["global_batch_size"] * MODEL["model"]["seq_length"], args.output)
    for name in sets:
        bits = {arm: [run["bits_per_byte"][name] for run in runs if run["arm"] == arm] for arm in ARMS}
        for arm, found in bits.items():
            print(name, arm, [round(of, 4) for of in found], "mean", round(statistics.mean(found), 4))


if __name__ == "__main__":
    main()
