"""`python -m tests.fuzz.guided TARGET SECONDS`: the same targets led by coverage, where `pip install atheris` works."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from random import Random


def main(name: str, seconds: int) -> None:
    """Fuzz one target by libFuzzer. The first finding ends it, and the input lies in the present folder."""
    import atheris

    with atheris.instrument_imports(include=["weights", "jaxref", "oracle"]):
        from tests.fuzz.attempt import CORPUS, TARGETS, attempt, warm
        from tests.fuzz.world import World

    folder = Path(tempfile.mkdtemp(prefix="jaxref-guided-"))
    target, world = TARGETS[name], World(folder / "world")
    (folder / "inputs").mkdir()
    for number, seed in enumerate(warm(target, world)):
        (folder / "inputs" / str(number)).write_bytes(seed)

    def one(data: bytes) -> None:
        outcome = attempt(target, world, data, measured=False)
        if outcome.kind == "finding":
            raise AssertionError(f"{outcome.where}: {outcome.words}")

    def mutated(data: bytes, most: int, seed: int) -> bytes:
        random = Random(seed)
        found = target.mutate(data, random) if random.randrange(4) else atheris.Mutate(data, most)
        return bytes(found[:most])

    CORPUS.joinpath(name).mkdir(parents=True, exist_ok=True)
    options = [f"-max_total_time={seconds}", "-max_len=40000", "-rss_limit_mb=4096", "-timeout=30"]
    atheris.Setup([sys.argv[0], *options, str(folder / "inputs"), str(CORPUS / name)], one, custom_mutator=mutated)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
