"""Modified Kneser-Ney with dictionaries, straight from the formulas; it imports nothing from megatrain."""

import math
from collections import Counter, defaultdict


class Failed(Exception):
    """Counts that give no discounts."""


def log10(value):
    """-99 of 0, as SRILM writes it."""
    return math.log10(value) if value else -99.0


def sentences(text):
    """Lists of words; the end of the text ends its last line."""
    lines = text.split(b"\n")
    if lines and lines[-1] == b"":
        lines.pop()
    table = bytes.maketrans(b"\0\t\r", b"   ")
    return [[w for w in line.translate(table).split(b" ") if w] for line in lines]


class Model:
    """log10 probabilities and back-offs of a text."""

    def __init__(self, text, order, prune=(), fallback=None, interpolate_unigrams=True, vocab_pad=0, quirk=True):
        self.order = order
        lines = sentences(text)
        self.ids = {b"<unk>": 0, b"<s>": 1, b"</s>": 2}
        for line in lines:
            for word in line:
                self.ids.setdefault(word, len(self.ids))
        thresholds = (*prune, *[prune[-1] if prune else 0] * (order - len(prune)))
        highest = Counter()
        for line in lines:
            whole = [b"<s>"] * (order - 1) + line + [b"</s>"]
            for i in range(order - 1, len(whole)):
                highest[tuple(whole[i - order + 1 : i + 1])] += 1
        self.raw, self.adjusted = {}, {}
        for k in range(1, order + 1):
            raw, left = Counter(), defaultdict(set)
            for gram, count in highest.items():
                g = gram[order - k :]
                if b"<s>" not in g[1:]:
                    raw[g] += count
                    if k < order:
                        left[g].add(gram[order - k - 1])
            if k == 1:
                raw[b"<unk>",] = raw[b"<s>",] = 0
            self.raw[k] = raw
            self.adjusted[k] = {g: raw[g] if k == order or g[0] == b"<s>" else len(left[g]) for g in raw}
        self._estimate(highest, thresholds, fallback, interpolate_unigrams, vocab_pad, quirk)

    def _suffix_key(self, gram):
        return [self.ids[w] for w in reversed(gram)]

    def _discounts(self, highest, k, fallback, quirk):
        n = Counter(self.adjusted[k][g] for g in self.adjusted[k])
        last = max(highest, key=self._suffix_key)
        if quirk:
            for j in range(1, self.order):
                h = last[self.order - j :]
                if j == k:
                    n[self.adjusted[k][h]] -= 1
                    n[self.raw[k][h]] += 1
                if h[0] == b"<s>":
                    break
        if all(n[j] for j in (1, 2, 3)):
            y = n[1] / (n[1] + 2 * n[2])
            found = (1 - 2 * y * n[2] / n[1], 2 - 3 * y * n[3] / n[2], 3 - 4 * y * n[4] / n[3])
            if all(0 <= d <= j for j, d in enumerate(found, 1)):
                return found
        if fallback is None:
            raise Failed(k)
        return fallback

    def _estimate(self, highest, thresholds, fallback, interpolate_unigrams, vocab_pad, quirk):
        self.p, self.backoff, self.discounts = {}, {}, []
        for k in range(1, self.order + 1):
            adjusted = self.adjusted[k]
            d = (0.0, *self._discounts(highest, k, fallback, quirk))
            self.discounts.append(d[1:])
            always = {(b"<unk>",), (b"<s>",), (b"</s>",)}
            keep = {g for g in adjusted if self.raw[k][g] > thresholds[k - 1] or g in always}
            total, left = defaultdict(float), defaultdict(float)
            for g, count in adjusted.items():
                total[g[:-1]] += count
                left[g[:-1]] += d[min(count, 3)] if g in keep else count
            gamma = {x: left[x] / total[x] for x in total if total[x]}
            for g in keep:
                mass = (adjusted[g] - d[min(adjusted[g], 3)]) / total[g[:-1]]
                if k == 1:
                    words = max(vocab_pad, len(keep) - 1)
                    share = gamma[()] / words if interpolate_unigrams else 0.0
                    if g == (b"<unk>",):
                        mass, share = 0.0, gamma[()] / words if interpolate_unigrams else gamma[()]
                    self.p[g] = 1.0 if g == (b"<s>",) else mass + share
                else:
                    self.p[g] = mass + gamma[g[:-1]] * self.p[g[1:]]
            if k > 1:
                self.backoff |= {x: gamma.get(x, 1.0) for x in self.p if len(x) == k - 1}

    def lines(self, k):
        """(log10 p, words, log10 backoff or None) in the order of a file."""
        grams = sorted((g for g in self.p if len(g) == k), key=self._suffix_key)
        for g in grams:
            weight = self.backoff.get(g, 1.0) if k < self.order else None
            yield min(0.0, log10(self.p[g])), g, None if weight is None else log10(weight)

    def score(self, history, word):
        """Probability of a word after a history, by backing off."""
        history = history[max(0, len(history) - self.order + 1) :]
        if (*history, word) in self.p:
            return self.p[(*history, word)]
        if not history:
            return self.p[b"<unk>",]
        return self.backoff.get(history, 1.0) * self.score(history[1:], word)
