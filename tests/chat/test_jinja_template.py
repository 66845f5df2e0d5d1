"""Templates are programs of somebody else: what they may do, how long, and what is said of those that do more
(megatrain.chat.jinja_process)."""

import pytest

from megatrain.chat.conversation import ChatError
from megatrain.chat.jinja_template import JinjaProcess, template_of, templates_beside, token_variables


@pytest.fixture(scope="module")
def process():
    return JinjaProcess()


def test_the_environment_is_that_of_transformers(process):
    template = (
        "{% for n in [1, 2, 3, 4] %}\n  {% if n == 2 %}{% continue %}{% endif %}\n{% if n == 4 %}{% break %}{% endif %}\n"
        "{{ n }}{% endfor %}{% generation %}{{ {'b': '你<', 'a': [1]} | tojson }}{% endgeneration %}{{ undefined_name }}"
        "{% set ns = namespace(x=1) %}{% set ns.x = ns.x + 1 %}{{ ns.x }}{{ strftime_now('%%') }}{{ dict(a=1).items() | list }}"
    )
    assert process.render(template, {}, "t") == "13" + '{"b": "你<", "a": [1]}' + "2%[('a', 1)]"
    assert process.render("{{ [1, 2] | tojson(indent=1, separators=(',', ':')) }}", {}, "t") == "[\n 1,\n 2\n]"


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ ''.__class__.__mro__ }}", "SecurityError: access to attribute '__class__' of 'str' object is unsafe"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{% set ns = namespace() %}{% set ns.__class__ = 1 %}", "SecurityError"),
        ("{{ cycler.__init__.__globals__ }}", "SecurityError"),
        ("{{ ('%s' | attr('format'))('a').__class__.__mro__ }}", "SecurityError"),
        ("{{ range(10**9) | list }}", "OverflowError: Range too big"),
        ("{{ 'a' * 10**9 }}", "it needs too much memory"),
        (
            "{% set ns = namespace(s='a' * 1000) %}{% for _ in range(99) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
            "too much memory",
        ),
        ("{{ '%0999999999d' % 1 }}", "it needs too much memory"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "it calls itself without end, or is nested too deep"),
        ("{{ " + "(" * 20_000 + "1" + ")" * 20_000 + " }}", "nested too deep"),
        ("{{ 'ab' * 10**7 }}", "its text has 20,000,000 characters, and 16,777,216 at the most are read"),
        ("{% if %}", "TemplateSyntaxError: Expected an expression, got 'end of statement block'"),
        ("{% include 'x' %}", "TypeError: no loader for this environment specified"),
        ("{{ raise_exception('only ' ~ messages[0]) }}", "TemplateError: only 1"),
    ],
)
def test_what_a_template_may_not(process, template, said):
    with pytest.raises(ChatError) as error:
        process.render(template, {"messages": [1]}, "bad")
    assert str(error.value).startswith("the chat template bad ")
    assert said in str(error.value)
    assert process.render("{{ 1 }}", {}, "good") == "1"


def test_a_template_without_end_is_given_up_and_the_next_one_is_rendered():
    process = JinjaProcess(seconds=0.2)
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(
        ChatError, match=r"^the chat template of x cannot be used: it takes more than 0\.2 s\. Choose another one: --chat"
    ):
        process.render(loop, {}, "of x")
    assert process.render("{{ 1 }}", {}, "good") == "1"


def test_a_template_sees_none_of_the_program(process):
    assert process.render(
        "{{ self }}{{ messages is defined }}{{ config is defined }}{{ environ is defined }}", {}, "t"
    ).endswith("FalseFalseFalse")


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ChatError, match=r"tokenizer_config\.json cannot be read: .*Mend it or take it away\.$"):
        templates_beside(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": 3}')
    with pytest.raises(ChatError, match=r"chat_template of .* is no text and no list of templates\. Mend it\.$"):
        templates_beside(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "chat_template.jinja").symlink_to("/etc/hostname")
    with pytest.raises(ChatError, match=r"chat_template\.jinja cannot be read: it is a link that leads out of its folder"):
        templates_beside(tmp_path)
    large = tmp_path / "large.jinja"
    large.write_bytes(b"a" * (1 << 20) + b"b")
    with pytest.raises(
        ChatError, match=r"large\.jinja cannot be read: it has 1,048,577 bytes, and 1,048,576 at the most are read"
    ):
        template_of(large)
    large.write_bytes("ä".encode("utf-16"))
    with pytest.raises(ChatError, match=r"large\.jinja cannot be read: this is UTF-16, not UTF-8"):
        template_of(large)


def test_names_of_tokens_are_those_of_the_files(tmp_path):
    assert token_variables(None) == token_variables(tmp_path) == {}
    (tmp_path / "special_tokens_map.json").write_text('{"bos_token": "<a>", "pad_token": "<p>", "unk_token": null}')
    (tmp_path / "tokenizer_config.json").write_text(
        '{"bos_token": {"content": "<b>"}, "eos_token": "<e>", "model_max_length": 8}'
    )
    assert token_variables(tmp_path) == {"bos_token": "<b>", "pad_token": "<p>", "eos_token": "<e>"}


def test_without_jinja_the_command_that_installs_it_is_told(monkeypatch, tmp_path):
    (tmp_path / "jinja2.py").write_text("raise ImportError('no jinja2')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(ChatError, match=r"^a chat template needs jinja2: pip install 'megatrain\[chat\]'$"):
        JinjaProcess().render("a", {}, "t")
