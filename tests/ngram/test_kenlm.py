"""The same ARPA file in KenLM's own reader gives the same scores; left out where kenlm could not be built (launch/test.sh says so)."""

import numpy as np
import pytest

from megatrain.ngram import load
from megatrain.ngram.fit import Settings, fit

kenlm = pytest.importorskip("kenlm", reason="pip install kenlm, which needs a C++ compiler")


@pytest.mark.parametrize(("order", "prune"), [(2, ()), (3, ()), (5, ()), (5, (0, 0, 1))])
def test_ten_thousand_lines(tmp_path, order, prune):
    draw = np.random.default_rng(order)

    def lines(count, words):
        return [b" ".join(b"w%d" % n for n in draw.zipf(1.3, draw.integers(0, 20)) if n < words) for _ in range(count)]

    (tmp_path / "text").write_bytes(b"\n".join(lines(20_000, 3000)) + b"\n")
    fit([tmp_path / "text"], tmp_path / "m.arpa", Settings(order, prune, (0.5, 1.0, 1.5)))
    theirs = kenlm.Model(str(tmp_path / "m.arpa"))
    asked = lines(10_000, 4000)
    for bos, eos in ((True, True), (False, False), (True, False)):
        for ours, line in zip(load(tmp_path / "m.arpa").score(asked, bos=bos, eos=eos), asked, strict=True):
            text = line.decode()
            assert ours.log10 == pytest.approx(theirs.score(text, bos=bos, eos=eos), abs=2e-3, rel=2e-5)
            assert ours.oov == sum(oov for _, _, oov in theirs.full_scores(text, bos=bos, eos=eos))
            if bos and eos:
                assert ours.perplexity == pytest.approx(theirs.perplexity(text), rel=1e-3)
