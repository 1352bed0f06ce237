r"""Training that is killed at random moments, restarted, and compared bit for bit.

    python benchmarks/killed.py [--kills 50] [--counts 1 2] [--background]

A run trains a sparse network on two devices, in one process or in two, saves every few
steps, and goes on from its newest checkpoint when it is started. It is killed with
`kill -9` again and again: at any moment of training, in a step that decides masks, and in
the middle of a save (while the folder has not got its name yet). Of two processes one is
killed, or both; what is left of them is stopped. With `--background` training goes on while
`save_async` writes.

Parameters, optimizer state, masks and the state of the data are hashed at each save and at
the end. They must be those of a run that nobody disturbed, a restart must not lose more than
the steps since the last save that was finished, and no step may be missing.
"""

import argparse
import collections
import functools
import hashlib
import os
import pathlib
import random
import re
import sys
import tempfile
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import processes
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxprune as jp

D, F = 64, 512
ROWS, BATCH = 4096, 64
MOMENTS = ("training", "update", "save")
EVERY = 5  # steps between mask updates
SAVE_EVERY = 15
NAME = r"step_\d+"
LONGEST = 3.0  # seconds of training before a kill
WITHIN = {"update": 0.02, "save": 0.3}  # seconds after the words that come before it
PATIENCE = 10  # seconds for what is left to see that it is alone


class Row(NamedTuple):
    """One kill; steps are those that are done."""

    processes: int
    who: str
    doing: str
    fate: str
    began: int  # with this step
    before: int  # the newest save that was finished when it began
    reached: int
    finished: int  # the newest save that was finished


class Batches:
    """Rows in an order of their own in each epoch; goes on from any state."""

    def __init__(self):
        self.epoch = self.position = 0

    def get_state(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position}

    def set_state(self, state: dict[str, int]) -> None:
        self.epoch, self.position = int(state["epoch"]), int(state["position"])

    def __next__(self) -> np.ndarray:
        order = np.random.default_rng(self.epoch).permutation(ROWS)
        found = order[self.position : self.position + BATCH]
        self.position += BATCH
        if self.position == ROWS:
            self.epoch, self.position = self.epoch + 1, 0
        return found


def method(name):
    # A period in which masks never stop moving.
    options = {"every": EVERY, "end": 10**6}
    if name == "rigl":
        return jp.rigl(0.9, key=jax.random.key(1), **options)
    return jp.granet(0.9, **options | {"end": 600})


def placed(mesh, shapes):
    """Shapes with the places that their types speak of, for `restore`."""

    def leaf(x):
        spec = P() if x.sharding is None else x.sharding.spec
        return jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=NamedSharding(mesh, spec)
        )

    return jax.tree.map(leaf, shapes)


def digest(tree) -> str:
    """Of all that this process holds, bit for bit."""
    total = hashlib.sha256()
    for x in jax.tree.leaves(tree):
        pieces = x.addressable_shards if isinstance(x, jax.Array) else [x]
        for piece in pieces:
            total.update(np.ascontiguousarray(getattr(piece, "data", piece)).tobytes())
    return total.hexdigest()[:16]


