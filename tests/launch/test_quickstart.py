"""The steps of launch/quickstart.py, without training: what is chosen, what is skipped, what is refused."""

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from megatrain.config.load import load
from megatrain.evaluation.tasks import shipped_names

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "launch/configs/quickstart.yaml"


@pytest.fixture(scope="module")
def quickstart() -> ModuleType:
    spec = importlib.util.spec_from_file_location("quickstart", ROOT / "launch/quickstart.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(ROOT / "launch"))  # as python does for a script
    sys.modules["quickstart"] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(ROOT / "launch"))
    return module


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Any:
    def set_count(count: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)

    return set_count


def test_the_config_is_tensor_parallel_and_near_ten_million_parameters() -> None:
    config = load(CONFIG).config
    model = config.model
    assert (config.parallel.tensor_parallel_size, config.parallel.sequence_parallel) == (2, True)
    gate = 3 if model.gated else 2
    layer = 4 * model.hidden_size**2 + gate * model.hidden_size * model.ffn_size
    assert model.vocab_size is not None
    assert 9e6 < model.num_layers * layer + model.vocab_size * model.hidden_size < 14e6


@pytest.mark.parametrize(("count", "device", "ranks"), [(0, "cpu", 2), (1, "cuda", 1), (2, "cuda", 2), (8, "cuda", 2)])
def test_layout(quickstart: ModuleType, gpus: Any, tmp_path: Path, count: int, device: str, ranks: int) -> None:
    gpus(count)
    layout = quickstart.choose_layout(load(CONFIG).config, tmp_path)
    assert (layout.device, layout.ranks) == (device, ranks)
    assert layout.precision in layout.why
    assert ("NCCL allows one process per GPU" in layout.why) == (count == 1)


