"""Several processes as one mesh: here on one host, over the transport that JAX has for CPUs."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import pytest

from jaxref.hosts import Hosts, parse_hosts
from jaxref.transport import Way, listen_for, way_to
from tests.commands import ROOT, refused
from tests.conftest import prompt
from tests.test_mesh import BOUNDS
from tests.trees import distance, read_tree, write_tree
from weights import UserError

RUN = "\nfrom jaxref.__main__ import main\nfrom weights.cli import run\nrun(main)"
TOKENS = prompt(20, 272)


class Host(NamedTuple):
    """Where a process runs: the words that lead there, its address, and what a cluster says there, if there is one."""

    enter: tuple[str, ...] = ()
    address: str = "localhost"
    cluster: Mapping[str, str] = MappingProxyType({})


@pytest.fixture
def network() -> Iterator[list[Host]]:
    """Two hosts of the kernel's making: network namespaces of their own, joined by one cable."""
    names = [f"jaxref-{os.getpid()}-{index}" for index in range(2)]
    cables = [f"jr{os.getpid() % 10**7}x{index}" for index in range(2)]
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", cables[0], "type", "veth", "peer", "name", cables[1])
        for index, (name, cable) in enumerate(zip(names, cables, strict=True)):
            ip("link", "set", cable, "netns", name)
            ip("-n", name, "addr", "add", f"198.51.100.{index + 1}/24", "dev", cable)
            for device in (cable, "lo"):
                ip("-n", name, "link", "set", device, "up")
        yield [Host(("ip", "netns", "exec", name), f"198.51.100.{i + 1}") for i, name in enumerate(names)]
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"needs the right to make network namespaces (iproute2, as root): {error}")
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def two(
    folder: Path,
    model: Path | str,
    ways: int = 2,
    each: Sequence[str] = ("", ""),
    more: Sequence[str] = (),
    hosts: Sequence[Host] = (Host(), Host()),
) -> list[tuple[int, str, str]]:
    """Exit code, stdout and last line of stderr of two processes that dump together; `each` is code that runs first."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    devices = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={ways // 2}"}
    words = ["dump", str(model), "--tokens", ",".join(map(str, TOKENS)), "--output", str(folder), *more]
    words += ["--mesh", f"tp={ways}", "--hosts"]
    started = [
        subprocess.Popen(
            [*host.enter, sys.executable, "-c", code + RUN, *words]
            + ["auto" if host.cluster else f"{hosts[0].address}:{port},2,{index}"],
            cwd=ROOT,
            env=os.environ | devices | host.cluster,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index, (host, code) in enumerate(zip(hosts, each, strict=True))
    ]
    ends = []
    for process in started:
        out, err = process.communicate(timeout=120)
        assert "Traceback" not in err, err
        ends.append((process.returncode, out, [line for line in err.splitlines() if line][-1]))
    return ends


@pytest.mark.parametrize(
    ("name", "ways", "dtype"), [("qwen2", 2, "float32"), ("moe", 4, "float32"), ("moe", 2, "bfloat16")]
)
def test_two_processes_write_the_tree_of_one_device(zoo, tmp_path: Path, name: str, ways: int, dtype: str) -> None:
    first, second = two(tmp_path / "two", zoo(name), ways, more=["--dtype", dtype, "--json"])
    assert (first[0], second[0]) == (0, 0), (first, second)
    assert first[1].startswith("{") and not second[1]  # nothing of the transport's own on stdout, and one report
    write_tree(zoo(name), tmp_path / "one", TOKENS, dtype=dtype)
    together, alone = read_tree(tmp_path / "two"), read_tree(tmp_path / "one")
    assert together.keys() == alone.keys()
    if dtype == "bfloat16":
        assert all(np.array_equal(together[path], alone[path]) for path in alone)
    assert max(distance(together[path], alone[path]) for path in alone) <= BOUNDS["float32"]
    assert json.loads((tmp_path / "two" / "manifest.json").read_text("utf-8"))["device"]["processes"] == 2


def test_two_hosts_find_each_other(zoo, tmp_path: Path, network: list[Host]) -> None:
    """Also where the name of each leads to itself alone, as on many systems and on this one's CI."""
    first, second = two(tmp_path / "two", zoo("qwen3"), hosts=network)
    assert (first[0], second[0]) == (0, 0), (first, second)
    write_tree(zoo("qwen3"), tmp_path / "one", TOKENS)
    together, alone = read_tree(tmp_path / "two"), read_tree(tmp_path / "one")
    assert together.keys() == alone.keys()
    assert max(distance(together[path], alone[path]) for path in alone) <= BOUNDS["float32"]


