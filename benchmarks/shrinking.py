"""A model made smaller by each structured method, to the same share of its operations.

Quality and time are measured apart: the one takes hours and does not mind what else the
machine does, the other takes minutes and wants it idle.
"""

import collections
import dataclasses
import functools
import itertools
import pathlib
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jsonl

import jaxprune as jp

ROUNDS = 9  # of timing
ROUND_TO: Any = {"neuron": 16, "channel": 8}  # units kept
_OPERATION = r'^ *(?:ROOT )?%?([\w.-]+) = (\w+\[[\d,]*\])\S* .*op_name="([^"]*)"'


class Setting(NamedTuple):
    """A line of the results of a model that is trained again with each seed."""

    method: str
    share: float
    seed: int


def settings(
    methods: Iterable[str], shares: Sequence[float], seeds: Iterable[int]
) -> Iterator[Setting]:
    """A seed after the other, since each has a dense model of its own."""
    methods = tuple(methods)
    for seed in seeds:
        yield Setting("dense", 1.0, seed)
        for share, method in itertools.product(shares, methods):
            yield Setting(method, share, seed)


class Small(NamedTuple):
    """A model made smaller: a function and its parameters, and what it takes."""

    fn: Callable[..., Any]
    params: Any
    parameters: int
    flops: int


@dataclasses.dataclass
class Model:
    """A trained model, and what its methods look at.

    Attributes:
      fn: `fn(params, *args)`.
      params: its parameters.
      args: an example, by which operations are counted and time is taken.
      batches: tuples of arguments, for statistics.
      loss: `loss(params, *args)`.
      examples: tuples of arguments of the loss, each an example or a few.
      kinds: of groups that are pruned.
      biased: kernels that get a bias for FLAP, where there is none.
      block_of: the layer of a leaf.
      where: leaves that statistics are taken of.
      token_weights: 0 for padding.
    """

    fn: Callable[..., Any]
    params: Any
    args: tuple
    batches: Sequence[tuple]
    loss: Callable[..., Any]
    examples: Sequence[tuple]
    kinds: tuple[Any, ...]
    biased: tuple[str, ...]
    block_of: Callable[[str], str | None]
    where: Any = None
    token_weights: Callable[..., Any] | None = None

    @functools.cached_property
    def graph(self) -> jp.structured.Graph:
        return jp.structured.trace(self.fn, self.params, *self.args)

    @functools.cached_property
    def dense(self) -> jp.structured.Cost:
        return jp.structured.planned(self.graph, {}).before

    @functools.cached_property
    def gradients(self) -> jp.calibration.Gradients:
        return jp.calibration.gradients(self.loss, self.params, self.examples)

    @functools.cached_property
    def similarity(self) -> jp.calibration.Similarity:
        return jp.calibration.similarity(
            self.fn, self.params, self.batches,
            block_of=self.block_of, token_weights=self.token_weights,
        )  # fmt: skip

    @functools.cached_property
    def statistics(self) -> jp.calibration.Statistics:
        return jp.calibrate(
            self.fn, self.params, self.batches,
            statistics=("square", "variance", "gram"), where=self.where,
            token_weights=self.token_weights,
        )  # fmt: skip

    def whole(self) -> Small:
        return Small(self.fn, self.params, self.dense.parameters, self.dense.flops)

    def by_scores(self, scores: Any, share: float) -> Small:
        target = jp.structured.Target(flops=share)
        return self.by_plan(
            jp.structured.plan(
                self.graph, scores, target=target, kinds=self.kinds, round_to=ROUND_TO
            )
        )

    def by_plan(self, plan: jp.structured.Plan, params: Any = None) -> Small:
        params = self.params if params is None else params
        small, after = plan.shrink(params), plan.after
        return Small(plan.rewrite(self.fn), small, after.parameters, after.flops)


def magnitude(model: Model, share: float) -> Small:
    scores = jp.structured.score_groups(model.graph, model.params, "l2")
    return model.by_scores(scores, share)


def taylor(model: Model, share: float, form: Any = "first") -> Small:
    scores = jp.structured.taylor(model.graph, model.params, model.gradients, form=form)
    return model.by_scores(scores, share)


