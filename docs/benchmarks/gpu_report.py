"""The report of gpu_checks.py for people: short, since a terminal may keep its last 12,000 characters alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

LONGEST = 11_000
"""Characters."""
SAID = 700
"""Characters of what a failed part said, from the end; its log in the folder has all of it."""
KERNELS = 14
FAILURES = 12
"""Rows shown; the JSON has more."""


def markdown(report: dict[str, Any]) -> str:
    """Tables first, what failed last; in all LONGEST at most."""
    text = "\n".join(_lines(report)) + "\n"
    return text if len(text) <= LONGEST else text[:LONGEST] + "\n... the rest is in report.json\n"


def _lines(report: dict[str, Any]) -> Iterable[str]:
    versions = _result(report, "1 speeds", "speeds").get("versions", {})
    yield f"# {versions.get('device', 'device not known')}, torch {versions.get('torch')}, Triton {versions.get('triton')}"
    yield f"CUDA {versions.get('cuda')}, {versions.get('nvidia-smi', '')}; {report['date']}; {report['seconds']:.0f} s\n"
    yield "| item | what became of it | s |\n| --- | --- | --- |"
    for name, item in report["items"].items():
        failed = [part for part, row in item["parts"].items() if row["problem"]]
        became = item["state"] + (f": {', '.join(failed)}" if failed else "")
        yield f"| {name} | {became} | {item['seconds']:.0f} |"
    yield from _models(report)
    yield from _step(report)
    yield from _speeds(report)
    yield from _ranks(report)
    yield from _kernels(report)
    yield from _decoding(report)
    yield from _tests(report)
    for item in report["items"].values():
        for part, row in item["parts"].items():
            if row["problem"]:
                yield f"\n{part}: {row['problem']}\n```\n{row['said'][-SAID:].strip()}\n```"


def _result(report: dict[str, Any], item: str, part: str) -> dict[str, Any]:
    """What a part has noted; empty where it has not."""
    found = report["items"].get(item, {}).get("parts", {}).get(part, {}).get("result")
    return found if isinstance(found, dict) else {}


def _models(report: dict[str, Any]) -> Iterable[str]:
    for name, table in report["models"].items():
        yield f"\n{name}, {table['shape']}\n"
        yield "| by | tokens/s | MFU | peak memory, GB | loader waited, ms |\n| --- | --- | --- | --- | --- |"
        for way, row in table["rows"].items():
            columns = [way, _number(row, "tokens_per_second", ".0f"), _number(row, "mfu", ".3f")]
            columns += [_number(row, "memory", ".1f", 1e-9), _number(row, "wait_seconds", ".2f", 1e3)]
            yield f"| {' | '.join(columns)} |"
        if "ratio" in table:
            yield f"\nbest of ours : best of plain = **{table['ratio']:.3f}**; ours is {table['mfu']:.1%} of 989 TFLOP/s"
        yield from sorted({row["attention"] for row in table["rows"].values() if row.get("attention")})
        if "expected_memory" in table:
            parts = ", ".join(f"{key} {value / 1e9:.1f}" for key, value in table["expected_memory"].items())
            yield f"docs/memory.md: {sum(table['expected_memory'].values()) / 1e9:.1f} GB ({parts})"


def _step(report: dict[str, Any]) -> Iterable[str]:
    found = _result(report, "3 one step", "step")
    if "synchronisations" in found:
        waits = found["synchronisations"]
        yield f"\nsynchronisations of one step: {sum(waits.values())}"
        yield from (f"- {count} x {where[:300]}" for where, count in list(waits.items())[:8])
    if "kernels" in found:
        yield f"\none step, {found['shape']}: {found['wall_ms']:.1f} ms, kernels {found['busy_ms']:.1f} ms, {found['launches']} launches"
        yield "\n| kernel | calls | ms |\n| --- | --- | --- |"
        yield from (f"| {row['kernel'][:60]} | {row['calls']} | {row['ms']:.2f} |" for row in found["kernels"][:KERNELS])


def _speeds(report: dict[str, Any]) -> Iterable[str]:
    found = _result(report, "1 speeds", "speeds")
    if "matmul_tflops" in found:
        yield f"\ncopy {found['copy_gb_per_s']:.0f} GB/s, matmul 8192 {found['matmul_tflops']:.0f} TFLOP/s"
    for key, title in (("products", "bf16 products, TFLOP/s"), ("attention", "SDPA, TFLOP/s"), ("sums", "sums in float32")):
        if found.get(key):
            yield f"\n{title}"
            yield from (f"- {name}: {_short(row)}" for name, row in found[key].items())


def _ranks(report: dict[str, Any]) -> Iterable[str]:
    found = _result(report, "7 ranks", "ranks")
    if found:
        yield "\nlargest deviations of two ranks over gloo from one process"
        yield from (f"- {name}: {_short(row)}" for name, row in found.items())


def _kernels(report: dict[str, Any]) -> Iterable[str]:
    found = _result(report, "8 kernels", "kernels")
    if found:
        yield "\n| kernel, forward and backward | ms | share of copy | reference ms | compile ms |\n| --- | --- | --- | --- | --- |"
    for name, row in found.items():
        columns = [name, *(_number(row, *pair) for pair in (("ms", ".3f"), ("share_of_copy", ".2f"), ("reference_ms", ".3f")))]
        yield f"| {' | '.join([*columns, _number(row, 'compile_ms', '.3f')])} | {row.get('problem', '')}"


def _decoding(report: dict[str, Any]) -> Iterable[str]:
    found = _result(report, "9 decoding", "decoding")
    if "one_user" in found:
        yield f"\ndecoding, {found['parameters'] / 1e6:.0f}M {found['dtype']}, attention by {found['attention']}"
        yield f"- one user: {_short(found['one_user'])}"
    for row in found.get("writing", []):
        yield f"- {row['requests']} requests: **{row['tokens_per_second']:.0f} tokens/s**; {_short(row)}"
    if "step" in found:
        yield f"- a step: {_short(found['step'])}"


def _tests(report: dict[str, Any]) -> Iterable[str]:
    found = _result(report, "2 tests", "tests")
    if found:
        yield f"\ntests marked gpu: {_short(found['outcomes'])}; slowest {found['slowest'][:3]}"
        if not found["outcomes"]:
            yield found.get("end", "")[-SAID:]
        for row in found["failures"][:FAILURES]:
            last = [line for line in row["text"].splitlines() if line.startswith("E ")] or [row["text"][-200:]]
            yield f"- {row['test'][-100:]}: {last[0][:200]}"


def _short(row: dict[str, Any]) -> str:
    """A row in a line."""
    return ", ".join(f"{key} {_short_value(value)}" for key, value in row.items() if key != "said")


def _short_value(value: Any) -> str:
    if isinstance(value, dict):
        return f"({_short(value)})"
    return f"{value:.3g}" if isinstance(value, float) else str(value)[:90]


def _number(row: dict[str, Any], key: str, form: str, scale: float = 1.0) -> str:
    """A number of a row; - where there is none."""
    value = row.get(key)
    return format(value * scale, form) if isinstance(value, (int, float)) else "-"