def train(args):
    """One process. Says what it does, before it does it."""
    folder = pathlib.Path(args.folder)
    mesh = jax.make_mesh((2,), ("fsdp",))

    def initialise(key):
        up, down = jax.random.split(key)
        spec = {"up": P(None, "fsdp"), "down": P("fsdp", None)}
        params = {
            "up": jax.random.normal(up, (D, F), out_sharding=spec["up"]) / 8,
            "down": jax.random.normal(down, (F, D), out_sharding=spec["down"]) / 20,
        }
        return params, tx.init(params)

    tx = jp.masked(optax.adamw(1e-3), method(args.method))

    def loss(params, batch):
        x, y = batch
        hidden = jnp.tanh(x @ jax.reshard(params["up"], P(None, None)))
        return jnp.mean((hidden @ jax.reshard(params["down"], P(None, None)) - y) ** 2)

    @jax.jit
    def step(params, state, batch):
        value, grads = jax.value_and_grad(loss)(params, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    numbers = np.random.default_rng(0).normal(size=(ROWS, 2 * D)).astype("f4")

    def placed_rows(rows):
        rows = numbers[rows]
        sharding = NamedSharding(mesh, P("fsdp"))
        whole = jax.make_array_from_callback(rows.shape, sharding, lambda i: rows[i])
        return whole[:, :D], whole[:, D:]

    batches = Batches()
    with jax.set_mesh(mesh):
        saved = sorted(p for p in folder.iterdir() if re.fullmatch(NAME, p.name))
        if saved:
            like = placed(mesh, jax.eval_shape(initialise, jax.random.key(0)))
            like = {"run": like, "step": 0, "data": batches.get_state()}
            found = jp.checkpoint.restore(saved[-1], like=like)
            (params, state), at = found["run"], int(found["step"])
            batches.set_state(found["data"])
        else:
            (params, state), at = jax.jit(initialise)(jax.random.key(0)), 0
        say(f"from {at} {digest((params, state))}")
        for i in range(at, args.steps):
            say(f"{'update' if i % EVERY == 0 else 'step'} {i}")
            params, state, value = step(params, state, placed_rows(next(batches)))
            value = float(value)
            say(f"loss {i} {value.hex()}")
            if (i + 1) % SAVE_EVERY == 0:
                tree = {
                    "run": (params, state),
                    "step": i + 1,
                    "data": batches.get_state(),
                }
                say(f"save {i + 1} {digest((params, state))}")
                saving = jp.checkpoint.save_async(folder / f"step_{i + 1:06}", tree)
                saving.add_done_callback(functools.partial(finished, i + 1))
                if not args.background:
                    saving.result()
        tree = (params, state, batches.get_state())
        say(f"end {args.steps} {digest(tree)}")


def finished(step, saving):
    if saving.exception():
        say(f"failed {step} {saving.exception()!r}")
        os._exit(1)
    say(f"saved {step}")


def say(line):
    sys.stdout.write(f"{line}\n")  # at once: two threads talk
    sys.stdout.flush()


def read(text):
    """Lines of a process by their first word; the last may be cut short."""
    found = collections.defaultdict(list)
    for line in text.splitlines(keepends=True):
        words = line.split()
        if line.endswith("\n") and words:
            found[words[0]].append(words[1:])
    return found


class Chain:
    """A training run that is started again until it comes to its end."""

    def __init__(self, args, number, folder, calm=None):
        self.args, self.number, self.folder = args, number, pathlib.Path(folder)
        self.folder.mkdir()
        # What was found at each step, here or in the run that nobody disturbs.
        self.losses = dict(calm.losses) if calm else {}
        self.hashes = [dict(x) for x in calm.hashes] if calm else [{}, {}]
        self.reached = self.finished = 0  # steps done; those whose save is finished
        self.ended = False

    def start(self):
        command = [__file__, "--folder", str(self.folder), "--method", self.args.method]
        command += ["--steps", str(self.args.steps)]
        command += ["--background"] if self.args.background else []
        return processes.Running(
            command, processes=self.number, devices=2 // self.number
        )

    def take(self, running) -> int:
        """Checks and keeps what one start has said; gives the step that it began with."""
        began = 0
        for i in range(self.number):
            said = read(running.output(i))
            for step, value in said["loss"]:
                self._same(self.losses, int(step), value)
                self.reached = max(self.reached, int(step) + 1)
            for step, value in [*said["save"], *said["from"]]:
                self._same(self.hashes[i], step, value)
            for _, value in said["end"]:
                self._same(self.hashes[i], "end", value)
            for step, _ in said["from"]:
                began = int(step)
                if began < self.finished:
                    raise AssertionError(f"{self.finished} was saved, but not {began}")
        said = read(running.output(0))
        self.finished = max([self.finished, *(int(step) for (step,) in said["saved"])])
        self.ended = bool(said["end"])
        return began

    def _same(self, found, step, value):
        if found.setdefault(step, value) != value:
            raise AssertionError(f"{step}: {value} here, {found[step]} before")


def await_moment(kind, chain, running, chance):
    """Waits for the moment to kill, unless the run ends before."""
    patience = chain.args.timeout

    def count(word):
        return len(read(running.output(0))[word])

    running.wait(patience, lambda: count("from") == 1)
    if kind == "training":
        end = time.monotonic() + chance.uniform(0, LONGEST)
        running.wait(patience, lambda: time.monotonic() > end)
    else:  # one of the next, and somewhere in it
        wanted = count(kind) + chance.randint(1, 3)
        running.wait(patience, lambda: count(kind) >= wanted)
        time.sleep(chance.uniform(0, WITHIN[kind]))


def seen(chain, running) -> str:
    """What was going on when the first process was killed."""
    text = running.output(0)
    words = [line.split(" ")[0] for line in text.splitlines()] or [""]
    doing = {"update": "mask update", "step": "step", "save": "save"}
    found = doing.get(words[-1], "between steps")
    parts = [p for p in chain.folder.iterdir() if not re.fullmatch(NAME, p.name)]
    # Folders of earlier kills may lie there; only a save can have begun one now.
    if parts and words.count("save") > words.count("saved"):
        found = found.removesuffix("save") + ", save begun"
    return found.removeprefix(", ")


def disturbed(args, number, root):
    """A row for each kill."""
    calm = Chain(args, number, root / f"calm{number}")
    with calm.start() as running:
        running.wait(args.timeout)
        calm.take(running)
    print(f"{number} processes, undisturbed: {len(calm.losses)} steps", flush=True)
    chance, rows = random.Random(args.seed), []
    chain = None
    while chain is None or not chain.ended:
        if chain is None:
            chain = Chain(args, number, root / f"run{number}-{len(rows)}", calm)
        kind = MOMENTS[len(rows) % 3]
        more = len(rows) < args.kills // len(args.counts)
        # Each of them at each of the moments; process 0 holds the coordinator.
        turn = (len(rows) + len(rows) // 3) % 3
        who = (0, 1, None)[turn] if number > 1 else None
        with chain.start() as running:
            if not more:
                running.wait(args.timeout)
                chain.take(running)
                break
            await_moment(kind, chain, running, chance)
            running.kill(who)
            doing = seen(chain, running)
            fate = "-" if who is None else outlived(running)
            running.kill()
            before = chain.finished
            began = chain.take(running)
        if chain.ended:  # too late
            chain = None
            continue
        rows.append(
            Row(number, "all" if who is None else f"process {who}", doing, fate,
                began, before, chain.reached, chain.finished)
        )  # fmt: skip
        print(rows[-1], flush=True)
    return rows


def outlived(running) -> str:
    """What becomes of the process that is left."""
    start = time.monotonic()
    while time.monotonic() < start + PATIENCE:
        if None not in [p.poll() for p in running.processes]:
            return f"failed after {time.monotonic() - start:.1f} s"
        time.sleep(0.05)
    return f"stopped after {PATIENCE} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=50, help="in all")
    parser.add_argument("--method", default="rigl", choices=("rigl", "granet"))
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=900)
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--background", action="store_true", help="by `save_async`")
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    processes.arguments(parser)
    args = parser.parse_args()
    if args.folder:
        processes.connect(args)
        train(args)
        return
    with tempfile.TemporaryDirectory() as root:
        # Each start compiles nothing that an earlier one has compiled.
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{root}/compiled")
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        report([x for n in args.counts for x in disturbed(args, n, pathlib.Path(root))])


def report(rows):
    print("\n| kill | processes | killed | in the middle of | the other | began at | "
          "reached | newest save | steps lost |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|")
    for i, row in enumerate(rows):
        print(f"| {i + 1} | {row.processes} | {row.who} | {row.doing} | {row.fate} | "
              f"{row.began} | {row.reached} | {row.finished} | "
              f"{row.reached - row.finished} |")  # fmt: skip


if __name__ == "__main__":
    main()