def wanda_sp(model: Model, share: float) -> Small:
    scores = jp.structured.fluctuation(
        model.graph, model.params, model.statistics, form="wifn", kinds=model.kinds
    )
    return model.by_scores(scores, share)


def obspa(model: Model, share: float) -> Small:
    """Units by what they cost once the others have taken over, which they then do."""
    scores = jp.structured.obs_scores(
        model.graph, model.params, model.statistics, kinds=model.kinds
    )
    target = jp.structured.Target(flops=share)
    plan = jp.structured.plan(
        model.graph, scores, target=target, kinds=model.kinds, round_to=ROUND_TO
    )
    return model.by_plan(
        plan, jp.structured.refit(plan, model.params, model.statistics)
    )


def amp(model: Model, share: float) -> Small:
    scores = jp.structured.amp(
        model.graph, model.fn, model.params, model.batches,
        kinds=model.kinds, token_weights=model.token_weights,
    )  # fmt: skip
    return model.by_scores(scores, share)


def flap(model: Model, share: float) -> Small:
    fn, params = model.fn, model.params
    if model.biased:
        fn, params = jp.structured.add_biases(
            fn, params, *model.args, where=model.biased
        )
    graph = jp.structured.trace(fn, params, *model.args)
    stats = jp.calibrate(
        fn, params, model.batches,
        statistics=("variance",), where=model.where, token_weights=model.token_weights,
    )  # fmt: skip

    def plan(ratio: float) -> jp.structured.Plan:
        return jp.structured.flap(
            graph, params, stats, ratio=ratio, kinds=model.kinds, round_to=ROUND_TO
        )

    found = _bisected(plan, share)
    new = found.shrink(jp.structured.compensate(graph, found, params, stats))
    return Small(found.rewrite(fn), new, found.after.parameters, found.after.flops)


def cfsp(model: Model, share: float) -> Small:
    """Neurons only, as in the paper."""
    graph, kinds = model.graph, ("neuron",)
    scores = jp.structured.relative_activation(graph, model.params, model.statistics)

    def plan(ratio: float) -> jp.structured.Plan:
        ratios = jp.structured.block_ratios(graph, model.similarity, ratio=ratio)
        return jp.structured.plan(
            graph, scores,
            ratio=ratio, kinds=kinds, overrides=ratios, round_to=ROUND_TO,
        )  # fmt: skip

    return model.by_plan(_bisected(plan, share))


def short_gpt(model: Model, share: float) -> Small:
    """Whole layers, of which all are alike."""

    def without(blocks: Sequence[str]) -> Small:
        fn, params = jp.structured.remove_blocks(
            model.fn, model.params, *model.args, blocks=blocks, block_of=model.block_of
        )
        graph = jp.structured.trace(fn, params, *model.args)
        cost = jp.structured.planned(graph, {}).before
        return Small(fn, params, cost.parameters, cost.flops)

    order = jp.structured.redundant_blocks(
        model.similarity, len(model.similarity.names)
    )
    each = model.dense.flops - without(order[:1]).flops
    return without(order[: round((1 - share) * model.dense.flops / each)])


METHODS: dict[str, Callable[[Model, float], Small]] = {
    "magnitude": magnitude,
    "Taylor": taylor,
    "Taylor, vectors": functools.partial(taylor, form="vector"),
    "Wanda-sp": wanda_sp,
    "FLAP": flap,
    "OBSPA": obspa,
    "AMP": amp,
    "CFSP": cfsp,
    "ShortGPT": short_gpt,
}


def _bisected(
    plan: Callable[[float], jp.structured.Plan], share: float
) -> jp.structured.Plan:
    """The plan of the smallest ratio with at most this share of the operations."""
    low, high = 0.0, 0.99
    for _ in range(9):
        middle = (low + high) / 2
        found = plan(middle)
        if found.after.flops > share * found.before.flops:
            low = middle
        else:
            high = middle
    return plan(high)


def latency(small: Small, model: Model) -> float:
    """Time of the small model over that of the dense one, the median of turns."""
    pair = [(jax.jit(x.fn), x.params) for x in (small, model.whole())]

    def spent(f: Callable, params: Any) -> float:
        start = time.perf_counter()
        jax.block_until_ready(f(params, *model.args))
        return time.perf_counter() - start

    turns = [[spent(*x) for x in pair] for _ in range(ROUNDS + 1)]
    return statistics.median(a / b for a, b in turns[1:])


