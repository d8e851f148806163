"""Two or three trees → a comparison a stage → a result with its first divergence and whom to blame."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from jaxref.stages import STAGES, Key, Stage
from oracle import experts
from oracle.experts import Choice
from oracle.layouts import Pair, View, heads_of, single_position, view
from oracle.metrics import Figures, Logits, Sums
from oracle.trees import Tree, ordered, path_of
from oracle.verdict import Blame, Judgement, Rules, Tolerance, coarser_of, judge, odd_one_out
from weights import UserError

WORKERS = 2
# Head-major q or k is told by this: read that way, the error is so many times smaller.
LAYOUT_GAIN = 10.0
LAYOUT_DOUBT = 0.02  # relative L2 from which another layout is tried
# After a near tie another expert ran: such positions may be off, but not by this much.
AFTER_TIE = 0.5
# What must agree in two manifests for the trees to be of one model.
SAME_MODEL = (
    "model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads"
    " head_dim num_experts num_experts_per_tok moe_intermediate_size"
).split()


@dataclass(frozen=True)
class Options:
    """How to compare. `positions` are those of the test's rows and `test_dtype` its dtype, where no manifest says so."""

    tolerances: tuple[Tolerance, ...] = ()
    min_cosine: float | None = None
    max_ratio: float = 2.0
    allow_missing: re.Pattern[str] | None = None
    accept_layout: bool = False
    test_dtype: str | None = None
    positions: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Comparison:
    """One stage of one layer. `status` is "agree", "diverge", "layout", or "tie": off after a near-tie swap."""

    key: Key
    status: str
    judgement: Judgement
    test: Figures  # test against reference
    hf: Figures | None  # yardstick against reference
    coordinate: dict[str, Any] | None  # of the greatest difference, or of the first NaN
    notes: tuple[str, ...] = ()

    @property
    def good(self) -> bool:
        """Whether it counts for agreement."""
        return self.status in ("agree", "tie")


@dataclass(frozen=True)
class Skip:
    """A stage that was not compared; `missing` ones make the result incomplete."""

    key: Key
    reason: str
    missing: bool


@dataclass
class Result:
    """What a compare found, in computation order."""

    trees: dict[str, Tree]  # "reference", "test", and perhaps "hf"
    rules: Rules
    comparisons: list[Comparison]
    skips: list[Skip]
    notes: list[str] = field(default_factory=list)
    last_good: Key | None = None
    worst: dict[str, Any] = field(default_factory=dict)  # the worst token and head of the first divergence
    blame: Blame = field(default_factory=lambda: Blame("none", "nobody: no divergence"))

    @cached_property
    def first(self) -> Comparison | None:
        """The first divergence."""
        return next((c for c in self.comparisons if not c.good), None)

    @property
    def missing(self) -> list[Skip]:
        """What should have been there."""
        return [skip for skip in self.skips if skip.missing]

    @property
    def verdict(self) -> str:
        """ "agree", "diverge" or "incomplete"."""
        return "diverge" if self.first else "incomplete" if self.missing else "agree"

    @property
    def exit_code(self) -> int:
        """0 agree, 1 diverge, 2 incomplete."""
        return {"agree": 0, "diverge": 1, "incomplete": 2}[self.verdict]


