"""Which device the GPU tests and benchmarks run on."""

from __future__ import annotations

import os

DEVICE = os.environ.get("JAXREF_GPU_DEVICE", "cuda")
