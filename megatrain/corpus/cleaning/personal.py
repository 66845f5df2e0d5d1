"""Masks personal data with typed placeholders: <EMAIL>, <PHONE>, <ID>, <CARD>, <IP>. The same text always gives the same bytes.

    email   a mail address, looked for around each `@` alone; not `icon@2x.png`, not `git@host`
    phone   a Chinese mobile number: 11 digits, 1 then 3 to 9; its country code and one separator after the third and seventh digit too
    abroad  a number with + and another country's code, 8 to 15 digits (E.164); it becomes <PHONE> too
    id      a Chinese identity card: 17 digits and a check digit or X (GB 11643, ISO 7064 MOD 11-2)
    card    a bank card: 13 to 19 digits, alone or in the groups that cards show, that Luhn's sum (ISO 7812) allows
    ip      an IPv4 or IPv6 address that is not private, local, of documentation (RFC 6890) or a netmask; no version, no section's number

Numbers are bounded by digits, not by words: a Chinese letter is a letter to `\\b`. Decimals, factors and hexadecimal words hold none. All
patterns are bounded and each place is looked at a bounded number of times, so time is linear in the text, whatever it is.
"""

from __future__ import annotations

import ipaddress
import re
from collections import Counter
from collections.abc import Callable, Collection
from typing import Literal

Kind = Literal["email", "phone", "abroad", "id", "card", "ip"]
KINDS: tuple[Kind, ...] = ("email", "phone", "abroad", "id", "card", "ip")
PLACEHOLDERS: dict[str, str] = {kind: "<PHONE>" if kind == "abroad" else f"<{kind.upper()}>" for kind in KINDS}

ROUNDS = 4
"""How often a text is looked through, at most."""
LONGEST_LOCAL = 64
"""Letters before the `@` of an address, at most (RFC 5321)."""
ALPHANUMERIC = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
LOCAL = f"{ALPHANUMERIC}._%+-"
"""Letters that may stand there."""
MIDDLE = re.compile(r"@(?<=[A-Za-z0-9._%+-]@)(?=[A-Za-z0-9-]{1,63}\.)")
START = re.compile("(?<![A-Za-z0-9])[A-Za-z0-9]")
DOMAIN = re.compile(
    r"(?:[A-Za-z0-9-]{1,63}\.){1,8}"
    r"(?!(?i:png|jpe?g|gif|svg|webp|ico|bmp|css|js|json|html?|php|xml|txt|pdf|t?gz|exe|dll|whl|deb|rpm|ya?ml|toml|lock)(?![A-Za-z0-9]))"
    r"[A-Za-z]{2,24}(?![A-Za-z0-9])"
)
"""Labels of up to 63 letters; none of the names of files that are no top-level domains."""

