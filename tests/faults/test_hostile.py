"""Files that are damaged or made to harm: refused before anything is used, on every rank at once, with the file's name."""

import json
import os
import pickle
import resource
import shutil
import struct
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import jobs
import numpy as np
import pytest
from breaking import LAYOUTS, MAIN, STEPS

from megatrain.checkpoint.manifest import read_manifest

SIZE = LAYOUTS[MAIN].size


def refused(house, measured, what, lines, needles):
    """Assert that each command line ends all ranks with one clear error that has its word."""
    answers = jobs.commands(house.folder / f"job_{what}", [["train", *line] for line in lines], SIZE)
    for each, needle in zip(answers, needles, strict=True):
        for answer in each:
            last = answer.err.strip().splitlines()[-1] if answer.err.strip() else ""
            assert answer.code == 1 and last.startswith("megatrain: error: ") and "Traceback" not in answer.err, answer
            assert needle in last, (needle, last)
            measured.detected(answer.seconds)


@pytest.mark.fault(
    injection="a data file cut, an index longer than its data, token ids beyond the vocabulary",
    promise="refused at open with the file's name",
    layout=MAIN,
    bound=30,
)
def test_data_that_is_damaged_before_the_start(house, measured):
    lines = []
    for case in ("cut", "index", "ids"):
        folder = house.folder / f"store_{case}"
        prefix = jobs.write_store(folder.with_name(f"store_{case}"))
        binary, index = prefix.with_name(f"{prefix.name}.bin"), prefix.with_name(f"{prefix.name}.idx")
        if case == "cut":
            os.truncate(binary, binary.stat().st_size // 2)
        elif case == "index":
            with index.open("r+b") as file:
                file.seek(34)
                file.write(struct.pack("<i", 10**6))
        else:
            tokens = np.fromfile(binary, "<u2")
            tokens[777] = 101
            tokens.tofile(binary)
        lines.append(house.words(MAIN, f"bad_{case}", f"data.train={prefix}"))
    refused(house, measured, "data", lines, ("store_cut.bin", "store_index", "store_ids.bin"))


class Canary:
    """Unpickling this makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.fault(
    injection="malicious pickles as pytorch_model.bin, .npy of the sample cache, a checkpoint's shard, the tokenizer",
    promise="refused or not read; the code in them does not run",
    layout=MAIN,
)
def test_pickles_do_not_run(house, measured):
    canary = house.folder / "canary"
    evil = pickle.dumps(Canary(canary))
    model = house.folder / "hf_pickle"
    model.mkdir()
    (model / "config.json").write_text(
        json.dumps({"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 101, "n_positions": 16})
    )
    (model / "pytorch_model.bin").write_bytes(evil)
    shards = house.folder / "pickled"
    shutil.copytree(house.undisturbed(MAIN) / "checkpoints", shards)
    for file in shards.rglob("*.safetensors"):
        file.write_bytes(evil)
    (house.folder / "tokenizer.json").write_bytes(evil)
    lines = [
        house.words(MAIN, "pickle_hf", f"checkpoint.resume={model}"),
        house.words(MAIN, "pickle_shard", f"checkpoint.resume={shards / f'step_{STEPS:08d}'}"),
        house.words(MAIN, "pickle_tokenizer", f"data.tokenizer={house.folder / 'tokenizer.json'}"),
    ]
    refused(house, measured, "pickles", lines, ("pytorch_model.bin", ".safetensors", "tokenizer.json"))
    cache = house.folder / "cache"
    text = jobs.write_store(house.folder / "large", documents=4000, length=400)  # a smaller one's index is not cached
    words = [*house.words(MAIN, "pickle_cache"), f"data.cache_dir={cache}", f"data.train={text}", "train.steps=4"]
    assert {answer.code for answer in jobs.commands(house.folder / "job_cache", [["train", *words]], SIZE)[0]} == {0}
    arrays = list(cache.rglob("*.npy"))
    assert arrays
    for array in arrays:
        np.save(array, np.array([Canary(canary)], dtype=object), allow_pickle=True)
    words[1] = f"log.dir={house.run('pickle_cache_again')}"
    assert {answer.code for answer in jobs.commands(house.folder / "job_cache", [["train", *words]], SIZE)[0]} == {0}
    assert not canary.exists()


@pytest.mark.fault(
    injection="`../`, an absolute path or a link as a shard, in file names and tensor names of a manifest",
    promise="refused before such a file is opened",
    layout=MAIN,
    bound=30,
)
def test_names_that_lead_out(house, measured):
    source = house.undisturbed(MAIN) / f"checkpoints/step_{STEPS:08d}"
    lines, needles = [], []
    for case in ("../x.safetensors", "/etc/passwd", "link", "link of the manifest", "tensor"):
        folder = house.folder / "out" / case.replace("/", "_").replace(" ", "_") / source.name
        shutil.copytree(source, folder)
        manifest = read_manifest(folder)
        first = manifest.files[0]
        if case == "link":
            (folder / first.name).rename(folder.parent / "outside")
            (folder / first.name).symlink_to(folder.parent / "outside")
            needles.append("link")
        elif case == "link of the manifest":
            (folder / "manifest.json").rename(folder.parent / "outside")
            (folder / "manifest.json").symlink_to(folder.parent / "outside")
            needles.append("manifest.json")
        elif case == "tensor":
            name, tensor = next(iter(manifest.tensors.items()))
            spec = replace(tensor.spec, name="../../x")
            rest = {key: value for key, value in manifest.tensors.items() if key != name}
            changed = replace(manifest, tensors={"../../x": tensor._replace(spec=spec), **rest})
            (folder / "manifest.json").write_bytes(changed.to_bytes())
            needles.append("lacks 1 of")  # no path is made of it
        else:
            changed = replace(manifest, files=(replace(first, name=case), *manifest.files[1:]))
            (folder / "manifest.json").write_bytes(changed.to_bytes())
            needles.append("manifest.json")
        lines.append(house.words(MAIN, f"out_{len(lines)}", f"checkpoint.resume={folder}"))
    refused(house, measured, "names", lines, needles)


@pytest.mark.fault(
    injection="a Hugging Face folder whose weights or config.json are links that lead out",
    promise="refused with the file's name, and nothing of what they lead to is copied",
    layout=MAIN,
    bound=30,
)
def test_links_out_of_a_hugging_face_folder(house, measured):
    secret, lines, needles = house.folder / "secret", [], ("config.json", "model.safetensors")
    secret.write_text("hush1234")
    config = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 101, "n_positions": 16}
    for name in needles:
        model = house.folder / f"hf_link_{name}"
        model.mkdir()
        (model / "config.json").write_text(json.dumps(config))
        (model / name).unlink(missing_ok=True)
        (model / name).symlink_to(secret)
        lines.append(house.words(MAIN, f"hf_out_{name}", f"checkpoint.resume={model}"))
    refused(house, measured, "hf_links", lines, needles)
    for name in needles:
        run = house.run(f"hf_out_{name}")
        assert not [file for file in run.rglob("*") if file.is_file() and b"hush1234" in file.read_bytes()]


@pytest.mark.fault(
    injection="a checkpoint's manifest with an alias bomb of 500 bytes as its config, or 200 MB of blanks",
    promise="refused with what is wrong",
    layout=MAIN,
    bound=30,
)
def test_bombs_in_a_manifest(house, measured):
    source, lines = house.undisturbed(MAIN) / f"checkpoints/step_{STEPS:08d}", []
    bomb = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 24))
    for case in ("alias", "blanks"):
        folder = house.folder / "bombs" / case / source.name
        shutil.copytree(source, folder)
        if case == "alias":
            (folder / "manifest.json").write_bytes(replace(read_manifest(folder), config=bomb).to_bytes())
        else:
            (folder / "manifest.json").write_bytes(b" " * 200_000_000)
        lines.append(house.words(MAIN, f"bomb_{case}", f"checkpoint.resume={folder}"))
    refused(house, measured, "manifests", lines, ("the config in the checkpoint, line 1: a YAML anchor", "manifest.json"))


@pytest.mark.fault(
    injection="a .zst of 300 KB that unpacks to 3 GB",
    promise="refused with file and place, in less than 600 MB of memory",
    layout="1 rank",
    bound=20,
)
def test_a_file_that_unpacks_without_end(tmp_path, measured):
    zstandard = pytest.importorskip("zstandard")
    packer, block = zstandard.ZstdCompressor().compressobj(), b"\n" * (1 << 20)
    file = tmp_path / "bomb.jsonl.zst"
    file.write_bytes(b"".join(packer.compress(block) for _ in range(3000)) + packer.flush())
    words = ["data", "tokenize", "--input", str(file), "--tokenizer", "bytes", "--output", str(tmp_path / "out")]
    began = time.monotonic()
    program = (
        "import sys; from megatrain.cli.main import main; from megatrain.runtime.device_memory import peak_memory_bytes; "
        "code = main(sys.argv[1:]); print(peak_memory_bytes('cpu')); sys.exit(code)"
    )
    process = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, timeout=60, check=False)
    measured.detected(time.monotonic() - began)
    error = process.stderr
    assert process.returncode == 1 and "bomb.jsonl.zst" in error and "unpacks to" in error, error
    assert int(process.stdout) < 600 << 20 and not list(tmp_path.glob("out*"))


def safetensors_of(case: str) -> bytes:
    """The bytes of a file that no reader may accept."""
    row = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
    rows = {
        "overlap": {"w": row, "v": {**row, "data_offsets": [8, 24]}},
        "hole": {"w": row, "v": {**row, "data_offsets": [24, 40]}},
        "shape": {"w": {**row, "shape": [5]}},
        "dtype": {"w": {**row, "dtype": "F31"}},
    }
    text = b'{"w": {}, "w": {}}' if case == "twice" else json.dumps(rows.get(case, {"w": row})).encode()
    length = {"2^63": 1 << 63, "100 MB + 1": 100_000_001}.get(case, len(text))
    return length.to_bytes(8, "little") + text + bytes(200_000_000 if case == "100 MB + 1" else 40 if case in rows else 16)


@pytest.mark.fault(
    injection="safetensors: a header of 2^63 or 100 MB + 1 bytes, overlap, hole, wrong shape or dtype, a name twice",
    promise="refused with less than 100 MB of memory",
    layout="1 rank",
    bound=1,
)
@pytest.mark.parametrize("case", ["2^63", "100 MB + 1", "overlap", "hole", "shape", "dtype", "twice"])
def test_safetensors_that_lie(tmp_path, measured, case):
    from megatrain.checkpoint.tensor_file import TensorFile
    from megatrain.checkpoint.together import DamagedCheckpointError

    path = tmp_path / "x.safetensors"
    path.write_bytes(safetensors_of(case))
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:
        before, began, end = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic(), "accepted"
        try:
            TensorFile(path)
        except DamagedCheckpointError as error:
            end = str(error)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        os.write(writes, json.dumps([end, time.monotonic() - began, grown]).encode())
        os._exit(0)
    os.waitpid(child, 0)
    end, seconds, grown = json.loads(os.read(reads, 1 << 16))
    os.close(reads), os.close(writes)
    assert "x.safetensors" in end, end
    assert grown < 100e6
    measured.detected(seconds)


@pytest.mark.fault(
    injection="YAML with an object's tag, an alias bomb, an unknown key",
    promise="a safe error that names the place or the key",
    layout=MAIN,
    bound=2,
)
def test_yaml_that_harms(house, measured):
    canary = house.folder / "canary_yaml"
    bomb = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 60))
    texts = {
        "tag": f"model: !!python/object/apply:os.system ['touch {canary}']\n",
        "bomb": bomb,
        "key": "model: {hidden_sise: 32}\n",
    }
    needles = {"tag": "tag", "bomb": "anchor", "key": "model.hidden_sise"}
    for case, text in texts.items():
        (house.folder / f"{case}.yaml").write_text(text)
    refused(house, measured, "yaml", [[str(house.folder / f"{case}.yaml")] for case in texts], needles.values())
    assert not canary.exists()
