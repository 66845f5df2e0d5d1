"""The verbs about weights, and runs that start from given ones, as people type them."""

import json

import jobs
import pytest

from megatrain.cli import main as cli

pytest.importorskip("transformers", reason="pip install 'megatrain[test]'")
from hf_models import tensors_of, write


@pytest.fixture
def house(tmp_path):
    """Data of a vocabulary of 101, and a config without a model section."""
    jobs.write_store(tmp_path / "data")
    tree = jobs.tiny(tmp_path / "data", tmp_path / "run", train={"steps": 3, "precision": "fp32"})
    tree["model"] = {"seq_length": 16}
    jobs.write_config(tmp_path / "config.yaml", tree)
    return tmp_path


def run(house, *words):
    return jobs.here(str(house / "config.yaml"), *words)


def test_a_run_starts_from_hugging_face_and_goes_back_there(house, capsys):
    source = write("qwen3", house / "hf")
    (source / "tokenizer.json").write_text("{}")
    ended = run(house, f"model.init_from={source}")
    assert ended.code == 0, ended.err
    config = (house / "run/config.yaml").read_text()
    assert f"num_layers: 3  # init_from {source}" in config and "seq_length: 16  # " in config
    assert cli.main(["export", str(house / "run"), str(house / "back")]) == 0
    new, old = tensors_of(house / "back"), tensors_of(source)
    assert new.keys() == old.keys() and all(new[n].shape == old[n].shape and not new[n].equal(old[n]) for n in new)
    assert (house / "back/tokenizer.json").read_text() == "{}"
    again = run(house, f"model.init_from={source}", "train.steps=5", "optim.lr=3e-3")
    assert again.code == 0 and "resumed from" in again.out
    assert "changed since then: optim.lr: 0.01 -> 0.003" in again.out
    assert "changed since then: train.steps: 3 -> 5" in again.out


def test_a_run_starts_from_a_checkpoint_with_its_shapes_and_keeps_a_longer_table_of_positions(house):
    assert cli.main(["import", str(write("gpt2", house / "hf")), str(house / "imported")]) == 0
    start = [f"model.init_from={house / 'imported'}", "optim.warmup_steps=0"]
    ended, too_long = run(house, *start, "train.steps=2"), run(house, *start, "model.seq_length=65")
    assert ended.code == 0, ended.err
    said = (house / "run/config.yaml").read_text()
    assert "hidden_size: 48  # init_from" in said
    assert "seq_length: 16  # " in said and "max_positions: 64  # init_from" in said
    assert (
        too_long.code == 1 and "model.seq_length=65 is more than model.max_positions=64, the rows of the table" in too_long.err
    )
    assert "Use model.seq_length=64 or less" in too_long.err
    again = run(house, *start, "train.steps=3")
    assert again.code == 0 and "resumed from" in again.out, again.err
    assert cli.main(["export", str(house / "run"), str(house / "back")]) == 0
    config, tensors = json.loads((house / "back/config.json").read_text()), tensors_of(house / "back")
    assert config["n_positions"] == 64 and tensors["transformer.wpe.weight"].shape == (64, 48)
    unseen, before = tensors["transformer.wpe.weight"][16:], tensors_of(house / "hf")["transformer.wpe.weight"][16:]
    assert unseen.allclose(before * (unseen.norm() / before.norm())) and 0.99 < unseen.norm() / before.norm() < 1  # decay alone
    assert cli.main(["import", str(house / "back"), str(house / "once more")]) == 0
    once_more = (house / "once more/checkpoints/step_00000000/manifest.json").read_text()
    assert "seq_length: 64" in once_more and "max_positions: 64" in once_more


