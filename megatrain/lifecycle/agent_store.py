"""The store where the launchers of a job's machines meet: it listens at one address, and its state is obeyed where it is sealed.

torchrun's own store listens on all interfaces, and what stands there is read by pickle, which runs whatever a stranger has written.

`agent_nodes.py` imports it.
"""

from __future__ import annotations

from datetime import timedelta

from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]
from torch.distributed.elastic.rendezvous import (
    RendezvousConnectionError,
    RendezvousHandler,
    RendezvousParameters,
    RendezvousStateError,
)
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler, Token, create_handler

from megatrain.transport.group import TransportError
from megatrain.transport.seal import Seal, derived
from megatrain.transport.store import open_store, serve_at

LOOPBACK = "127.0.0.1"


class SealedBackend(C10dRendezvousBackend):
    """Torch's state of a rendezvous, sealed. A stranger's is put back to the last one that was not, and never unpickled."""

    def __init__(self, store: Store, run_id: str, key: bytes) -> None:
        self._seal, self._last = Seal(key), self._NULL_SENTINEL
        super().__init__(store, run_id)

    def set_state(self, state: bytes, token: Token | None = None) -> tuple[bytes, Token, bool] | None:
        """Set the state, sealed; returns what is there then, and whether it is this one."""
        found = super().set_state(self._seal.close_bytes(self._key, state), token)
        return None if found is None else (found[0], found[1], found[0] == state)

    def _decode_state(self, base64_state: bytes) -> tuple[bytes, Token] | None:
        try:
            found = super()._decode_state(base64_state)
        except RendezvousStateError:
            found = b"", base64_state
        if found is None:
            return None
        state = self._seal.open_bytes(self._key, found[0])
        if state is not None:
            self._last = base64_state.decode()
            return state, base64_state
        restored: bytes = self._call_store("compare_set", self._key, base64_state.decode(errors="replace"), self._last)
        if restored == base64_state:
            raise RendezvousStateError("a process that is not of this job writes to the store where its machines meet")
        return self._decode_state(restored)


class LocalRendezvous(DynamicRendezvousHandler):
    """Torch's rendezvous on one machine, whose workers meet at a store on loopback; torch's own listens on all interfaces."""

    def _create_tcp_store_server(self, master_addr: str, master_port: int) -> TCPStore:
        return serve_at(LOOPBACK, master_port, timedelta(minutes=5))


def rendezvous(parameters: RendezvousParameters, secret: str, one_machine: bool) -> RendezvousHandler:
    """Torch's rendezvous over a store that this process serves or reaches. Raises RendezvousConnectionError.

    parameters: `is_host`: whether this process serves the store; port 0: a free one.
    """
    host, _, port = parameters.endpoint.rpartition(":")
    limit = timedelta(seconds=parameters.get_as_int("read_timeout", 60) or 60)
    try:
        store = open_store(0, 1, (host, int(port)), limit, serve=bool(parameters.get_as_bool("is_host")))
    except TransportError as error:
        raise RendezvousConnectionError(str(error)) from error
    parameters.run_id += derived(secret, "rendezvous", parameters.run_id)[:32]  # a name that no stranger can guess
    backend = SealedBackend(store, parameters.run_id, derived(secret, "launchers", parameters.run_id).encode())
    if one_machine:
        return LocalRendezvous.from_backend(parameters.run_id, store, backend, 1, 1, LOOPBACK)
    return create_handler(store, backend, parameters)
