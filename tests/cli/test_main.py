"""The command line: verbs, exit codes, and errors as one clear message."""

import json
import subprocess
import sys
import types

import pytest

import megatrain
from megatrain.cli.arguments import text
from megatrain.cli.main import LATER, main
from megatrain.config.load import ConfigError
from megatrain.data.prepare.read import Lines


@pytest.fixture
def room(monkeypatch, tmp_path):
    """Put a stand-in for a module of megatrain in its place: the command line is tested without the rooms, beside a c.yaml."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text("data: {train: PREFIX}")

    def room(name, **functions):
        module = types.ModuleType(name)
        vars(module).update(functions)
        monkeypatch.setitem(sys.modules, name, module)

    return room


def run_python(*arguments):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=60, check=False)


def test_importing_the_command_line_loads_no_heavy_package():
    code = "import sys, json, megatrain.cli.main; megatrain.cli.main.main(['train', '--help']); print(json.dumps(sorted(sys.modules)))"
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr
    loaded = set(json.loads(done.stdout.splitlines()[-1]))
    assert "megatrain.cli.main" in loaded
    assert not loaded & {
        "torch",
        "numpy",
        "yaml",
        "tokenizers",
        "rich",
        "matplotlib",
        "megatrain.program",
        "megatrain.config.load",
    }


def test_python_m_megatrain_and_version():
    done = run_python("-m", "megatrain", "--version")
    assert (done.returncode, done.stdout) == (0, f"megatrain {megatrain.__version__}\n")
    assert run_python("-m", "megatrain", "fly").returncode == 2


def test_a_bad_config_from_the_shell(tmp_path):
    """No traceback, exit 1; with --traceback the way there too."""
    code = (
        "import sys, types, megatrain.cli.main\n"
        "room = types.ModuleType('megatrain.train')\n"
        "def train(path, overrides):\n"
        "    from megatrain.config.load import load\n"
        "    load(path, overrides)\n"
        "room.main = train\n"
        "sys.modules['megatrain.train'] = room\n"
        "sys.exit(megatrain.cli.main.main(sys.argv[1:]))\n"
    )
    (tmp_path / "c.yaml").write_text("model:\n  num_layer: 3\n")
    done = run_python("-c", code, "train", str(tmp_path / "c.yaml"))
    expected = f"{tmp_path}/c.yaml:2: model.num_layer is an unknown key. Did you mean model.num_layers?"
    assert (done.returncode, done.stderr) == (1, f"megatrain: error: {expected}\n")
    loud = run_python("-c", code, "train", str(tmp_path / "c.yaml"), "--traceback")
    assert loud.returncode == 1 and "Traceback" in loud.stderr and expected in loud.stderr


@pytest.mark.parametrize(
    "verb", [[], ["train"], ["generate"], ["data"], *(["data", name] for name in ("tokenizer", "tokenize", "inspect"))]
)
def test_every_verb_has_help_with_an_example(verb, capsys):
    assert main([*verb, "--help"]) == 0
    out = capsys.readouterr().out
    assert (
        out.startswith(f"usage: {' '.join(['megatrain', *verb])} ") and f"example:\n  {' '.join(['megatrain', *verb])}" in out
    )


def test_help_lists_what_is_and_what_is_not_in_this_release(capsys):
    main(["--help"])
    out = capsys.readouterr().out
    now, later = out.split("not in this release")
    assert all(f"    {verb} " in now for verb in ("train", "generate", "data"))
    assert all(f"  {verb} " in later for verb in LATER)


def test_every_verb_of_the_interface_is_known():
    promised = {
        "find-lr",
        "quantize",
        "prune",
    }
    assert set(LATER) == promised


@pytest.mark.parametrize("verb", LATER)
@pytest.mark.parametrize("rest", [[], ["--help"], ["--layouts", "all", "x"]])
def test_verbs_of_a_later_release_are_refused(verb, rest, capsys):
    assert main([*verb.split(), *rest]) == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"megatrain: error: `megatrain {verb}` (") and "is not in this release." in said.err
    assert said.out == ""


@pytest.mark.parametrize(
    "words, part",
    [
        ([], "required: VERB"),
        (["fly"], "invalid choice: 'fly'"),
        (["tra", "c.yaml"], "invalid choice: 'tra'"),
        (["data"], "required: STAGE"),
        (["data", "fly"], "invalid choice: 'fly'"),
        (["train"], "required: CONFIG.yaml"),
        (["train", "c.yaml", "--nope"], "unrecognized arguments: --nope"),
        (["train", "c.yaml", "--trace"], "unrecognized arguments: --trace"),
        (["generate", "c"], "one of the arguments --prompt --input --chat is required"),
        (["generate", "c", "--prompt", "x", "--max-tokens", "0"], "'0' is not a whole number of 1 or more"),
        (
            ["generate", "c", "--prompt", "x", "--temperature", "0"],
            "'0' is not a number above 0; for the most probable token use --greedy",
        ),
        (["generate", "c", "--prompt", "x", "--top-p", "1.5"], "'1.5' is not a probability above 0 and at most 1"),
        (["generate", "c", "--prompt", "x", "--top-p", "nan"], "'nan' is not a probability"),
        (["generate", "c", "--prompt", "x", "--top-k", "-1"], "'-1' is not a whole number"),
        (
            ["generate", "c", "--prompt", "x", "--greedy", "--top-k", "5"],
            "--greedy takes what is most probable, so --top-k means nothing",
        ),
        (
            ["generate", "c", "--prompt", "x", "--beams", "1", "--top-p", "0.9"],
            "--beams 1 looks for what is most probable, so --top-p means nothing",
        ),
        (
            ["generate", "c", "--prompt", "x", "--beams", "1", "--length-penalty", "0.5"],
            "--length-penalty ranks texts of several beams, and there is one. Leave it out, or use --beams 4.",
        ),
        (["generate", "c", "--prompt", "x", "--length-penalty", "nan"], "'nan' is not a number"),
        (["generate", "c", "--prompt", "x", "--seed", "-1"], "'-1' is not a whole number from 0 to 9223372036854775807"),
        (
            ["generate", "c", "--prompt", "caf\udce9"],
            "this text is not UTF-8: the byte 0xe9 stands after 'caf'. Give it in UTF-8; a file in another encoding as "
            '"$(iconv -f ENCODING -t utf-8 FILE)"',
        ),
        (["generate", "c", "--prompt", "x", "--chat"], "argument --chat: not allowed with argument --prompt"),
        (
            ["generate", "c", "--prompt", "x", "--n", "2", "--beams", "3"],
            "--beams 3 gives one text for a prompt, 2 times the same",
        ),
        (["generate", "c", "--input", "x", "--greedy", "--min-p", "0.1"], "so --min-p means nothing. Leave one out."),
        (["generate", "c", "--input", "x", "--beams", "2", "--logprobs", "1"], "leave penalties and --logprobs out"),
        (["generate", "c", "--prompt", "x", "--logprobs", "1"], "are told in rows of JSON. Add --output FILE, or --output -"),
        (
            ["generate", "c", "--prompt", "x", "--system", "y"],
            '--system goes with --chat. In rows it is a message: {"role": "system"',
        ),
        (["generate", "c", "--chat", "--output", "y"], "--chat shows one answer after the other, so --output means nothing"),
        (["generate", "c", "--prompt", "x", "--stop", ""], "an empty text would end every text before it begins"),
        (
            ["generate", "c", "--prompt", "x", "--stop", r"\n"],
            r"\n is a backslash and a letter here. For the character, in bash: --stop $",
        ),
        (["generate", "c", "--prompt", "x", "--min-p", "2"], "'2' is not a number from 0 to 1"),
        (["generate", "c", "--prompt", "x", "--repetition-penalty", "0"], "'0' is not a number above 0"),
        (["generate", "c", "--prompt", "\ud800"], "the lone surrogate U+D800 stands after ''"),
        (["data", "tokenizer", "--input", "a", "--output", "b"], "required: --vocab-size"),
        (["data", "tokenizer", "--input", "--vocab-size", "9", "--output", "b"], "--input: expected at least one argument"),
        (["data", "tokenize", "--input", "a", "--tokenizer", "bytes"], "required: --output"),
        (
            ["data", "tokenize", "--input", "a", "--tokenizer", "bytes", "--output", "b", "--workers", "two"],
            "'two' is not a whole number",
        ),
        (["data", "inspect"], "required: PREFIX"),
    ],
)
def test_wrong_use_exits_2_and_says_why(words, part, capsys):
    assert main(words) == 2
    said = capsys.readouterr()
    assert part in said.err and "megatrain: error: " in said.err and "Traceback" not in said.err
    assert said.out == ""


@pytest.mark.parametrize("code", [0, 1, 75])
def test_train_passes_its_config_and_gives_its_exit_code(room, code):
    calls = []
    room("megatrain.program", main=lambda *given: calls.append(given[:2]) or code)
    assert main(["train", "c.yaml", "optim.lr=1e-3", "log.dir=x"]) == code
    assert main(["train", "c.yaml"]) == code
    assert calls == [("c.yaml", ["optim.lr=1e-3", "log.dir=x"]), ("c.yaml", [])]


def test_generate_passes_its_options(room):
    calls = []
    room("megatrain.verbs.generate", main=lambda options: calls.append(vars(options)) or 0)
    assert main(["generate", "CKPT", "--prompt", "x"]) == 0
    options = "--prompt x --max-tokens 5 --temperature 0.5 --top-k 3 --top-p 0.9 --seed 7 --tokenizer t.json"
    assert main(["generate", "CKPT", *options.split()]) == 0
    assert main(["generate", "CKPT", "--prompt", "x", "--greedy"]) == 0
    assert main(["generate", "CKPT", "--chat", "--stop", "a", "--stop", "b"]) == 0
    defaults = {"checkpoint": "CKPT", "prompt": ["x"], "max_tokens": 64, "seed": 1234, "tokenizer": None, "greedy": False}
    defaults |= {"temperature": 1.0, "top_k": None, "top_p": None, "beams": None, "length_penalty": 0.0}
    defaults |= {
        "input": None,
        "output": None,
        "chat": False,
        "stop": (),
        "n": 1,
        "min_p": None,
        "logprobs": None,
        "system": None,
    }
    defaults |= {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "chat_template": None}
    changed = {"max_tokens": 5, "temperature": 0.5, "top_k": 3, "top_p": 0.9, "seed": 7, "tokenizer": "t.json"}
    assert [{key: call[key] for key in defaults} for call in calls] == [
        defaults,
        defaults | changed,
        defaults | {"greedy": True},
        defaults | {"prompt": None, "max_tokens": 512, "chat": True, "stop": ("a", "b")},
    ]


def test_the_data_verbs_pass_their_options(room, capsys):
    calls = []

    def note(*given, **named):
        calls.append((given, named))
        return f"{len(calls)} calls"

    room("megatrain.data.tokenizers.fitting", train_tokenizer=note)
    room("megatrain.data.tokenizer", load_tokenizer=lambda *given: given, Tokenizer=None)
    room("megatrain.data.prepare.tokenize", tokenize_files=note)
    room("megatrain.data.store_record", describe=lambda prefix: f"store {prefix}", describe_tokenizer=None, read_record=None)
    assert main(["data", "tokenizer", "--input", "a", "b", "--vocab-size", "300", "--output", "t.json"]) == 0
    words = "data tokenizer --input a --vocab-size 300 --output t.json --key body --kind unigram --sample 1M"
    assert main(words.split()) == 0
    assert main(["data", "tokenize", "--input", "a", "--tokenizer", "bytes", "--output", "p"]) == 0
    words = "data tokenize --input a b --tokenizer t.json --output p --workers 2 --append-eod --eod </s> --bos 1 --key body --max-line 64M"
    assert main(words.split()) == 0
    assert main(["data", "inspect", "p"]) == 0
    longer = Lines("body", 64 << 20)
    assert calls == [
        ((["a", "b"], 300, "t.json", "text", "bpe", None), {}),
        ((["a"], 300, "t.json", "body", "unigram", 1 << 20), {}),
        ((["a"], ("bytes", None, None), "p"), {"workers": 1, "append_eod": False, "key": "text", "engine": "auto"}),
        ((["a", "b"], ("t.json", "</s>", "1"), "p"), {"workers": 2, "append_eod": True, "key": longer, "engine": "auto"}),
    ]
    assert capsys.readouterr().out == "3 calls\n4 calls\nstore p\n"


class RoomError(RuntimeError):
    """Stands for an error class of a room."""

    __module__ = "megatrain.transport.group"


def raised_in(module, error):
    """A function, as if defined in `module`, that raises `error`."""
    scope = {"__name__": module, "error": error}
    exec("def main(*given):\n    raise error", scope)
    return scope["main"]


@pytest.mark.parametrize(
    "error, module",
    [
        (ConfigError("said"), "megatrain.program"),
        (RoomError("said"), "megatrain.program"),
        (RoomError("said"), "torch.somewhere"),
        (ValueError("said"), "megatrain.data.indexed"),
        (OSError("said"), "megatrain.program"),
        (FileNotFoundError("said"), "torch.somewhere"),
    ],
)
def test_expected_errors_are_one_line(room, capsys, error, module):
    room("megatrain.program", main=raised_in(module, error))
    assert main(["train", "c.yaml"]) == 1
    assert capsys.readouterr().err == "megatrain: error: said\n"
    with pytest.raises(type(error)):
        main(["train", "c.yaml", "--traceback"])


def test_what_a_file_says_in_a_plain_error_stays_on_one_line(room, capsys):
    long = "a.yaml: \x1b[2J\n" + "[], " * 100_000 + "Copy it again."
    for error in (ValueError(long), OSError(long)):
        room("megatrain.program", main=raised_in("megatrain.data.indexed", error))
        assert main(["train", "c.yaml"]) == 1
        said = capsys.readouterr().err
        assert said.startswith(r"megatrain: error: a.yaml: \x1b[2J\n[], [], ") and said.endswith("[], Copy it again.\n")
        assert said.count("\n") == 1 and len(said) < 3000
    room("megatrain.program", main=raised_in("megatrain.testing.spawn", TimeoutError("2 ranks ran\nrank 1 was in:")))
    assert main(["train", "c.yaml"]) == 1
    assert capsys.readouterr().err == "megatrain: error: 2 ranks ran\nrank 1 was in:\n"


@pytest.mark.parametrize(
    "error, module",
    [
        (ValueError("a fault"), "torch.somewhere"),
        (ValueError("a fault"), "megatrainer"),
        (RuntimeError("a fault"), "megatrain.program"),
        (KeyError("a fault"), "megatrain.program"),
        (AssertionError("a fault"), "megatrain.program"),
    ],
)
def test_faults_keep_their_traceback(room, error, module):
    room("megatrain.program", main=raised_in(module, error))
    with pytest.raises(type(error)):
        main(["train", "c.yaml"])


def test_an_interrupt_exits_130(room, capsys):
    room("megatrain.program", main=raised_in("megatrain.train", KeyboardInterrupt()))
    assert main(["train", "c.yaml"]) == 130
    assert capsys.readouterr().err == "megatrain: interrupted\n"


def test_text_in_utf8_is_read_in_any_locale():
    assert text("caf\udcc3\udca9") == text("café") == "café"
