import pytest

from megatrain.config.source import ConfigError
from megatrain.evaluation.task_keys import read_keys

CHOICE = """\
output_type: multiple_choice
items: items.jsonl
doc_to_text: question
doc_to_choice: choices
doc_to_target: answer
"""
WRITES = "output_type: generate_until\nitems: items.jsonl\ndoc_to_text: q\ndoc_to_target: a\n"


def read(tmp_path, text):
    path = tmp_path / "task.yaml"
    path.write_text(text, encoding="utf-8")
    return read_keys(path)


def test_defaults_and_what_the_harness_has(tmp_path):
    keys, warnings = read(
        tmp_path,
        """\
task: mine
dataset_path: json
dataset_kwargs: {data_files: {test: a.jsonl, train: b.jsonl}, cache_dir: c}
test_split: test
fewshot_split: train
fewshot_config: {sampler: first_n}
num_fewshot: 5
output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_choice: ["no", "yes"]
doc_to_target: 1
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - metric: acc_mutual_info
metadata: {version: 1.0}
""",
    )
    assert (keys.task, keys.num_fewshot, keys.doc_to_choice, keys.doc_to_target) == ("mine", 5, ("no", "yes"), 1)
    assert keys.dataset_kwargs.data_files == (("test", "a.jsonl"), ("train", "b.jsonl"))
    assert keys.fewshot_config.sampler == "first_n"
    assert keys.metrics == ("acc", "acc_pmi")
    assert (keys.target_delimiter, keys.fewshot_delimiter, warnings) == (None, "\n\n", ())
    plain, _ = read(tmp_path, CHOICE)
    assert plain.metrics == ("acc", "acc_norm", "acc_bytes", "acc_tokens", "acc_pmi")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (CHOICE + "doc_to_choise: c\n", "task.yaml:6: doc_to_choise is an unknown key. Did you mean doc_to_choice?"),
        (CHOICE + "wholly: 1\n", "task.yaml:6: wholly is an unknown key. Known keys: task, output_type, items,"),
        (
            CHOICE + "process_docs: f\n",
            "task.yaml:6: process_docs is not taken here: it runs Python of the harness. Write the items as they shall be asked, or use "
            "lm-evaluation-harness with the adapter.",
        ),
        (CHOICE + "process_docs: !function a.b\n", "task.yaml:6: a YAML tag (!) is not accepted in a config."),
        (CHOICE.replace("multiple_choice", "multiple_choise"), "task.yaml:1: output_type is the text 'multiple_choise'; expected one of"),
        (CHOICE + "num_fewshot: -1\n", "task.yaml:6: num_fewshot=-1 must be 0 or more. Use for example 0."),
        (CHOICE + "num_fewshot: '3'\n", "num_fewshot is the text '3'; expected integer. Write 3 without quotes."),
        (
            CHOICE + "generation_kwargs: {max_gen_toks: 0}\n",
            "task.yaml:6: generation_kwargs.max_gen_toks=0 must be greater than 0. Use for example 256.",
        ),
        (
            CHOICE + "generation_kwargs: {max_gen_token: 3}\n",
            "generation_kwargs.max_gen_token is an unknown key. Did you mean generation_kwargs.max_gen_toks?",
        ),
        (CHOICE.replace("doc_to_target: answer\n", ""), "doc_to_target is missing, which output_type multiple_choice needs."),
        (CHOICE.replace("items: items.jsonl\n", ""), "neither items nor dataset_kwargs.data_files is given. Write `items: FILE.jsonl`."),
        (CHOICE + "dataset_path: allenai/ai2_arc\n", "task.yaml:6: dataset_path is allenai/ai2_arc, and items are read from files here."),
        (CHOICE + "dataset_kwargs: {data_files: b.jsonl}\n", "both items and dataset_kwargs.data_files are"),
        (CHOICE + "metric_list: [{metric: bleu}]\n", "has no metric 'bleu'. Use acc, acc_norm, acc_bytes, acc_tokens or acc_pmi."),
        (CHOICE + "metric_list: [acc]\n", "metric_list[0] is the text 'acc', not a mapping. Write its keys as {metric,"),
        (
            WRITES + "doc_to_choice: c\n",
            "doc_to_choice=c has no effect: it has one when output_type is multiple_choice, classification, cloze or loglikelihood, and "
            "here output_type=generate_until.",
        ),
        ("", "task.yaml is empty. Write its keys, for example `output_type: multiple_choice`."),
        ("- 1\n", "task.yaml: the file is a list, not a mapping. Its top level has keys, for example `output_type: multiple_choice`."),
        ("items: a.jsonl\n", "task.yaml: output_type is missing. Write one of multiple_choice, classification, cloze,"),
    ],
)  # fmt: skip
def test_what_is_refused(tmp_path, text, message):
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, text)
    assert message in str(caught.value)


def test_a_backslash_and_a_letter_in_until_are_told(tmp_path):
    _, warnings = read(tmp_path, WRITES + "generation_kwargs: {until: ['\\n']}\n")
    (said,) = warnings
    assert said.endswith(
        "task.yaml:5: generation_kwargs.until has a backslash and a letter ('\\\\n'), not a line's end: YAML reads \\n so in double quotes "
        'alone. Write "\\n"'
    )
    keys, warnings = read(tmp_path, WRITES + 'generation_kwargs: {until: "\\n", do_sample: true, temperature: 0.0}\n')
    assert (warnings, keys.generation_kwargs.stops, keys.generation_kwargs.greedy) == ((), ("\n",), True)
