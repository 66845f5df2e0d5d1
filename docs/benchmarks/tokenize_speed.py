"""Speed of `megatrain data tokenize` by gigatoken and by `tokenizers`, beside both libraries' own encoding, in interleaved rounds.

    python docs/benchmarks/tokenize_speed.py --megabytes 60 --workers 1 --rounds 3

The text is real: the interpreter's library, sources and documentation of installed packages, man pages, a document a file; the
tokenizer a byte-level BPE trained on a part of it. The libraries encode text that is already in memory, megatrain reads a .jsonl file and
writes a token store. Megabytes of text for each second of processor time of the whole process; prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests/harness"))


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=60.0)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--vocab-size", type=int, default=16384)
    return parser.parse_args()


def corpus(work: Path, megabytes: float) -> list[str]:
    """Real texts, also as corpus.jsonl."""
    from real_text import real_texts

    texts = list(real_texts(int(megabytes * 1e6)))
    with (work / "corpus.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    return texts


def ways(work: Path, texts: list[str], args: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """What is measured, by name."""
    from tokenizers import Tokenizer

    from megatrain.data.prepare.tokenize import tokenize_files
    from megatrain.data.tokenizer import JsonTokenizer
    from megatrain.data.tokenizers.fast_engine import FastTokenizer
    from megatrain.data.tokenizers.fitting import train_tokenizer

    train_tokenizer([work / "corpus.jsonl"], args.vocab_size, work / "tokenizer.json")
    library = Tokenizer.from_file(str(work / "tokenizer.json"))

    def encode_library() -> None:
        for first in range(0, len(texts), 100):
            library.encode_batch_fast(texts[first : first + 100], add_special_tokens=False)

    def encode_gigatoken() -> None:
        fast = FastTokenizer(JsonTokenizer(Tokenizer.from_file(str(work / "tokenizer.json"))))  # knows no words yet
        for first in range(0, len(texts), 100):
            fast.encode_plainly(texts[first : first + 100])

    def tokenize(engine: str) -> Callable[[], Any]:
        inputs = [work / "corpus.jsonl"]
        return lambda: tokenize_files(inputs, work / "tokenizer.json", work / engine, args.workers, True, engine=engine)

    return {
        "tokenizers encode": encode_library,
        "gigatoken encode": encode_gigatoken,
        "data tokenize, tokenizers": tokenize("tokenizers"),
        "data tokenize, gigatoken": tokenize("gigatoken"),
    }


def main() -> None:
    """Measure and print."""
    args = parse()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        texts = corpus(work, args.megabytes)
        size = sum(len(text.encode()) for text in texts) / 1e6
        measured = ways(work, texts, args)
        speeds: dict[str, list[float]] = {name: [] for name in measured}
        for _ in range(args.rounds):
            for name, run in measured.items():
                begin = time.process_time()
                run()
                speeds[name].append(size / (time.process_time() - begin))
        same = all(
            (work / f"gigatoken.{kind}").read_bytes() == (work / f"tokenizers.{kind}").read_bytes() for kind in ("bin", "idx")
        )
    library, fast, slow_store, fast_store = speeds.values()
    ratios = {
        "encode": [a / b for a, b in zip(fast, library, strict=True)],
        "data tokenize": [a / b for a, b in zip(fast_store, slow_store, strict=True)],
        "data tokenize by tokenizers, of the library": [a / b for a, b in zip(slow_store, library, strict=True)],
    }
    print(
        json.dumps(
            {
                "megabytes": round(size, 1),
                "documents": len(texts),
                "megabytes_per_processor_second": {name: [round(s, 2) for s in found] for name, found in speeds.items()},
                "ratio_median": {name: round(statistics.median(found), 2) for name, found in ratios.items()},
                "same_store": same,
                "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
            }
        )
    )


if __name__ == "__main__":
    main()
