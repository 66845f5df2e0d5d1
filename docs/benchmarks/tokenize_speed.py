"""Speed of `megatrain data tokenize` beside the `tokenizers` library's own batch encoding, in interleaved rounds.

    python docs/benchmarks/tokenize_speed.py --megabytes 50 --workers 2 --rounds 3

The text is the interpreter's standard library, repeated; the tokenizer a byte-level BPE of 50,257 trained on it. The library
encodes text that is already in memory (encode_batch_fast, as many threads); megatrain reads a .jsonl file and writes a token store.
Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import tempfile
import time
from itertools import cycle
from pathlib import Path


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=50.0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--vocab-size", type=int, default=50257)
    return parser.parse_args()


def main() -> None:
    """Measure and print."""
    args = parse()
    os.environ["RAYON_NUM_THREADS"] = str(args.workers)  # read by the library at its first use
    from tokenizers import Tokenizer

    from megatrain.data.prepare.stdlib_corpus import build
    from megatrain.data.prepare.tokenize import tokenize_files
    from megatrain.data.tokenizer import train_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        build(work)
        train_tokenizer([work / "train.jsonl"], args.vocab_size, work / "tokenizer.json")
        lines = (work / "train.jsonl").read_text().splitlines()
        texts, size = [], 0
        with (work / "corpus.jsonl").open("w") as corpus:
            for line in cycle(lines):
                texts.append(json.loads(line)["text"])
                corpus.write(line + "\n")
                size += len(texts[-1].encode())
                if size >= args.megabytes * 1e6:
                    break
        library = Tokenizer.from_file(str(work / "tokenizer.json"))
        library.encode_batch_fast(texts[:50])
        seconds: dict[str, list[float]] = {"library": [], "megatrain": []}
        for _ in range(args.rounds):
            start = time.perf_counter()
            for first in range(0, len(texts), 100):
                library.encode_batch_fast(texts[first : first + 100], add_special_tokens=False)
            seconds["library"].append(time.perf_counter() - start)
            start = time.perf_counter()
            tokenize_files([work / "corpus.jsonl"], str(work / "tokenizer.json"), work / "store", workers=args.workers)
            seconds["megatrain"].append(time.perf_counter() - start)
        ratios = [a / b for a, b in zip(seconds["library"], seconds["megatrain"], strict=True)]
        speeds = {name: [round(size / 1e6 / s, 2) for s in values] for name, values in seconds.items()}
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        print(
            json.dumps(
                {"megabytes_per_second": speeds, "ratio_median": round(statistics.median(ratios), 3), "peak_mib_of_both": peak}
            )
        )


if __name__ == "__main__":
    main()