def test_resume_takes_a_directory_of_hugging_face(house):
    source = write("llama", house / "hf")
    ended = run(house, f"model.init_from={source}", f"checkpoint.resume={source}", "train.steps=3")
    assert ended.code == 0, ended.err
    assert f"resumed from {source} at step 0" in ended.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model.init_from=nowhere"], "model.init_from=nowhere: no whole checkpoint in nowhere"),
        (["model.init_from=HF", "model.num_layers=2"], "has, and the model section does not give, "),
        (["model.init_from=HF", "model.hidden_size=96"], "and the model gives"),
    ],
)
def test_weights_that_do_not_fit_are_refused(house, words, message):
    source = str(write("llama", house / "hf"))
    ended = run(house, *(word.replace("HF", source) for word in words))
    assert ended.code == 1 and message in ended.err and "Traceback" not in ended.err


def test_what_is_in_a_checkpoint_and_is_it_whole(house, capsys):
    assert cli.main(["import", str(write("bloom", house / "hf")), str(house / "run")]) == 0
    capsys.readouterr()
    assert cli.main(["checkpoint", "inspect", str(house / "run"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["step"] == 0 and said["kinds"] == {"weights": ["float32"]} and said["parameters"] == 89_856
    assert cli.main(["checkpoint", "verify", str(house / "run")]) == 0
    assert "step_00000000: whole" in capsys.readouterr().out
    file = next((house / "run/checkpoints/step_00000000").glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    assert cli.main(["checkpoint", "verify", str(house / "run")]) == 1
    assert "DAMAGED" in capsys.readouterr().out
    for words in (["checkpoint", "verify", str(house / "nowhere")], ["import", str(house), str(house / "x")]):
        assert cli.main(words) == 1
    assert cli.main(["export", str(house / "run"), str(house / "back")]) == 1
    assert not (house / "back").exists()


def test_a_damaged_checkpoint_is_passed_over_with_an_event(house):
    tree = ["checkpoint.save_every=1", "model.num_layers=2", "model.hidden_size=32", "model.num_attention_heads=4"]
    assert run(house, *tree, "model.vocab_size=101").code == 0
    newest = house / "run/checkpoints/step_00000003"
    file = next(newest.glob("exp_avg_sq*"))
    file.write_bytes(file.read_bytes()[:-1])
    again = run(house, *tree, "model.vocab_size=101")
    assert again.code == 0 and "passing over the damaged checkpoint" in again.err
    told = [event for event in jobs.events(house / "run") if event["event"] in ("resume", "damaged_checkpoint")]
    assert [event["event"] for event in told] == ["damaged_checkpoint", "resume"]
    assert file.name in told[0]["message"] and told[1]["checkpoint"].endswith("step_00000002")
    assert (house / "run/checkpoints/damaged_step_00000003" / file.name).exists()


def test_changes_are_told_by_value_and_a_new_key_is_none(house):
    from megatrain.checkpoint.manifest import Manifest
    from megatrain.config.load import dump, from_dict
    from megatrain.parallel.mesh import MeshShape
    from megatrain.resuming.changed import changes

    was = from_dict({"model": {"dropout": 0.1}, "optim": {"betas": [0.9, 0.99]}})
    text = "".join(line for line in dump(was).splitlines(keepends=True) if "rope_theta" not in line)
    manifest = Manifest(1, 0.0, {}, MeshShape(), (), {}, text)
    assert list(changes(manifest, was)) == []
    said = {
        "num_query_groups": 8,
        "ffn_hidden_size": 2048,
        "max_positions": 512,
        "head_dim": 64,
        "vocab_size": 101,
        "qkv_bias": True,
    }
    assert list(changes(manifest, from_dict({"model": {"dropout": 0.1, **said}, "optim": {"betas": [0.9, 0.99]}}))) == []
    ((key, *values),) = changes(
        manifest, from_dict({"model": {"dropout": 0.1, "head_dim": 32}, "optim": {"betas": [0.9, 0.99]}})
    )
    assert (key, values) == ("model.head_dim", [None, 32])
    now = from_dict({"model": {"rope_theta": 5e5}, "optim": {"betas": [0.9, 0.99]}})
    assert list(changes(manifest, now)) == [("model.rope_theta", 10000.0, 5e5), ("model.dropout", 0.1, 0.0)]