def compare(
    reference: str | Path, test: str | Path, hf: str | Path | None = None, options: Options | None = None
) -> Result:
    """Compare the tree TEST with the tree REFERENCE, stage by stage, with HF as the yardstick of rounding noise.

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
                " `python -m jaxref dump`, or compare two files by `python -m oracle diff`"
            )
        self.dims = config.dims() | {"S": len(tokens)}
        self.single = {role: single_position(tree, self.dims) for role, tree in trees.items()}
        self.rules = self._rules()
        self.choices: dict[tuple[str, int], Choice] = {}  # (role, layer) -> its experts
        self.skips: list[Skip] = []

    def _rules(self) -> Rules:
        test, hf = self.trees["test"], self.trees.get("hf")
        yardstick = hf.stated_dtype if hf else None
        dtype = self.options.test_dtype or test.stated_dtype or yardstick
        if dtype is None:
            dtype = test.guess_dtype()
            self.notes.append(f"the test tree does not say its dtype; its values are those of {dtype} (--test-dtype)")
        if yardstick is not None and yardstick != dtype:
            raise UserError(f"the yardstick is {yardstick} and the test {dtype}; --hf takes a tree in the test's dtype")
        reference = self.trees["reference"].stated_dtype or "float32"
        options = self.options
        return Rules(dtype, coarser_of(dtype, reference), options.tolerances, options.min_cosine, options.max_ratio)

    def run(self) -> Result:
        keys = list(self._comparable())
        if not keys:
            names = " and ".join(str(self.trees[role].folder) for role in ("reference", "test"))
            raise UserError(f"{names} have no stage in common, so nothing was compared")
        self._choose(keys)
        with ThreadPoolExecutor(WORKERS, "oracle-compare") as pool:
            comparisons = [found for found in pool.map(self._compare, keys) if found is not None]
        if not comparisons:
            raise UserError("the trees have no position in common, so nothing was compared")
        result = Result(self.trees, self.rules, comparisons, self.skips, self.notes)
        self._explain(result)
        return result

    def _comparable(self) -> Iterator[Key]:
        reference, test, hf = (self.trees.get(role) for role in ("reference", "test", "hf"))
        assert reference is not None and test is not None
        for key in ordered(set(reference.files) | set(test.files)):
            if key not in reference.files:
                self.skips.append(Skip(key, "not in the reference tree", False))
            elif key not in test.files:
                self._miss(key, "missing in the test tree")
            else:
                if hf is not None and key not in hf.files:
                    self._miss(key, "missing in the yardstick tree; judged without it")
                yield key
        for tree in self.trees.values():
            if tree.unknown:
                self.notes.append(f"{tree.folder}: no stages, so not compared: {', '.join(tree.unknown[:8])}")

    def _miss(self, key: Key, reason: str) -> None:
        allowed = self.options.allow_missing
        fine = allowed is not None and any(allowed.fullmatch(name) for name in (key[1], path_of(key)))
        self.skips.append(Skip(key, reason + (" (allowed)" if fine else ""), not fine))

    def _choose(self, keys: list[Key]) -> None:
        """Which experts each tree chose, before anything that depends on it is compared."""
        for role in ("test", "hf"):
            tree = self.trees.get(role)
            for layer, stage in keys if tree else []:
                if stage != experts.INDICES or layer is None:
                    continue
                pairs = {}
                for name in (experts.INDICES, experts.LOGITS, experts.WEIGHTS):
                    if all((layer, name) in self.trees[r].files for r in ("reference", role)):
                        pairs[name] = self._pair((layer, name), "reference", role)
                if pairs.get(experts.INDICES) is not None:
                    there = {name: pair for name, pair in pairs.items() if pair is not None}
                    self.choices[role, layer] = experts.choose(there, self.rules.epsilon)

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
        choice = self.choices.get((second, key[0])) if key[0] is not None else None
        if choice is not None and key[1] in (*experts.INSIDE, experts.WEIGHTS, experts.INDICES):
            pair = experts.apply(pair, choice)
        return pair

    def _compare(self, key: Key) -> Comparison | None:
        pairs = {"test": self._pair(key, "reference", "test")}
        if key in self.trees["hf"].files if "hf" in self.trees else False:
            pairs["hf"] = self._pair(key, "reference", "hf")
        found = {role: pair for role, pair in pairs.items() if pair is not None}
        positions = set.intersection(*(set(pair.positions) for pair in found.values())) if found else set()
        if "test" not in found or not positions:
            self._miss(key, "no position in common")
            return None
        clean = positions - self._tied(key)
        after_tie = not clean
        found = {role: experts.only(pair, clean or positions) for role, pair in found.items()}
        measured = {role: measure(pair, self.rules.dtype) for role, pair in found.items()}
        return self._judge(key, measured, after_tie, clean < positions)

    def _tied(self, key: Key) -> set[int]:
        """Positions at which another expert ran before this stage, by a near tie."""
        layer = self.dims["L"] if key[0] is None else key[0]
        inside = [*STAGES].index(key[1]) > [*STAGES].index(experts.INSIDE[-1])
        return {
            tie["token"]
            for (_, at), choice in self.choices.items()
            if at < layer or (at == layer and inside)
            for tie in choice.ties
        }

    def _judge(self, key: Key, measured: Mapping[str, Measured], after_tie: bool, fewer: bool) -> Comparison:
        test, hf = measured["test"], measured.get("hf")
        notes = [f"test is {test.layout}"] if test.layout else []
        notes += [f"yardstick is {hf.layout}"] if hf and hf.layout else []
        notes += ["positions after a near-tie swap of experts left out"] if fewer and not after_tie else []
        between = None
        if hf is not None and max(test.figures.relative_l2, test.figures.channel_median) > self.rules.bound(key[1]):
            between = measure(replace(test.pair, reference=hf.pair.test), self.rules.dtype).figures
        if key[1] == experts.INDICES:
            judgement, more = self._judge_indices(key)
            notes += more
        else:
            judgement = judge(key, test.figures, hf.figures if hf else None, between, self.rules)
        status = "diverge" if judgement.fault else "agree"
        if status == "agree" and test.layout and not self.options.accept_layout:
            words = f"{test.layout}; the values agree once they are put in order (--accept-layout)"
            status, judgement = "layout", replace(judgement, fault=words, blame="test")
        elif status == "diverge" and after_tie and test.figures.relative_l2 < AFTER_TIE and not test.figures.mismatched:
            status = "tie"
        place = test.figures.mismatch if test.figures.mismatched else test.figures.place
        coordinate = test.pair.coordinate(place)
        return Comparison(
            key, status, judgement, test.figures, hf.figures if hf else None, coordinate, tuple(notes)
        )

    def _judge_indices(self, key: Key) -> tuple[Judgement, list[str]]:
        choice = self.choices.get(("test", key[0] or 0))
        rule = "the same experts, but for near ties"
        if choice is None:
            return Judgement(rule, "the experts could not be matched"), []
        words = ["token {token}: expert {reference} in the reference, {test} in the test".format(**s) for s in choice.faults]
        notes = ["near tie at token {token}: experts {reference} and {test} swapped".format(**s) for s in choice.ties]
        notes += ["the same experts in another order"] if choice.reordered and not choice.faults else []
        return Judgement(rule, "; ".join(words[:4]) or None, blame="test" if words else None), notes

    def _explain(self, result: Result) -> None:
        """Fill in what only the first divergence needs: the last good stage, the worst place, the odd one out."""
        result.skips.sort(key=lambda skip: ordered({skip.key for skip in result.skips}).index(skip.key))
        first = result.first
        if first is None:
            result.blame = _nobody(result)
            return
        before = result.comparisons[: result.comparisons.index(first)]
        result.last_good = before[-1].key if before else None
        pair = self._pair(first.key, "reference", "test")
        assert pair is not None
        result.worst = worst_place(pair)
        result.blame = self._blame(first)

    def _blame(self, first: Comparison) -> Blame:
        if first.hf is None:
            if first.judgement.blame == "test":
                return Blame("test", f"test: {first.judgement.fault}")
            return Blame("none", "two trees cannot tell who is wrong; a third one by --hf can")
        if first.judgement.blame == "test" and not first.hf.mismatched:
            return Blame("test", f"test: {first.judgement.fault}")
        pair = self._pair(first.key, "hf", "test")
        between = measure(pair, self.rules.dtype).figures.relative_l2 if pair else 0.0
        distances = first.test.relative_l2, first.hf.relative_l2, between
        return odd_one_out(*distances, self.rules, first.key[1])


def _nobody(result: Result) -> Blame:
    if "hf" not in result.trees:
        return Blame("none", "nobody: no divergence")
    off = [c for c in result.comparisons if c.hf and c.hf.relative_l2 > result.rules.bound(c.key[1])]
    off = [c for c in off if c.hf and c.test.relative_l2 < c.hf.relative_l2 / 10]
    if off:
        words = f"hf: the yardstick is off from {path_of(off[0].key)} on, where test and reference agree"
        return Blame("hf", words)
    return Blame("none", f"nobody: inside the rounding noise of {result.rules.dtype}")


@dataclass(frozen=True)
class Measured:
    """A pair with its figures, and its layout in words where that is not the contract's."""

    pair: Pair
    figures: Figures
    layout: str | None = None


