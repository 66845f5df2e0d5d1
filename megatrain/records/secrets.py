"""Hides what looks like a secret in a text that a run keeps: its launch script, command, and values of its environment.

A name says that a value is secret, however it is given to it: `NAME=value`, `"name": "value"`, `Header: value`, `--name value`. Other
secrets are told by the program that takes them, by the address that they stand in, or by how services begin those that they issue.
"""

from __future__ import annotations

import re

HIDDEN = "(not kept)"
SECRET = re.compile(
    r"""KEY|TOKEN(?!IZ|S(?![A-Z]))|(?:API|AUTH|ACCESS|HF)_?TOKENS|SECRET|(?<!BY)(?<!COM)PASS(?!ES\b|IVE)|PWD|(?<![A-Z])PW(?![A-Z])
    |CRED|AUTH(?!OR(?!IZ))|COOKIE|PRIVATE
    |CERT(?!AIN)|DSN|SIGNATURE|(?<![A-Z])SIG(?![A-Z])|WEBHOOK|JWT|BEARER|(?<![A-Z])PAT(?![A-Z])""",
    re.IGNORECASE | re.VERBOSE,
)
"""Found in names of secrets."""
_NAMED = re.compile(r"""(["']?)(?<![\w.-])([\w.-]+)(["']?[ \t]*[=:]+[ \t]*)""")
_QUOTED = r""""(?:\\.|[^"\\])*"|'[^']*\'"""
_VALUE = re.compile(
    rf"""(?:(?:Bearer|Basic|Token)\s+)?(?:{_QUOTED}|\\.|[^\s;&,"'\\]|[;&,](?![\w.-]+=|[\s"';&,]|$))+|["'][^\n]*""",
    re.IGNORECASE,
)
"""The value given to a name: shell words and JSON; a `,` belongs to it where no other name follows."""
_OPTION = re.compile(rf"((?<![\w-])--?([\w-]+)\s+)(?!-)(?:{_QUOTED}|[^\s\"'])+")
_HIDDEN_AFTER = re.compile(
    rf"""(://)(?:[^\s/@]{{0,4000}}:\S{{0,4000}}|[^\s/@]{{1,4000}})(?=@)
    |(https?://(?:hooks\.slack\.com|discord(?:app)?\.com/api/webhooks|[\w.-]+\.webhook\.office\.com)/)[^\s"']+
    |(\b(?:Bearer|Basic)\s+)[\w.~+/=-]{{8,}}
    |(\bsshpass\s+-p\s*)(?:{_QUOTED}|\S)+
    |((?<!\S)(?:-u|--user|--proxy-user)[\s=]*["']?[^\s:"']+:)[^\s"']+
    |(\b(?:mysql|mariadb)\w*\s(?:[^\n|;]{{0,200}}\s)?-p)[^\s"']+
    |(\b(?:password|passphrase|passwd)\s+)[^\s"'=:]+
    |(--comment[=\s]+)(?:{_QUOTED}|\S)+
    |\b(?:gh[a-z]_|github_pat_|glpat-|hf_|sk-|xox[a-z]-|AKIA|ASIA|eyJ[\w-]+\.)[\w.-]{{10,}}""",
    re.IGNORECASE | re.VERBOSE,
)
"""Secrets that are told by what stands before them, which stays, or by their own beginning."""
_MARK = "\0"
"""Stands for HIDDEN until all is hidden, so that nothing takes that for a value."""


def masked(text: str) -> str:
    """A text with HIDDEN in place of each secret."""
    text = _named_hidden(text.replace(_MARK, ""))
    text = _OPTION.sub(lambda found: found[1] + _MARK if SECRET.search(found[2]) else found[0], text)
    text = _HIDDEN_AFTER.sub(lambda found: (found[found.lastindex] if found.lastindex else "") + _MARK, text)
    return text.replace(_MARK, HIDDEN)


def _named_hidden(text: str) -> str:
    parts, at = [], 0
    for found in _NAMED.finditer(text):
        quote, name, given = found.groups()
        if found.start() < at or not SECRET.search(name):
            continue
        value = _VALUE.match(text, found.end())
        if value is None:
            continue
        end = value.end()
        if quote and ":" in given and quote not in given:  # a header, as in curl -H 'Cookie: a=1; b=2': up to its quote
            end = max(end, re.compile(rf"[^{quote}\n]*").match(text, found.end()).end())  # type: ignore[union-attr]
        parts += [text[at : found.end()], _MARK]
        at = end
    return "".join([*parts, text[at:]])
