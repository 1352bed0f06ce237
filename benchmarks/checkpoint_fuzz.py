"""Damaged checkpoints: an error or an equal tree, and no crash, hang or great memory.

A checkpoint of 2 MB with leaves of all kinds is damaged in one way after another, and
restored in a process whose memory is watched: what it takes beyond what it had must stay
below twice the size of the checkpoint and 4 MB. A process that dies, or is silent for five
minutes, is counted and started anew.

    python benchmarks/checkpoint_fuzz.py [--files 10000]

It ends with status 1 if anything went wrong. Most damage leaves the checksums as they are;
two kinds mend them afterwards, as only a forger would. A file of Orbax that was forged
must still give an error or an equal tree, for the sums of the arrays. A forged manifest
may describe another tree, and then that is what comes back ("another tree").

Expected before measuring: errors for all damage, but where a change has no meaning (a
range that was zero is zeroed, a file takes the place of its equal).
"""

import argparse
import collections
import json
import os
import pathlib
import random
import resource
import select
import shutil
import subprocess
import sys
import tempfile

PATIENCE = 300  # seconds
SLACK = 4 << 20  # bytes
FINE = {"error", "equal tree"}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--worker", type=int, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker is not None:
        worker(args.worker, args.files)
        return
    counts = collections.defaultdict(collections.Counter)
    examples, most, size, done = {}, 0, 0, 0
    while done < args.files:
        for line in lines(done, args.files):
            case = json.loads(line)
            if "size" in case:
                size = case["size"]
                continue
            done += 1
            counts[case["damage"]][case["found"]] += 1
            most = max(most, case["memory"])
            if done % 500 == 0:
                print(f"{done} of {args.files}", file=sys.stderr)
            if not is_fine(case):
                examples.setdefault((case["damage"], case["found"]), case)
    columns = sorted({x for c in counts.values() for x in c})
    print(f"{args.files} damaged checkpoints of {size / 1e6:.1f} MB; at most")
    print(f"{most / 1e6:.1f} MB of memory for one of them.\n")
    print(f"| damage | {' | '.join(columns)} |")
    print("|---|" + "---|" * len(columns))
    for damage, found in sorted(counts.items()):
        print(f"| {damage} | {' | '.join(str(found[c]) for c in columns)} |")
    for case in examples.values():
        print("\n", case)
    sys.exit(bool(examples))


def is_fine(case) -> bool:
    is_forged = case["damage"] == "forged JSON"
    return case["found"] in FINE or (is_forged and case["found"] == "another tree")


def lines(first: int, files: int):
    """What a worker says of each case; something of its own if it says no more."""
    command = [sys.executable, __file__, "--files", str(files), "--worker", str(first)]
    started = {}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        while True:
            if not select.select([process.stdout], [], [], PATIENCE)[0]:
                process.kill()
                if not started:
                    sys.exit("The worker does not start.")
                yield json.dumps({**started, "found": "hang", "memory": 0})
                return
            line = process.stdout.readline()
            if not line:
                break
            if "found" in line or "size" in line:
                started = {}
                yield line
            else:
                started = json.loads(line)
    if process.returncode:
        if not started:
            sys.exit("The worker does not start.")
        yield json.dumps({**started, "found": "crash", "memory": 0})


def worker(first: int, files: int):
    os.environ["JAX_PLATFORMS"] = "cpu"
    import logging

    import jaxprune as jp

    logging.disable()
    root = pathlib.Path(tempfile.mkdtemp())
    try:
        tree, other = trees(0), trees(1)
        jp.checkpoint.save(root / "a", tree)
        jp.checkpoint.save(root / "b", other)
        for _ in range(3):
            # Not the tree itself: dicts have another order than what they stand for.
            references = [
                jp.checkpoint.restore(root / "a", like=x) for x in (tree, None)
            ]
        whole, foreign = contents(root / "a"), contents(root / "b")
        size = sum(map(len, whole.values()))
        say(size=size)
        limit = now("VmSize") + (2 << 30)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        for i in range(first, files):
            rng = random.Random(i)
            damage = rng.choice(sorted(DAMAGES))
            say(case=i, damage=damage)
            what = DAMAGES[damage](rng, root / "a", whole, foreign)
            before = fresh_peak()
            found, why = restored(
                jp, root / "a", (tree, None)[i % 2], references[i % 2]
            )
            memory = max(0, now("VmHWM") - before)
            if memory > 2 * size + SLACK:
                found = "memory"
            say(case=i, damage=damage, what=what, found=found, why=why, memory=memory)
            mend(root / "a", whole)
    finally:
        shutil.rmtree(root)


def restored(jp, path, like, reference):
    try:
        found = jp.checkpoint.restore(path, like=like)
    except (ValueError, OSError) as e:
        return "error", f"{type(e).__name__}: {e}"[:300]
    except Exception as e:
        return f"{type(e).__name__}", f"{e}"[:300]
    return ("equal tree" if same(found, reference) else "another tree"), ""


