"""EfficientNet-lite0 made smaller: accuracy, operations and latency, by method.

The network (ImageNet weights) is moved to Fashion-MNIST, its images enlarged to 48 x 48:
statistics of the norms are taken anew, and all weights are trained for 400 steps of 64
images. Channels are removed until the share of operations that a row names remains; what is
left is trained for 100 steps, in the same way for all methods. Three seeds of the classifier,
the order of the images and all that follows. Scores are of 512 images of the training split,
accuracy is that of 5,000 of the test split. FLAP is not among the methods: it writes what is
lost into biases, and these convolutions have none.

Every setting is a line of the results file, and one that is there is not run again: stop it
whenever you like. The packages that it needs: see `efficientnet.py`.

    python benchmarks/structured_efficientnet.py            # runs what is missing
    python benchmarks/structured_efficientnet.py --times    # latency, with the first seed
    python benchmarks/structured_efficientnet.py --operations  # what takes the time
    python benchmarks/structured_efficientnet.py --table    # prints the table

Expected before measuring: OBSPA far ahead of all before the recovery, as it is the only one
that fits weights; after it all within two points at 80 %, and Taylor ahead of magnitude at
50 %. Latency falls less than the operations say, as depthwise convolutions and norms are
bound by memory: six tenths.
"""

import argparse
import functools
import itertools
import pathlib
import time
from typing import Any

import efficientnet
import fashion_mnist
import jax
import jax.numpy as jnp
import jsonl
import numpy as np
import optax
import shrinking

HERE = pathlib.Path(__file__).resolve().parent
RESULTS = HERE / "results" / "structured_efficientnet.jsonl"
TIMES = HERE / "results" / "structured_efficientnet_times.jsonl"
METHODS = ("magnitude", "Taylor", "OBSPA")
SHARES = (0.8, 0.65, 0.5)  # of the operations that remain
SEEDS = (0, 1, 2)
SIZE, BATCH, RATE = 48, 64, 3e-4
STEPS, RECOVERY = 400, 100
SOME = 512  # images that scores are of
TESTED = 5000  # images of the test split
FIXED = ("mean", "variance")  # leaves that are not trained


@jax.jit
def enlarged(images: Any) -> Any:
    """`[n, 28, 28]` in [0, 1] as the network was trained on: colours, around 0."""
    shape = (len(images), SIZE, SIZE)
    x = jax.image.resize(images, shape, "bilinear")
    return jnp.repeat((255 * x[..., None] - 127) / 128, 3, axis=-1)


def loss_of(fn: Any) -> Any:
    def loss(params, images, labels):
        found = fn(params, images)
        return optax.softmax_cross_entropy_with_integer_labels(found, labels).mean()

    return loss


