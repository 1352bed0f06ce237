"""Pruning a model block by block."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from jaxprune import posttrain
from jaxprune.calibration import calibrate

pytestmark = pytest.mark.usefixtures("quick_compilation")

SOLVERS = {
    "magnitude": posttrain.magnitude(),
    "sparsegpt": posttrain.sparsegpt(),
}


PARTS = ("down", "up")


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        h = nn.gelu(nn.Dense(24, name="up")(nn.LayerNorm()(x)))
        return x + nn.Dense(12, name="down")(h), None


class Model(nn.Module):
    scanned: bool = False

    @nn.compact
    def __call__(self, x):
        if self.scanned:
            layers = nn.scan(
                Layer,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=3,
            )
            return layers(name="layers")(x, None)[0]
        for i in range(3):
            x, _ = Layer(name=f"layers_{i}")(x)
        return x


def batches(count=3, rows=64):
    keys = jax.random.split(jax.random.key(5), count)
    mix = jax.random.normal(jax.random.key(6), (12, 12)) * np.arange(1, 13)
    return [jax.random.normal(key, (rows, 12)) @ mix for key in keys]


@functools.cache
def both():
    """A model in two forms with the same weights."""
    scanned = Model(True)
    params = scanned.init(jax.random.key(0), batches()[0])
    stacked = params["params"]["layers"]
    unrolled = {
        f"layers_{i}": jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(3)
    }
    return (scanned.apply, params), (Model().apply, {"params": unrolled})


def output_error(fn, params, new):
    found = [(fn(params, x), fn(new, x)) for x in batches()]
    change = sum(float(jnp.sum((a - b) ** 2)) for a, b in found)
    return change / sum(float(jnp.sum(a**2)) for a, _ in found)


@pytest.mark.parametrize("name", SOLVERS)
def test_a_scanned_model_is_pruned_as_an_unrolled_one(name):
    found = []
    for fn, params in both():
        new, masks, report = posttrain.prune(
            fn, params, batches(), method=SOLVERS[name], sparsity=0.5
        )
        assert jp.masks.sparsity(masks) == 0.5
        np.testing.assert_array_equal(
            new["params"][next(iter(new["params"]))]["up"]["bias"],
            params["params"][next(iter(params["params"]))]["up"]["bias"],
        )
        found.append((new, masks, report))
    (scanned, masks, report), (unrolled, other, _) = found
    for i in range(3):
        for part in ("up", "down"):
            a = masks["params"]["layers"][part]["kernel"][i]
            b = other["params"][f"layers_{i}"][part]["kernel"]
            assert np.mean(np.asarray(a) != np.asarray(b)) <= 0.001
            np.testing.assert_allclose(
                scanned["params"]["layers"][part]["kernel"][i],
                unrolled["params"][f"layers_{i}"][part]["kernel"],
                rtol=1e-3, atol=1e-4,
            )  # fmt: skip
    assert [row.layer for row in report.rows] == [0, 0, 1, 1, 2, 2]
    assert "layers/up/kernel[1]" in str(report)


def test_better_than_magnitude_and_than_dense_inputs():
    fn, params = both()[1]
    run = functools.partial(posttrain.prune, fn, params, batches(), sparsity=0.6)
    errors = {
        name: output_error(fn, params, run(method=solver)[0])
        for name, solver in SOLVERS.items()
    }
    assert errors["sparsegpt"] < 0.7 * errors["magnitude"]
    dense = output_error(fn, params, run(propagate_error=False)[0])
    assert errors["sparsegpt"] < 1.05 * dense and dense != errors["sparsegpt"]


def test_the_first_block_is_solved_on_the_inputs_of_the_dense_model():
    fn, params = both()[1]
    method = posttrain.sparsegpt()
    new, _, report = posttrain.prune(fn, params, batches(), sparsity=0.5)
    stats = calibrate(fn, params, batches(), statistics=("gram",))
    ((site, inputs),) = stats["layers_0/up/kernel"]
    w = params["params"]["layers_0"]["up"]["kernel"]
    found = method.solve(site.to_matrix(w), inputs, 0.5, jp.Unstructured())
    np.testing.assert_allclose(
        new["params"]["layers_0"]["up"]["kernel"], found.w[0, 0], rtol=1e-4, atol=1e-5
    )
    row = next(r for r in report.rows if r.path == "layers_0/up/kernel")
    whole = posttrain.layer_error(w, 0 * w, inputs.gram[0, 0])
    np.testing.assert_allclose(row.error, found.error[0, 0] / whole, rtol=1e-4)
    assert row.shape == (1, 12, 24) and row.sparsity == 0.5 and row.block == "layers_0"


def test_structures_allocations_and_where():
    fn, params = both()[1]
    new, masks, report = posttrain.prune(
        fn, params, batches(), structure=jp.NM(2, 4), where="*/up/kernel"
    )
    groups = np.asarray(masks["params"]["layers_1"]["up"]["kernel"]).reshape(3, 4, 24)
    assert (groups.sum(1) == 2).all() and len(report.rows) == 3
    assert masks["params"]["layers_1"]["down"]["kernel"] is None
    _, _, report = posttrain.prune(
        fn, params, batches(), method=posttrain.magnitude(),
        allocation={"*": 0.75, "layers_0/*": 0.25},
    )  # fmt: skip
    assert [r.sparsity for r in report.rows] == [0.25, 0.25, 0.75, 0.75, 0.75, 0.75]
    with pytest.raises(ValueError, match="allocation: got 'global'"):
        posttrain.prune(fn, params, batches(), sparsity=0.5, allocation="global")


def kept_of(masks, path, m):
    """How many of each group are kept, of groups along K."""
    mask = np.asarray(masks["params"][path[0]][path[1]]["kernel"])
    return np.unique(mask.reshape(-1, m, mask.shape[-1]).sum(1)).tolist()


def test_structures_by_pattern():
    fn, params = both()[1]
    run = functools.partial(
        posttrain.prune, fn, params, batches(), method=posttrain.wanda()
    )
    table = {"*": jp.NM(1, 4), "*/down/kernel": jp.NM(3, 8)}
    _, masks, report = run(structure=table)
    for i in range(3):
        assert kept_of(masks, (f"layers_{i}", "up"), 4) == [1]
        assert kept_of(masks, (f"layers_{i}", "down"), 8) == [3]
    assert [r.sparsity for r in report.rows] == [0.625, 0.75] * 3
    overridden = {"layers_0/*": 0.7, "*": 0.5}
    *_, report = run(structure=jp.NM(2, 4), allocation=overridden)
    assert [r.sparsity for r in report.rows] == [0.5] * 6
    # A sparsity is for those whose structure does not say it.
    table = {"*": jp.Unstructured(), "layers_1/up/kernel": jp.NM(2, 4)}
    given = {"layers_1/down/kernel": 0.25, "layers_[02]/*": 0.75}
    for options in (
        {"allocation": given},
        {"allocation": {**given, "layers_1/up/*": 0.5}},
        {"sparsity": 0.75, "allocation": {"layers_1/*": 0.25}},
    ):
        *_, report = run(structure=table, **options)
        found = [r.sparsity for r in report.rows]
        assert found == [0.75, 0.75, 0.25, 0.5, 0.75, 0.75]


NM, ALL = jp.NM(2, 4), jp.Unstructured()
NAMES = [f"layers_{i}/{part}/kernel" for i in range(3) for part in ("down", "up")]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"structure": {"*": ALL}}, ValueError, "sparsity: got None"),
        (
            {"structure": NM, "sparsity": 0.6},
            ValueError,
            "sparsity: got 0.6 with NM.*, which prunes 1/2 .*Leave it out",
        ),
        ({"structure": {"*": NM}, "sparsity": 0.7}, ValueError, "got 0.7 with NM"),
        ({"structure": {"*": NM}, "sparsity": 7}, ValueError, "sparsity: got 7"),
        (
            {"structure": {"*/up/*": NM}},
            ValueError,
            r"structure: no pattern of \['\*/up/\*'\] matches layers_0/down/kernel",
        ),
        ({"structure": {"*": NM, "x": NM}}, ValueError, "structure: the pattern 'x'"),
        (
            {"structure": {"*": NM, "*/up/*": None}},
            TypeError,
            "for '\\*/up/\\*': got None",
        ),
        (
            {"structure": "2:4"},
            TypeError,
            "structure: got '2:4'; expected Unstructured",
        ),
        ({"structure": jp.NM}, TypeError, "structure: got <class .*NM'>; expected"),
        (
            {"structure": NM, "allocation": "erk"},
            ValueError,
            "allocation: got 'erk', and N:M says the sparsity of every leaf",
        ),
        (
            {"structure": {"*": NM}, "allocation": {"*/up/*": 0.75}},
            ValueError,
            "allocation: got 0.75 for '\\*/up/\\*', where NM.* says",
        ),
        (
            {"structure": {"*": ALL, "layers_2/*": jp.Block(5, 1)}, "sparsity": 0.5},
            ValueError,
            "layers_2/down/kernel: .*Block.* does not divide",
        ),
        (
            {
                "structure": {"*": ALL, "layers_2/*": jp.NM(2, 4, axis=-1)},
                "sparsity": 0.5,
            },
            ValueError,
            "structure: NM.* sees K on axes",
        ),
        ({"structure": lambda a, b: None}, ValueError, "sparsity: got None; expected"),
        (
            {"structure": lambda a, b: None, "sparsity": 0.5},
            TypeError,
            "structure: the function gave None",
        ),
        (
            {"structure": lambda a, b: dict.fromkeys(NAMES[1:], NM), "sparsity": 0.5},
            ValueError,
            "structure: the function gave nothing for layers_0/down/kernel",
        ),
        (
            {"structure": lambda a, b: dict.fromkeys([*NAMES, 3], NM), "sparsity": 0.5},
            ValueError,
            "structure: the function gave what is no leaf, 3;",
        ),
        (
            {"structure": lambda a, b: dict.fromkeys(NAMES, "2:4"), "sparsity": 0.5},
            TypeError,
            "structure for layers_0/down/kernel: got '2:4'",
        ),
    ],
)
def test_structures_that_do_not_fit_are_refused_before_anything_is_run(
    options, error, message
):
    fn, params = both()[1]
    given = jax.tree.map(jnp.copy, params)
    with pytest.raises(error, match=message):
        posttrain.prune(fn, given, batches(), donate=True, **options)
    assert not any(x.is_deleted() for x in jax.tree.leaves(given))


@pytest.mark.parametrize("form", ["scanned", "unrolled"])
def test_owl_gives_each_layer_its_own_n(form):
    fn, params = both()[form == "unrolled"]
    names = ("layers/0/*", "layers/1/*", "layers/2/*")
    if form == "unrolled":
        names = ("layers_0/*", "layers_1/*", "layers_2/*")
    outliers = dict(zip(names, (0.3, 0.0, 0.15), strict=True))
    _, masks, report = posttrain.prune(
        fn, params, batches(), method=posttrain.wanda(), sparsity=0.5,
        allocation=functools.partial(jp.allocation.owl, outliers=outliers, limit=0.25),
        structure=functools.partial(jp.allocation.mixed_nm, m=4),
    )  # fmt: skip
    assert [r.sparsity for r in report.rows] == [0.25, 0.25, 0.75, 0.75, 0.5, 0.5]
    if form == "unrolled":
        kept = [kept_of(masks, (f"layers_{i}", "up"), 4) for i in range(3)]
        assert kept == [[3], [1], [2]]


@pytest.mark.parametrize("explicit", [False, True])
def test_eight_devices_and_one(explicit):
    fn, params = both()[0]
    kind = jax.sharding.AxisType.Explicit if explicit else jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    rows = jax.NamedSharding(mesh, jax.P("data"))
    whole = jax.NamedSharding(mesh, jax.P())
    one, masks, _ = posttrain.prune(fn, params, batches(), sparsity=0.5)
    with jax.set_mesh(mesh):
        eight, others, _ = posttrain.prune(
            fn,
            jax.device_put(params, whole),
            [jax.device_put(x, rows) for x in batches()],
            sparsity=0.5,
            offload=explicit,
        )
    for a, b in zip(*map(jax.tree.leaves, (masks, others)), strict=True):
        assert np.mean(np.asarray(a) != np.asarray(b)) <= 0.001
    for a, b in zip(*map(jax.tree.leaves, (one, eight)), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4)


def test_outliers_and_layers_by_name():
    ratios, masks = [], []
    for fn, params in both():
        run = functools.partial(posttrain.outlier_ratios, fn, params, batches())
        found = run(multiple=1.5, where="*/kernel")
        assert found == run(multiple=1.5, where="*/kernel", offload=True)
        pruned = posttrain.prune(
            fn, params, batches(), method=posttrain.wanda(), sparsity=0.5,
            allocation=functools.partial(jp.allocation.owl, outliers=found),
        )  # fmt: skip
        ratios.append(found)
        masks.append(jp.masks.count(pruned[1]))
        rows = pruned[2].rows
        by_layer = [rows[i].sparsity for i in (0, 2, 4)]
        order = [found[name] for name in found if "up" in name]
        assert np.argsort(by_layer).tolist() == np.argsort(order)[::-1].tolist()
    scanned, unrolled = ratios
    assert list(scanned) == [f"layers/{i}/{p}/kernel" for i in range(3) for p in PARTS]
    np.testing.assert_allclose(list(scanned.values()), list(unrolled.values()))
    assert len(set(scanned.values())) == 3
    assert abs(masks[0].kept - masks[1].kept) <= 6  # of as many weights
    # By hand, for the first layer.
    fn, params = both()[1]
    stats = calibrate(fn, params, batches(), where="layers_0/*/kernel")
    scores = []
    for part in PARTS:
        ((_, inputs),) = stats[f"layers_0/{part}/kernel"]
        w = params["params"]["layers_0"][part]["kernel"]
        scores.append(np.abs(w) * np.sqrt(inputs.square[0, 0])[:, None])
    flat = np.concatenate([x.ravel() for x in scores])
    np.testing.assert_allclose(
        unrolled["layers_0/up/kernel"], np.mean(flat > 1.5 * flat.mean()), atol=1e-6
    )
    table = {"layers/0/*": 0.25, "layers/[12]/*": 0.5}
    fn, params = both()[0]
    *_, report = posttrain.prune(
        fn, params, batches(), method=posttrain.magnitude(), allocation=table
    )
    assert [r.sparsity for r in report.rows] == [0.25] * 2 + [0.5] * 4


@pytest.mark.parametrize("form", ["scanned", "unrolled"])
def test_what_rests_on_the_host(form):
    fn, params = both()[form == "unrolled"]
    new, masks, report = posttrain.prune(fn, params, batches(), sparsity=0.5)
    there = jax.tree.map(np.array, params)
    before = jax.tree.map(np.copy, there)
    known, seen = jax.live_arrays(), []

    def look(*block):
        del block
        new = [x for x in jax.live_arrays() if not any(x is y for y in known)]
        seen.append({x.shape for x in new})

    found = posttrain.prune(
        fn, there, list(map(np.array, batches())), sparsity=0.5, offload=True,
        progress=look,
    )  # fmt: skip
    assert not any((64, 12) in shapes or (3, 12, 24) in shapes for shapes in seen)
    assert all(type(x) is np.ndarray for x in jax.tree.leaves(found[:2]))
    jax.tree.map(np.testing.assert_array_equal, found[:2], (new, masks))
    jax.tree.map(np.testing.assert_array_equal, there, before)
    assert [r.sparsity for r in found[2].rows] == [r.sparsity for r in report.rows]


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("propagate_error", [False, True])
@pytest.mark.parametrize("form", ["scanned", "unrolled"])
def test_parameters_that_are_given_up(form, propagate_error, offload):
    fn, params = both()[form == "unrolled"]
    run = functools.partial(
        posttrain.prune, fn, batches=batches(), sparsity=0.5, where="*/kernel",
        propagate_error=propagate_error,
    )  # fmt: skip
    expected = run(params=params)
    given = jax.tree.map(jnp.copy, params)
    found = run(params=given, donate=True, offload=offload)
    jax.tree.map(np.testing.assert_array_equal, found[:2], expected[:2])
    for path, x in jax.tree.leaves_with_path(given):
        # With offload all rest on the host.
        assert x.is_deleted() == (offload or "kernel" in jax.tree_util.keystr(path))


def test_memory_of_two_leaves_is_kept():
    def fn(params, x):
        for name in ("a", "b", "c", "d"):
            x = jnp.tanh(x @ params[name])
        return x

    w, other = jax.random.normal(jax.random.key(0), (2, 12, 12))
    same = jax.device_put(other, other.sharding)  # another array, but one memory
    params = {"a": w, "b": same, "c": w, "d": other}
    new, _, _ = posttrain.prune(fn, params, batches(), sparsity=0.5, donate=True)
    assert not any(x.is_deleted() for x in params.values())
    assert not np.array_equal(new["a"], new["c"])
    # A batch that is a parameter too.
    params = {name: jnp.copy(x) for name, x in params.items()}
    batch = params["b"]
    posttrain.prune(fn, params, [batch], sparsity=0.5, donate=True)
    assert not batch.is_deleted() and params["a"].is_deleted()
    with pytest.raises(
        ValueError, match="params: a, c, d was deleted, as by donate=True"
    ):
        posttrain.prune(fn, params, [batch], sparsity=0.5)


def test_a_scanned_leaf_is_given_up_whoever_looks_at_it():
    fn, params = both()[0]
    given = jax.tree.map(jnp.copy, params)
    kernel = given["params"]["layers"]["up"]["kernel"]
    view = np.asarray(kernel)  # for which XLA would not write into it
    found = posttrain.prune(fn, given, batches(), sparsity=0.5, donate=True)
    expected = posttrain.prune(fn, params, batches(), sparsity=0.5)
    jax.tree.map(np.testing.assert_array_equal, found[:2], expected[:2])
    assert kernel.is_deleted()
    np.testing.assert_array_equal(view, params["params"]["layers"]["up"]["kernel"])


def test_statistics_of_one_block_at_a_time():
    fn, params = both()[1]
    seen = []

    def look(*block):
        del block
        # Gram matrices of the inputs of `up`, which no leaf or activation has the shape of.
        seen.append(sum(x.shape[-2:] == (12, 12) for x in jax.live_arrays()))

    before = sum(x.shape[-2:] == (12, 12) for x in jax.live_arrays())
    posttrain.prune(fn, params, batches(), sparsity=0.5, progress=look)
    assert seen == [before] * 3


def test_a_mesh_and_the_host():
    fn, params = both()[1]
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.device_put(params, jax.NamedSharding(mesh, jax.P()))
    found = posttrain.prune(fn, spread, batches(), sparsity=0.5, offload=True)
    expected = posttrain.prune(fn, spread, batches(), sparsity=0.5)
    jax.tree.map(np.testing.assert_array_equal, found[1], expected[1])


def test_refine_and_its_statistics():
    fn, params = both()[1]

    def refine(w, found, inputs):
        assert inputs.mean is not None and inputs.gram is None
        return found._replace(w=jnp.where(found.mask, 2 * w, 0))

    new, masks, _ = posttrain.prune(
        fn, params, batches(), method=posttrain.magnitude(), sparsity=0.5,
        refine=refine, statistics=("mean",),
    )  # fmt: skip
    w = params["params"]["layers_0"]["up"]["kernel"]
    mask = masks["params"]["layers_0"]["up"]["kernel"]
    np.testing.assert_array_equal(
        new["params"]["layers_0"]["up"]["kernel"], np.where(mask, 2 * w, 0)
    )


def test_empty_slots_of_experts():
    """Statistics of an expert are those of the tokens that were sent to it."""
    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        "router": jax.random.normal(keys[0], (12, 3)),
        "up": jax.random.normal(keys[1], (3, 12, 8)),
        "down": jax.random.normal(keys[2], (8, 12)),
    }
    seen = []

    def fn(params, x):
        gate = jax.nn.one_hot(jnp.argmax(x @ params["router"], 1), 3, axis=0)
        return jnp.einsum("etd,edf->etf", gate[..., None] * x, params["up"]).sum(0)

    def spy(dense, solution, inputs):
        del dense
        seen.append(inputs)
        return solution

    args = fn, params, batches(1)
    options = {"where": "up", "statistics": ("variance",)}
    posttrain.prune(*args, sparsity=0.5, refine=spy, empty_rows="up", **options)
    (x,) = args[2]
    chosen = np.argmax(x @ params["router"], 1)
    assert seen[0].count[0].tolist() == np.bincount(chosen, minlength=3).tolist()
    wanted = [np.var(x[chosen == e], axis=0) for e in range(3)]
    np.testing.assert_allclose(seen[0].variance[0], wanted, rtol=2e-4)
    ratio = posttrain.outlier_ratios(*args, where="up", empty_rows="up", multiple=2.0)
    norms = np.stack([np.sqrt(np.mean(x[chosen == e] ** 2, 0)) for e in range(3)])
    scores = np.abs(params["up"]) * norms[:, :, None]
    assert ratio["up"] == pytest.approx(np.mean(scores > 2 * scores.mean()))
    with pytest.raises(
        ValueError, match="empty_rows: the pattern 'experts' matches no"
    ):
        posttrain.prune(*args, sparsity=0.5, empty_rows="experts", **options)


def test_padding_is_left_out():
    fn, params = both()[1]
    x = batches(1)[0]
    padded = jnp.concatenate([x, 100 * jnp.ones((16, 12))])

    def weights(x):
        return (jnp.arange(len(x)) < 64).astype(jnp.float32)

    found = [
        posttrain.prune(fn, params, [data], sparsity=0.5, token_weights=of)[0]
        for data, of in ((x, None), (padded, weights))
    ]
    for a, b in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4)


def test_padding_may_be_anything():
    fn, params = both()[1]
    x = batches(1)[0]
    padded = jnp.concatenate([x, jnp.full((16, 12), jnp.nan)])
    run = functools.partial(posttrain.prune, fn, params, method=posttrain.wanda())
    new, masks, _ = run([x], sparsity=0.5)
    found = run(
        [padded], sparsity=0.5, token_weights=lambda x: ~jnp.isnan(x[:, 0])
    )  # fmt: skip
    jax.tree.map(np.testing.assert_array_equal, found[:2], (new, masks))


def test_a_method_without_statistics_needs_no_weights_of_tokens():
    fn, params = both()[1]
    run = functools.partial(posttrain.prune, fn, params, batches(), sparsity=0.5)
    found, plain = (
        run(method=posttrain.magnitude(), token_weights=of)[1]
        for of in (lambda x: x[:, 0] > 0, None)
    )
    jax.tree.map(np.testing.assert_array_equal, found, plain)


def test_keys_among_what_rests_on_the_host():
    params = {
        "layers": [jax.random.normal(jax.random.key(i), (12, 12)) for i in (0, 1)]
    }
    params["key"] = jax.random.key(3)

    def fn(params, x, key):
        for w in params["layers"]:
            keep = jax.random.bernoulli(key, 0.9, x.shape)
            x = jnp.tanh(jnp.where(keep, x, 0) @ w)
        return x + jax.random.normal(params["key"], x.shape)

    args = [(x, jax.random.key(i)) for i, x in enumerate(batches())]
    run = functools.partial(posttrain.prune, fn, params, args, sparsity=0.5)
    found, plain = (run(offload=offload)[:2] for offload in (True, False))
    jax.tree.map(np.testing.assert_array_equal, found[0]["layers"], plain[0]["layers"])
    jax.tree.map(np.testing.assert_array_equal, found[1], plain[1])


@pytest.mark.parametrize(
    "make", [posttrain.sparsegpt, posttrain.alps], ids=["sparsegpt", "alps"]
)
def test_few_rows_and_dead_inputs_are_damped_and_reported(make):
    fn, params = both()[1]
    w = params["params"]["layers_0"]["down"]["kernel"]
    dead = {"params": {**params["params"]}}  # no neuron 5: an input that is always 0
    dead["params"]["layers_0"] = jax.tree.map(lambda x: x, dead["params"]["layers_0"])
    up = dead["params"]["layers_0"]["up"]
    up["kernel"], up["bias"] = (x.at[..., 5].set(0) for x in (up["kernel"], up["bias"]))
    new, masks, report = posttrain.prune(
        fn, dead, [batches()[0][:4]], method=make(damping=1e-12), sparsity=0.5
    )
    assert jp.masks.sparsity(masks) == 0.5
    assert all(1e-12 < row.damping <= 1 for row in report.rows)
    found = np.asarray(new["params"]["layers_0"]["down"]["kernel"])
    assert np.isfinite(found).all() and not found[5].any() and np.asarray(w)[5].any()


def test_obs_as_a_solver():
    fn, params = both()[1]
    solver = posttrain.Solver("obs", ("gram",), posttrain.obs)
    _, masks, report = posttrain.prune(
        fn, params, batches(), method=solver, sparsity=0.5
    )
    assert jp.masks.sparsity(masks) == 0.5 and report.rows[0].damping > 0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"method": "wanda"}, TypeError, "method: got 'wanda'; expected a solver"),
        ({"method": posttrain.wanda}, TypeError, "method: got <function wanda"),
        ({"statistics": "gram"}, TypeError, "statistics: got the string 'gram'"),
        ({"statistics": ("grm",)}, ValueError, r"statistics: got \('grm',\)"),
        (
            {"refine": lambda w, found, inputs: found.mask},
            TypeError,
            "refine: it gave .*; expected a Solution",
        ),
        (
            {"refine": lambda w, found, inputs: found._replace(w=w[0])},
            ValueError,
            "refine: it gave w of ",
        ),
        (
            {"refine": lambda w, found, inputs: found._replace(mask=found.w)},
            ValueError,
            "refine: .* float32; expected .* the mask of booleans",
        ),
        (
            {"refine": lambda w, found, inputs: found._replace(w=w)},
            ValueError,
            "refine: weights that its mask prunes are not 0",
        ),
        (
            {
                "refine": lambda w, found, inputs: found._replace(mask=w == w),
                "structure": jp.NM(1, 4),
                "sparsity": None,
            },
            ValueError,
            "refine: its mask keeps 4 of a group, where NM.n=1.* allows 1",
        ),
    ],
)
def test_what_does_not_fit_the_driver(options, error, message):
    fn, params = both()[1]
    options = {"method": posttrain.magnitude(), "sparsity": 0.5, **options}
    with pytest.raises(error, match=message):
        posttrain.prune(fn, params, batches(), **options)


def test_slices_of_a_leaf_are_pruned_one_by_one():
    def fn(params, x):
        query, value = jnp.split(params["qv"], 2, axis=1)
        return jnp.tanh(x @ query) @ value.T

    params = {"qv": jax.random.normal(jax.random.key(0), (12, 16))}
    _, masks, report = posttrain.prune(fn, params, batches(), sparsity=0.5)
    assert [row.shape for row in report.rows] == [(1, 12, 8), (1, 8, 12)]
    assert jp.masks.sparsity(masks) == 0.5


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (lambda p, x: x @ p["w"] @ p["w"].T, "params: w is used in two ways"),
        (lambda p, x: x @ jnp.linalg.inv(p["w"]), "params: w cannot be followed"),
        (lambda p, x: x @ (p["w"] * 2), r"params: w goes through mul"),
        (lambda p, x: x, "params: w is not used by fn"),
    ],
)
def test_leaves_that_cannot_be_pruned(fn, message):
    params = {"w": jax.random.normal(jax.random.key(0), (12, 12))}
    with pytest.raises(ValueError, match=message):
        posttrain.prune(fn, params, batches(), sparsity=0.5)


def test_a_leaf_of_several_blocks():
    def fn(params, x):
        x = jnp.tanh(x @ params["layers"][0] @ params["shared"])
        return jnp.tanh(x @ params["layers"][1] @ params["shared"])

    w = jax.random.normal(jax.random.key(0), (12, 12))
    params = {"layers": [w, w], "shared": w}
    with pytest.raises(ValueError, match="shared is used in the blocks"):
        posttrain.prune(fn, params, batches(), sparsity=0.5)
    _, masks, _ = posttrain.prune(
        fn, params, batches(), sparsity=0.5, block_of=lambda path: None
    )
    assert jp.masks.sparsity(masks) == 0.5


def test_a_leaf_of_layers_that_is_used_as_a_whole_too():
    def fn(params, x):
        x = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["layers"])[0]
        return (x @ params["head"]) @ params["layers"][0]

    w = jax.random.normal(jax.random.key(0), (12, 12))
    params = {"layers": jnp.stack([w, 2 * w]), "head": w}
    with pytest.raises(ValueError, match="layers is used layer by layer in the block"):
        posttrain.prune(fn, params, batches(), sparsity=0.5)


def test_a_leaf_with_empty_rows_that_cannot_be_followed():
    params = {"w": jax.random.normal(jax.random.key(0), (12, 12))}
    with pytest.raises(ValueError, match="params: w cannot be followed"):
        posttrain.prune(
            lambda p, x: x @ jnp.linalg.inv(p["w"]), params, batches(), sparsity=0.5,
            empty_rows="w",
        )  # fmt: skip


def test_bad_batches():
    fn, params = both()[1]
    with pytest.raises(ValueError, match="batches: there is none"):
        posttrain.prune(fn, params, [], sparsity=0.5)
    odd = [batches()[0], batches()[1][:32]]
    with pytest.raises(ValueError, match=r"batches: batch 2 is .*\n?.*token_weights="):
        posttrain.prune(fn, params, odd, sparsity=0.5)
    with pytest.raises(ValueError, match="not finite"):
        posttrain.prune(fn, params, [batches()[0].at[0, 0].set(jnp.nan)], sparsity=0.5)
