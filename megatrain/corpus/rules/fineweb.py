"""Signals of lines and sizes: FineWeb's (arXiv:2406.17557, section 3.6) and mC4's.

fineweb      ended          share of lines with something in them that end in a mark which ends sentences
             short          share of those that have at most 30 letters
             same_letters   letters in those that were there before, of all but line feeds
             feeds          line feeds a word
mc4          third_line     letters of the third longest line (between line feeds)
"""

from __future__ import annotations

import numpy as np

from megatrain.corpus.letters import ENDING, SPACE
from megatrain.corpus.rules.hashed import Letters, Numbers, Where, hashes_of
from megatrain.corpus.rules.view import View, Words
from megatrain.corpus.words import Extents, jit

SHORT = 30
"""Letters of a short line."""


@jit
def _lines(letters: Letters, starts: Where, ends: Where, short: int, out: Numbers, keep: Where) -> int:
    """Fill in the shares of lines and the numbers of the lines with something in them; their number."""
    count, ended, few = 0, 0, 0
    for i in range(len(starts)):
        empty = True
        for at in range(starts[i], ends[i]):
            if not letters[at] & SPACE:
                empty = False
                break
        if not empty:
            keep[count] = i
            count += 1
            ended += bool(letters[ends[i] - 1] & ENDING)
            few += ends[i] - starts[i] <= short
    out[0], out[1] = ended / max(count, 1), few / max(count, 1)
    return count


def fineweb(view: View, table: Words) -> dict[str, float]:
    """The signals of FineWeb; of a text of blanks alone, zeros but for feeds."""
    extents, out = view.arrays.between_feeds(), np.zeros(2)
    keep = np.empty(len(extents.starts), np.int64)
    count = _lines(view.arrays.letters, extents.starts, extents.ends, SHORT, out, keep)
    feeds = len(extents.starts) - 1
    kept = Extents(extents.starts[keep[:count]], extents.ends[keep[:count]])
    same = view.repeats.again(hashes_of(view.arrays.codes, kept), kept.ends - kept.starts)[1]
    return {
        "ended": float(out[0]),
        "short": float(out[1]),
        "same_letters": same / max(len(view.text) - feeds, 1),
        "feeds": feeds / max(len(view.words(table).starts), 1),
    }


def mc4(view: View, table: Words) -> dict[str, float]:
    """The signal of mC4: letters of the third longest line, 0 where there are fewer than three."""
    starts, ends = view.arrays.between_feeds()
    return {"third_line": float(np.partition(ends - starts, -3)[-3]) if len(starts) > 2 else 0.0}