def same(a, b) -> bool:
    """Whether two trees have the same leaves; their containers may be others."""
    import jax
    import numpy as np

    def words(x):
        is_key = jax.numpy.issubdtype(getattr(x, "dtype", None), jax.dtypes.prng_key)
        return jax.random.key_data(x) if is_key else x

    a, b = (list(map(words, jax.tree.leaves(x))) for x in (a, b))
    return len(a) == len(b) and all(
        np.asarray(x).dtype == np.asarray(y).dtype
        and np.shape(x) == np.shape(y)
        and np.asarray(x).tobytes() == np.asarray(y).tobytes()
        for x, y in zip(a, b, strict=True)
    )


def trees(seed: int):
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    import jaxprune as jp

    w = jax.random.normal(jax.random.key(seed), (1024, 512), jnp.bfloat16)
    small = {"k1": w[:64, :128], "k2": w[64:128, :128], "k3": w[:64, 128:256]}
    structures = {"k1": jp.NM(2, 4), "k2": jp.Block(16, 16), "k3": jp.Unstructured()}
    pruned, masks = jp.prune(small, sparsity=0.5)
    masks["k1"] = jp.prune({"k": small["k1"]}, structure=jp.NM(2, 4))[1]["k"]
    tx = jp.masked(optax.adam(1e-3), jp.gmp(0.5, end=0))
    return {
        "params": {"kernel": w, "bias": w[0].astype(jnp.float32)},
        "packed": jp.formats.pack_tree(small, masks, structures),
        "masks": jp.masks.pack(masks),
        "state": tx.init({"kernel": w[:512]}),
        "small": {
            "int4": jnp.arange(9).astype(jnp.int4),
            "fp8": w[1].astype("float8_e4m3fn"),
        },
        "key": jax.random.key(seed),
        "host": np.arange(5.0) + seed,
        "iterator": b"\x00\x01" * 20,
        "plan": {"groups": [["a", 1, [0, 2]], ["b", 2.5, None]]},
        "step": 7,
    }


def contents(path: pathlib.Path) -> dict[str, bytes]:
    files = (f for f in path.rglob("*") if f.is_file())
    return {f.relative_to(path).as_posix(): f.read_bytes() for f in sorted(files)}


def mend(path: pathlib.Path, whole: dict[str, bytes]):
    for there in sorted(path.rglob("*"), reverse=True):
        name = there.relative_to(path).as_posix()
        inside = any(n.startswith(name + "/") for n in whole)
        is_file = there.is_file() and not there.is_symlink()
        if there.is_dir() and not there.is_symlink():
            if not inside:
                shutil.rmtree(there)
        elif not is_file or name not in whole:
            there.unlink()
    for name, data in whole.items():
        file = path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        same_size = file.exists() and file.stat().st_size == len(data)
        if not same_size or file.read_bytes() != data:
            file.write_bytes(data)


def pick(rng, whole):
    """A file; the small ones, which describe the others, as often as the large ones."""
    return rng.choice(sorted(whole))


def rewrite(change):
    def damage(rng, path, whole, foreign):
        name = pick(rng, whole)
        (path / name).write_bytes(change(rng, bytearray(whole[name]), whole))
        return name

    return damage


def span(rng, data) -> slice:
    start = rng.randrange(len(data)) if data else 0
    return slice(start, min(len(data), start + rng.choice([1, 8, 100, 4096, 1 << 20])))


def filled(byte):
    def change(rng, data, whole):
        place = span(rng, data)
        data[place] = bytes([byte]) * (place.stop - place.start)
        return data

    return rewrite(change)


def flip(rng, data, whole):
    for _ in range(rng.choice([1, 1, 2, 50])):
        if data:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return data


def noise(rng, data, whole):
    place = span(rng, data)
    data[place] = rng.randbytes(place.stop - place.start)
    return data


def splice(rng, data, whole):
    other = whole[pick(rng, whole)]
    data[span(rng, data)] = other[span(rng, other)]
    return data


def truncate(rng, data, whole):
    return data[: rng.randrange(len(data))] if data else data


def append(rng, data, whole):
    return data + rng.randbytes(rng.choice([1, 100, 1 << 16]))


def swap(rng, path, whole, foreign):
    a, b = pick(rng, whole), pick(rng, whole)
    (path / a).write_bytes(whole[b])
    (path / b).write_bytes(whole[a])
    return f"{a}, {b}"


def of_another(rng, path, whole, foreign):
    """A file of a checkpoint of the same kind; all that describes it, at times."""
    if rng.random() < 0.2:
        for name in ("manifest.json", "process_0.json"):
            (path / name).write_bytes(foreign[name])
        return "both descriptions"
    name, there = pick(rng, whole), pick(rng, foreign)
    (path / name).write_bytes(foreign[name if name in foreign else there])
    return name


def delete(rng, path, whole, foreign):
    there = sorted(path.rglob("*"))
    gone = rng.choice(there)
    shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    return str(gone.relative_to(path))