def fitted(fn: Any, params: Any, data: Any, steps: int, seed: int) -> Any:
    """Parameters after some steps; statistics of norms stay."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, RATE, steps // 10, steps)
    kind = jax.tree_util.tree_map_with_path(
        lambda path, _: "fixed" if path[-1].key in FIXED else "trained", params
    )
    tx = optax.partition(
        {"trained": optax.adamw(schedule, weight_decay=1e-4), "fixed": optax.set_to_zero()},
        kind,
    )  # fmt: skip
    loss = loss_of(fn)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, images, labels):
        gradients = jax.grad(loss)(params, enlarged(images), labels)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    params = jax.tree.map(jnp.copy, params)
    state, random = tx.init(params), np.random.default_rng(seed)
    images, labels = data
    order = random.permutation(len(labels))
    for i in range(steps):
        rows = order[i * BATCH : (i + 1) * BATCH]
        params, state = step(params, state, images[rows], labels[rows])
    return params


class Bench:
    """The dense network of one seed, moved to Fashion-MNIST."""

    def __init__(self, seed: int, data: dict):
        self.seed, self.data = seed, data
        images, labels = data["train"]
        params = efficientnet.pretrained(10, seed=seed)
        params = efficientnet.statistics(params, enlarged(images[-SOME:]))
        params = fitted(efficientnet.logits, params, data["train"], STEPS, seed)
        cut = [slice(i, i + BATCH) for i in range(0, SOME, BATCH)]
        few = [(enlarged(images[-SOME:][c]), labels[-SOME:][c]) for c in cut]
        self.model = shrinking.Model(
            efficientnet.logits, params, few[0][:1], [x[:1] for x in few],
            loss_of(efficientnet.logits), few, kinds=("channel",),
            biased=(),
            block_of=lambda path: None,
            where=("*/expand/*/kernel", "*/project/*/kernel", "head/*/kernel",
                   "classifier/kernel"),
        )  # fmt: skip

    def accuracy(self, fn: Any, params: Any) -> float:
        images, labels = (x[:TESTED] for x in self.data["test"])
        predict = jax.jit(lambda params, x: fn(params, enlarged(x)).argmax(-1))
        cut = range(0, len(labels), 200)
        right = [
            predict(params, images[i : i + 200]) == labels[i : i + 200] for i in cut
        ]
        return float(np.mean(right))

    def run(self, setting: shrinking.Setting) -> dict:
        """The numbers of one line of the results."""
        start = time.perf_counter()
        small = shrinking.made(setting.method, self.model, setting.share)
        found = {**setting._asdict(), "seconds": round(time.perf_counter() - start, 1)}
        found |= shrinking.costs(small, self.model)
        found["before"] = self.accuracy(small.fn, small.params)
        params = fitted(
            small.fn, small.params, self.data["train"], RECOVERY, 100 + self.seed
        )
        return {**found, "after": self.accuracy(small.fn, params)}


def show_operations() -> None:
    """Where the time goes in ImageNet's network, whole and made smaller."""
    params = efficientnet.pretrained(10, seed=0)
    images = enlarged(np.random.default_rng(0).random((BATCH, 28, 28), np.float32))
    model = shrinking.Model(
        efficientnet.logits, params, (images,), [], None, [], kinds=("channel",),
        biased=(), block_of=lambda path: None,
    )  # fmt: skip
    for small in (model.whole(), *(shrinking.magnitude(model, s) for s in SHARES)):
        found = shrinking.operations(small.fn, small.params, model.args)
        print(f"{small.flops:,} operations, {sum(found.values()):.1f} ms")
        for name, spent in list(found.items())[:16]:
            print(f"    {spent:.2f} ms {name}")
    for step, share in itertools.product((8, 16), SHARES):
        shrinking.ROUND_TO = {"channel": step}
        small = shrinking.magnitude(model, share)
        row = {"method": "magnitude", "share": share, **shrinking.costs(small, model)}
        timed = {**row, "latency": shrinking.latency(small, model)}
        print(f"multiples of {step}: {' | '.join(shrinking.costs_of(row, [timed]))}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-dir", default=".data")
    parser.add_argument("--times", action="store_true", help="only latency")
    parser.add_argument("--operations", action="store_true", help="what takes the time")
    parser.add_argument("--table", action="store_true", help="only print the table")
    args = parser.parse_args()
    if args.operations:
        show_operations()
        return
    if not args.table:
        data = fashion_mnist.load(args.data_dir)
        done = {(r["method"], r["share"], r["seed"]) for r in jsonl.read(RESULTS)}
        bench = None
        for setting in shrinking.settings(METHODS, SHARES, SEEDS):
            if args.times or setting in done:
                continue
            if bench is None or bench.seed != setting.seed:
                bench = Bench(setting.seed, data)
            jsonl.add(RESULTS, bench.run(setting))
        shrinking.time_all(TIMES, lambda: Bench(SEEDS[0], data).model, METHODS, SHARES)
    rows, times = jsonl.read(RESULTS), jsonl.read(TIMES)
    print(shrinking.accuracies(rows, times, METHODS, SHARES))


if __name__ == "__main__":
    main()
