"""The measuring: rounds of all peers one after another, what each captured, and the bound."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.benchmarks.measure import (
    ROOT,
    Failed,
    Run,
    dump_command,
    free_memory,
    into_page_cache,
    measure,
    medians,
    random_model,
    write_tokens,
)
from tests.benchmarks.peers.install import versions
from tests.benchmarks.peers.table import OURS, Peer, Place, python_of


@dataclass(frozen=True)
class Plan:
    """What is asked for."""

    peers: list[Peer]
    tokens: list[int]
    repeat: list[int]  # of each of `tokens`
    environments: Path
    limit: float  # seconds of one process
    memory: float  # of what is free, of one process
    touch: float  # GB of memory that are touched before each run


@dataclass
class Series:
    """One benchmark, in a scratch folder."""

    plan: Plan
    scratch: Path
    model: Path | None
    rows: list[dict[str, Any]] = field(default_factory=list)
    captured: dict[str, Any] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def run(self) -> dict[str, Any]:
        """Everything that the report says, as JSON values."""
        self._prepare()
        installed = {peer.name: versions(peer, self.plan.environments) for peer in self.plan.peers}
        bounds = []
        for count, repeat in zip(self.plan.tokens, self.plan.repeat, strict=True):
            tokens = write_tokens(self.scratch, self._model, count)
            self._rounds([peer for peer in self.plan.peers if self._ready(peer, installed)], tokens, count, repeat)
            if any(peer.name == OURS for peer in self.plan.peers):
                bounds += self._bound(tokens, count)
        return {
            "machine": machine(),
            "model": str(self.model or "random weights, the 0.5B shape"),
            "peers": {peer.name: {"what": peer.what, "versions": installed[peer.name]} for peer in self.plan.peers},
            "rows": self.rows,
            "captured": self.captured,
            "bounds": bounds,
            "failed": self.failed,
        }

    def _prepare(self) -> None:
        self._model = self.model or random_model(self.scratch / "model", "--like", "0.5b")
        if not (self._model / "config.json").exists():
            sys.exit(f"{self._model}: no config.json there; a folder in Hugging Face's format was expected")
        kind = json.loads((self._model / "config.json").read_text(encoding="utf-8")).get("model_type")
        if kind != "qwen2":
            sys.exit(f"{self._model}: a {kind}; the peers' programs name the stages of qwen2")
        self._gguf = self.scratch / "model.gguf"
        if any(peer.gguf for peer in self.plan.peers):
            # In a process of its own, whose memory does not count.
            measure([sys.executable, "-m", "tests.benchmarks.peers.make_gguf", self._model, self._gguf])

    @property
    def _environment(self) -> dict[str, str]:
        """No network, and a cache of compiled stages of this benchmark's own, so that the first run is a cold one."""
        return {"HF_HUB_OFFLINE": "1", "JAX_COMPILATION_CACHE_DIR": str(self.scratch / "compiled")}

    def _ready(self, peer: Peer, installed: dict[str, Any]) -> bool:
        if installed[peer.name] is None:
            self.failed[peer.name] = f"not installed: python -m tests.benchmarks.peers --install --only {peer.name}"
        return peer.name not in self.failed

    def _rounds(self, peers: list[Peer], tokens: Path, count: int, repeat: int) -> None:
        """`repeat` rounds, in each of which every peer runs once; a peer that fails is out and its reason noted."""
        runs: dict[str, list[Run]] = {peer.name: [] for peer in peers}
        for number in range(repeat + 1):
            for peer in list(peers):
                # Before them one that is not measured; at later lengths for jaxref alone, which compiles for each.
                if number == 0 and peer.name != OURS and count != self.plan.tokens[0]:
                    continue
                try:
                    runs[peer.name].append(self._once(peer, tokens, count))
                except Failed as error:
                    self.failed[f"{peer.name}, {count} tokens"] = str(error)
                    peers.remove(peer)
        for peer in peers:
            measured = runs[peer.name][-repeat:]
            row = {"peer": peer.name, "tokens": count, "runs": [asdict(run) for run in measured]}
            cold = asdict(runs[OURS][0]) if peer.name == OURS else None
            self.rows.append(row | {"median": asdict(medians(measured)), "cold": cold})

    def _once(self, peer: Peer, tokens: Path, count: int) -> Run:
        output = self.scratch / "tree"
        place = Place(python_of(peer, self.plan.environments), self._model, self._gguf, tokens, output)
        into_page_cache([self._gguf] if peer.gguf else sorted(self._model.glob("*.safetensors")))
        memory = int(self.plan.memory * free_memory())
        print(f"{time.strftime('%H:%M:%S')} {count} tokens {peer.name}", file=sys.stderr)
        command, environment = peer.command(place), self._environment
        run = measure(
            command, output, limit=self.plan.limit, memory=memory, environment=environment, touch=self.plan.touch
        )
        if peer.name not in self.captured:
            self.captured[peer.name] = self._compare(tokens, output)
        return run

    def _compare(self, tokens: Path, output: Path) -> dict[str, Any]:
        """What a peer captured, against a tree of jaxref of the same tokens."""
        reference = self.scratch / f"reference-{tokens.name}"
        if not reference.exists():
            measure(dump_command(self._model, tokens, reference), environment=self._environment)
        return self._json("tests.benchmarks.peers.captured", self._model, reference, output)

    def _bound(self, tokens: Path, count: int) -> list[dict[str, Any]]:
        """The machine's rates, measured now, and the time of a process that only starts, imports and plans."""
        start = [*dump_command(self._model, tokens, self.scratch / "nothing"), "--plan"]
        try:
            found = self._json("tests.benchmarks.bound", self._model, tokens, "--folder", self.scratch)
            return [found | {"start": medians([measure(start) for _ in range(3)]).seconds}]
        except Failed as error:
            self.failed[f"bound, {count} tokens"] = str(error)
            return []

    def _json(self, module: str, *words: str | Path) -> dict[str, Any]:
        command = [sys.executable, "-m", module, *map(str, words)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise Failed(f"{module}: {(done.stderr.strip().splitlines() or ['failed'])[-1]}")
        return json.loads(done.stdout)


def machine() -> dict[str, Any]:
    """Processor, cores and memory, for people."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"cpu": name, "cores": os.cpu_count(), "memory_gb": round(memory / 1e9), "python": platform.python_version()}
