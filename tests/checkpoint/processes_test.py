"""Two processes that save together, and other numbers of them that restore."""

import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np

import jaxprune as jp


def _run(count: int, root: str) -> list[str]:
    """Runs this file in so many processes; what each of them says."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    flags = "--xla_force_host_platform_device_count=2"
    started = [
        subprocess.Popen(
            [sys.executable, __file__, str(i), str(count), str(port), root],
            env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(count)
    ]
    done = [p.communicate(timeout=600) for p in started]
    assert not any(p.returncode for p in started), [err[-3000:] for _, err in done]
    return [pathlib.Path(root, f"said {i}").read_text() for i in range(count)]


def test_saved_by_two_restored_by_two_and_by_one(tmp_path):
    said = _run(2, str(tmp_path))
    for i, out in enumerate(said):
        wanted = [f"place {i}", "shards equal", "refused", "not there"]
        assert out.splitlines() == wanted
    back = jp.checkpoint.restore(tmp_path / "a")
    assert back["place"] == jp.checkpoint.PerProcess(("place 0", "place 1"))
    assert back["step"] == 3 and back["same"] == "x"
    np.testing.assert_array_equal(back["w"], _weights())
    np.testing.assert_array_equal(jp.masks.unpack(back["mask"])["k"], _weights() > 0)
    assert jp.checkpoint.metadata(tmp_path / "a").processes == 2


def _weights():
    return np.asarray(jax.random.normal(jax.random.key(0), (128, 256)))


def _process(i: int, count: int, port: str, root: str) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", count, i)
    import jax.numpy as jnp

    def say(text: str) -> None:  # not to stdout, where Gloo talks in between
        with open(f"{root}/said {i}", "a") as file:
            file.write(text + "\n")

    mesh = jax.make_mesh((2 * count,), ("x",))
    here = jax.NamedSharding(mesh, jax.P("x"))
    whole = _weights()
    w = jax.make_array_from_callback(whole.shape, here, lambda at: whole[at])
    mask = jp.masks.pack({"k": jax.jit(lambda w: w > 0)(w)})
    tree = {"w": w, "mask": mask, "step": jnp.int32(3), "place": f"place {i}"}
    tree["same"] = "x"
    jp.checkpoint.save_async(f"{root}/a", tree).result()
    back = jp.checkpoint.restore(f"{root}/a", like=tree)
    say(back["place"])
    for a, b in zip(back["w"].addressable_shards, w.addressable_shards, strict=True):
        np.testing.assert_array_equal(a.data, b.data)
    assert back["w"].sharding == here
    say("shards equal")
    try:  # of what each process has for itself, one copy is kept
        jp.checkpoint.save(f"{root}/b", {"x": jnp.int32(i)})
    except (ValueError, OSError) as e:
        text = "x has other values in process 1" if i == 0 else "another process has"
        assert text in str(e), e
        say("refused")
    say("there" if os.path.exists(f"{root}/b") else "not there")


if __name__ == "__main__":
    _process(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
