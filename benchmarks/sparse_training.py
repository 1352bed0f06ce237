"""Every sparse training method on Fashion-MNIST, with the same training.

An MLP 784-512-256-10 without biases, the same with the mean image taken from its inputs,
and a small CNN; adamw with learning rate 1e-3 and weight decay 1e-4, batches of 128,
8 epochs (the CNN 4), seeds 0 to 2. All methods have their default settings, updates every
100 steps where they have a say, and the masks final after three quarters of the run;
methods in rounds train for as many epochs as the table says. A run is a line of the
results file, and a run that is there is not repeated: stop it whenever you like.

    python benchmarks/sparse_training.py                    # runs what is missing
    python benchmarks/sparse_training.py --only rigl gmp    # ... of some methods
    python benchmarks/sparse_training.py --times            # time of steps against dense
    python benchmarks/sparse_training.py --table            # prints the tables

Expected before measuring, at 90 %: GMP and the other methods that start dense lead, within
half a point of dense; RigL and GraNet >= SET >= static random, by a few tenths each, since
the task is easy and the network wide; SNIP and SynFlow near static random, GraSP below;
STE and SR-STE behind GMP, because Adam undoes the decay. At 98 % the gaps are several
points. 2:4 costs nothing, 16 x 16 blocks cost a point. Steps without an update 1.0 to 1.05
of dense; the STE family 1.25 when masks are decided every 20 steps.
"""

import argparse
import itertools
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import fashion_mnist
import jax
import jax.numpy as jnp
import jsonl
import numpy as np
import optax
from jax import lax

import jaxprune as jp

RESULTS = pathlib.Path(__file__).resolve().parent / "results"
RUNS = RESULTS / "sparse_training.jsonl"
TIMES = RESULTS / "sparse_training_times.jsonl"
SEEDS = (0, 1, 2)
BATCH = 128
SIZES = (784, 512, 256, 10)
CHANNELS = (1, 16, 32, 64)
ADAMW = optax.adamw(1e-3, weight_decay=1e-4)
EPOCHS = {"mlp": 8, "centred mlp": 8, "cnn": 4}


class Case(NamedTuple):
    """What is trained, and how sparse."""

    model: str = "mlp"
    sparsity: float = 0.9
    allocation: str = "erk"
    structure: str = "unstructured"

    def __str__(self) -> str:
        return f"{self.model} {self.sparsity:.0%} {self.allocation} {self.structure}"


STRUCTURES = {
    "unstructured": jp.Unstructured(),
    "2:4": jp.NM(2, 4),
    "1:8": jp.NM(1, 8),
    "1:16": jp.NM(1, 16),
    "16x16": jp.Block(16, 16),
}
MAIN = Case()
MORE = [
    *(Case(sparsity=s) for s in (0.8, 0.95, 0.98)),
    Case(allocation="uniform"),
    Case(sparsity=0.5, allocation="uniform", structure="2:4"),
    Case(allocation="uniform", structure="16x16"),
    Case("centred mlp"),
    Case("cnn"),
    Case("cnn", 0.95),
]


class Setup(NamedTuple):
    """What a method is made from."""

    case: Case
    steps: int
    key: Any
    params: Any
    loss: Callable
    batch: Any

    @property
    def common(self) -> dict[str, Any]:
        """Sparsity, structure and allocation, as every factory takes them."""
        structure = STRUCTURES[self.case.structure]
        return {
            "sparsity": self.case.sparsity,
            "structure": structure,
            "allocation": self.case.allocation,
        }

    @property
    def final(self) -> int:
        """The step from which masks stand still."""
        return self.steps * 3 // 4


def masks_by(score: Callable[[Setup], Any], **options) -> Callable[[Setup], Any]:
    """Masks that are drawn before training and stay."""

    def make(setup: Setup) -> Any:
        arguments = setup.common | options
        return jp.prune(
            setup.params, score=score(setup), where=where(setup.case), **arguments
        )[1]

    return make


