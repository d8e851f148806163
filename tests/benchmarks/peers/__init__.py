"""jaxref beside other programs that capture intermediates: `python -m tests.benchmarks.peers`."""
