"""Whatever a reader is given: it takes it or refuses it by a `UserError`, in little memory, without leaving its folder.

`targets.py` has one function a reader, `mutate.py` breaks valid files, `attempt.py` runs one input and judges what
happened, `corpus/` keeps inputs that reached distinct refusals or were once findings. CI replays the corpus and a few
hundred new inputs; `python -m tests.fuzz` goes on for as long as it is told to.
"""
