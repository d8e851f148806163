"""The stand-in's stages as an engine writes them: APRT files and no manifest."""

from __future__ import annotations

import struct
from pathlib import Path

from tests.oracle.standin.place import Trace

WHOLE_MODEL = 0xFFFFFFFF


def write(folder: Path, trace: Trace, last: bool = False) -> Path:
    """Write a trace; with `last` only the last position of the MoE stages and of lm_head, as engines do by default."""
    for (layer, stage), values in trace.items():
        if last and (stage == "lm_head" or stage.startswith("moe_")):
            values = values[-1:]
        path = folder / ("" if layer is None else f"layer-{layer}") / f"{stage}.bin"
        path.parent.mkdir(parents=True, exist_ok=True)
        header = struct.pack("<4sII", b"APRT", WHOLE_MODEL if layer is None else layer, values.size)
        path.write_bytes(header + values.astype("<f4").tobytes())
    return folder
