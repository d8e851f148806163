"""An engine written by hand in PyTorch, apart from jaxref, in which faults can be planted."""

from tests.oracle.standin.catalogue import EXTRAS, FAULTS
from tests.oracle.standin.engine import run
from tests.oracle.standin.files import write
from tests.oracle.standin.planted import Planted, struck_stages

__all__ = ["EXTRAS", "FAULTS", "Planted", "run", "struck_stages", "write"]
