"""Files go from rank to rank whole or not at all, to ranks of the run alone, and nobody waits for ever."""

import socket
import threading
import time

import pytest
import xxhash

from megatrain.testing import simulate
from megatrain.transport import handover
from megatrain.transport.group import TransportError
from megatrain.transport.handover import Handover, Parcel, Taken

BLOCK = 1000


def parcel(path, data, wrong=False):
    path.write_bytes(data)
    sums = [xxhash.xxh3_128_hexdigest(data[start : start + BLOCK]) for start in range(0, len(data), BLOCK)]
    return Parcel(path, len(data), tuple(["0" * 32, *sums[1:]] if wrong else sums))


def between_two(tmp_path, give, address="127.0.0.1", expected="first", secret=b""):
    """Rank 0 gives to rank 1, which takes in what comes under a label; what `give(handover)` returns, and rank 1's handover."""
    (tmp_path / "taken").mkdir()

    def run(ctx):
        mine = Handover(address, BLOCK, ctx.world.group, ctx.device, secret)
        mine.expect(expected, tmp_path / "taken")
        ctx.world.group.barrier()
        said = give(mine) if ctx.world.rank == 0 else None
        ctx.world.group.barrier()
        mine.close()
        return said, mine.taken

    (said, _), (_, taken) = simulate(2, run)
    return said, taken


def refused(mine, *parcels, label="first"):
    began = time.monotonic()
    with pytest.raises(TransportError) as caught:
        mine.send(1, label, parcels, 10.0)
    assert time.monotonic() < began + 5
    return str(caught.value)


def test_a_name_that_leads_out_of_the_folder_is_refused(tmp_path):
    def give(mine):
        one = parcel(tmp_path / "a", b"a")
        return refused(mine, one._replace(path=type("", (), {"name": "../a"})()))

    said, taken = between_two(tmp_path, give)
    assert said.endswith(": '../a' is no name of a file") and taken == {}


def test_files_arrive_whole_and_are_described(tmp_path):
    files = {"a": b"", "b": b"x" * BLOCK, "weights-dp0.safetensors": bytes(range(256)) * 13}
    parcels = [parcel(tmp_path / name, data) for name, data in files.items()]
    _, taken = between_two(tmp_path, lambda mine: mine.send(1, "first", parcels, 10.0))
    assert {path.name: path.read_bytes() for path in (tmp_path / "taken").iterdir()} == files
    assert taken == {one.path.name: Taken(one.size, one.blocks) for one in parcels}


def test_other_bytes_than_the_checksums_say_are_refused_and_leave_nothing(tmp_path):
    good, bad = parcel(tmp_path / "a", b"a" * 2500), parcel(tmp_path / "b", b"b" * 2500, wrong=True)
    said, taken = between_two(tmp_path, lambda mine: refused(mine, good, bad))
    assert said.startswith("rank 0 could not hand first to rank 1 at 127.0.0.1:")
    assert said.endswith(": b has other bytes than its checksums say, as rank 1 has got it")
    assert list(taken) == ["a"] and [path.name for path in (tmp_path / "taken").iterdir()] == ["a"]


def test_a_file_that_has_become_shorter_is_told(tmp_path):
    cut = parcel(tmp_path / "a", b"a" * 2500)
    cut.path.write_bytes(b"a" * 1500)
    said, taken = between_two(tmp_path, lambda mine: refused(mine, cut))
    assert said.endswith(f": {tmp_path}/a is shorter than it was") and taken == {}
    assert not (tmp_path / "taken/a").exists()


def test_what_comes_under_another_label_is_refused(tmp_path):
    said, taken = between_two(tmp_path, lambda mine: refused(mine, parcel(tmp_path / "a", b"a"), label="second"))
    assert said.endswith(": it came under 'second', and 'first' is expected") and taken == {}


def test_without_room_it_is_refused_before_a_byte_is_sent(tmp_path, monkeypatch):
    monkeypatch.setattr(handover.shutil, "disk_usage", lambda folder: type("", (), {"free": 2499}))
    said, _ = between_two(tmp_path, lambda mine: refused(mine, parcel(tmp_path / "a", b"a" * 2500)))
    assert said.endswith(f": rank 1 needs 2,500 bytes in {tmp_path}/taken for what rank 0 gives, and has 2,499 free")
    assert list((tmp_path / "taken").iterdir()) == []