def test_precision_is_measured_once(quickstart: ModuleType, gpus: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(0)
    config = load(CONFIG).config
    monkeypatch.setattr(quickstart, "bf16_is_faster", lambda: True)
    first = quickstart.choose_layout(config, tmp_path)
    monkeypatch.setattr(quickstart, "bf16_is_faster", lambda: False)
    assert quickstart.choose_layout(config, tmp_path) == first
    assert first.precision == "bf16"


def test_once_repeats_what_did_not_finish(quickstart: ModuleType, tmp_path: Path) -> None:
    made: list[int] = []

    def fails() -> None:
        made.append(1)
        raise quickstart.Failed("no")

    for _ in range(2):
        with pytest.raises(quickstart.Failed):
            quickstart.once(tmp_path / "stamp", "a step", fails)
    quickstart.once(tmp_path / "stamp", "a step", lambda: made.append(2))
    quickstart.once(tmp_path / "stamp", "a step", lambda: made.append(3))
    assert made == [1, 1, 2]


def test_text_key_follows_the_text(quickstart: ModuleType, tmp_path: Path) -> None:
    config = load(CONFIG).config
    (tmp_path / "a").mkdir()
    (tmp_path / "a/1.txt").write_text("one")
    names = {quickstart.text_key(None, config), quickstart.text_key([tmp_path / "a"], config)}
    assert quickstart.text_key([tmp_path / "a"], config) in names
    (tmp_path / "a/2.txt").write_text("two")
    names.add(quickstart.text_key([tmp_path / "a"], config))
    names.add(quickstart.text_key([tmp_path / "a/2.txt"], config))
    assert len(names) == 4


def write_losses(run: Path, losses: list[float], **more: float) -> None:
    run.mkdir(parents=True, exist_ok=True)
    rows = [json.dumps({"step": i + 1, "loss": loss, **more}) for i, loss in enumerate(losses)]
    (run / "metrics.jsonl").write_text("\n".join(rows) + "\n")


def test_reduced_run_must_learn(quickstart: ModuleType, tmp_path: Path) -> None:
    write_losses(tmp_path, [8.0, 7.0, 6.0, 5.0, 4.0])
    quickstart.require_learning(tmp_path)
    write_losses(tmp_path, [8.0, 8.1, 8.0, 8.1, 8.2])
    with pytest.raises(quickstart.Failed, match=r"did not fall: 8\.000 over the first 1 steps, 8\.200"):
        quickstart.require_learning(tmp_path)


@pytest.mark.parametrize(
    ("minutes", "train_tokens", "steps"),
    [
        (10, 10**9, (600 - 4 * 10 * 2.2 / 3) // 2.2),  # 2 s a step plus the slack; 4 evaluations of 10 batches at a third
        (0.01, 10**9, 30),
        (600, 4096 * 50, 8 * 50),
    ],
)
def test_steps_fit_the_minutes(
    quickstart: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, minutes: float, train_tokens: int, steps: float
) -> None:
    clock = iter([0.0, 32.0])
    monkeypatch.setattr(quickstart, "time", argparse.Namespace(monotonic=lambda: next(clock)))
    sizes = {"train": train_tokens, "valid": 40960}
    monkeypatch.setattr(quickstart, "TokenStore", lambda prefix: argparse.Namespace(tokens=sizes[prefix.name]))
    monkeypatch.setattr(quickstart, "launch", lambda *_: write_losses(tmp_path / "probe_x", [8.0] * 16, step_seconds=2.0))
    options = argparse.Namespace(dir=tmp_path, minutes=minutes, config=CONFIG)
    config = load(CONFIG, ["train.global_batch_size=16"]).config
    assert quickstart.plan_steps(options, config, None, tmp_path, "x") == int(steps)
    assert not (tmp_path / "probe_x").exists()


@pytest.mark.parametrize(
    ("step_seconds", "done", "steps"),
    [
        (2.0, 100, None),  # 100 seconds of 250 left: too early to tell
        (1.1, 120, None),  # a tenth late
        (2.0, 63, 125),  # twice as slow
        (0.5, 251, 500),  # twice as fast
        (0.1, 1251, 2000),  # as long as is good for it
        (2.0, 200, 201),  # over time already
    ],
)
def test_the_plan_changes_with_the_speed(
    quickstart: ModuleType, tmp_path: Path, step_seconds: float, done: int, steps: int | None
) -> None:
    change = quickstart.change_of_plan
    assert change(tmp_path, 250.0, 2000, 250) is None  # nothing written yet
    seconds = 1000.0 if steps is None and step_seconds == 2.0 else 250.0
    write_losses(tmp_path, [5.0] * done, step_seconds=step_seconds)
    assert change(tmp_path, seconds, 2000, 250) == steps
    if steps is not None:
        assert change(tmp_path, seconds, 2000, steps) is None or done * step_seconds > seconds  # the new plan is good


@pytest.mark.parametrize(
    ("name", "tasks"), [("quickstart", ["python_choice", "text_en"]), ("glm_tiny", ["python_choice", "infill_en"])]
)
def test_it_shows_what_the_model_writes_as_it_learns_and_how_it_does_on_two_tasks(
    quickstart: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, tasks: list[str]
) -> None:
    config = load(ROOT / f"launch/configs/{name}.yaml", ["data.train=PREFIX", "data.tokenizer=bytes"]).config
    launched: list[list[str]] = []
    monkeypatch.setattr(quickstart, "launch", lambda *words: launched.append(words[3]))
    for text in (None, [CONFIG]):
        data = tmp_path / f"data_{quickstart.text_key(text, config)}"
        quickstart.train_as_planned(CONFIG, config, None, data, tmp_path, 100, lambda _: None)
    (prompts,) = (word for word in launched[0] if word.startswith("log.samples.prompts="))
    assert len(load(CONFIG, [prompts]).config.log.samples.prompts) == 3 and ("[MASK]" in prompts) == (name == "glm_tiny")
    assert not any("log.samples" in word for word in launched[1])  # another text, which these prompts do not fit
    called: list[tuple[object, ...]] = []
    monkeypatch.setattr(quickstart, "verb", lambda *words: called.append(words))
    quickstart.solve(config, tmp_path)
    assert called == [("eval", tmp_path / "checkpoints", "--tasks", *tasks)]
    assert set(tasks) <= set(shipped_names())


def test_a_command_that_is_told_to_stop_saves_and_ends(
    quickstart: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, ready = tmp_path / "saves.py", tmp_path / "ready"
    script.write_text(
        "import pathlib, signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
        "pathlib.Path(sys.argv[1]).touch()\ntime.sleep(60)"
    )
    monkeypatch.setattr(sys.modules["running"], "CHECK_SECONDS", 0.1)
    assert quickstart.call(sys.executable, script, ready, stop=ready.exists) is False
    assert quickstart.call(sys.executable, "-c", "", stop=lambda: False) is True
    with pytest.raises(KeyboardInterrupt):  # told to stop by somebody else
        quickstart.call(sys.executable, "-c", "raise SystemExit(75)")


def test_ctrl_c_has_the_command_save_before_it_ends(tmp_path: Path) -> None:
    script = tmp_path / "saves.py"
    script.write_text(
        "import pathlib, signal, sys, time\n"
        "def save(*_):\n    time.sleep(0.3)\n    pathlib.Path('saved').touch()\n    sys.exit(75)\n"
        "signal.signal(signal.SIGTERM, save)\npathlib.Path('ready').touch()\ntime.sleep(60)"
    )
    caller = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'launch')!r}); import running; running.call(sys.executable, 'saves.py')"
    )
    with subprocess.Popen(
        [sys.executable, "-c", caller], cwd=tmp_path, start_new_session=True, stderr=subprocess.PIPE
    ) as process:
        while not (tmp_path / "ready").exists():
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to every process of the group
        process.communicate(timeout=30)
    assert process.returncode not in (0, 75)
    assert (tmp_path / "saved").exists()


@pytest.mark.parametrize("words", [["--minutes", "0"], ["--text", "/no/such/file"], ["--minuts", "4"]])
def test_wrong_use(
    quickstart: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["quickstart.py", *words])
    with pytest.raises(SystemExit) as stop:
        quickstart.parse()
    assert stop.value.code == 2
    assert words[0] in capsys.readouterr().err


def test_a_failed_step_ends_with_a_message(quickstart: ModuleType, tmp_path: Path) -> None:
    script = tmp_path / "fails.py"
    script.write_text("raise SystemExit(3)")
    with pytest.raises(quickstart.Failed, match="exit code 3"):
        quickstart.call(sys.executable, script)
