r"""What each method costs in a training step, on a step with an update and without.

The MLP of `masked_overhead.py` (11 M parameters) and the bare optimizer in the same run:
all variants take turns in random order, and each figure is the median over rounds of the
ratio to the plain step of the same round. The forward view stands in the loss where the
weights are dense behind the mask; where they are 0 themselves, no view is needed.

    python benchmarks/method_overhead.py [--rounds 15] [--only rigl ste]

XLA takes all temporaries of a program from the C library at once, at each execution. glibc
hands back to the system what is larger than 32 MB, so that every page of it must be made
again in the next step: some 12 ms in 70 on the machine this was written on, and the bare
optimizer here stays just below. The column of page faults (thousands, on a step without an
update) shows who is struck; to measure methods and not the C library, tell it to keep what
it has:

    MALLOC_ARENA_MAX=1 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=8000000000 \
        MALLOC_TOP_PAD_=1000000000 python benchmarks/method_overhead.py

Expected before measuring: off their update steps, prune-and-grow methods within 1.05 of
the optimizer; the STE family up to 1.15 (a masked copy of the weights is made in the
forward pass), soft masks 1.3 to 1.5 (a sigmoid for each weight). With an update 1.7 for
one selection, 2.5 for two, 3.3 for GraNet's three; SET 3, for its random numbers; CHTs 10,
for its products of masks. 2:4 at each step 1.5. Temporaries: a masked copy for the STE
family, a byte a weight for what stays in prune-and-grow.
"""

import argparse
import statistics

import jax
import masked_overhead
import optax
from masked_overhead import HIDDEN, Variant

import jaxprune as jp

NEVER = 10**6
KEY = jax.random.key(0)
NM = jp.NM(2, 4)


def steps(every):
    """From the first step on, so that nothing but `every` differs."""
    return {"begin": 1 if every > 1 else 0, "end": 2 * NEVER, "every": every}


METHODS = {
    "gmp": lambda every: jp.gmp(0.9, **steps(every)),
    "set": lambda every: jp.set_(0.9, key=KEY, **steps(every)),
    "rigl": lambda every: jp.rigl(0.9, key=KEY, **steps(every)),
    "granet": lambda every: jp.granet(0.9, **steps(every)),
    "chts": lambda every: jp.chts(0.9, key=KEY, **steps(every)),
    "acdc": lambda every: jp.acdc(0.9, **steps(every)),
    "iss_p": lambda every: jp.iss_p(0.9, **steps(every)),
    "mask_sparsity": lambda every: jp.mask_sparsity(0.9, begin=1, end=NEVER),
    "top_kast": lambda every: jp.top_kast(0.9, backward=0.8, every=every),
    "ste": lambda every: jp.ste(0.9, every=every),
    "ste 2:4": lambda every: jp.ste(structure=NM, every=every),
    "sr_ste": lambda every: jp.sr_ste(0.9, every=every),
    "mdgf": lambda every: jp.mdgf(
        0.9, leak=jp.schedules.linear(0.0, 0, NEVER, initial=1.0), every=every
    ),
    "pdp": lambda every: jp.pdp(
        0.9, begin=0, end=1, harden=NEVER, every=every, allocation="uniform"
    ),
    "soft_top_k": lambda every: jp.soft_top_k(
        0.9, begin=0, end=1, harden=NEVER, every=every, allocation="uniform"
    ),
}


def unseen(params, state):
    del state
    return params


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", nargs="+", default=list(METHODS))
    args = parser.parse_args()
    jax.config.update("jax_compilation_cache_dir", "build/compiled")
    params, batch = masked_overhead.setting()
    adamw = optax.adamw(1e-3)
    found = [Variant("optax.adamw", adamw, params, batch)]
    for name in args.only:
        where = HIDDEN if "2:4" in name else None
        for every in (NEVER, 1):
            method = METHODS[name](every)
            tx = jp.masked(adamw, method, where=where)
            view = jp.sparse_params if method.dense else unseen
            found.append(Variant(f"{name} {every}", tx, params, batch, view))
    turns = masked_overhead.take_turns(found, args.rounds)
    memory = {v.name: v.memory / found[0].memory for v in found}
    size = sum(x.size for x in jax.tree.leaves(params))
    bits = {v.name: 8 * (v.bytes - found[0].bytes) / size for v in found}
    print(f"{size / 1e6:.2f} M parameters, {args.rounds} rounds, jax {jax.__version__}, "
          f"{jax.devices()[0].device_kind}\n")  # fmt: skip
    faults = {v.name: statistics.median(v.faults) / 1e3 for v in found}
    print(
        f"Page faults in a step of the bare optimizer: {faults['optax.adamw']:.1f} k\n"
    )
    print("| method | no update | update | every 20 steps | every 100 steps | "
          "temporaries / adamw | state, bits a weight | page faults, k |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|")
    for name in args.only:
        off, on = (statistics.median(turns[f"{name} {e}"]) for e in (NEVER, 1))
        cells = [off, on, (19 * off + on) / 20, (99 * off + on) / 100]
        print(f"| {name} | " + " | ".join(f"{x:.2f}" for x in cells) +
              f" | {memory[f'{name} 1']:.2f} | {bits[f'{name} 1']:.1f} | "
              f"{faults[f'{name} {NEVER}']:.1f} |")  # fmt: skip


if __name__ == "__main__":
    main()
