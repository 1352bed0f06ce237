"""Solvers on one matrix against the authors' formulations in PyTorch, in one run.

The peers are written here after the papers and the authors' code, on the papers' layout
`[out, in]`: SparseGPT by Cholesky factor, inverse and Cholesky factor, thresholds from
a sort and a loop over columns; Wanda by a stable sort of each row; ALPS, in up to three turns,
by an eigendecomposition in float64 and a new inverse every three iterations. Both run on
the CPU, with one thread each if the process is pinned to one core, which is how the table
was made (PyTorch is told so as well). The two take turns; each figure is the median over
turns. Compilation is not counted: it comes once for each shape and structure.

    python -m pip install torch==2.13.0
    taskset -c 0 python benchmarks/solvers.py [--rounds 5] [--quick] [--only ALPS]

Expected before measuring: SparseGPT 1.5 to 3 times as fast, from one factor instead of
three and strips of columns that stay in cache, the more the smaller the layer; 2:4 less
than unstructured, since it has no sort to save; Wanda 3 to 5 times, from bisection in place
of a sort; ALPS 2 to 4 times, from products in float32 in place of float64.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import torch

import jaxprune as jp
from jaxprune import posttrain
from jaxprune.calibration import Inputs

SQUARES = ((512, 512), (1024, 1024), (2048, 2048))
SMOLLM2 = ((576, 576), (576, 192), (576, 1536), (1536, 576))
PATTERNS = {"50 %": (0.5, None), "70 %": (0.7, None), "2:4": (None, (2, 4))}
WANTED = 1.5


def layer(rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights `[K, N]` and a Gram matrix of inputs with skewed scales."""
    random = np.random.default_rng(0)
    mixed = random.standard_normal((2 * rows, rows), np.float32)
    mixed = mixed @ random.standard_normal((rows, rows), np.float32)
    scales = random.lognormal(size=rows).astype(np.float32)
    x = mixed * scales / np.float32(rows**0.5)
    w = random.standard_normal((rows, columns), np.float32) / np.float32(rows**0.5)
    return w, x.T @ x / np.float32(len(x))


def torch_wanda(w, gram, sparsity, nm):
    scores = w.abs() * gram.diagonal().sqrt()
    pruned = torch.zeros_like(w, dtype=torch.bool)
    if nm is None:
        order = torch.sort(scores, dim=1, stable=True)[1]
        pruned.scatter_(1, order[:, : int(w.shape[1] * sparsity)], True)
    else:
        _prune_groups(pruned, scores, nm)
    return torch.where(pruned, 0, w)


def _prune_groups(pruned, scores, nm):
    n, m = nm
    for i in range(0, scores.shape[1], m):
        worst = torch.topk(scores[:, i : i + m], m - n, dim=1, largest=False)[1]
        pruned.scatter_(1, i + worst, True)