RUN = re.compile("[0-9+][0-9 -]{9,}[0-9Xx]")
"""Where numbers may be; begins with a set of letters, which the library looks for ten times as fast as for what is behind something."""
NUMBER = re.compile(
    r"(?<!\d)(?<!\d\.)(?:"
    r"(?P<id>\d{17}(?:[Xx]|\d(?!\.?\d)))"
    r"|(?P<phone>(?:(?:\+|00)?86[ -]?)?1[3-9]\d(?:[ -]?\d{4}){2})(?!\.?\d)"
    r"|(?P<card>\d{13,19}|\d{4}(?:[ -]\d{4}){3}(?:[ -]\d{3})?|\d{4}[ -]\d{6}[ -]\d{4,5}|\d{6}[ -]\d{10,13})(?!\.?\d)"
    r")(?!\*[\w(<])",
    re.ASCII,
)
SHAPE = bytes(48 if byte in b"0123456789" else 32 if byte in b" -" else 120 for byte in range(256))
"""Digits, separators and other bytes as `0`, a blank and `x`."""
LEAST_OF_NUMBERS = (b"00000000", b"000 0000 0000", b"0000000 0000", b"0000 000000")
"""Every number has one of these; looked for at several GB a second."""
GROUPED = 19
"""Letters of a card of four groups of four."""
WORD = 64
"""Letters around a number that are looked at, each way, to see whether it is a part of a digest."""
LITERAL = re.compile(r"(?=[0-9]*[a-fA-F])[0-9a-fA-F]+|0[xXoObB][0-9a-zA-Z]+")
"""A digest or a number in hexadecimal, octal or binary."""
CODES = (
    r"1[ .(-]{0,2}[2-9]|7|2(?:[07]|1[12368]|[2346]\d|5[0-8]|9[01789])|3(?:[0-469]|5\d|7[0-8]|8[0-35-79])|4(?:[013-9]|2[013])"
    r"|5(?:[1-8]|[09]\d)|6(?:[0-6]|7[02-9]|8[0-35-9]|9[0-2])|8(?:[124]|0[08]|5[02356]|7[08]|8[0-368])|9(?:[0-58]|6[0-8]|7[0-79]|9[2-68])"
)
"""Countries' codes but China's (ITU-T E.164); none of North America's areas begins with 0 or 1."""
ABROAD = re.compile(rf"\+(?<![A-Za-z0-9_)+]\+)(?=(?:{CODES})[0-9 .(-])[0-9 .()-]{{7,23}}", re.ASCII)
"""A plus sign and what may be a number behind it, and a blank or more that are not."""
PART = re.compile(r"[0-9]+|\([0-9]+\)")
LEAST_DIGITS, USUAL_DIGITS, MOST_DIGITS = 8, 10, 15
"""Digits of a number with its country's code."""
WEIGHTS = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)
DOUBLED = str.maketrans("0123456789", "0246813579")
"""The sum of the digits of twice a digit."""

