"""`predict`: what would pay, by device, structure and aim."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp

pytestmark = pytest.mark.usefixtures("quick_compilation")
SHAPES = [(2048, 4096, 4096), (16, 4096, 4096)]


@pytest.mark.parametrize("device", ["v4", "v5e", "v5p", "v6e", "tpu7x", "h200", "cpu"])
def test_blocks(device):
    report = jp.predict(SHAPES, jp.Block(128, 128), 0.9, device)
    assert all(c.go and 1.1 < c.speedup <= 10.5 for c in report.choices)
    timed = "predicted" if device == "cpu" else "predicted, not timed"
    assert {c.basis for c in report.choices} == {timed} and timed in str(report)


def test_blocks_without_a_kernel_or_without_zeros():
    choice = jp.predict(SHAPES, jp.Block(32, 32), 0.9, "v6e").choices[0]
    assert not choice.go and "no kernel on v6e for blocks of 32" in choice.reason
    assert not jp.predict(SHAPES, jp.Block(128, 128), 0.0, "v5e").choices[0].go
    report = jp.predict(SHAPES, jp.Block(64, 64), 0.9, "h200", dtype=jnp.float32)
    assert "no kernel on h200 for float32" in report.choices[0].reason


@pytest.mark.parametrize(
    ("structure", "name"),
    [
        (jp.Block(64, 64), "Block(64, 64)"),
        (jp.NM(2, 4), "NM(2, 4)"),
        (jp.Unstructured(), "Bitmap"),
    ],
)
def test_bytes_are_those_of_the_packed_leaf(structure, name):
    mask = np.zeros((256, 192), bool)
    mask[:128] = True  # half of the blocks, and of all weights
    if structure == jp.NM(2, 4):
        mask = mask.reshape(2, 128, 192).swapaxes(0, 1).reshape(256, 192)
    report = jp.predict((1, 256, 192), structure, 0.5, "cpu")
    found = next(c for c in report.choices[0].candidates if c.format == name)
    w = jnp.ones((256, 192), jnp.bfloat16)
    assert found.nbytes == jp.formats.pack(w, jnp.asarray(mask), structure).nbytes


def test_nm_pays_for_few_rows_where_there_is_a_kernel():
    def choice(rows, device, **options):
        return jp.predict((rows, 4096, 4096), jp.NM(2, 4), 0.5, device, **options)[0][0]

    few = choice(16, "v5e")
    assert few.format == "NM(2, 4)" and 1.5 < few.speedup < 16 / 8.75
    many = choice(2048, "v5e")
    assert not many.go and many.reason.startswith("NM(2, 4) 0.")
    # Decoding takes as long as reading dense weights, or longer.
    assert not choice(16, "v4").go and not choice(16, "tpu7x").go
    # Without a kernel the matrix is written out first.
    for other in (choice(16, "h200"), choice(16, "v5e", dtype=jnp.float32)):
        assert not other.go and 0 < other.speedup < 1


def test_part_of_nm_and_no_structure():
    partly = jp.predict((16, 512, 512), jp.NM(2, 4), 0.3, "v5e").choices[0]
    assert [c.format for c in partly.candidates] == ["dense", "Bitmap"]
    scattered = jp.predict((1, 512, 512), jp.Unstructured(), 0.9, "v5e").choices[0]
    assert math.isnan(scattered.candidates[1].seconds)
    assert scattered.reason == "no kernel on v5e for bitmaps, and the time is not known"
    assert scattered.speedup == 0 and scattered.basis == ""
    assert not jp.predict((1, 512, 512), jp.Unstructured(), 0.9, "cpu")[0][0].go


def test_memory_takes_the_smallest_that_is_not_too_slow():
    def choice(slowdown):
        return jp.predict(
            (256, 1024, 1024), jp.Unstructured(), 0.9, "cpu",
            dtype=jnp.float32, prefer="memory", slowdown=slowdown,
        ).choices[0]  # fmt: skip

    assert choice(2.0).format == "Bitmap" and choice(2.0).speedup < 1
    assert choice(None).reason.startswith("Bitmap 1.")
    both = jp.predict(
        (2048, 1024, 1024), jp.NM(4, 16), 0.75, "cpu",
        dtype=jnp.float32, prefer="memory", slowdown=9.0,
    ).choices[0]  # fmt: skip
    assert both.format == min(both.candidates, key=lambda c: c.nbytes).format


def test_one_shape_several_and_named_ones():
    def paths(shapes):
        return [
            c.path for c in jp.predict(shapes, jp.Block(64, 64), 0.5, "cpu").choices
        ]

    assert paths((16, 256, 256)) == ["16 x 256 x 256"]
    assert paths([[16, 256, 256], [8, 256, 256]]) == ["16 x 256 x 256", "8 x 256 x 256"]
    assert paths({"up": (16, 256, 256)}) == ["up"]
    assert paths([]) == []


def test_unequal_blocks_are_cut_to_squares():
    found = jp.predict((512, 4096, 4096), jp.Block(128, 512), 0.9, "v5e").choices[0]
    assert found.format == "Block(128, 128)"
    odd = jp.predict((512, 4096, 4096), jp.Block(48, 48), 0.9, "v5e").choices[0]
    assert [c.format for c in odd.candidates] == ["dense", "Bitmap"]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (((1, 64, 64), jp.Block(32, 32), 0.5, "v9"), ValueError,
         "device: got 'v9'; expected one of cpu, v4"),
        (((1, 64, 64), jp.Channel(), 0.5, "v4"), TypeError,
         "structure: got Channel.*expected Block, NM or Unstructured"),
        (((1, 64, 64), jp.NM(2, 4), 0.9, "v4"), ValueError,
         r"sparsity: got 0.9, but NM\(.*expected sparsity=0.5"),
        (((1, 64, 64), jp.Block(32, 32), 1.0, "v4"), ValueError,
         r"sparsity: got 1.0; expected a share in \[0, 1\)"),
        (((64, 64), jp.Block(32, 32), 0.5), ValueError,
         r"shapes: got \(64, 64\).*three positive numbers"),
        (({"up": (0, 64, 64)}, jp.Block(32, 32), 0.5), ValueError,
         "shapes: got .* for 'up'"),
        (([1.5, 64, 64], jp.Block(32, 32), 0.5), ValueError, "three positive numbers"),
        ((7, jp.Block(32, 32), 0.5), TypeError, "shapes: got 7; expected"),
    ],
)  # fmt: skip
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        jp.predict(*arguments)


def test_a_device_without_a_model(monkeypatch):
    class Other:
        device_kind, platform = "NVIDIA A100", "gpu"

    monkeypatch.setattr(jax, "devices", lambda: [Other()])
    with pytest.raises(
        ValueError, match="device: JAX's is 'NVIDIA A100'.*measure=True"
    ):
        jp.predict((1, 64, 64), jp.Block(32, 32), 0.5)