def rename(rng, path, whole, foreign):
    name = rng.choice(sorted(path.rglob("*")))
    name.rename(name.with_name(name.name + rng.choice(["~", ".part", "0"])))
    return str(name.relative_to(path))


def instead(rng, path, whole, foreign):
    """A folder, a link, a pipe, or a file of enormous length without contents."""
    name = pick(rng, whole)
    file = path / name
    file.unlink()
    kind = rng.choice(["folder", "link", "link outside", "pipe", "hole"])
    if kind == "folder":
        file.mkdir()
    elif kind == "pipe":
        os.mkfifo(file)
    elif kind == "hole":
        with open(file, "wb") as f:
            f.truncate(1 << rng.choice([30, 40]))
    else:
        inside = path / pick(rng, whole)
        file.symlink_to("/etc/passwd" if kind == "link outside" else inside)
    return f"{kind} for {name}"


def add(rng, path, whole, foreign):
    file = path / pathlib.Path(pick(rng, whole)).with_name(f"{rng.getrandbits(64):x}")
    file.write_bytes(rng.randbytes(100))
    return str(file.relative_to(path))


def edit(rng, data):
    """Changes one thing somewhere in JSON data."""
    places = []

    def walk(x):
        for key in x if isinstance(x, dict) else range(len(x)):
            places.append((x, key))
            if isinstance(x[key], dict | list):
                walk(x[key])

    walk(data)
    owner, key = rng.choice(places)
    kind = rng.choice(["set", "set", "set", "delete", "swap", "rename"])
    if kind == "delete":
        del owner[key]
    elif kind == "swap":
        owner2, key2 = rng.choice(places)
        try:
            owner[key], owner2[key2] = owner2[key2], owner[key]
            json.dumps(data)
        except (KeyError, IndexError, ValueError, RecursionError):
            owner[key] = 0  # one was inside the other
    elif kind == "rename" and isinstance(owner, dict):
        owner[rng.choice(["../x", "dict", "array", "/etc/passwd", ""])] = owner.pop(key)
    else:
        old = owner[key]
        owner[key] = rng.choice(
            [None, 0, -1, 1, 2**31, 10**15, 10**30, 1.5, float("nan"), "", "../../x", [], {},
             True, [old], {"array": 0}, "float64", "int4", "object", [10**8, 10**7], "x" * 999]
            + ([old + 1, old * 2, -old] if type(old) is int else [])
        )  # fmt: skip
    return f"{kind} {str(key)[:50]}"


def json_edit(rng, path, whole, foreign):
    name = rng.choice(["manifest.json", "process_0.json"])
    data = json.loads(whole[name])
    what = edit(rng, data)
    (path / name).write_text(json.dumps(data))
    return f"{name}: {what}"


def forged_json(rng, path, whole, foreign):
    parts = {n: json.loads(whole[n]) for n in ("manifest.json", "process_0.json")}
    name = rng.choice(sorted(parts))
    parts[name].pop("crc32")
    what = edit(rng, parts[name])
    reseal(path, parts)
    return f"{name}: {what}"


def forged_file(rng, path, whole, foreign):
    import zlib

    name = rng.choice([n for n in whole if n.startswith("arrays/")])
    change = rng.choice([flip, noise, splice, truncate, append])
    data = bytes(change(rng, bytearray(whole[name]), whole))
    (path / name).write_bytes(data)
    parts = {n: json.loads(whole[n]) for n in ("manifest.json", "process_0.json")}
    listed = parts["process_0.json"]["files"]
    listed[name.removeprefix("arrays/")] = [len(data), zlib.crc32(data)]
    reseal(path, parts)
    return f"{change.__name__} {name}"


def reseal(path, parts):
    from jaxprune.checkpoint import _manifest

    own = parts["process_0.json"]
    for part in parts.values():
        part.pop("crc32", None)
    if isinstance(own, dict) and "manifest" in own:
        own["manifest"] = _manifest.crc(parts["manifest.json"])
    for name, part in parts.items():
        (path / name).write_text(_manifest.sealed(part))


DAMAGES = {
    "bits flipped": rewrite(flip),
    "range of zeros": filled(0),
    "range of ones": filled(255),
    "range of noise": rewrite(noise),
    "cut short": rewrite(truncate),
    "made longer": rewrite(append),
    "spliced": rewrite(splice),
    "two files swapped": swap,
    "file of another checkpoint": of_another,
    "deleted": delete,
    "renamed": rename,
    "no file there": instead,
    "file added": add,
    "JSON edited": json_edit,
    "forged JSON": forged_json,
    "forged Orbax file": forged_file,
}


def fresh_peak() -> int:
    """Resident bytes; the peak is measured from now on."""
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    return now("VmRSS")


def now(name: str) -> int:
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return 1024 * int(line.split()[1])
    raise ValueError(name)


def say(**case):
    print(json.dumps(case), flush=True)


if __name__ == "__main__":
    main()
