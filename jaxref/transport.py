"""What carries a mesh of CPUs from host to host: JAX's own transport, told where the others find this host."""

from __future__ import annotations

import ipaddress
import os
import socket
import sys
from functools import partial
from importlib import import_module

from weights import UserError


def own_address(coordinator: str) -> str:
    """This host's address on the way to `coordinator` (ADDRESS:PORT), which is where the others can reach it.

    Raises `UserError` where the name is not known or there is no way to it.
    """
    name, _, port = coordinator.rpartition(":")
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(name.strip("[]"), int(port), type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(place)  # chooses a way; of a datagram nothing is sent
            return str(probe.getsockname()[0])
    except OSError as error:
        raise UserError(f"--hosts: {coordinator} cannot be reached from here: {error.strerror or error}") from None


def listen_for(coordinator: str) -> None:
    """Let the transport between CPUs listen where the others find it. To be called once they know each other.

    By itself it listens where the host's own name leads, which on many systems is 127.0.0.1 or 127.0.1.1: no other
    host reaches it there. JAX has the setting, but shows it to nobody (`jax/_src/xla_bridge.py`, `make_cpu_client`).
    Raises `UserError` where a JAX without it would listen in vain.
    """
    address = own_address(coordinator)
    try:
        from jax._src import distributed, xla_bridge

        make = import_module("jaxlib._jax").make_gloo_tcp_collectives
        gloo = make(distributed_client=distributed.global_state.client, hostname=address)
        client = partial(xla_bridge.make_cpu_client, gloo)
        xla_bridge.register_backend_factory("cpu", client, priority=0, fail_quietly=False)
    except (ImportError, AttributeError, TypeError):
        _check_name(address)


def _check_name(address: str) -> None:
    """Refuse a host whose own name leads to itself alone while the others look for it at `address`."""
    name = socket.gethostname()
    try:
        found = socket.gethostbyname(name)
    except OSError:
        return  # the transport says so itself
    if ipaddress.ip_address(found).is_loopback and not ipaddress.ip_address(address).is_loopback:
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
