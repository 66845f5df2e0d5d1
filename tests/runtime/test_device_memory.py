"""The peak memory of a process is its own, and not that of the one that started it."""

from megatrain.runtime import device_memory
from megatrain.runtime.device_memory import peak_memory_bytes


def test_peak_memory_is_what_the_system_says_of_this_image(tmp_path, monkeypatch):
    status = tmp_path / "status"
    status.write_text("Name:\tpython\nVmPeak:\t  9999 kB\nVmHWM:\t  1234 kB\nVmRSS:\t  12 kB\n")
    monkeypatch.setattr(device_memory, "STATUS", status)
    assert peak_memory_bytes("cpu") == 1234 * 1024


def test_without_that_file_the_library_answers(tmp_path, monkeypatch):
    monkeypatch.setattr(device_memory, "STATUS", tmp_path / "none")
    found = peak_memory_bytes("cpu")
    assert 1 << 20 < found < 1 << 40