def test_two_nodes_of_a_cluster_find_each_other(zoo, tmp_path: Path, network: list[Host]) -> None:
    """The first one's name leads to itself there, as Debian has it; the variables are those of Slurm."""
    nodes = []
    for index, (host, known) in enumerate(zip(network, ("127.0.1.1", network[0].address), strict=True)):
        names = tmp_path / f"hosts-{index}"
        names.write_text(f"127.0.0.1 localhost\n{known} node1\n")
        own_names = ("unshare", "--mount", "sh", "-c", 'mount --bind "$0" /etc/hosts && exec "$@"', str(names))
        said = {"JOB_ID": "7", "STEP_NODELIST": "node[1-2]", "NTASKS": "2", "PROCID": str(index), "LOCALID": "0"}
        cluster = {f"SLURM_{name}": value for name, value in said.items()}
        nodes.append(Host((*host.enter, *own_names), cluster=cluster))
    first, second = two(tmp_path / "two", zoo("qwen3"), hosts=nodes)
    assert (first[0], second[0]) == (0, 0), (first, second)
    assert json.loads((tmp_path / "two" / "manifest.json").read_text("utf-8"))["device"]["processes"] == 2


def test_a_host_that_would_listen_to_itself_alone_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a JAX that has no setting for it."""
    monkeypatch.setattr("jaxlib._jax.make_gloo_tcp_collectives", None)
    monkeypatch.setattr("jaxref.transport.way_to", lambda coordinator: Way("10.0.0.2", "10.0.0.1"))
    monkeypatch.setattr("socket.gethostbyname", lambda name: "127.0.1.1")
    with pytest.raises(UserError, match=r"leads to 127\.0\.1\.1, where no other .* let it lead to 10\.0\.0\.2"):
        listen_for("10.0.0.1:1234")


def test_the_address_is_that_of_the_way_there(monkeypatch: pytest.MonkeyPatch) -> None:
    assert way_to("127.0.0.1:1234") == Way("127.0.0.1", "127.0.0.1")

    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr("socket.getaddrinfo", unknown)
    with pytest.raises(UserError, match=r"--hosts: nowhere\.invalid:1 cannot be reached from here"):
        way_to("nowhere.invalid:1")


def test_both_hear_of_a_fault_before_the_work(zoo, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    first, second = two(tmp_path / "file", zoo("qwen2"))
    assert first[0] == 2 and "file" in first[2]
    assert second[0] == 2 and second[2] == "error: process 0 of 2 has failed; its own output says why"


def test_both_hear_of_a_full_disk(zoo, tmp_path: Path) -> None:
    full = """
import errno
from jaxref.stage_file import StageFile
write = StageFile.write
def failing(self, block):
    if self.layer == 1:
        raise OSError(errno.ENOSPC, "No space left on device")
    return write(self, block)
StageFile.write = failing
"""
    first, second = two(tmp_path / "tree", zoo("qwen2"), each=(full, ""))
    assert first[0] == 2 and "the disk is full" in first[2]
    assert second[0] == 2 and second[2] == "error: process 0 of 2 has failed; its own output says why"
    assert not (tmp_path / "tree" / "manifest.json").exists()


def test_one_that_was_asked_something_else_is_found(zoo, tmp_path: Path) -> None:
    other = "import sys\nsys.argv += ['--tokens', '1,2,3']"
    for code, _, said in two(tmp_path / "tree", zoo("qwen2"), each=("", other)):
        assert code == 2
        assert said.startswith("error: process 1 of 2 was asked something else than process 0")
    assert not (tmp_path / "tree").exists()


@pytest.mark.parametrize("index", [0, 1])
def test_who_is_left_alone_ends_in_a_line(zoo, tmp_path: Path, index: int) -> None:
    dies = """
import os
from jaxref import model
layer = model.decoder_layer
def dying(parameters, hidden, positions, place, *more):
    if place.layer == 2:
        os._exit(9)
    return layer(parameters, hidden, positions, place, *more)
import jaxref.stream
jaxref.stream.decoder_layer = dying
"""
    ends = two(tmp_path / "tree", zoo("qwen2"), each=[dies if i == index else "pass" for i in range(2)])
    assert ends[index][0] == 9
    assert ends[1 - index][0] == 2, ends
    assert not (tmp_path / "tree" / "manifest.json").exists()


def test_nobody_is_waited_for_without_end(tmp_path: Path) -> None:
    hurry = "import jaxref.hosts\njaxref.hosts.CONNECT = 1"
    words = ["dump", "tiny", "--mesh", "tp=2", "--output", str(tmp_path / "tree"), "--hosts", "localhost:1,2,1"]
    command = [sys.executable, "-c", hurry + RUN, *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: --hosts: the processes did not find each other within 1 s")


def test_what_is_typed() -> None:
    assert parse_hosts("10.0.0.1:1234,2,1") == Hosts("10.0.0.1:1234", 2, 1)
    assert parse_hosts(" AUTO ") == Hosts()
    for text in ("", "auto,2,0", "a,2,1", "a:1,2,2", "a:1,2", "a:1,-2,0", "a:1,2,0,", "a:99999,2,0", "a:1,1,0"):
        with pytest.raises(UserError, match="ADDRESS:PORT,COUNT,INDEX was expected"):
            parse_hosts(text)
    assert "coordinator_address" in refused("dump", "tiny", "--mesh", "tp=2", "--hosts", "auto")  # no cluster here
    assert "--hosts: needs --mesh" in refused("dump", "tiny", "--hosts", "localhost:1234,2,0")