def synflow(setup: Setup) -> Any:
    flow = lambda p: jp.scores.synflow(network(setup.case), p, jnp.ones((1, 28, 28)))  # noqa: E731
    arguments = setup.common | {"allocation": "global"}
    return jp.prune_in_rounds(
        setup.params, score=flow, rounds=100, where=where(setup.case), **arguments
    )[1]


def random_search(setup: Setup, trials: int = 50) -> Any:
    arguments = setup.common | {"structure": jp.Channel(), "allocation": "uniform"}
    # Not the classes: a class without a neuron cannot be learnt.
    return jp.rounds.random_search(
        setup.loss, setup.params, arguments.pop("sparsity"), setup.batch,
        key=setup.key, trials=trials, where=["*", "!*_2/*"], **arguments,
    ).masks  # fmt: skip


def gmp(setup: Setup, **options) -> Any:
    window = jp.schedules.window(setup.case.sparsity, setup.steps, every=100)
    arguments = setup.common | {"sparsity": window} | options
    return jp.gmp(**arguments)


def leaky(setup: Setup) -> Any:
    leak = jp.schedules.linear(0.0, 0, setup.final, initial=1.0)
    return jp.mdgf(leak=leak, every=20, **setup.common)


def neuroprune(setup: Setup) -> Any:
    # The classifier stays dense, and each matrix has its own share: compared across
    # matrices, the second layer loses nearly all of its links.
    roles = jp.Roles(mlp_in="dense_0/kernel", degree="dense_1/kernel")
    return jp.neuroprune(
        setup.case.sparsity, roles=roles, allocation="uniform", begin=100,
        end=setup.final, every=20,
    )  # fmt: skip


def granet(setup: Setup, **options) -> Any:
    return jp.granet(
        end=setup.steps // 2, until=setup.final, every=100, **setup.common, **options
    )


