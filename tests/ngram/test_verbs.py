"""`megatrain ngram fit`, `compile` and `score`, as a person types them; compiled models are the same, and damage is seen."""

import argparse
import json
import signal
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest
from reference_ngram import Model

from megatrain.cli.main import main
from megatrain.cli.ngram import size
from megatrain.ngram import load
from megatrain.ngram.binary import MAGIC, BinaryError, open_binary

TEXT = b"a b c a b\nb c d\n\nc d a b c\nb a\n" * 4


@pytest.fixture
def model(tmp_path):
    (tmp_path / "text").write_bytes(TEXT)
    words = ["--order", "3", "--input", str(tmp_path / "text"), "--arpa", str(tmp_path / "m.arpa"), "--discount-fallback"]
    assert main(["ngram", "fit", *words, "--memory", "64M", "--workers", "1"]) == 0
    assert main(["ngram", "compile", str(tmp_path / "m.arpa"), str(tmp_path / "m.bin")]) == 0
    return tmp_path


def rows(capsys, *words):
    capsys.readouterr()
    assert main(["ngram", "score", *map(str, words)]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_from_text_to_perplexity(model, capsys):
    (model / "asked").write_bytes(b"a b c\n\nq b")
    binary = rows(capsys, "--model", model / "m.bin", "--input", model / "asked")
    assert binary == rows(capsys, "--model", model / "m.arpa", "--input", model / "asked")
    *lines, summary = binary
    assert [line["tokens"] for line in lines] == [4, 1, 3] and [line["oov"] for line in lines] == [0, 0, 1]
    assert list(lines[0]) == ["log10", "tokens", "oov", "perplexity"]
    assert lines[0]["perplexity"] == pytest.approx(10 ** (-lines[0]["log10"] / 4), rel=1e-5)
    total = sum(line["log10"] for line in lines)
    assert summary["tokens"] == 8 and summary["lines"] == 3 and summary["log10"] == pytest.approx(total, rel=1e-5)
    assert summary["perplexity"] == pytest.approx(10 ** (-total / 8), rel=1e-5)
    assert summary["perplexity_without_oov"] < summary["perplexity"]
    assert rows(capsys, "--model", model / "m.bin", "--input", model / "asked", "--summary") == [summary]
    pieces = rows(capsys, "--model", model / "m.bin", "--input", model / "asked", "--no-sentences")
    assert [line["tokens"] for line in pieces[:-1]] == [3, 0, 2] and pieces[1]["perplexity"] == 1


def test_what_fit_says(model, capsys):
    capsys.readouterr()
    main(
        [
            "ngram",
            "fit",
            "--order",
            "2",
            "--input",
            str(model / "text"),
            "--arpa",
            str(model / "two.arpa"),
            "--discount-fallback",
            "0.4",
        ]
    )
    said = capsys.readouterr().out.splitlines()
    wanted = Model(TEXT, 2, fallback=(0.4, 0.4, 0.4))
    assert said[0].endswith(f": {sum(wanted.raw[1].values())} tokens, {len(wanted.ids)} types")
    assert "1-grams: 7, discounts" in said[1] and "(given: the text has none)" in said[1]


def test_a_compiled_model_scores_the_same(model):
    lines = [b"a b c a", b"d d q", b"", b"c"] * 30
    whole, compiled = (list(load(model / name).score(lines)) for name in ("m.arpa", "m.bin"))
    assert whole == compiled
    assert main(["ngram", "compile", str(model / "m.arpa"), str(model / "q.bin"), "--quantize", "12"]) == 0
    for exact, rounded in zip(whole, load(model / "q.bin").score(lines), strict=True):
        assert (exact.tokens, exact.oov) == (rounded.tokens, rounded.oov)
        assert rounded.log10 == pytest.approx(exact.log10, abs=1e-5), "fewer values than 2^12: none is rounded"
    assert main(["ngram", "compile", str(model / "m.arpa"), str(model / "q.bin"), "--quantize", "3"]) == 0
    rounded = [score.log10 for score in load(model / "q.bin").score(lines)]
    assert rounded != [score.log10 for score in whole] and np.allclose(rounded, [s.log10 for s in whole], atol=1.5)


def test_damage_and_other_versions(model):
    data = bytearray((model / "m.bin").read_bytes())
    open_binary(model / "m.bin", verify=True)

    def refused(changed, match, verify=False):
        (model / "bad.bin").write_bytes(bytes(changed))
        with pytest.raises(BinaryError, match=match):
            open_binary(model / "bad.bin", verify=verify)

    flipped = data.copy()
    flipped[-200] ^= 1
    refused(flipped, "is damaged: the checksum of its", verify=True)
    refused(data[: len(data) // 2], "is cut short")
    refused(data[:30], "cut short")
    header = data.copy()
    header[40] ^= 1
    refused(header, "damaged|is of version")
    length = int.from_bytes(data[8:12], "little")
    said = json.loads(data[12 : 12 + length])
    said.pop("crc32")
    for version, shown in ((1, "1"), ("a\nb\x1b[2J", r"a\\nb\\x1b\[2J")):
        said["version"] = version
        text = json.dumps({**said, "crc32": zlib.crc32(json.dumps(said, sort_keys=True).encode())}).encode()
        again = rf"is of version {shown}, and this release reads version 2, .*: megatrain ngram compile M\.arpa bad\.bin"
        refused(MAGIC + len(text).to_bytes(4, "little") + text, again)


@pytest.mark.parametrize(
    ("text", "number"), [("512M", 512 << 20), ("2G", 2 << 30), ("1.5k", 1536), ("77", 77), ("2GB", 2 << 30)]
)
def test_sizes(text, number):
    assert size(text) == number


@pytest.mark.parametrize("text", ["", "0", "x", "2X", "-1M"])
def test_what_is_no_size(text):
    with pytest.raises(argparse.ArgumentTypeError, match="is no size"):
        size(text)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_fit_leaves_nothing_behind(tmp_path, number):
    (tmp_path / "text").write_bytes(b"\n".join(b"w%d " % (n * n % 9973) * 9 for n in range(400_000)) + b"\n")
    command = [sys.executable, "-m", "megatrain", "ngram", "fit", "--order", "5", "--input", str(tmp_path / "text")]
    command += ["--arpa", str(tmp_path / "m.arpa"), "--discount-fallback"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("ngram-*/*")) and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(number)
        process.communicate(timeout=60)
    assert process.returncode != 0
    assert [path.name for path in tmp_path.iterdir()] == ["text"]


def test_wrong_use_is_said(model, capsys):
    fit = ["ngram", "fit", "--input", str(model / "text"), "--arpa", str(model / "x.arpa"), "--order"]
    for words, code, said in (
        ([*fit, "0"], 1, "--order 0 must lie in 1 .. 10"),
        ([*fit, "2"], 1, "--discount-fallback"),
        ([*fit, "2", "--prune", "2", "1"], 1, "thresholds must not fall"),
        ([*fit, "2", "--memory", "x"], 2, "is no size"),
        (["ngram", "score", "--model", str(model / "text"), "--input", str(model / "text")], 1, "this is no ARPA file"),
        (["ngram", "score", "--model", str(model / "none"), "--input", str(model / "text")], 1, "No such file"),
        (["ngram", "compile", str(model / "m.arpa"), str(model / "x.bin"), "--quantize", "1"], 1, "2 to 16 bits"),
    ):
        assert main(words) == code, words
        assert said in capsys.readouterr().err
    assert not (model / "x.arpa").exists() and not list(model.glob("ngram-*"))
