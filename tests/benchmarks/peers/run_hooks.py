"""Hugging Face eager float32 with the hooks of `oracle.hf`, each stage written as soon as a hook has it.

Leaner than `python -m oracle hf`: no manifest, no digests, the logits of the last position alone, no import of JAX.
"""

from __future__ import annotations

import sys
from functools import partial
from types import ModuleType

from tests.benchmarks.measure import ROOT
from tests.benchmarks.peers.emit import read_tokens, writer


def main(model: str, tokens: str, output: str) -> None:
    # Stand-ins, since the packages' own __init__ import JAX: 0.4 s that whoever hooks transformers does not spend.
    for name in ("weights", "oracle"):
        sys.modules[name] = ModuleType(name)
        sys.modules[name].__path__ = [str(ROOT / name)]
    from oracle import hf

    loaded = hf.load(model)
    loaded.forward = partial(loaded.forward, logits_to_keep=1)
    hf.run(loaded, read_tokens(tokens)[0].tolist(), writer(output))


if __name__ == "__main__":
    main(*sys.argv[1:])
