"""The third oracle: a pure-functional forward of Qwen2 and Qwen3 in JAX that returns every intermediate by name."""

from jaxref.loaded import load_tree
from jaxref.model import forward
from jaxref.session import Session
from jaxref.stages import STAGES

__all__ = ["STAGES", "Session", "forward", "load_tree"]
