"""What decides how a rank rounds: ranks that are unlike are told apart, and kernels that differ are refused."""

import threading
from types import SimpleNamespace

import pytest
import torch

from megatrain.runtime import rounding
from megatrain.runtime.distributed import RemoteError, Session
from megatrain.runtime.launch import Launch
from megatrain.runtime.rounding import kind_of, processor, require_same_kernels, unlike
from megatrain.testing import simulate
from megatrain.transport.wrappers import Recorder

X86 = """processor\t: 0
vendor_id\t: GenuineIntel
cpu family\t: 6
model\t\t: 143
model name\t: Intel(R) Xeon(R) Platinum 8481C
cpu MHz\t\t: 2700.000
flags\t\t: fpu sse smep ssse3 sse4_2 avx512_bf16 avx2 ht fma amx_tile

processor\t: 1
vendor_id\t: GenuineIntel
model\t\t: 144
"""
ARM = "processor : 0\nBogoMIPS : 50.00\nFeatures : fp asimd crc32 sve bf16\nCPU implementer : 0x41\nCPU part : 0xd40\n\nprocessor : 1\n"
CPU = torch.device("cpu")


def test_the_kind_of_a_processor_is_read_from_its_first_one(tmp_path):
    (tmp_path / "x86").write_text(X86)
    (tmp_path / "arm").write_text(ARM)
    assert processor(tmp_path / "x86") == (
        "GenuineIntel 6 143 Intel(R) Xeon(R) Platinum 8481C",
        "amx_tile avx2 avx512_bf16 fma sse sse4_2 ssse3",
    )
    assert processor(tmp_path / "arm") == ("0x41 0xd40", "asimd bf16 sve")
    kind, sets = processor(tmp_path / "none")
    assert kind and not sets


@pytest.mark.parametrize(
    ("env", "counts"),
    [
        ({"MKL_CBWR": "COMPATIBLE"}, "MKL_CBWR=COMPATIBLE"),
        ({"ONEDNN_MAX_CPU_ISA": "AVX2"}, "ONEDNN_MAX_CPU_ISA=AVX2"),
        ({"DNNL_DEFAULT_FPMATH_MODE": "BF16"}, "DNNL_DEFAULT_FPMATH_MODE=BF16"),
        ({"ATEN_CPU_CAPABILITY": "avx2"}, "ATEN_CPU_CAPABILITY=avx2"),
        ({"GLIBC_TUNABLES": "glibc.malloc.top_pad=1:glibc.cpu.hwcaps=-FMA"}, "glibc.cpu.hwcaps=-FMA"),
        ({"GLIBC_TUNABLES": "glibc.malloc.top_pad=1"}, None),
        ({"DNNL_VERBOSE": "1", "CUDA_VISIBLE_DEVICES": "3", "HOME": "/root"}, None),
    ],
)
def test_variables_that_change_bits_count(env, counts):
    plain, now = kind_of(CPU, "numba", {}).splitlines(), kind_of(CPU, "numba", env).splitlines()
    assert [line for line in now if line not in plain] == ([] if counts is None else [counts])
    assert "kernels: numba" in plain and f"threads: {torch.get_num_threads()}" in plain


def test_a_processor_of_another_model_is_of_another_kind(tmp_path, monkeypatch):
    kinds = []
    for model in ("143", "207"):
        (tmp_path / model).write_text(X86.replace("143", model))
        monkeypatch.setattr(rounding, "processor", lambda at=tmp_path / model: processor(at))
        kinds.append(kind_of(CPU, "numba", {}))
    used = torch.backends.cpu.get_cpu_capability()
    assert unlike([kinds[0]] * 4) == ""
    assert unlike([kinds[0], kinds[1], kinds[0], kinds[1]]) == (
        "ranks 1, 3 may round otherwise than rank 0 (on rank 1 CPU: GenuineIntel 6 207 Intel(R) Xeon(R) Platinum 8481C, used as "
        f"{used}; on rank 0 CPU: GenuineIntel 6 143 Intel(R) Xeon(R) Platinum 8481C, used as {used})"
    )
    assert unlike(["a", "a\nMKL_CBWR=AVX2"]) == (
        "rank 1 may round otherwise than rank 0 (on rank 1 MKL_CBWR=AVX2; on rank 0 nothing of it)"
    )


def test_ranks_with_other_kernels_are_named_with_the_reason(monkeypatch):
    """Reasons alone may differ, as a number of threads may."""
    here = threading.local()
    monkeypatch.setattr(rounding, "require", lambda *_: here.found)

    def look(ctx, found):
        rank = ctx.world.rank
        here.found = found[rank]
        session = Session(Launch(rank=rank), SimpleNamespace(rank=rank), ctx.device, "gloo", Recorder(), ctx.world.group, "")
        try:
            return require_same_kernels(session, "auto", torch.bfloat16)
        except RemoteError as error:
            return str(error)

    broken = "plain PyTorch (numba cannot be imported (ImportError: x): pip install it)"
    assert (
        simulate(4, look, ["numba", broken, "numba", broken])
        == [
            f"The kernels differ between ranks, and so would their rounding: numba on ranks 0, 2; {broken} on ranks 1, 3. Make them equal "
            "there, or set train.kernels=reference, which needs none (it is auto)."
        ]
        * 4
    )
    assert simulate(2, look, ["plain PyTorch (no use for 2 threads)", "plain PyTorch (no use for 4 threads)"]) == [None] * 2
