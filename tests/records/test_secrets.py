"""Secrets in a text are hidden however they are given; what only looks a little like one is kept, and no text takes long."""

import time

import pytest

from megatrain.config.keys import knobs
from megatrain.records.secrets import masked

ALONE = """STORAGE_KEY=hush  AZURE_STORAGE_KEY=hush  OPENAI_KEY=hush  ENCRYPTION_KEY=hush  SECRETKEY=hush  SENTRY_DSN=hush  MYCOOKIE=hush
DB_CREDS=hush  DB_PW=hush  pw: hush  TOKEN_A=hush  HF_TOKEN_READ=hush  API_TOKENS=hush  api-key: hush  PASSWD_DB=hush  PGPASSFILE=hush
encryption key = hush  PASSWORD = hush  mypassword=hush  JWT=hush  MYSQL_PWD=hush  export A_KEY='hush hush'  PASSWORD='hush''hush'
PASSWORD="hu\\"hush"  PASSWORD=hu\\ hush  A_KEY=hu,hush  A_KEY="hush  SSHPASS=hush  --auth-token hush  --pass hush  --passphrase 'hush hush'
-storepass hush  --comment=hush  --comment "pw hush"  passphrase hush  curl -u me:hush  curl --user "me:hush"  wget --proxy-user=me:hush
sshpass -p hush  sshpass -phush  mysql -phush  mysql -u me -phush  https://hooks.slack.com/services/T0/B0/hush  Basic hushhushhush
https://discord.com/api/webhooks/1/hush  'Cookie: a=hush; b=hush'  "X-Api-Key: hush hush"  login me password hush  Token: Bearer hush
redis://:hush@host:6379/0  AKIAhushhushhush  sk-hushhushhush  {"client_secret":"hush"}  --export=ALL,WANDB_KEY=hush,STORAGE_KEY=hush
OPTIONS="a=1 A_KEY=hush"  HF_TOKEN=hush;STORAGE_KEY=hush  https://h/a?x=1&sig=hush"""


@pytest.mark.parametrize("text", [text for line in ALONE.splitlines() for text in line.split("  ")])
def test_a_secret_is_hidden(text):
    shown = masked(f"{text}\nsrun megatrain train")
    assert "hush" not in shown and "(not kept)" in shown and shown.endswith("\nsrun megatrain train"), shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://me:hu@sh/x@proxy:8080", "http://(not kept)@proxy:8080"),
        ("https://hush@github.com/a", "https://(not kept)@github.com/a"),
        ("Server=db;Password=hush;Database=d", "Server=db;Password=(not kept);Database=d"),
        ("DB_PASS='hush and hush' x", "DB_PASS=(not kept) x"),
        ('{"api_key": "hush", "n": 1}', '{"api_key": (not kept), "n": 1}'),
        ('{"api_key":"hush","n":1}', '{"api_key":(not kept),"n":1}'),
        ("https://h/a?sig=hush&x=1", "https://h/a?sig=(not kept)&x=1"),
        ("ALL,WANDB_KEY=hush,OMP_NUM_THREADS=2", "ALL,WANDB_KEY=(not kept),OMP_NUM_THREADS=2"),
        ("--password hush --steps 3", "--password (not kept) --steps 3"),
        ("curl -u me:hush https://h/a", "curl -u me:(not kept) https://h/a"),
        ("-H 'Cookie: a=1; b=2' x=1", "-H 'Cookie: (not kept)' x=1"),
        ("ghp_0123456789abcdef", "(not kept)"),
    ],
)
def test_what_stands_around_a_secret_is_kept(text, shown):
    assert masked(text) == shown


@pytest.mark.parametrize(
    "text",
    [
        "log.dir=a data.tokenizer=a.json --tokenizer a.json --max-tokens 5 TOKENIZERS_PARALLELISM=false tokens: a table",
        "bypass=1 path=/a compat: yes http://host:80/a PATH=/bin author=x",
        "except KeyboardInterrupt:\n    print('x')",
        "mkdir -p runs/a && ssh -p 22 host; docker run -u 1000 x; cp -u a b",
    ],
)
def test_what_is_no_secret_is_kept(text):
    assert masked(text) == text


def test_no_key_of_the_config_is_a_secret():
    for knob in knobs():
        assert masked(f"{knob.key}=a") == f"{knob.key}=a"


def test_no_text_takes_long():
    begun = time.process_time()
    for piece in (
        "a",
        "key",
        "key ",
        '"',
        'key="',
        "'key: ",
        "-",
        "mysql ",
        "-u ",
        "a:",
        "://a",
        "eyJ",
        " ",
        "\\",
        "--key ",
        "password ",
    ):
        masked(piece * (60_000 // len(piece)))
    assert time.process_time() - begun < 3
