"""Training that is killed goes on to the same bits as training that is not."""

import os
import pathlib
import signal
import subprocess
import sys

import numpy as np

EXAMPLES = pathlib.Path(__file__).resolve().parents[2] / "examples"


def test_killed_at_a_step_and_in_a_save(tmp_path):
    killed = tmp_path / "killed"

    # On the way to step 7, and so back to the checkpoint of step 4.
    assert _run(killed, kill="step 7").returncode == -signal.SIGKILL
    assert _names(killed) == ["00000004"]

    # Then at the last moment of a save: all is written but the final name.
    assert _run(killed, kill="save 00000008").returncode == -signal.SIGKILL
    left = _names(killed)
    assert len(left) == 2
    assert left[0] == "00000004"
    assert left[1].startswith("00000008.")

    done = _run(killed, tmp_path / "never_killed")
    assert done.returncode == 0, done.stderr
    assert _names(killed) == ["00000008", "00000012"]
    found = np.load(tmp_path / "killed.npz")
    wanted = np.load(tmp_path / "never_killed.npz")
    assert sorted(found) == sorted(wanted)
    different = [
        name
        for name, x in wanted.items()
        if x.dtype != found[name].dtype or x.tobytes() != found[name].tobytes()
    ]
    assert different == []

    # Neither run was idle: links were pruned, moments moved and heads were folded.
    kept = np.concatenate([x.ravel() for n, x in wanted.items() if n[:6] == "masks/"])
    assert 0.2 < kept.mean() < 0.6
    alive = np.concatenate([x for n, x in wanted.items() if "/alive/" in n])
    assert 0 < alive.sum() < alive.size
    assert any(x.any() for n, x in wanted.items() if "/nu/" in n)


def _names(folder: pathlib.Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _run(*folders: pathlib.Path, kill: str = "") -> subprocess.CompletedProcess:
    """Runs this file as a program of its own; what it compiles is kept for the next."""
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(folders[0].parent / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    command = [sys.executable, __file__, kill, *map(str, folders)]
    return subprocess.run(
        command, env=os.environ | cache, capture_output=True, text=True
    )


def _main(kill: str, folders: list[str]) -> None:
    sys.path.insert(0, str(EXAMPLES))
    _die_in_a_save(kill.removeprefix("save "))
    for folder in map(pathlib.Path, folders):
        _train(folder, kill)


def _die_in_a_save(name: str) -> None:
    """Kills this process when a checkpoint is about to get its final name."""

    def watch(event, args):
        if event == "os.rename" and os.path.basename(args[1]) == name:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


class _Stream:
    """Batches that kill this process in place of the one that `kill` says."""

    def __init__(self, batches, kill: str):
        self._batches, self._last = batches, kill.removeprefix("step ")
        self.get_state, self.set_state = batches.get_state, batches.set_state

    def __next__(self):
        if str(self.get_state()["next_index"] + 1) == self._last:
            os.kill(os.getpid(), signal.SIGKILL)
        return next(self._batches)


def _train(out: pathlib.Path, kill: str) -> None:
    import grain
    import jax
    from flax import nnx
    from minilm import model, train

    import jaxprune as jp

    rng = np.random.default_rng(0)
    config = model.Config(
        vocab=50, positions=8, width=16, head_dim=4, heads=(4,), ff=(32,)
    )
    static, shapes, frozen_shapes = model.split(model.abstract(config))
    params, frozen = jax.tree.map(
        lambda x: jax.numpy.asarray(0.1 * rng.normal(size=x.shape), x.dtype),
        (shapes, frozen_shapes),
    )
    examples = [
        {
            "ids": rng.integers(config.vocab, size=8),
            "mask": np.arange(8) < rng.integers(2, 9),
            "label": rng.integers(config.classes),
        }
        for _ in range(40)  # 12 batches of 8 are more than two epochs
    ]
    source = grain.MapDataset.source(examples).shuffle(seed=1).batch(8).repeat()
    stream = _Stream(iter(source.to_iter_dataset()), kill)

    layer = "layers/*"
    roles = jp.Roles(
        mlp_in=f"{layer}/mlp/up/kernel",
        mlp_out=f"{layer}/mlp/down/kernel",
        query=f"{layer}/attn/query/kernel",
        key=f"{layer}/attn/key/kernel",
        value=f"{layer}/attn/value/kernel",
        out=f"{layer}/attn/out/kernel",
        heads=4,
    )
    # Heads go at steps 3, 6 and 9, and the mask is drawn after the last save but one.
    method = jp.neuroprune(
        0.6, roles=roles, begin=1, end=9, every=2, head_every=3, theta_rel=1.1
    )
    budget = train.Budget(steps=12, save_every=4, learning_rate=1e-2)
    trained = train.fit(
        train.forward(static, frozen),
        params,
        jp.masked(train.adamw(budget), method),
        stream,
        budget=budget,
        out=out,
        title=out.name,
    )
    tree = {
        "trained": trained,
        "masks": jp.get_masks(trained.opt_state),
        "stream": stream.get_state(),
    }
    named = {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(nnx.as_pure(tree))
    }
    np.savez(out.with_suffix(".npz"), **named)


if __name__ == "__main__":
    _main(sys.argv[1], sys.argv[2:])
