"""The same run in float32 and in bfloat16 (FP32 masters, FP32 accumulation): validation losses, and both curves as one PNG.

    bash launch/quickstart.sh                                        # makes the corpus and its tokenizer
    python docs/benchmarks/precision_curves.py runs/quickstart/data_* --steps 2000 --output docs/images/precision.png

Trains launch/configs/quickstart.yaml in one process, shrunk to a third of its width so that 2,000 steps take minutes on two cores, with an
evaluation on the whole held-out text every hundredth of the run. Prints one JSON line: the last validation losses, their ratio, and the
largest ratio along the way after the first tenth.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from megatrain.records.rows import read_metrics

ROOT = Path(__file__).parents[2]
SMALL = ["model.hidden_size=160", "model.num_attention_heads=4", "model.num_layers=3", "model.seq_length=128"]


def train(precision: str, data: Path, steps: int, folder: Path) -> dict[int, float]:
    """Step -> validation loss."""
    run = folder / precision
    words = [f"data.train={data / 'train'}", f"data.valid={data / 'valid'}", f"data.tokenizer={data / 'tokenizer.json'}"]
    words += [f"log.dir={run}", "log.to=[]", "log.every=500", f"train.steps={steps}", f"train.precision={precision}"]
    words += ["parallel.tensor_parallel_size=1", "parallel.sequence_parallel=false", "checkpoint.save_every=0"]
    words += [f"optim.warmup_steps={min(60, steps // 10)}", f"train.eval_every={max(1, steps // 20)}", "train.eval_batches=64"]
    command = [sys.executable, "-m", "megatrain", "train", str(ROOT / "launch/configs/quickstart.yaml"), *words, *SMALL]
    subprocess.run(command, check=True, stdout=sys.stderr)
    return {row["step"]: row["valid_loss"] for row in read_metrics(run / "metrics.jsonl")[1]}


def draw(curves: dict[str, dict[int, float]], path: Path) -> None:
    """Both curves, and their ratio below."""
    figure = Figure(figsize=(8, 5.5), dpi=110, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    for (precision, curve), style in zip(curves.items(), ("-", "--"), strict=True):
        above.plot(list(curve), list(curve.values()), style, label=precision)
    above.set_ylabel("validation loss, nats")
    above.legend()
    ratios = [curves["bf16"][step] / curves["fp32"][step] for step in curves["fp32"]]
    below.plot(list(curves["fp32"]), ratios)
    below.axhspan(0.99, 1.01, alpha=0.15)
    below.set(xlabel="step", ylabel="bf16 / fp32")
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(str(path))


def main() -> None:
    """Train both, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with train, valid and tokenizer.json, as the quickstart makes it")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--output", type=Path, default=Path("runs/precision.png"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        curves = {precision: train(precision, args.data, args.steps, Path(folder)) for precision in ("fp32", "bf16")}
    draw(curves, args.output)
    last = max(curves["fp32"])
    late = [step for step in curves["fp32"] if step > args.steps / 10]
    report = {
        "steps": args.steps,
        **{precision: curve[last] for precision, curve in curves.items()},
        "ratio": curves["bf16"][last] / curves["fp32"][last],
        "largest_difference": max(abs(curves["bf16"][step] / curves["fp32"][step] - 1) for step in late),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
