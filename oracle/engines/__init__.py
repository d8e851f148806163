"""Engines under test, driven in this process: each gives the stages it computes, in the contract's names and shapes."""