def operations(fn: Callable[..., Any], params: Any, args: tuple) -> dict[str, float]:
    """Milliseconds of each operation of the compiled function, the slowest first.

    They are named by XLA's name, the shape of what comes out, and the primitive.
    """
    compiled = jax.jit(fn).lower(params, *args).compile()
    found = re.findall(_OPERATION, compiled.as_text(), flags=re.MULTILINE)
    names = {name: f"{name} {shape} {own.split('/')[-1]}" for name, shape, own in found}
    jax.block_until_ready(compiled(params, *args))
    spent: dict[str, float] = collections.defaultdict(float)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(ROUNDS):
                jax.block_until_ready(compiled(params, *args))
        (path,) = pathlib.Path(folder).glob("**/*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(path))
        for event in (e for p in data.planes for x in p.lines for e in x.events):
            if event.name in names:
                spent[names[event.name]] += event.duration_ns / 1e6 / ROUNDS
    return dict(sorted(spent.items(), key=lambda x: -x[1]))


def costs(small: Small, model: Model) -> dict[str, float]:
    """Shares of the dense model's parameters and operations."""
    return {
        "parameters": small.parameters / model.dense.parameters,
        "flops": small.flops / model.dense.flops,
    }


def made(method: str, model: Model, share: float) -> Small:
    """What the method makes of the model; the model itself for `"dense"`."""
    return model.whole() if method == "dense" else METHODS[method](model, share)


def time_all(
    path: pathlib.Path,
    make: Callable[[], Model],
    methods: Iterable[str],
    shares: Iterable[float],
) -> None:
    """Adds a line of time for each method and share that has none."""
    done = {(r["method"], r["share"]) for r in jsonl.read(path)}
    wanted = [("dense", 1.0), *((m, s) for s in shares for m in methods)]
    missing = [x for x in wanted if x not in done]
    if not missing:
        return
    model = make()
    for method, share in missing:
        small = made(method, model, share)
        found = {"method": method, "share": share, **costs(small, model)}
        jsonl.add(path, {**found, "latency": latency(small, model)})


def costs_of(row: dict, times: Iterable[dict]) -> list[str]:
    """Cells of a table: operations, parameters, time, and what of the fall arrived.

    Operations and parameters are those of the row; time, and the operations that it is
    compared with, those of the model that was timed.
    """
    shares = [f"{100 * row[x]:.1f} %" for x in ("flops", "parameters")]
    key = row["method"], row["share"]
    timed = next((t for t in times if (t["method"], t["share"]) == key), None)
    if timed is None:
        return [*shares, "-", "-"]
    saved = 1 - timed["flops"]
    fall = f"{(1 - timed['latency']) / saved:.2f}" if saved else "-"
    return [*shares, f"{timed['latency']:.2f}", fall]


COSTS = ("FLOPs", "parameters", "latency", "fall of latency / of FLOPs")


def spread(found: Sequence[float], digits: int = 2) -> str:
    """Mean and standard deviation."""
    if not found:
        return "-"
    mean = f"{statistics.fmean(found):,.{digits}f}"
    if len(found) == 1:
        return f"{mean} (1)"
    return f"{mean} ± {statistics.stdev(found):,.{digits}f}"


def accuracies(
    rows: Sequence[dict],
    times: Sequence[dict],
    methods: Iterable[str],
    shares: Iterable[float],
) -> str:
    """A row for each method and share, with the accuracy before and after recovery."""
    columns = ("wanted", "method", *COSTS, "seeds", "accuracy %", "recovered %")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for share, method in itertools.product((1.0, *shares), ("dense", *methods)):
        own = [r for r in rows if (r["method"], r["share"]) == (method, share)]
        if not own:
            continue
        mean = {k: statistics.fmean(r[k] for r in own) for k in ("flops", "parameters")}
        cells = [
            f"{100 * share:.0f} %", method, *costs_of(own[0] | mean, times), str(len(own)),
            *(spread([100 * r[k] for r in own]) for k in ("before", "after")),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