def measure(pair: Pair, dtype: str) -> Measured:
    """The figures of a pair; q or k that fits only when read head-major is read so."""
    figures = _sum(pair, dtype)
    heads = heads_of(pair.stage, pair.dims) if pair.stage.axes[-1] in ("Hh", "Kh") else None
    rows = len(pair.test.positions)
    if heads is None or heads == 1 or rows == 1 or figures.relative_l2 < LAYOUT_DOUBT or pair.test.heads_first:
        return Measured(pair, figures)
    turned = replace(pair, test=pair.test.head_major(heads))
    better = _sum(turned, dtype)
    if better.relative_l2 * LAYOUT_GAIN > figures.relative_l2:
        return Measured(pair, figures)
    return Measured(turned, better, f"head-major {[heads, rows, pair.dims['h']]}, not {[rows, heads * pair.dims['h']]}")


def _sum(pair: Pair, dtype: str) -> Figures:
    sums = Sums(dtype, pair.size, pair.channels, pair.block_rows * pair.columns)
    if pair.stage.name == "lm_head":
        sums.logits = Logits()
    for block in pair.blocks():
        sums.add(*block)
        if sums.logits is not None:
            sums.logits.add(block.reference, block.test)
    return sums.figures()


def worst_place(pair: Pair) -> dict[str, Any]:
    """The token and the head with the greatest relative L2, each over all of its values."""
    heads = heads_of(pair.stage, pair.dims)
    over_maps = pair.stage.axes[0] == "H"
    count = pair.outer if over_maps else heads or 1
    squares = np.zeros((2, len(pair.positions), count))
    for block in pair.blocks():
        r = np.nan_to_num(block.reference.astype(np.float64), posinf=0.0, neginf=0.0)
        d = np.nan_to_num(block.test.astype(np.float64), nan=np.inf, posinf=np.inf) - r
        if block.visible is not None:
            r, d = r * block.visible, np.where(block.visible, d, 0.0)
        first, rows = block.origin[1], slice(block.origin[1], block.origin[1] + len(r))
        del first
        for part, values in zip(squares, (d, r), strict=True):
            grouped = np.square(values).reshape(len(values), -1 if over_maps else count, values.shape[1] // (1 if over_maps else count))
            if over_maps:
                part[rows, block.origin[0]] += np.square(values).sum(axis=1)
            else:
                part[rows] += grouped.sum(axis=2)
    return _worst(squares, pair, over_maps or heads is not None)


def _worst(squares: np.ndarray, pair: Pair, with_heads: bool) -> dict[str, Any]:
    with np.errstate(all="ignore"):
        tokens = np.nan_to_num(np.sqrt(squares[0].sum(axis=1) / squares[1].sum(axis=1)), nan=0.0, posinf=np.inf)
        heads = np.nan_to_num(np.sqrt(squares[0].sum(axis=0) / squares[1].sum(axis=0)), nan=0.0, posinf=np.inf)
    found: dict[str, Any] = {"token": pair.positions[int(tokens.argmax())], "token_relative_l2": float(tokens.max())}
    if with_heads:
        found |= {"head": int(heads.argmax()), "head_relative_l2": float(heads.max())}
    return found


def same_run(trees: Mapping[str, Tree]) -> list[str]:
    """Raise `UserError` for trees of other tokens or another model; notes on what else differs in their manifests."""
    notes: list[str] = []
    first = next((tree for tree in trees.values() if tree.manifest is not None), None)
    for tree in trees.values():
        if first is None or tree is first or tree.manifest is None:
            continue
        if None not in (tree.tokens, first.tokens) and tree.tokens != first.tokens:
            raise UserError(f"{first.folder} and {tree.folder} are of other tokens: {_short(first)} and {_short(tree)}")
        notes += _same_model(first, tree)
    return notes


def _short(tree: Tree) -> str:
    tokens = tree.tokens or []
    return ",".join(map(str, tokens[:8])) + (f",… ({len(tokens)})" if len(tokens) > 8 else "")


def _same_model(first: Tree, second: Tree) -> Iterator[str]:
    ours, theirs = (vars(tree.config) if tree.config else None for tree in (first, second))
    if ours is None or theirs is None:
        return
    differing = [name for name in ours if _plain(ours[name]) != _plain(theirs[name])]
    words = [f"{name} {ours[name]} and {theirs[name]}" for name in differing]
    if set(differing) & set(SAME_MODEL):
        raise UserError(f"{first.folder} and {second.folder} are of different models: {', '.join(words)}")
    if words:
        yield f"the configs of {first.folder} and {second.folder} differ: {', '.join(words)}"


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


Progress = Callable[[int], None]
