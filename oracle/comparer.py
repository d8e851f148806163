"""Two or three trees → a comparison a stage → a result with its first divergence and whom to blame."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from jaxref.stages import STAGES, Key
from oracle import experts
from oracle.blame import blame_first, blame_nobody
from oracle.conventions import check_positions, mixed_up, of_model, recognise
from oracle.experts import Choices
from oracle.layouts import Misfit, Pair, View, single_position, view
from oracle.measure import Stagewise, measure, worst_place
from oracle.result import Comparison, Result, Skip
from oracle.rules import Options, rules_of
from oracle.same import same_run
from oracle.sources import Given
from oracle.trees import Tree, ordered
from oracle.verdict import Judgement, Yardstick, judge
from weights import UserError
from weights.errors import brief

WORKERS = 2
# After a near tie another expert ran: such positions may be off, but not by this much.
AFTER_TIE = 0.5


def compare(reference: Given, test: Given, hf: Given | None = None, options: Options | None = None) -> Result:
    """Compare the tree TEST with the tree REFERENCE, stage by stage, with HF as the yardstick of rounding noise.

    A file of another shape than the reference's model gives it counts as missing, with the reason.
    Raises `UserError` for trees that cannot be compared: broken, empty, of other tokens or another model, or with no
    stage in common.
    """
    options = options or Options()
    trees = {"reference": Tree(reference, "reference"), "test": Tree(test, "test", options.positions)}
    if hf is not None:
        trees["hf"] = Tree(hf, "yardstick")
    return _Comparer(trees, options).run()


class _Comparer:
    """One run of `compare`: the trees, what their files mean, and the rules."""

    def __init__(self, trees: dict[str, Tree], options: Options) -> None:
        self.trees, self.options = trees, options
        self.notes = same_run(trees)
        config = next((tree.config for tree in trees.values() if tree.config is not None), None)
        tokens = next((tree.tokens for tree in trees.values() if tree.tokens is not None), None)
        if config is None or tokens is None:
            raise UserError(
                f"{trees['reference'].folder}: has no manifest, and the shapes come from there; make the reference by"
                " `python -m jaxref dump`, in Python by `jaxref.make_tree`, or compare files by `python -m oracle diff`"
            )
        self.dims = config.dims() | {"S": len(tokens)}
        for tree in trees.values():
            self.notes += of_model(tree, config)
            check_positions(tree, self.dims)
        self.notes += mixed_up(trees["reference"], trees["test"])
        self.single = {role: single_position(tree, self.dims) for role, tree in trees.items()}
        self.rules, notes = rules_of(trees, options, self.dims)
        self.notes += notes
        self.conventions = {role: recognise(tree) for role, tree in trees.items()}
        for role, convention in self.conventions.items():
            if convention is not None:
                self.notes.append(f"{trees[role].folder}: read as a tree of {convention.name}")
        self.choices = Choices(self.dims["S"], self.dims["L"])
        self.skips: list[Skip] = []
        self.misfits: dict[tuple[Key, str], Misfit] = {}  # by the tree's role
        for pattern in options.allow_missing.idle(trees["reference"].files) if options.allow_missing else []:
            self.notes.append(f"allow-missing {brief(pattern)}: no stage of the reference is called so")

    def run(self) -> Result:
        keys = list(self._comparable())
        if not keys:
            names = " and ".join(str(self.trees[role].folder) for role in ("reference", "test"))
            raise UserError(f"{names} have no stage in common, so nothing was compared")
        self._choose(keys)
        with ThreadPoolExecutor(WORKERS, "oracle-compare") as pool:
            measured = list(pool.map(self._measure, keys))
        comparisons: list[Comparison] = []
        for found in measured:
            if found is not None:
                comparisons.append(self._judge(found, comparisons[-1] if comparisons else None))
        misfits = self._set_aside(keys)
        if not comparisons:
            raise misfits[0] if misfits else UserError("the trees have no position in common, so nothing was compared")
        order = ordered({skip.key for skip in self.skips})
        skips = sorted(self.skips, key=lambda skip: order.index(skip.key))
        result = Result(self.trees, self.rules, comparisons, skips, self.notes)
        self._explain(result)
        return result

    def _comparable(self) -> Iterator[Key]:
        reference, test, hf = (self.trees.get(role) for role in ("reference", "test", "hf"))
        assert reference is not None and test is not None
        for key in ordered(set(reference.files) | set(test.files)):
            if key not in reference.files:
                self.skips.append(Skip(key, "not in the reference tree", False))
            elif key not in test.files:
                self._miss(key, "missing in the test tree", "test")
            else:
                if hf is not None and key not in hf.files:
                    self._miss(key, "missing in the yardstick tree; judged without it", "hf")
                yield key
        for tree in self.trees.values():
            if tree.unknown:
                self.notes.append(f"{tree.folder}: no stages, so not compared: {', '.join(tree.unknown[:8])}")

    def _miss(self, key: Key, reason: str, role: str = "test") -> None:
        allowed, convention = self.options.allow_missing, self.conventions.get(role)
        fine = allowed is not None and allowed.covers(key)
        if key[1] in self.trees[role].unobservable:
            self.skips.append(Skip(key, f"{reason}; its manifest says that it cannot be seen there", False))
        elif convention is not None and key[1] in convention.lacks:
            self.skips.append(Skip(key, f"{reason}, as from {convention.name}", False))
        else:
            self.skips.append(Skip(key, reason + (" (allowed)" if fine else ""), not fine))

    def _choose(self, keys: list[Key]) -> None:
        """Which experts each tree chose, before anything that depends on it is compared."""
        for role, tree in self.trees.items():
            for layer, stage in keys:
                if role == "reference" or stage != experts.INDICES or layer is None:
                    continue
                pairs: dict[str, Pair] = {}
                for name in (experts.INDICES, experts.LOGITS, experts.WEIGHTS):
                    if (layer, name) in self.trees["reference"].files and (layer, name) in tree.files:
                        pair = self._fitting((layer, name), role)
                        pairs |= {name: pair} if pair else {}
                if experts.INDICES in pairs:
                    self.choices.add(role, layer, pairs, self.rules.epsilon)
        if self.choices.unseen():
            self.notes.append(
                "the experts' stages do not hold all positions: a near-tie swap elsewhere cannot be told from a fault"
                " (dump with --positions all)"
            )

    def _view(self, key: Key, role: str) -> View:
        tree = self.trees[role]
        return view(tree, STAGES[key[1]], tree.open(key), self.dims, self.single[role])

    def _pair(self, key: Key, first: str, second: str) -> Pair | None:
        """Two trees at their common positions; None where they have none."""
        ours, theirs = self._view(key, first), self._view(key, second)
        positions = set(ours.positions) & set(theirs.positions)
        if not positions:
            return None
        pair = Pair(STAGES[key[1]], self.dims, ours, theirs, tuple(sorted(positions)))
        return self.choices.ordered(pair, second, key[0])

    def _fitting(self, key: Key, role: str) -> Pair | None:
        """As `_pair`, beside the reference; None as well where a file has another shape, which is kept in mind."""
        try:
            return self._pair(key, "reference", role)
        except Misfit as misfit:
            self.misfits[key, misfit.role] = misfit
            return None

    def _set_aside(self, keys: list[Key]) -> list[Misfit]:
        """Let the files of another shape count as missing, here and for all that reads the trees later."""
        places = [(key, tree) for key in keys for tree in self.trees.values() if (key, tree.role) in self.misfits]
        if places and self.options.positions is not None:
            raise self.misfits[places[0][0], places[0][1].role]  # it is rather --positions that is wrong
        for key, tree in places:
            del tree.files[key]
            self.skips.append(Skip(key, f"in the {tree.role} tree {self.misfits[key, tree.role].reason}", True))
        return [self.misfits[key, tree.role] for key, tree in places]

    def _measure(self, key: Key) -> Stagewise | None:
        """A stage in every tree that has it, at the positions that all of them have; None where there are none."""
        pairs = {role: self._fitting(key, role) for role in ("test", "hf") if self._has(role, key)}
        found = {role: pair for role, pair in pairs.items() if pair is not None}
        positions = set.intersection(*(set(pair.positions) for pair in found.values())) if found else set()
        if "test" not in found or not positions:
            if not any((key, tree.role) in self.misfits for tree in self.trees.values()):
                self._miss(key, "no position in common")
            return None
        clean = positions - self.choices.tied(key)
        test, hf = (
            measure(experts.only(found[role], clean or positions), self.rules.dtype) if role in found else None
            for role in ("test", "hf")
        )
        assert test is not None
        between = None
        if hf is not None and max(test.figures.relative_l2, test.figures.channel_median) > self.rules.bound(key):
            between = measure(replace(test.pair, reference=hf.pair.test), self.rules.dtype).figures
        return Stagewise(key, test, hf, between, after_tie=not clean, fewer=bool(clean) and clean < positions)

    def _has(self, role: str, key: Key) -> bool:
        return role in self.trees and key in self.trees[role].files

    def _judge(self, found: Stagewise, before: Comparison | None) -> Comparison:
        key, test, hf = found.key, found.test, found.hf
        notes = found.notes()
        if key[1] == experts.INDICES:
            fault, more = self.choices.judged(key[0])
            judgement = Judgement(Choices.RULE, fault, blame="test" if fault else None)
            notes += more
        else:
            same_layer = before is not None and before.key[0] == key[0]
            earlier = before.hf if before and same_layer and before.key[1] != experts.INDICES else None
            yardstick = Yardstick(hf.figures, found.between, earlier) if hf else None
            judgement = judge(key, test.figures, yardstick, self.rules)
        status = "diverge" if judgement.fault else "agree"
        convention = self.conventions["test"]
        expected = self.options.accept_layout or (convention is not None and convention.head_major)
        if status == "agree" and test.layout and not expected:
            words = f"{test.layout}; the values agree once they are put in order (--accept-layout)"
            status, judgement = "layout", replace(judgement, fault=words, blame="test")
        elif found.unmatched:
            status = "tie"
        elif found.after_tie and test.figures.relative_l2 < AFTER_TIE and not test.figures.mismatched:
            status = "tie" if status == "diverge" else status
        place = test.figures.mismatch if test.figures.mismatched else test.figures.place
        where = test.pair.coordinate(place)
        return Comparison(key, status, judgement, test.figures, hf.figures if hf else None, where, tuple(notes))

    def _explain(self, result: Result) -> None:
        """Fill in what only the first divergence needs: the last good stage, the worst place, the odd one out."""
        first = result.first
        if first is None:
            result.blame = blame_nobody(result)
            return
        before = result.comparisons[: result.comparisons.index(first)]
        result.last_good = before[-1].key if before else None
        pair = self._pair(first.key, "reference", "test")
        result.worst = worst_place(measure(pair, self.rules.dtype).pair) if pair else {}
        result.blame = blame_first(first, self.rules, lambda: self._apart(first.key))

    def _apart(self, key: Key) -> float:
        """How far test and yardstick are from each other."""
        pair = self._pair(key, "hf", "test")
        return measure(pair, self.rules.dtype).figures.relative_l2 if pair else 0.0