def test_a_folder_that_has_gone_is_told(tmp_path):
    def give(mine):
        (tmp_path / "taken").rmdir()
        return refused(mine, parcel(tmp_path / "a", b"a" * 2500))

    said, taken = between_two(tmp_path, give)
    assert said.endswith(f": rank 1 cannot write to {tmp_path}/taken: No such file or directory") and taken == {}


@pytest.mark.parametrize("says", [b"", b"x" * 96, b"GET / HTTP/1.1\r\n" * 99], ids=["nothing", "no seal", "another protocol"])
def test_a_stranger_can_neither_read_nor_write(tmp_path, says):
    def give(mine):
        with socket.create_connection(mine._addresses[1], timeout=8) as line:
            assert len(line.recv(32, socket.MSG_WAITALL)) == 32
            try:
                line.sendall(says)
                line.shutdown(socket.SHUT_WR)
                return line.recv(1)
            except OSError:  # the other side has closed before it read all
                return b""

    assert between_two(tmp_path, give) == (b"", {})
    assert list((tmp_path / "taken").iterdir()) == []


def test_nothing_is_given_to_who_does_not_prove_that_it_is_a_rank(tmp_path):
    heard = []

    def impostor(listener):
        line, _ = listener.accept()
        with line:
            line.sendall(b"n" * 32)
            line.recv(96, socket.MSG_WAITALL)
            line.sendall(b"0" * 64)
            heard.append(line.recv(1000))

    def give(mine):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            thread = threading.Thread(target=impostor, args=(listener,))
            thread.start()
            mine._addresses[1] = listener.getsockname()
            said = refused(mine, parcel(tmp_path / "a", b"secret"))
            thread.join()
        return said

    said, _ = between_two(tmp_path, give)
    assert said.endswith(": who listens there is no rank of this run") and heard == [b""]


def test_who_has_another_secret_is_no_rank_of_the_run(tmp_path):
    def run(ctx):
        mine = Handover("127.0.0.1", BLOCK, ctx.world.group, ctx.device, b"one" if ctx.world.rank else b"another")
        mine.expect("first", tmp_path)
        ctx.world.group.barrier()
        said = refused(mine, parcel(tmp_path / "a", b"a")) if ctx.world.rank == 0 else ""
        ctx.world.group.barrier()
        mine.close()
        return said

    assert simulate(2, run)[0].endswith(": the connection broke off")


@pytest.mark.parametrize("after", ["its proof", "the list"])
def test_a_rank_that_falls_silent_is_waited_for_a_limited_time(tmp_path, monkeypatch, after):
    monkeypatch.setattr(handover, "IDLE_SECONDS", 0.2)
    silent = threading.Event()
    if after == "its proof":
        monkeypatch.setattr(Handover, "_take", lambda self, line, place: silent.wait(3))
    else:
        monkeypatch.setattr(Handover, "_write", lambda self, *what: (silent.wait(3), "")[1])

    def give(mine):
        try:
            return refused(mine, parcel(tmp_path / "a", b"a" * 5000))
        finally:
            silent.set()

    assert between_two(tmp_path, give)[0].endswith(": no answer for 0.2 s")


def test_closing_ends_what_is_under_way_on_the_spot(tmp_path, monkeypatch):
    silent = threading.Event()
    monkeypatch.setattr(Handover, "_write", lambda self, *what: (silent.wait(3), "")[1])

    def give(mine):
        threading.Timer(0.2, mine.close).start()
        try:
            return refused(mine, parcel(tmp_path / "a", b"a" * 5000))
        finally:
            silent.set()

    assert between_two(tmp_path, give)[0].startswith("rank 0 could not hand first to rank 1 at 127.0.0.1:")


def test_a_limit_for_all_of_it(tmp_path):
    def give(mine):
        with pytest.raises(TransportError, match="it takes too long"):
            mine.send(1, "first", [parcel(tmp_path / "a", b"a" * 5000)], -1.0)

    between_two(tmp_path, give)


def test_an_address_that_is_not_this_machines_is_an_error_on_every_rank():
    def run(ctx):
        address = "127.0.0.1" if ctx.world.rank == 0 else "203.0.113.7"
        with pytest.raises(TransportError) as caught:
            Handover(address, BLOCK, ctx.world.group, ctx.device)
        return str(caught.value)

    ours, theirs = simulate(2, run)
    assert ours == theirs and ours.startswith("rank 1 cannot listen at 203.0.113.7: Cannot assign requested address")