DOTTED = re.compile(r"\.(?<=\d\.)(?<!\.\d\.)(?<!\.\d\d\.)(?<!\.\d\d\d\.)\d{1,3}\.\d{1,3}\.\d", re.ASCII)
"""In every IPv4 address, from its first dot on; begins with one letter, which the library looks for ten times as fast again."""
ADDRESS = re.compile(r"\d{1,3}(?:\.\d{1,3}){3}(?!\.?\d)(?!\.in-addr)", re.ASCII)
COLONS = re.compile(r":(?<=[23][0-9a-fA-F]{3}:)[0-9a-fA-F]{0,4}:")
"""The first group of an IPv6 address, from its end on."""
ADDRESS_6 = re.compile(r"[23][0-9a-fA-F]{3}:(?:[0-9a-fA-F]{0,4}:){1,6}[0-9a-fA-F]{1,4}(?![0-9A-Za-z:])", re.ASCII)
BEFORE = 16
"""Letters before an address in which a word says what it is."""
VERSION = re.compile(
    r"(?:[a-z_]-?|[=<>~!]=|[<>])$"
    r"|(?:§|第|\b(?:version|ver|v|release|build|section|sect?|chapter|clause|figure|fig|table|rfc)s?|版本?|[章节条图表])[ \t.:：号]{0,3}$",
    re.IGNORECASE | re.ASCII,
)
"""Tells that what follows is a version or the number of a section."""
HOST = re.compile(
    r"(?:\b(?:ip|ipv4|hosts?|server|nameserver|dns|addr(?:ess)?|ping|peer|client)\b|地址|服务器|主机)[ \t:：='\"(\[]{0,3}$",
    re.IGNORECASE | re.ASCII,
)
"""Tells that what follows is the address of a host."""
RESERVED = tuple(
    map(
        ipaddress.IPv4Network,
        (
            "0.0.0.0/8",
            "10.0.0.0/8",
            "100.64.0.0/10",
            "127.0.0.0/8",
            "169.254.0.0/16",
            "172.16.0.0/12",
            "192.0.0.0/24",
            "192.0.2.0/24",
            "192.88.99.0/24",
            "192.168.0.0/16",
            "198.18.0.0/15",
            "198.51.100.0/24",
            "203.0.113.0/24",
            "224.0.0.0/24",
            "239.0.0.0/8",
            "255.0.0.0/8",
        ),
    )
)
"""IPv4 networks that say nothing of anybody (RFC 6890): private, local, of documentation, netmasks; Python's list changes."""
GLOBAL_6 = ipaddress.IPv6Network("2000::/3")
RESERVED_6 = [ipaddress.IPv6Network(network) for network in ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20")]
SMALL, LEAST = 32, 100
"""Four numbers below LEAST, three of them below SMALL, are a section's or a version's unless a word before or a port behind says other."""


def is_identity(number: str) -> bool:
    """Whether 17 digits and a check digit are of an identity card."""
    rest = sum(weight * int(digit) for weight, digit in zip(WEIGHTS, number, strict=False)) % 11
    return "10X98765432"[rest] == number[17].upper()


def is_card(digits: str) -> bool:
    """Whether Luhn's sum of some digits is right, they are not all the same, and they are no time (1700000000000, 20261127154500)."""
    total = sum(map(int, digits[-1::-2])) + sum(map(int, digits[-2::-2].translate(DOUBLED)))
    time = (len(digits) == 13 and digits[0] == "1") or (len(digits) == 14 and digits[:2] in ("19", "20"))
    return total % 10 == 0 and len(set(digits)) > 1 and not time


def is_public(address: str) -> bool:
    """Whether an IPv4 or IPv6 address may be of a host on the internet."""
    try:
        number = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(number, ipaddress.IPv6Address):
        return number in GLOBAL_6 and not any(number in network for network in RESERVED_6)
    return not any(number in network for network in RESERVED)


def mask(text: str, kinds: Collection[Kind] = KINDS) -> tuple[str, Counter[str]]:
    """(The text with placeholders, how many of each kind were put in). What it gives, it gives back unchanged."""
    found: Counter[str] = Counter()
    for _ in range(ROUNDS):  # a placeholder may now stand beside what was too long for a mail address
        before, text = text, _masked_once(text, kinds, found)
        if text == before:
            break
    return text, found


def _masked_once(text: str, kinds: Collection[Kind], found: Counter[str]) -> str:
    """A text after each kind was looked for."""

    def placeholder(kind: str) -> str:
        found[kind] += 1
        return PLACEHOLDERS[kind]

    if "email" in kinds:
        text = _masked_mails(text, placeholder)
    if {"phone", "id", "card"} & set(kinds):
        text = _masked_numbers(text, kinds, placeholder)
    if "abroad" in kinds:
        text = ABROAD.sub(lambda match: _without_number_abroad(match, placeholder), text)
    if "ip" in kinds:
        text = _masked_addresses(text, placeholder)
        if COLONS.search(text):
            text = ADDRESS_6.sub(lambda match: placeholder("ip") if _is_host_6(match) else match[0], text)
    return text


# --- mail -----------------------------------------------------------------------------------------------------------------


def _masked_mails(text: str, placeholder: Callable[[str], str]) -> str:
    """A text without mail addresses; only what stands around an `@` is looked at."""
    parts, done, found = [], 0, MIDDLE.search(text)
    while found is not None:
        at = found.start()
        domain = DOMAIN.match(text, at + 1)
        if domain is not None:
            before = text[max(done, at - LONGEST_LOCAL) : at]
            local = START.search(text, at - len(before) + len(before.rstrip(LOCAL)), at)
            if local is not None and text[local.start() : at] != "git":
                begin = local.start()
                parts += [text[done:begin], placeholder("email")]
                done = domain.end()
        found = MIDDLE.search(text, max(at + 1, done))
    return "".join([*parts, text[done:]]) if parts else text


# --- numbers --------------------------------------------------------------------------------------------------------------


def _masked_numbers(text: str, kinds: Collection[Kind], placeholder: Callable[[str], str]) -> str:
    """A text without numbers of phones and cards; only runs of digits, blanks and hyphens are looked at."""
    shape = text.encode(errors="surrogatepass").translate(SHAPE)
    if not any(least in shape for least in LEAST_OF_NUMBERS):
        return text
    parts, done = [], 0
    for run in RUN.finditer(text):
        at, last = run.start(), run.end() + 2  # two letters more, for what must not follow
        while (match := NUMBER.search(text, at, last)) is not None:
            kind, end = _kind_of(match)
            at = match.start() + 1
            if kind in kinds and not _in_arithmetic(text, match.start(), end):
                parts += [text[done : match.start()], placeholder(kind)]
                at = done = end
    return "".join([*parts, text[done:]]) if parts else text


def _kind_of(match: re.Match[str]) -> tuple[str, int]:
    """(The kind of a number, "" for none; where it ends)."""
    kind, said = match.lastgroup or "", match[0]
    digits = said.replace(" ", "").replace("-", "")
    if kind == "phone" or (kind == "id" and is_identity(digits)):
        return kind, match.end()
    if digits.isdecimal() and is_card(digits):  # the digits of what is no identity card may be a card's
        return "card", match.end()
    four = said[:GROUPED].replace(" ", "").replace("-", "")
    if len(said) > GROUPED and len(four) == 16 and is_card(four):
        return "card", match.start() + GROUPED
    return "", match.end()


def _in_arithmetic(text: str, begin: int, end: int) -> bool:
    """Whether a number is a part of a digest, one in hexadecimal or octal, or stands behind a minus sign."""
    before, behind = text[max(0, begin - WORD) : begin], text[end : end + WORD]
    if before[-1:] == "-" and not before[-2:-1].isalnum():
        return True
    head, tail = before[len(before.rstrip(ALPHANUMERIC)) :], behind[: len(behind) - len(behind.lstrip(ALPHANUMERIC))]
    return bool(head or tail) and LITERAL.fullmatch(f"{head}{text[begin:end]}{tail}") is not None


def _without_number_abroad(match: re.Match[str], placeholder: Callable[[str], str]) -> str:
    """The text behind a plus sign, without the number that it begins: as few groups of digits as usual numbers have."""
    said, digits, end = match[0], 0, 0
    for part in PART.finditer(said):
        digits, end = digits + len(part[0].strip("()")), part.end()
        if digits >= USUAL_DIGITS:
            break
    behind = match.string[match.start() + end : match.start() + end + 2]
    if behind[:1].isalnum() or (behind[:1] == "." and behind[1:].isdecimal()):  # it goes on, or is 4.0614962j
        return said
    least = USUAL_DIGITS if "." in said[:end] else LEAST_DIGITS  # +4.061496 is none, +1.8005550100 is one
    return placeholder("abroad") + said[end:] if least <= digits <= MOST_DIGITS else said


# --- addresses ------------------------------------------------------------------------------------------------------------


def _masked_addresses(text: str, placeholder: Callable[[str], str]) -> str:
    """A text without IPv4 addresses; only what stands around three numbers behind dots is looked at."""
    parts, done, dotted = [], 0, DOTTED.search(text)
    while dotted is not None:
        dot = dotted.start()
        head = text[max(done, dot - 3) : dot]
        begin = dot - len(head) + len(head.rstrip("0123456789"))
        match = ADDRESS.match(text, begin) if begin < dot else None
        at = dot + 1
        if match is not None and _is_host(match):
            parts += [text[done:begin], placeholder("ip")]
            at = done = match.end()
        dotted = DOTTED.search(text, at)
    return "".join([*parts, text[done:]]) if parts else text


def _is_host(match: re.Match[str]) -> bool:
    """Whether four numbers are the public address of a host."""
    text, begin = match.string, match.start()
    before = text[max(0, begin - BEFORE) : begin]
    if before[-1:] == "." or before[-1:].isdecimal() or not is_public(match[0]) or VERSION.search(before):
        return False
    parts = sorted(int(part) for part in match[0].split("."))
    small = parts[2] < SMALL and parts[3] < LEAST
    return (
        not small or HOST.search(before) is not None or re.match(r":\d{2,5}\b", text[match.end() : match.end() + 7]) is not None
    )


def _is_host_6(match: re.Match[str]) -> bool:
    """Whether groups of hexadecimal digits are the public address of a host."""
    before = match.string[max(0, match.start() - 1) : match.start()]
    return not (before.isascii() and before.isalnum()) and before not in (":", ".", "_") and is_public(match[0].lower())
