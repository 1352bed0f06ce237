"""MiniLM through `accelerate`: what is packed, what stays dense, and why.

Three models on a batch of 32 film snippets: the published weights with 90 % of the 64 x 64
blocks of the encoder pruned in one shot, the same with 2:4, and the model that the demo
trains with NeuroPrune (it is trained if `make demo` has not done so). For each, the report
of `accelerate`, its choices timed here; the largest difference of logits; the bytes of the
encoder's matrices; and the inference time against the dense model, turn by turn.

    python benchmarks/accelerate_minilm.py [--rounds 15] [--demo build/demo]

Expected before measuring: blocks are packed throughout and inference takes half the time or
less, since attention and norms stay; 2:4 and NeuroPrune's scattered zeros stay dense on a
CPU, with the reason.
"""

import argparse
import functools
import pathlib
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

import jaxprune as jp

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "examples"))

import neuroprune_minilm as demo
from minilm import data, model, train

ENCODER = "layers/*/kernel"


def models(args, builder):
    """Names, parameters and masks."""
    _, params, _ = model.split(model.pretrained())
    blocks = jp.Block(64, 64)
    yield (
        "90 % of 64 x 64 blocks",
        *jp.prune(params, 0.9, structure=blocks, where=ENCODER),
    )
    yield ("2:4", *jp.prune(params, 0.5, structure=jp.NM(2, 4), where=ENCODER))
    budget = demo.SPARSE_BUDGET
    tx = jp.masked(
        train.adamw(budget), jp.neuroprune(roles=model.ROLES, **demo.NEUROPRUNE)
    )
    settings = (budget, model.ROLES, demo.NEUROPRUNE)
    params, state = demo.fit("NeuroPrune", tx, settings, builder, args.demo)
    yield "NeuroPrune, as the demo trains it", params, jp.get_masks(state)


def ratio(calls, rounds):
    spent = [[] for _ in calls]
    for turn in range(-2, rounds):
        for call, own in zip(calls, spent, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(call())
            if turn >= 0:
                own.append(time.perf_counter() - start)
    return statistics.median(a / b for a, b in zip(*spent, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=15, help="turns that count")
    parser.add_argument("--data-dir", type=pathlib.Path, default=".data")
    parser.add_argument("--demo", type=pathlib.Path, default="build/demo")
    args = parser.parse_args()
    builder = data.prepare(args.data_dir)
    test = data.test_set(builder, length=demo.BUDGET.length)
    batch = {name: jnp.asarray(x[: demo.BUDGET.batch]) for name, x in test.items()}
    static, _, frozen = model.split(model.pretrained())
    logits = train.forward(static, frozen)
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}")
    for name, params, masks in models(args, builder):
        params = jp.masks.apply(params, masks)
        fast, packed, report = jp.accelerate(logits, params, masks, batch, measure=True)
        dense, fast = jax.jit(logits), jax.jit(fast)
        apart = np.abs(np.asarray(dense(params, batch) - fast(packed, batch))).max()
        held = sum(c.nbytes for c in report.choices)
        whole = sum(c.dense_nbytes for c in report.choices)
        calls = (
            functools.partial(dense, params, batch),
            functools.partial(fast, packed, batch),
        )
        times = ratio(calls, args.rounds)
        print(f"\n## {name}\n\n```text\n{report}\n```\n\nInference time, dense / accelerated: "
              f"{times:.2f}. Bytes of the matrices: {held / whole:.2f} of dense. Logits differ "
              f"by at most {apart:.1e}.", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
