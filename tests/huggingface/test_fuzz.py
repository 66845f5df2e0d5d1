"""Random config.json files against transformers: what is taken means the same model, and what is refused is refused by name."""

import json
import warnings

import fuzzing
import pytest
import torch

import megatrain
from megatrain.checkpoint.together import CheckpointError
from megatrain.config.load import from_dict
from megatrain.config.source import ConfigError
from megatrain.huggingface.config import config_of, model_of

hf = pytest.importorskip("transformers", reason="pip install 'megatrain[test]'")
import hf_random  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

TOKENS = 22
"""More than the windows and original lengths that are drawn, and no more than the positions."""
CLOSE = 3e-4
"""In standard deviations of the logits: transformers computes norms and rotations in float32, and little here is well-conditioned."""


def theirs(config, state=None):
    """The model that transformers makes of a config.json, with the same random weights at every call, or those given."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hf.logging.set_verbosity_error()
        made = hf.AutoConfig.for_model(**json.loads(json.dumps(config)))
        made.dtype = None
        model = hf.AutoModelForCausalLM.from_config(made, dtype=torch.float32).eval()
    if state is not None:
        model.load_state_dict(state)
        return model
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            centre = 1.0 if p.dim() == 1 and name.endswith("weight") else 0.0
            p.copy_(centre + 0.3 * torch.randn(p.shape, generator=generator))
    return model


def stored(model, config, path):
    path.mkdir(exist_ok=True)
    tied = config.get("tie_word_embeddings", model.config.tie_word_embeddings)
    state = {name: t.contiguous() for name, t in model.state_dict().items() if not (tied and name == "lm_head.weight")}
    save_file(state, path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_text(json.dumps(config))
    return path


def logits(model, vocab):
    ids = torch.randint(vocab, (2, TOKENS), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        found = model(ids)
    return getattr(found, "logits", found)


def apart(got, want):
    """Largest difference, in standard deviations of what is wanted."""
    return float((got - want).abs().max() / want.std())


def check_legal(config, path):
    """Both take a config, mean the same, and transformers finds it again in what is exported."""
    model = theirs(config)
    want = logits(model, config["vocab_size"])
    assert apart(logits(megatrain.load(stored(model, config, path)), config["vocab_size"]), want) < CLOSE
    ours = from_dict({"model": model_of(config)}).model
    exported = config_of(ours, config["vocab_size"], config["model_type"])
    assert apart(logits(theirs(exported, model.state_dict()), config["vocab_size"]), want) < 1e-5, exported


def check_changed(config, name, path):
    """Either refused by name, or taken and meant as transformers means it."""
    try:
        model = theirs(config)
        want = logits(model, config["vocab_size"])
    except Exception:  # transformers raises all kinds
        return
    try:
        got = logits(megatrain.load(stored(model, config, path)), config["vocab_size"])
    except (CheckpointError, ConfigError) as error:
        assert name in str(error) or "rotates" in str(error), error
    else:
        assert apart(got, want) < CLOSE


def fuzz(limit, path):
    for case, rng in fuzzing.cases(limit, "hugging face"):
        legal = hf_random.config(rng)
        try:
            if rng.random() < 0.6:
                check_legal(legal, path / "hf")
            else:
                changed, name, _ = hf_random.changed(rng, legal)
                legal = changed
                check_changed(changed, name, path / "hf")
        except Exception as error:
            raise AssertionError(f"{case}: {json.dumps(legal)}: {type(error).__name__}: {error}") from error


def test_random_configs_are_what_transformers_makes_of_them(tmp_path, one_thread):
    fuzz(fuzzing.seconds(), tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_many_random_configs_are_what_transformers_makes_of_them(tmp_path, one_thread):
    fuzz(fuzzing.seconds(slow=True), tmp_path)