def torch_sparsegpt(w, gram, sparsity, nm, size=128, damping=0.01):
    w, h = w.clone(), gram.clone()
    columns = w.shape[1]
    dead = h.diagonal() == 0
    h[dead, dead] = 1
    w[:, dead] = 0
    h.diagonal().add_(damping * h.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
    upper = torch.linalg.cholesky(inverse, upper=True)
    for first in range(0, columns, size):
        last = min(first + size, columns)
        part, corner = w[:, first:last].clone(), upper[first:last, first:last]
        new, errors = torch.zeros_like(part), torch.zeros_like(part)
        losses = torch.zeros_like(part)
        pruned = torch.zeros_like(part, dtype=torch.bool)
        if nm is None:
            scores = part**2 / corner.diagonal()[None] ** 2
            place = int(scores.numel() * sparsity)
            pruned = scores <= torch.sort(scores.flatten())[0][place]
        for i in range(last - first):
            column, scale = part[:, i], corner[i, i]
            if nm is not None and i % nm[1] == 0:
                group = slice(i, i + nm[1])
                scores = part[:, group] ** 2 / corner.diagonal()[None, group] ** 2
                _prune_groups(pruned[:, group], scores, nm)
            kept = column.clone()
            kept[pruned[:, i]] = 0
            new[:, i] = kept
            losses[:, i] = (column - kept) ** 2 / scale**2
            error = (column - kept) / scale
            part[:, i:] -= error.unsqueeze(1).matmul(corner[i, i:].unsqueeze(0))
            errors[:, i] = error
        w[:, first:last] = new
        w[:, last:] -= errors.matmul(upper[first:last, last:])
    return w


def torch_alps(w, gram, sparsity, nm, damping=0.01, rho=0.1, iterations=300):
    gram = gram.clone()
    gram.diagonal().add_(damping * gram.diagonal().mean())
    norm = gram.diagonal().sqrt() + 1e-8
    a = gram / norm / norm[:, None]
    dense = (w * norm).T.clone()
    target = ((w * norm) @ a).T
    values, vectors = torch.linalg.eigh(a.double())
    rows, columns = dense.shape
    kept = round((1 - (sparsity or 1 - nm[0] / nm[1])) * dense.numel())

    def divide():
        return (vectors @ ((1 / (values + rho)) * vectors).T).float()

    def project(x):
        if nm is None:
            flat = x.clone().reshape(-1)
            flat[torch.topk(-(flat**2), flat.numel() - kept)[1]] = 0
            return flat.reshape(rows, columns)
        flat = x.t().reshape(-1, nm[1]).clone()
        worst = torch.topk(-(flat**2), nm[1] - nm[0], dim=1)[1]
        return flat.scatter(1, worst, 0).reshape(columns, rows).t()

    inverse = divide()
    b, d, v = dense.clone(), project(dense), torch.zeros_like(dense)
    start, before, moved = d.clone(), d == 0, False
    for i in range(iterations):
        b = inverse @ (target - v + rho * d)
        d = project((v + rho * b) / rho)
        v = v + rho * (b - d)
        if (i + 1) % 3:
            continue
        changed = ((d == 0) != before).sum().item()
        share = changed / kept
        moved = moved or share > 0.005
        if share > 0.005 or (changed and moved):
            rho *= 1.3 if share > 0.1 else 1.2 if share > 0.005 else 1.1
        elif moved:
            break
        else:
            rho /= 5
            if changed:
                b, d, v = dense.clone(), start.clone(), torch.zeros_like(v)
        before = d == 0
        inverse = divide()
        if i >= 30 and share < 3e-4:
            break
    x = project(b)
    support = x != 0
    r = (target - a @ x) * support
    p, size = r, (r * r).sum(0)
    for _ in range(10):
        product = a @ p
        length = size / (p * product).sum(0).clamp_min(1e-30)
        x, r = x + length * p, (r - length * product) * support
        now = (r * r).sum(0)
        p, size = r + now / size.clamp_min(1e-30) * p, now
    return x.T / norm


SOLVERS = {
    "Wanda": (posttrain.wanda(), torch_wanda),
    "SparseGPT": (posttrain.sparsegpt(), torch_sparsegpt),
    "ALPS": (posttrain.alps(), torch_alps),
}


def compare(method: str, shape, pattern: str, rounds: int):
    """Seconds of ours and theirs, the median of ratios, and errors as shares."""
    (sparsity, nm), (solver, peer) = PATTERNS[pattern], SOLVERS[method]
    w, gram = layer(*shape)
    structure = jp.Unstructured() if nm is None else jp.NM(*nm)
    square = None if method != "Wanda" else jnp.asarray(gram.diagonal())
    known = None if method == "Wanda" else jnp.asarray(gram)
    inputs = Inputs(jnp.float32(2 * shape[0]), square=square, gram=known)
    ours_w, theirs_w = jnp.asarray(w), torch.tensor(w.T.copy())
    theirs_gram = torch.tensor(gram)

    def ours():
        return jax.block_until_ready(solver.solve(ours_w, inputs, sparsity, structure))

    def theirs():
        return peer(theirs_w, theirs_gram, sparsity, nm)

    found = {"ours": np.asarray(ours().w), "theirs": theirs().numpy().T}
    energy = posttrain.layer_error(ours_w, 0 * ours_w, jnp.asarray(gram))
    errors = [
        float(posttrain.layer_error(ours_w, jnp.asarray(x), jnp.asarray(gram)) / energy)
        for x in found.values()
    ]
    times = []
    for _ in range(rounds):
        turn = []
        for f in (ours, theirs):
            start = time.perf_counter()
            f()
            turn.append(time.perf_counter() - start)
        times.append(turn)
    spent = [statistics.median(t[i] for t in times) for i in (0, 1)]
    return *spent, statistics.median(t[1] / t[0] for t in times), *errors


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="only 512 and 576 x 192")
    parser.add_argument("--only", nargs="+", choices=SOLVERS, default=list(SOLVERS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    shapes = ((512, 512), (576, 192)) if args.quick else SQUARES + SMOLLM2
    print(
        "| method | K x N | pattern | ours, ms | PyTorch, ms | ratio | error, ours | error |"
    )
    print("|-|-|-|-|-|-|-|-|")
    below = []
    for method in args.only:
        for shape in shapes:
            for pattern in PATTERNS:
                rounds = args.rounds if method != "ALPS" else min(args.rounds, 3)
                ours, theirs, ratio, *errors = compare(method, shape, pattern, rounds)
                name = f"{method} {shape[0]} x {shape[1]} {pattern}"
                below += [name] if ratio < WANTED else []
                print(
                    f"| {method} | {shape[0]} x {shape[1]} | {pattern} | {ours * 1e3:.1f} "
                    f"| {theirs * 1e3:.1f} | {ratio:.2f} "
                    f"| {errors[0]:.4f} | {errors[1]:.4f} |",
                    flush=True,
                )
    print(f"\nBelow {WANTED}: {', '.join(below) or 'none'}.")


if __name__ == "__main__":
    main()
