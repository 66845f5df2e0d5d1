"""The launchers' store: at one address, and what a stranger writes there is put back and never unpickled."""

import os
import pickle
from base64 import b64encode
from datetime import timedelta

import psutil
from torch.distributed import HashStore, TCPStore
from torch.distributed.elastic.rendezvous import RendezvousParameters

from megatrain.lifecycle.agent_store import SealedBackend, rendezvous
from megatrain.transport.seal import derived


class Attack:
    """What makes pickle run a command."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (self.canary,)


def test_a_state_goes_round_and_a_token_of_before_does_not_overwrite_it():
    backend = SealedBackend(HashStore(), "job", b"key")
    assert backend.get_state() is None
    state, token, mine = backend.set_state(b"one")
    assert (state, mine) == (b"one", True) and backend.get_state() == (b"one", token)
    assert backend.set_state(b"two", token)[::2] == (b"two", True)
    assert backend.set_state(b"three", token)[::2] == (b"two", False)


def test_a_strangers_state_is_put_back_to_the_last_one_of_the_job():
    store = HashStore()
    backend = SealedBackend(store, "job", b"key")
    name = "torch.rendezvous.job"
    store.set(name, b64encode(b"before the first").decode())
    assert backend.get_state() is None
    backend.set_state(b"one")
    for said in (b64encode(pickle.dumps([1])).decode(), "not of base 64", "\x1b[2J"):
        store.set(name, said)
        assert backend.get_state()[0] == b"one"
    SealedBackend(store, "job", b"another key").set_state(b"theirs", store.get(name))
    assert backend.get_state()[0] == b"one"


def test_the_store_listens_on_one_address_and_a_stranger_runs_nothing(tmp_path):
    canary, secret = tmp_path / "canary", "0123456789abcdef"
    parameters = RendezvousParameters("c10d", "127.0.0.1:0", "job", 1, 1, "127.0.0.1", is_host=True, last_call_timeout="1")
    handler = rendezvous(parameters, secret, one_machine=True)
    store = handler._store
    name = "torch.rendezvous.job" + derived(secret, "rendezvous", "job")[:32]
    stranger = TCPStore("127.0.0.1", store.port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=5))
    assert stranger.check([name])
    info = handler.next_rendezvous()
    stranger.set(name, b64encode(pickle.dumps(Attack(str(canary)))).decode())
    assert handler.num_nodes_waiting() == 0 and not handler.is_closed()
    assert not canary.exists()
    listens = {c.laddr.port: c.laddr.ip for c in psutil.Process().net_connections("tcp") if c.status == psutil.CONN_LISTEN}
    assert (info.rank, info.world_size, info.bootstrap_store_info.master_addr) == (0, 1, "127.0.0.1")
    assert listens[store.port].endswith("127.0.0.1") and listens[info.bootstrap_store_info.master_port].endswith("127.0.0.1")
    handler.shutdown()
