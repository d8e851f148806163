"""What carries a mesh of CPUs from host to host: JAX's own transport, told where the others find this host."""

from __future__ import annotations

import ipaddress
import os
import socket
import sys
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

from weights import UserError

WAIT = 60_000  # milliseconds for what another process says at its start


class Way(NamedTuple):
    """The two ends of the way to another process: addresses of this host and of its host."""

    own: str
    there: str


def way_to(coordinator: str) -> Way:
    """The way to `coordinator` (ADDRESS:PORT): at `own` the others can reach this host.

    Raises `UserError` where the name is not known or there is no way to it.
    """
    name, _, port = coordinator.rpartition(":")
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(name.strip("[]"), int(port), type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(place)  # chooses a way; of a datagram nothing is sent
            return Way(str(probe.getsockname()[0]), str(probe.getpeername()[0]))
    except OSError as error:
        raise UserError(f"--hosts: {coordinator} cannot be reached from here: {error.strerror or error}") from None


def listen_for(coordinator: str | None) -> None:
    """Let the transport between CPUs listen where the others find it. To be called once they know each other.

    By itself it listens where the host's own name leads, which on many systems is 127.0.0.1 or 127.0.1.1: no other
    host reaches it there. JAX has the setting, but shows it to nobody (`jax/_src/xla_bridge.py`, `make_cpu_client`).
    Without `coordinator` the cluster said where process 0 is.
    Raises `UserError` where a JAX without the setting would listen in vain.
    """
    way = None if coordinator is None else way_to(coordinator)
    try:
        from jax._src import distributed, xla_bridge

        make = import_module("jaxlib._jax").make_gloo_tcp_collectives
        state: Any = distributed.global_state
        way = way or way_to(state.coordinator_address)
        address = _seen_by_others(state, way)
        gloo = make(distributed_client=state.client, hostname=address)
        client = partial(xla_bridge.make_cpu_client, gloo)
        xla_bridge.register_backend_factory("cpu", client, priority=0, fail_quietly=False)
    except (ImportError, AttributeError, TypeError):
        if way is not None:
            _check_name(way.own)


def _seen_by_others(state: Any, way: Way) -> str:
    """This host's address. On the host of process 0, whose name may lead to itself there, the others know it.

    `state` is JAX's of the job (`jax._src.distributed.State`). Raises `UserError` where one of them has ended.
    """
    key = "jaxref/address of process 0 as seen by {}"
    try:
        state.client.key_value_set(key.format(state.process_id), way.there)
        if not _is_loopback(way.own):
            return way.own
        seen = (state.client.blocking_key_value_get(key.format(i), WAIT) for i in range(state.num_processes))
        return next((address for address in seen if not _is_loopback(address)), way.own)
    except RuntimeError as error:
        raise UserError(f"--hosts: another process has ended: {str(error).splitlines()[0]}") from error


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address).is_loopback


def _check_name(address: str) -> None:
    """Refuse a host whose own name leads to itself alone while the others look for it at `address`."""
    name = socket.gethostname()
    try:
        found = socket.gethostbyname(name)
    except OSError:
        return  # the transport says so itself
    if _is_loopback(found) and not _is_loopback(address):
        raise UserError(
            f"--hosts: this host's name {name} leads to {found}, where no other host finds it: let it lead to"
            f" {address} in /etc/hosts"
        )


def own_stdout() -> None:
    """Let what the transport prints on stdout, past Python, go to stderr."""
    sys.stdout.flush()
    stdout = os.fdopen(os.dup(1), "w", encoding=sys.stdout.encoding, errors="backslashreplace")
    os.dup2(2, 1)
    sys.stdout = stdout
