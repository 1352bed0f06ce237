"""What `masked` costs in a training step, against the bare optimizer in the same run.

An 11 M-parameter MLP (784, 4 x 1792, 10), float32, batch 64, jitted with donation. All
variants take turns in random order, and each figure is the median over rounds of the
ratio to the plain step of the same round, so that a slow moment of the machine hits both.
The rounds are shared out among several processes, since where the system happens to place
the arrays of a variant moves it by a hundredth or two for as long as the process lives.

    python benchmarks/masked_overhead.py [--rounds 31] [--processes 5]

Expected before measuring: without a mask update one extra read of the packed masks and a
`where` that fuses into the optimizer, 1.00 to 1.03; an update step 1.4 to 1.6
(about ten passes that compare and count, one to draw masks, one to reset moments), more
for 2:4 (whose passes rank four weights each) and less for blocks (one pass of sums).
"""

import argparse
import json
import random
import resource
import statistics
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import optax

import jaxprune as jp

WIDTHS = (784, 1792, 1792, 1792, 1792, 10)
BATCH = 64
HIDDEN = "!4/*"  # the last layer has ten outputs: no 16 x 16 blocks


def model(key):
    keys = jax.random.split(key, len(WIDTHS))
    return [
        {
            "kernel": jax.random.normal(k, (a, b)) / a**0.5,
            "bias": jnp.zeros(b),
        }
        for k, a, b in zip(keys, WIDTHS, WIDTHS[1:], strict=False)
    ]


def loss(params, x, y):
    for layer in params[:-1]:
        x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
    logits = x @ params[-1]["kernel"] + params[-1]["bias"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def compiled(tx, params, batch, view):
    def step(params, state, batch):
        def seen(params):
            return loss(view(params, state), *batch)

        grads = jax.grad(seen)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    program = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, batch).compile()
    return program, state


class Variant:
    """One optimizer in training: a step, and the state that it has come to."""

    def __init__(self, name, tx, params, batch, view=lambda params, state: params):
        self.name, self.batch = name, batch
        self.program, state = compiled(tx, params, batch, view)
        self.memory = self.program.memory_analysis().temp_size_in_bytes
        self.bytes = sum(x.nbytes for x in jax.tree.leaves(state))
        self.params, self.state = jax.tree.map(jnp.copy, (params, state))
        self.seconds, self.faults = [], []

    def run(self):
        before, start = _page_faults(), time.perf_counter()
        self.params, self.state = self.program(self.params, self.state, self.batch)
        jax.block_until_ready((self.params, self.state))
        self.seconds.append(time.perf_counter() - start)
        self.faults.append(_page_faults() - before)


def _page_faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def variants(params, batch, rounds):
    adamw = optax.adamw(1e-3)
    last = 10 * rounds + 100
    often = {"end": last, "every": 1}
    block = jp.Block(16, 16)
    yield Variant("optax.adamw", adamw, params, batch)
    yield Variant("optax.adamw again (noise)", adamw, params, batch)
    _, masks = jp.prune(params, 0.9)
    kinds = {
        "unstructured": {},
        "global": {"allocation": "global"},
        "2:4": {"structure": jp.NM(2, 4)},
        "16 x 16 blocks": {"structure": block},
    }
    yield Variant("fixed masks", jp.masked(adamw, masks), params, batch)
    for name, options in kinds.items():
        target = 0.5 if name == "2:4" else 0.9
        where = HIDDEN if "structure" in options else None
        never = jp.gmp(target, begin=last, end=last, **options)
        yield Variant(f"gmp {name}, no update", jp.masked(adamw, never, where=where),
                      params, batch)  # fmt: skip
        always = jp.gmp(target, **often, **options)
        yield Variant(f"gmp {name}, update", jp.masked(adamw, always, where=where),
                      params, batch)  # fmt: skip


def setting():
    """Parameters and a batch."""
    key = jax.random.key(0)
    batch = (
        jax.random.normal(key, (BATCH, WIDTHS[0])),
        jax.random.randint(key, (BATCH,), 0, WIDTHS[-1]),
    )
    return model(key), batch


def take_turns(found, rounds):
    """Runs all variants in random order; ratios to the first, round by round."""
    order = random.Random(0)
    for _ in range(rounds + 2):
        # In another order each time: what ran before leaves its mark on the caches.
        for variant in order.sample(found, len(found)):
            variant.run()
    plain = found[0].seconds
    return {
        v.name: [a / b for a, b in zip(v.seconds, plain, strict=True)][2:]
        for v in found
    }


def measure(rounds):
    """In this process: ratios by round, temporaries and bytes of state, by variant."""
    params, batch = setting()
    found = list(variants(params, batch, rounds))
    turns = take_turns(found, rounds)
    return {v.name: (turns[v.name], v.memory, v.bytes) for v in found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=31, help="in each process")
    parser.add_argument("--processes", type=int, default=5, help="one after the other")
    args = parser.parse_args()
    if args.processes < 0:
        parser.error(f"--processes: got {args.processes}; expected at least 1.")
    jax.config.update("jax_compilation_cache_dir", "build/compiled")
    if args.processes == 0:  # one of the processes
        print(json.dumps(measure(args.rounds)))
        return
    command = [
        sys.executable,
        __file__,
        "--rounds",
        str(args.rounds),
        "--processes",
        "0",
    ]
    parts = [
        json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
        for _ in range(args.processes)
    ]
    size = sum(x.size for x in jax.tree.leaves(setting()[0]))
    print(f"{size / 1e6:.2f} M parameters, {args.processes} processes of {args.rounds} rounds, "
          f"jax {jax.__version__}, {jax.devices()[0].device_kind}\n")  # fmt: skip
    print(
        "| variant | step / adamw | quartiles | by process | temporaries / adamw | "
        "state, bits a weight |"
    )
    print("|---|---|---|---|---|---|")
    ratios = {}
    _, plain_memory, plain_bytes = parts[0]["optax.adamw"]
    for name, (_, memory, state) in parts[0].items():
        turns = [part[name][0] for part in parts]
        low, middle, high = statistics.quantiles(sum(turns, []), n=4)
        each = sorted(map(statistics.median, turns))
        ratios[name] = middle
        extra = 8 * (state - plain_bytes) / size
        print(f"| {name} | {middle:.3f} | {low:.3f} - {high:.3f} | {each[0]:.3f} - "
              f"{each[-1]:.3f} | {memory / plain_memory:.3f} | {extra:.3f} |")  # fmt: skip
    print()
    print("| updating every 100 steps | step / adamw, on average |\n|---|---|")
    for kind in ("unstructured", "global", "2:4", "16 x 16 blocks"):
        quiet, busy = ratios[f"gmp {kind}, no update"], ratios[f"gmp {kind}, update"]
        print(f"| gmp {kind} | {(99 * quiet + busy) / 100:.3f} |")


if __name__ == "__main__":
    main()
