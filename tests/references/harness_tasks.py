"""Tasks of lm-evaluation-harness from local files, a small model that both sides read, and the harness' own `hf` backend for it."""

import contextlib
import importlib
import json
import sys
import types
import warnings
from types import SimpleNamespace

import torch
import transformers
import yaml

PLACES = ["Paris", "巴黎", "Answer is", "a b c"]
CHOICES = [{"q": f"Question {n}: where is it", "c": PLACES, "a": n % 4} for n in range(5)]
ROWS = {
    "choices": [*CHOICES, {"q": "中国", "c": PLACES[:2], "a": 1}, {"q": "Paris " * 120, "c": PLACES, "a": 0}],
    "rolls": [{"t": "Ans wer is Paris. " * n + "中国"} for n in (1, 3, 8, 20)],
    "writes": [{"q": f"Ans {n} 中国", "a": "x"} for n in range(5)],
}
KINDS = {
    "choices": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "target_delimiter": " ",
        "doc_to_choice": "c",
        "doc_to_target": "a",
        "metric_list": [
            {"metric": name, "aggregation": "mean", "higher_is_better": True}
            for name in ("acc", "acc_norm", "acc_bytes", "acc_mutual_info")
        ],
    },
    "rolls": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{t}}",
        "metric_list": [{"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}],
    },
    "writes": {
        "output_type": "generate_until",
        "doc_to_text": "{{q}}",
        "doc_to_target": "a",
        "generation_kwargs": {"until": ["a", "\n"], "max_gen_toks": 24, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
}


def write_tasks(folder):
    """A multiple-choice, a rolling and a generating task, with their items beside them. Returns the folder."""
    folder.mkdir()
    for name, rows in ROWS.items():
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        data = {"data_files": {"test": str(path)}, "cache_dir": str(folder / "cache")}
        asked = {"task": name, "dataset_path": "json", "dataset_kwargs": data, "test_split": "test", "num_fewshot": 0}
        (folder / f"{name}.yaml").write_text(
            yaml.safe_dump({**asked, **KINDS[name]}, allow_unicode=True, sort_keys=False), encoding="utf-8"
        )
    return folder


CHAT = (
    "{{ bos_token }}{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""A template of ChatML's kind that puts what opens a text by itself."""


def write_model(folder, library, opening=False):
    """A small LLaMA of transformers with weights of a large spread, and its tokenizer; opening: it has a <s>, and converses."""
    if opening:
        library.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    size = max(library.get_vocab().values()) + 1
    ids = {"pad_token_id": None, "bos_token_id": int(opening), "eos_token_id": 0}
    shape = {
        "num_hidden_layers": 2,
        "hidden_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 80,
    }
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**shape, max_position_embeddings=96, vocab_size=size, **ids)
        )
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(float(p.dim() == 1) + 0.3 * torch.randn_like(p))
        model.save_pretrained(folder)
    library.save(str(folder / "tokenizer.json"))
    names = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "bos_token": "<s>" if opening else "<|endoftext|>"}
    names |= {"chat_template": CHAT} if opening else {}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **names}))


@contextlib.contextmanager
def pretended_accelerate():
    """What the harness' `hf` backend imports of accelerate, of which one process with a finished model uses nothing."""
    importlib.import_module("transformers.utils.import_utils").is_accelerate_available()  # remembers that there is none
    made, more = types.ModuleType("accelerate"), types.ModuleType("accelerate.utils")
    made.Accelerator = made.InitProcessGroupKwargs = SimpleNamespace
    made.find_executable_batch_size = lambda **_: lambda function: function
    more.get_max_memory = dict
    absent = [name for name in ("accelerate", "accelerate.utils") if name not in sys.modules]
    sys.modules.update({name: {"accelerate": made, "accelerate.utils": more}[name] for name in absent})
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]


def hf_backend(folder, **settings):
    """The harness' own backend of a directory of transformers, in float32, one text at a time."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pretended_accelerate():
            backend = importlib.import_module("lm_eval.models.huggingface").HFLM
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        codec = transformers.AutoTokenizer.from_pretrained(folder)
        return backend(pretrained=model, tokenizer=codec, device="cpu", batch_size=1, **settings)


def items(results, task):
    """The answers to each item's requests, in order."""
    samples = sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
    return [answer for sample in samples for (answer,) in sample["resps"]]


def close(found, wanted):
    """Sums are equal to 1e-5 of them, everything else is equal."""
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        if isinstance(other, str):
            assert one == other
        else:
            pairs = zip(one, other, strict=True) if isinstance(other, tuple | list) else [(one, other)]
            for a, b in pairs:
                assert a == b if isinstance(b, bool) else abs(a - b) <= 1e-5 * max(1, abs(b))