METHODS: dict[str, Callable[[Setup], Any]] = {
    "dense": lambda s: jp.static(0.0),
    "static random": lambda s: jp.static(key=s.key, **s.common),
    "SNIP": masks_by(
        lambda s: jp.scores.snip(s.loss, s.params, s.batch), allocation="global"
    ),
    "GraSP": masks_by(
        lambda s: jp.scores.grasp(s.loss, s.params, s.batch), allocation="global"
    ),
    "SynFlow": synflow,
    "PreCrop": lambda s: jp.static(
        key=s.key, **(s.common | {"allocation": jp.allocation.water_filling})
    ),
    "random search": random_search,
    "random units": lambda s: random_search(s, trials=1),
    "SET": lambda s: jp.set_(key=s.key, end=s.final, **s.common),
    "RigL": lambda s: jp.rigl(key=s.key, end=s.final, **s.common),
    "GraNet": granet,
    "GraNet s2s": lambda s: granet(s, initial=min(0.5, s.case.sparsity), key=s.key),
    "GMP": gmp,
    "GMP global": lambda s: gmp(s, allocation="global"),
    "AC/DC": lambda s: jp.acdc(
        begin=s.steps // 10, every=s.steps // 20, end=s.steps * 85 // 100, **s.common
    ),
    "Top-KAST": lambda s: jp.top_kast(
        backward=s.case.sparsity - 0.1, until=s.final, **s.common
    ),
    "ISS-P": lambda s: jp.iss_p(end=s.final, every=20, **s.common),
    "MaskSparsity": lambda s: jp.mask_sparsity(
        begin=s.steps // 4, end=s.final, **s.common
    ),
    "NeuroPrune": neuroprune,
    "CHTs": lambda s: jp.chts(
        s.case.sparsity, key=s.key, end=s.final, allocation=s.case.allocation
    ),
    "CHTss": lambda s: jp.chts(
        s.case.sparsity, key=s.key, end=s.final, allocation=s.case.allocation,
        initial=0.5, settle=s.steps // 2,
    ),
    "STE": lambda s: jp.ste(every=20, **s.common),
    "SR-STE": lambda s: jp.sr_ste(every=20, **s.common),
    "MdGf": leaky,
    "SdGf": lambda s: jp.sdgf(s.common["structure"], end=s.steps // 2, every=20),
    "PDP": lambda s: jp.pdp(
        begin=s.steps // 8, end=s.steps // 2, harden=s.final, every=20, **s.common
    ),
    "soft top-k": lambda s: jp.soft_top_k(
        begin=0, end=s.steps // 5, harden=s.steps * 4 // 5, every=20, **s.common
    ),
    "BDWP": lambda s: jp.static(0.0),  # what is sparse are its products
    "SPDF": lambda s: jp.static(key=s.key, until=s.final, **s.common),
}  # fmt: skip
ONLY_NM = ("SdGf", "BDWP")
SIX = ("static random", "SET", "RigL", "GraNet", "GMP", "SR-STE")


def plan() -> Iterator[tuple[str, Case, int]]:
    """All runs, the most telling first."""
    for seed in SEEDS:
        yield from ((name, MAIN, seed) for name in METHODS if name not in ONLY_NM)
        yield from ((name, MAIN, seed) for name in ROUNDS)
    for case, seed in itertools.product(MORE, SEEDS):
        if case.model != MAIN.model:
            yield "dense", case, seed
        yield from ((name, case, seed) for name in SIX)
        if case.structure == "2:4":
            yield from ((name, case, seed) for name in ONLY_NM)
    for structure, seed in itertools.product(("1:8", "1:16"), SEEDS):
        sparsity = 1 - 1 / int(structure[2:])
        case = Case("mlp", sparsity, "uniform", structure)
        yield from ((name, case, seed) for name in ("SR-STE", "MdGf", "SdGf", "GMP"))


def where(case: Case) -> Any:
    """Blocks leave out the last layer, which has ten columns."""
    return None if case.structure != "16x16" else "!dense_2/*"


def init(case: Case, seed: int) -> dict:
    keys = iter(jax.random.split(jax.random.key(seed), 8))
    he = jax.nn.initializers.he_normal()
    if case.model != "cnn":
        shapes = {f"dense_{i}": s for i, s in enumerate(itertools.pairwise(SIZES))}
    else:
        shapes = {
            f"conv_{i}": (3, 3, *s) for i, s in enumerate(itertools.pairwise(CHANNELS))
        } | {"dense": (CHANNELS[-1], 10)}
    return {name: {"kernel": he(next(keys), s)} for name, s in shapes.items()}


def network(case: Case, name: str = "") -> Callable:
    if name == "BDWP":
        return bdwp
    return cnn if case.model == "cnn" else mlp


def mlp(params: dict, images: jax.Array) -> jax.Array:
    x = images.reshape(len(images), -1)
    x = jax.nn.relu(x @ params["dense_0"]["kernel"])
    x = jax.nn.relu(x @ params["dense_1"]["kernel"])
    return x @ params["dense_2"]["kernel"]


def bdwp(params: dict, images: jax.Array) -> jax.Array:
    """The MLP with 2:4 weights in both directions; its ten outputs are no multiple of 4."""
    x = images.reshape(len(images), -1)
    for name in ("dense_0", "dense_1"):
        kernel = params[name]["kernel"]
        x = jax.nn.relu(jp.training.bdwp_matmul(x, kernel, STRUCTURES["2:4"]))
    return x @ params["dense_2"]["kernel"]


def cnn(params: dict, images: jax.Array) -> jax.Array:
    x = images[..., None]
    for i, stride in enumerate((2, 2, 1)):
        x = jax.nn.relu(convolution(x, params[f"conv_{i}"]["kernel"], stride))
    return x.mean((1, 2)) @ params["dense"]["kernel"]


def convolution(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """3 x 3 with a border of zeros, as one matmul: many times faster backward on a CPU."""
    height, width = x.shape[1:3]
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    seen = [
        x[:, i : i + height : stride, j : j + width : stride]
        for i, j in itertools.product(range(3), range(3))
    ]
    return jnp.concatenate(seen, -1) @ kernel.reshape(-1, kernel.shape[-1])


def loss_of(model: Callable) -> Callable:
    def loss(params, batch):
        images, labels = batch
        logits = model(params, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return loss


class Trainer:
    """A model, the optimizer of one method, and compiled training."""

    def __init__(self, name: str, case: Case, seed: int, images, labels):
        model = network(case, name)
        self.data = jnp.asarray(images), jnp.asarray(labels)
        self.steps_an_epoch = len(images) // BATCH
        self.steps = EPOCHS[case.model] * self.steps_an_epoch
        self.params = init(case, seed)

        loss = loss_of(model)
        some = np.random.default_rng(seed).choice(len(images), 10 * BATCH, False)
        setup = Setup(
            case, self.steps, jax.random.key(100 + seed), self.params, loss,
            tuple(x[some] for x in self.data),
        )  # fmt: skip
        method = METHODS[name](setup)
        chosen = where(case) if isinstance(method, jp.training.Method) else None
        self.tx = jp.masked(ADAMW, method, where=chosen)
        self.opt_state = jax.jit(self.tx.init)(self.params)

        def step(carry, places, data):
            params, opt_state = carry
            batch = tuple(x[places] for x in data)
            grads = jax.grad(lambda p: loss(jp.sparse_params(p, opt_state), batch))(
                params
            )
            updates, opt_state = self.tx.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), None

        def many(carry, places, data):
            return lax.scan(lambda c, p: step(c, p, data), carry, places)[0]

        self.many = jax.jit(many)
        self.one = jax.jit(
            lambda carry, places, data: step(carry, places, data)[0], donate_argnums=0
        )
        self.logits = jax.jit(model)

    def epoch(self, order: np.ndarray) -> None:
        carry = self.params, self.opt_state
        for part in np.array_split(order, 4):
            carry = self.many(carry, part, self.data)
        self.params, self.opt_state = carry


def orders(seed: int, examples: int) -> Iterator[np.ndarray]:
    """Places of the examples of each batch, `[steps, batch]`, an epoch at a time."""
    random = np.random.default_rng(seed)
    steps = examples // BATCH // 4 * 4
    while True:
        yield random.permutation(examples)[: steps * BATCH].reshape(steps, BATCH)


class Loop:
    """What methods in rounds train with, under masks that stand still."""

    def __init__(self, case: Case, seed: int, images, labels):
        loss, data = loss_of(network(case)), (jnp.asarray(images), jnp.asarray(labels))
        epochs = itertools.islice(orders(seed, len(images)), EPOCHS[case.model])
        self.case, self.seed = case, seed
        self.order = np.concatenate(list(epochs))
        self.an_epoch = len(self.order) // EPOCHS[case.model]
        self.params = init(case, seed)
        self.steps = 0

        def train(params, masks, order):
            tx = jp.masked(ADAMW, masks)

            def step(carry, places):
                params, state = carry
                grads = jax.grad(loss)(params, tuple(x[places] for x in data))
                updates, state = tx.update(grads, state, params)
                return (optax.apply_updates(params, updates), state), None

            return lax.scan(step, (params, tx.init(params)), order)[0][0]

        self.pure = train
        self.jitted = jax.jit(train)

    def train(self, params, masks, *, start=0, stop=None):
        order = self.order[start:stop]
        self.steps += len(order)
        return self.jitted(params, masks, order)

    def imp(self, rounds=4, **options):
        """With as large a share in each round, to the sparsity of the case."""
        rate = 1 - (1 - self.case.sparsity) ** (1 / rounds)
        return jp.rounds.imp(
            self.train, self.params, rate=rate, rounds=rounds,
            allocation=self.case.allocation, **options,
        )  # fmt: skip

    def sap(self):
        return jp.rounds.sap(self.train, self.params, rounds=4)

    def soup(self):
        rounds, replicas = 3, 3
        masks = jax.tree.map(lambda x: jnp.ones_like(x, bool), self.params)
        dense = self.train(self.params, masks)
        order = jnp.asarray(self.order[: len(self.order) // 2])
        self.steps += rounds * replicas * len(order)
        return jp.rounds.sparse_model_soups(
            lambda p, m, key: self.pure(p, m, jax.random.permutation(key, order)),
            dense, self.case.sparsity, key=jax.random.key(200 + self.seed),
            rounds=rounds, replicas=replicas, allocation=self.case.allocation,
        )  # fmt: skip

    def scratch(self):
        found = self.imp(rewind=self.an_epoch)
        again = jp.rounds.scratch(
            lambda p, m, steps: self.train(p, m, stop=steps),
            init(self.case, 50 + self.seed), found.masks, steps=len(self.order),
        )  # fmt: skip
        return found._replace(params=again.params)


ROUNDS: dict[str, Callable[[Loop], jp.rounds.Rounds]] = {
    "one shot, trained on": lambda loop: loop.imp(rounds=1, rewind=None),
    "lottery ticket": lambda loop: loop.imp(rewind=0),
    "IMP, rewound to epoch 1": lambda loop: loop.imp(rewind=loop.an_epoch),
    "Scratch-E of IMP's masks": Loop.scratch,
    "SAP": Loop.sap,
    "soup of 3": Loop.soup,
}


def run_rounds(name: str, case: Case, seed: int, data) -> dict:
    loop = Loop(case, seed, *data["train"])
    start = time.perf_counter()
    found = jax.block_until_ready(ROUNDS[name](loop))
    seconds = time.perf_counter() - start
    images, labels = data["test"]
    right = np.asarray(network(case)(found.params, images)).argmax(-1) == labels
    return {
        "method": name, **case._asdict(), "seed": seed,
        "accuracy": float(right.mean()),
        "achieved": jp.masks.sparsity(found.masks),
        "degree_deviation": degree_deviation(found.params),
        "epochs": loop.steps / loop.an_epoch,
        "seconds": seconds,
    }  # fmt: skip


def run(name: str, case: Case, seed: int, data) -> dict:
    if name in ROUNDS:
        return run_rounds(name, case, seed, data)
    images, labels = data["train"]
    # Pixels are positive; less the mean image, an input is as often below 0 as above.
    mean = images.mean(0) if case.model == "centred mlp" else 0
    trainer = Trainer(name, case, seed, images - mean, labels)
    stream = orders(seed, len(images))
    start = time.perf_counter()
    for _ in range(EPOCHS[case.model]):
        trainer.epoch(next(stream))
    jax.block_until_ready(trainer.params)
    seconds = time.perf_counter() - start
    images, labels = data["test"]
    seen = jp.sparse_params(trainer.params, trainer.opt_state)
    right = np.asarray(trainer.logits(seen, images - mean)).argmax(-1) == labels
    if name == "BDWP":
        seen, _ = jp.prune(seen, structure=STRUCTURES["2:4"], where="!dense_2/*")
    masked = jp.get_masks(trainer.opt_state)
    zeros = sum(
        int((x == 0).sum())
        for x, m in zip(jax.tree.leaves(seen), _leaves(masked), strict=True)
        if m is not None
    )
    return {
        "method": name, **case._asdict(), "seed": seed,
        "accuracy": float(right.mean()),
        "achieved": zeros / jp.masks.count(masked).total,
        "degree_deviation": degree_deviation(seen),
        "seconds": seconds,
    }  # fmt: skip


def degree_deviation(params: dict) -> float:
    """Of the first layer: how unevenly its links are dealt to its units, in percent."""
    first = next(iter(params.values()))["kernel"]
    inputs = tuple(range(first.ndim - 1))
    return float(jp.analysis.degree_deviation(first, axis=inputs))


def _leaves(masks) -> list:
    return jax.tree.leaves(masks, is_leaf=lambda x: x is None)


def times(name: str, case: Case, data, rounds: int = 450) -> dict:
    """Steps against dense ones, turn by turn: median ratios with and without an update.

    The trainers start where a third of the run is over and masks still move. An update
    every 100 steps comes 4 or 5 times.
    """
    pair = [Trainer(n, case, 0, *data["train"]) for n in (name, "dense")]
    order = next(orders(0, len(data["train"][0])))
    carries = [(t.params, t.opt_state) for t in pair]
    begin = pair[0].steps // 3
    carries = [(p, _at_step(s, begin)) for p, s in carries]
    for i, trainer in enumerate(pair):
        carries[i] = jax.block_until_ready(
            trainer.one(carries[i], order[0], trainer.data)
        )
    ratios: dict[bool, list[float]] = {True: [], False: []}
    for places in order[1 : rounds + 1]:
        spent = []
        for i, trainer in enumerate(pair):
            start = time.perf_counter()
            carries[i] = jax.block_until_ready(
                trainer.one(carries[i], places, trainer.data)
            )
            spent.append(time.perf_counter() - start)
        changed = bool(carries[0][1].method.info.changed)
        ratios[changed].append(spent[0] / spent[1])
    out = {k: statistics.median(v) if v else None for k, v in ratios.items()}
    return {
        "method": name, **case._asdict(), "plain": out[False], "update": out[True],
        "updates": len(ratios[True]),
    }  # fmt: skip


def _at_step(state, step: int):
    def is_state(x):
        return isinstance(x, jp.training.MethodState)

    return jax.tree.map(
        lambda x: x._replace(step=jnp.int32(step)) if is_state(x) else x,
        state,
        is_leaf=is_state,
    )


def table(rows: list[dict], timed: list[dict], case: Case) -> str:
    """Mean and standard deviation over seeds."""
    ratios = {r["method"]: r for r in timed if _case(r) == case}
    lines = [
        "| method | seeds | epochs | accuracy % | sparsity % | degree dev. % | "
        "step / dense | updating step |",
        "|---|---|---|---|---|---|---|---|",
    ]
    some = [r for r in rows if _case(r) == case]
    names = sorted(
        {r["method"] for r in some},
        key=lambda n: (
            -statistics.fmean(r["accuracy"] for r in some if r["method"] == n)
        ),
    )
    for name in names:
        mine = [r for r in some if r["method"] == name]
        values = [100 * r["accuracy"] for r in mine]
        spread = statistics.stdev(values) if len(values) > 1 else float("nan")
        achieved = 100 * statistics.fmean(r["achieved"] for r in mine)
        uneven = [r["degree_deviation"] for r in mine if "degree_deviation" in r]
        uneven = f"{statistics.fmean(uneven):.1f}" if uneven else "-"
        ratio = ratios.get(name, {})
        plain, update = (
            "-" if ratio.get(k) is None else f"{ratio[k]:.2f}"
            for k in ("plain", "update")
        )
        lines.append(
            f"| {name} | {len(mine)} | {mine[0].get('epochs', EPOCHS[case.model]):.0f} | "
            f"{statistics.fmean(values):.2f} ± {spread:.2f} | "
            f"{achieved:.2f} | {uneven} | {plain} | {update} |"
        )
    return "\n".join(lines)


def _case(row: dict) -> Case:
    return Case(*(row[f] for f in Case._fields))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-dir", default=".data")
    parser.add_argument("--times", action="store_true", help="time steps against dense")
    parser.add_argument("--table", action="store_true", help="only print the tables")
    parser.add_argument(
        "--only", nargs="+", default=[*METHODS, *ROUNDS], help="these methods"
    )
    parser.add_argument("--model", nargs="+", default=list(EPOCHS), help="these models")
    args = parser.parse_args()
    # Seeds share programs, which take longer to compile than to run.
    jax.config.update("jax_compilation_cache_dir", "build/compiled")
    if args.times:
        data = fashion_mnist.load(args.data_dir)
        done = {(r["method"], _case(r)) for r in jsonl.read(TIMES)}
        for name, case in dict.fromkeys((name, case) for name, case, _ in plan()):
            wanted = name in args.only and case.model in args.model
            if (
                wanted
                and name in METHODS
                and name != "dense"
                and (name, case) not in done
            ):
                jsonl.add(TIMES, times(name, case, data))
    elif not args.table:
        data = fashion_mnist.load(args.data_dir)
        done = {(r["method"], _case(r), r["seed"]) for r in jsonl.read(RUNS)}
        for name, case, seed in plan():
            wanted = name in args.only and case.model in args.model
            if wanted and (name, case, seed) not in done:
                jsonl.add(RUNS, run(name, case, seed, data))
    rows, timed = jsonl.read(RUNS), jsonl.read(TIMES)
    for case in dict.fromkeys(map(_case, rows)):
        print(f"\n### {case}\n\n{table(rows, timed, case)}")


if __name__ == "__main__":
    main()
