"""What every sparse training method promises, over one table of methods.

A new method adds a row to `METHODS`, with parameters of its own if it needs names or
shapes, and to `ONE_OF_EACH`.
"""

import collections
import itertools
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training import train_state

import jaxprune as jp

pytestmark = pytest.mark.usefixtures("quick_compilation")

BEGIN, END, EVERY = 1, 6, 2
UPDATES = (1, 3, 5, 6)
STEPS = 8
FINAL, INITIAL = Fraction(1, 2), Fraction(1, 4)


def plain_params():
    """A kernel, layers stacked for a scan, biases, a 0-d leaf and a hole."""
    keys = iter(jax.random.split(jax.random.key(0), 8))

    def draw(*shape):
        return jax.random.normal(next(keys), shape)

    return {
        "dense": {"kernel": draw(16, 8), "bias": draw(8), "temperature": draw()},
        "norm": None,
        "stack": {"kernel": draw(3, 8, 4), "bias": draw(3, 4)},
    }


def transformer_params():
    """One layer of a transformer, four heads."""
    keys = iter(jax.random.split(jax.random.key(0), 12))

    def dense(*shape):
        return {
            "kernel": jax.random.normal(next(keys), shape) / 4,
            "bias": jax.random.normal(next(keys), shape[1:]),
        }

    attention = {name: dense(16, 16) for name in ("query", "key", "value", "out")}
    return {"layer": {"attn": attention, "up": dense(16, 32), "down": dense(32, 16)}}


class Case(NamedTuple):
    """A row of the table.

    Attributes:
      make: the method, or fixed masks, for given parameters.
      params: nested dictionaries of arrays, float32.
      expected: weights kept by each leaf, or by all together, after an update at a step,
        from the shapes of the masked leaves; `None` where it depends on the values.
      first: the first step from which on some weights are pruned.
      dense: whether pruned weights are 0 in the forward view only.
    """

    make: Callable[[Any], Any]
    params: Callable[[], Any] = plain_params
    expected: Callable[[dict, int], dict | int] | None = None
    first: int = BEGIN + 2
    dense: bool = False


def _gone(step):
    """The cubic of Zhu & Gupta, held between two updates."""
    if step < BEGIN:
        return 0.0
    if step >= END:
        return 1.0
    time = (step - BEGIN) // EVERY * EVERY / (END - BEGIN)
    return 1 - (1 - time) ** 3


def _kept(units, whole, pruned, step, initial=Fraction(0), final=FINAL):
    """Weights left of `units`, of which a kept one holds `whole` and another `pruned`."""
    most = 1 - Fraction(pruned, whole)
    first, last = (units - math.floor(s / most * units + Fraction(1, 2))
                   for s in (initial, final))  # fmt: skip
    now = first - math.floor((first - last) * _gone(step) + 0.5)
    return now * whole + (units - now) * pruned


def _gmp_row(name, units, total=False, initial=Fraction(0), **options):
    def expected(shapes, step):
        if total:
            return _kept(sum(map(math.prod, shapes.values())), 1, 0, step, initial)
        return {p: _kept(*units(s), step, initial) for p, s in shapes.items()}

    def make(params):
        del params
        return jp.gmp(
            FINAL, begin=BEGIN, end=END, every=EVERY, initial=initial, **options
        )

    return pytest.param(Case(make, expected=expected), id=name)


def _every_other_weight(params, nth=2):
    def mask(path, x):
        names = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        places = jnp.arange(x.size).reshape(x.shape)
        return places % nth == 0 if "kernel" in names else None

    return jax.tree_util.tree_map_with_path(mask, params)


def _constant(shapes, step):
    del step
    return {p: _kept(math.prod(s), 1, 0, END) for p, s in shapes.items()}


def _erk(shapes, step):
    """Straight from all to the final division, which meets the budget."""
    sizes = {p: math.prod(s) for p, s in shapes.items()}
    shares = jp.allocation.erk(shapes, FINAL)
    last = {p: round((1 - shares[p]) * sizes[p]) for p in shapes}
    assert sum(last.values()) == sum(sizes.values()) * (1 - FINAL)
    return {
        p: n - math.floor((n - last[p]) * _gone(step) + 0.5) for p, n in sizes.items()
    }


def _weights(shape):
    return math.prod(shape), 1, 0


def _neuroprune_row(name, expected=None, **options):
    roles = jp.Roles(
        mlp_in="*/up/kernel", mlp_out="*/down/kernel", query="*/attn/query/kernel",
        key="*/attn/key/kernel", value="*/attn/value/kernel", out="*/attn/out/kernel",
        heads=4,
    )  # fmt: skip

    def make(params):
        del params
        return jp.neuroprune(
            FINAL, roles=roles, begin=BEGIN, end=END, every=EVERY, **options
        )

    return pytest.param(Case(make, transformer_params, expected, END), id=name)


def _by_part(shapes, step):
    """Half of the MLP and half of Q, K, V, all at the end."""
    attention = sum(math.prod(s) for p, s in shapes.items() if "/attn/" in p)
    mlp = sum(math.prod(s) for p, s in shapes.items() if "/attn/" not in p)
    pruned = math.floor(mlp * FINAL) + math.floor(attention * 3 // 4 * FINAL)
    return attention + mlp - (pruned if step >= END else 0)


FROZEN = pytest.param(Case(_every_other_weight, expected=_constant), id="frozen")
STATIC = pytest.param(Case(lambda _: jp.static(FINAL), expected=_constant), id="static")
GMP = _gmp_row("gmp", _weights)
NM = _gmp_row("gmp-nm", lambda s: (math.prod(s) // 4, 4, 2), structure=jp.NM(2, 4))


def _row(name, make, expected, first=0, dense=False):
    case = Case(lambda _: make(), plain_params, expected, first, dense)
    return pytest.param(case, id=name)


def _half_from(begin):
    """All of each leaf, and half of it from a step on."""

    def expected(shapes, step):
        return {p: _kept(math.prod(s), 1, 0, END if step >= begin else 0)
                for p, s in shapes.items()}  # fmt: skip

    return expected


def _half_in_phases(shapes, step):
    """Half at steps 1 and 2, all at 3 to 5, half for good at 6."""
    sparse = step in (1, 2) or step >= END
    return {
        p: _kept(math.prod(s), 1, 0, END if sparse else 0) for p, s in shapes.items()
    }


def _erk_at_once(shapes, step):
    del step
    return _erk(shapes, END)


def _three_then_two_of_four(shapes, step):
    return {
        p: math.prod(s) * (4 if step < BEGIN else 3 if step < END else 2) // 4
        for p, s in shapes.items()
    }


def _on_a_line(begin, end):
    def expected(shapes, step):
        gone = min(max(step - begin, 0) / (end - begin), 1)
        return {p: math.prod(s) - math.floor(math.prod(s) // 2 * gone + 0.5)
                for p, s in shapes.items()}  # fmt: skip

    return expected


def _sigmoid(shapes, step):
    time = min(max(step - BEGIN, 0) // EVERY * EVERY / (END - BEGIN), 1)
    time = 1.0 if step >= END else time
    gone = (1 + math.tanh(6 * (time - 0.5)) / math.tanh(3)) / 2
    return {p: math.prod(s) * 3 // 4 - math.floor(math.prod(s) // 4 * gone + 0.5)
            for p, s in shapes.items()}  # fmt: skip


KEY = jax.random.key(5)
STEPS_OF = {"begin": BEGIN, "end": END, "every": EVERY}
UNIFORM = {"key": KEY, "allocation": "uniform"} | STEPS_OF


def _granet(**options):
    return lambda: jp.granet(
        FINAL, **({"allocation": "uniform"} | STEPS_OF | {"until": END + 1} | options)
    )


HEADS = _neuroprune_row("neuroprune-heads", head_every=3, theta=None, theta_rel=0.9)
RIGL = _row("rigl", lambda: jp.rigl(FINAL, **UNIFORM), _constant)
STE = _row("ste", lambda: jp.ste(FINAL), _constant, dense=True)
TOP_KAST = _row(
    "top_kast", lambda: jp.top_kast(FINAL, backward=Fraction(1, 4), every=2), _constant,
    dense=True,
)  # fmt: skip
PDP = _row(
    "pdp",
    lambda: jp.pdp(FINAL, begin=1, end=4, harden=END, tau=0.1, allocation="uniform"),
    _on_a_line(1, 4), END, dense=True,
)  # fmt: skip
TASK = pytest.param(
    Case(
        lambda params: jp.training.task(
            _every_other_weight(params), earlier=[_every_other_weight(params, 4)]
        ),
        expected=_constant,
        first=0,
        dense=True,
    ),
    id="task",
)


def _coupled(params):
    """One group of four units over both kernels, each two columns of the first."""
    del params
    two = jp.structures.Member("dense/kernel", 1, (0, 0, 1, 1, 2, 2, 3, 3))
    one = jp.structures.Member("stack/kernel", 2, (0, 1, 2, 3))
    return jp.Groups((jp.structures.Group("both", 4, (two, one)),))


def _units_row(name, make, expected=None):
    case = Case(lambda params: make(_coupled(params)), plain_params, expected, END)
    return pytest.param(case, id=name)


CRIC = _units_row(
    "hesso_cric",
    lambda g: jp.hesso_cric(g, FINAL, begin=BEGIN, end=END, samples=2, cycles=2),
    _half_from(END),
)
METHODS = [
    FROZEN,
    TASK,
    STATIC,
    GMP,
    NM,
    _gmp_row("gmp-initial", _weights, initial=INITIAL),
    _gmp_row("gmp-global", _weights, total=True, allocation="global"),
    pytest.param(
        Case(
            lambda _: jp.gmp(
                FINAL, begin=BEGIN, end=END, every=EVERY, allocation="erk"
            ),
            expected=_erk,
        ),
        id="gmp-erk",
    ),
    _gmp_row(
        "gmp-block", lambda s: (math.prod(s) // 16, 16, 0), structure=jp.Block(4, 4)
    ),
    _gmp_row(
        "gmp-channel",
        lambda s: (s[-1], math.prod(s) // s[-1], 0),
        structure=jp.Channel(),
    ),
    _neuroprune_row("neuroprune", _by_part),
    HEADS,
    _row("static-random", lambda: jp.static(FINAL, key=KEY), _constant),
    _row("set", lambda: jp.set_(FINAL, **UNIFORM), _constant),
    RIGL,
    _row("rigl-erk", lambda: jp.rigl(FINAL, key=KEY, **STEPS_OF), _erk_at_once),
    _row("rigl-nm", lambda: jp.rigl(structure=jp.NM(2, 4), **UNIFORM), _constant),
    _row(
        "rigl-block",
        lambda: jp.rigl(FINAL, structure=jp.Block(4, 4), **UNIFORM),
        _constant,
    ),
    _row(
        "rigl-channel",
        lambda: jp.rigl(FINAL, structure=jp.Channel(), **UNIFORM),
        _constant,
    ),
    _row(
        "granet",
        _granet(),
        lambda s, t: {p: _kept(*_weights(x), t) for p, x in s.items()},
        BEGIN + 2,
    ),
    _row(
        "granet-sparse-to-sparse",
        _granet(initial=INITIAL, key=KEY),
        lambda s, t: {p: _kept(*_weights(x), t, INITIAL) for p, x in s.items()},
    ),
    _row(
        "granet-nm",
        _granet(structure=jp.NM(2, 4)),
        lambda s, t: {p: _kept(math.prod(x) // 4, 4, 2, t) for p, x in s.items()},
        BEGIN + 2,
    ),
    _row(
        "acdc",
        lambda: jp.acdc(FINAL, allocation="uniform", **STEPS_OF),
        _half_in_phases,
        END,
    ),
    TOP_KAST,
    _row("iss_p", lambda: jp.iss_p(FINAL, **STEPS_OF), _half_from(END), END),
    _row(
        "mask_sparsity",
        lambda: jp.mask_sparsity(FINAL, begin=BEGIN, end=END),
        _half_from(END),
        END,
    ),
    _units_row(
        "hesso",
        lambda g: jp.hesso(g, FINAL, begin=BEGIN, end=END, periods=1),
        _half_from(END),
    ),
    _units_row(
        "hesso-periods",
        lambda g: jp.hesso(
            g,
            FINAL,
            begin=BEGIN,
            end=END,
            periods=2,
        ),
    ),
    CRIC,
    _units_row("dhspg", lambda g: jp.dhspg(g, FINAL, begin=BEGIN, end=END)),
    _row("sora", lambda: jp.sora(0.15, end=END), None, END),
    _row("chts", lambda: jp.chts(FINAL, key=KEY, **STEPS_OF), _constant),
    _row(
        "chtss", lambda: jp.chts(FINAL, key=KEY, initial=INITIAL, **STEPS_OF), _sigmoid
    ),
    STE,
    _row("ste-nm", lambda: jp.ste(structure=jp.NM(2, 4)), _constant, dense=True),
    _row("sr_ste", lambda: jp.sr_ste(FINAL, every=2), _constant, dense=True),
    _row(
        "mdgf",
        lambda: jp.mdgf(FINAL, leak=jp.schedules.linear(0.0, 0, END, initial=1.0)),
        _constant,
        END,
        dense=True,
    ),
    _row(
        "sdgf",
        lambda: jp.sdgf(jp.NM(2, 4), begin=BEGIN, end=END),
        _three_then_two_of_four,
        BEGIN,
        dense=True,
    ),
    PDP,
    _row(
        "pdp-nm",
        lambda: jp.pdp(
            begin=1, end=1, harden=END, structure=jp.NM(2, 4), allocation="uniform"
        ),
        _half_from(1),
        END,
        dense=True,
    ),
    _row(
        "pdp-block",
        lambda: jp.pdp(
            FINAL,
            begin=1,
            end=1,
            harden=END,
            tau=1.0,
            structure=jp.Block(4, 4),
            allocation="uniform",
        ),
        _half_from(1),
        END,
        dense=True,
    ),
    _row(
        "soft_top_k",
        lambda: jp.soft_top_k(FINAL, begin=1, end=4, harden=END, allocation="uniform"),
        _on_a_line(1, 4),
        END,
        dense=True,
    ),
    _row(
        "soft_top_k-channel",
        lambda: jp.soft_top_k(
            FINAL,
            begin=1,
            end=1,
            harden=END,
            structure=jp.Channel(),
            allocation="uniform",
        ),
        None,
        END,
        dense=True,
    ),
]
# One row a method, for what does not depend on structure or allocation.
PLAIN = [m for m in METHODS if "-" not in m.id or m.id in ("static-random", "gmp-nm")]
# Where only the shape of the state matters: a row for each kind of it.
ONE_OF_EACH = [FROZEN, GMP, HEADS, TOP_KAST, CRIC]
LARGE = [STATIC, GMP, NM, RIGL, STE]


def gradients(params, step=0):
    return jax.tree.map(lambda p: jnp.cos(7 * p + step).astype(p.dtype), params)


def check_zeros(case, params, state):
    """Pruned weights are exactly 0, and not -0, in what the forward pass sees.

    And in the parameters themselves, unless they are dense behind the mask.
    """
    found, seen = jp.get_masks(state), jp.sparse_params(params, state)
    if not case.dense:
        for other in (seen, jp.masks.apply(params, found)):
            jax.tree.map(_assert_finite_equal, params, other)
    params = nnx.as_pure(seen)
    kept = total = 0
    for mask, weight in zip(_arrays(found), _arrays(params), strict=True):
        if mask is not None:
            pruned = np.asarray(weight)[~np.asarray(mask)].astype(np.float32)
            assert not pruned[np.isfinite(pruned)].view(np.uint32).any()
            kept, total = kept + int(np.sum(mask)), total + mask.size
    assert 0 < kept < total


def _assert_finite_equal(a, b):
    """Equal where `a` is finite: what is not, no update can mend."""
    finite = np.isfinite(np.asarray(a, np.float32))
    np.testing.assert_array_equal(np.asarray(a)[finite], np.asarray(b)[finite])


def _arrays(tree):
    return jax.tree.leaves(tree, is_leaf=lambda x: x is None)


def _host(tree):
    return jax.tree.map(np.array, tree)


class History(NamedTuple):
    """A jitted run whose buffers are donated: the moments before and after each step."""

    tx: Any
    step: Callable
    moments: list


class Moment(NamedTuple):
    """Everything after one step, on the host."""

    params: Any
    state: Any
    updates: Any


@pytest.fixture(scope="module", params=METHODS)
def case(request):
    return request.param


@pytest.fixture(scope="module")
def history(case):
    params = case.params()
    tx = jp.masked(optax.adamw(0.1, weight_decay=0.1), case.make(params))

    def step(params, state, i):
        updates, state = tx.update(gradients(params, i), state, params)
        return optax.apply_updates(params, updates), state, updates

    step = jax.jit(step, donate_argnums=(0, 1))
    state = jax.jit(tx.init)(params)
    moments = [Moment(_host(params), _host(state), None)]
    for i in range(STEPS):
        params, state, updates = step(params, state, i)
        moments.append(Moment(*map(_host, (params, state, updates))))
    return History(tx, step, moments)


def test_pruned_weights_are_zero_after_every_step(case, history):
    for moment in history.moments[1 + case.first :]:
        check_zeros(case, moment.params, moment.state)


def test_counts_are_exact_at_every_step(case, history):
    for i, moment in enumerate(history.moments):
        found, info = jp.get_masks(moment.state), jp.get_info(moment.state)
        by_path, shapes = {}, {}
        for path, mask in jax.tree_util.tree_leaves_with_path(found):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            by_path[name], shapes[name] = int(np.sum(mask)), mask.shape
        assert info["step"] == i
        assert info["kept"] == by_path
        total = sum(map(math.prod, shapes.values()))
        assert info["density"] == sum(by_path.values()) / total
        if case.expected is not None:
            wanted = case.expected(shapes, i - 1)
            assert wanted == (
                by_path if isinstance(wanted, dict) else sum(by_path.values())
            )


def test_churn_is_what_changed(history):
    for before, after in itertools.pairwise(history.moments):
        flipped = jp.masks.flipped(
            jp.get_masks(before.state), jp.get_masks(after.state)
        )
        info = jp.get_info(after.state)
        assert info["flipped"] == flipped if info["changed"] else flipped == 0


def test_only_weights_are_masked(history):
    found = jp.get_masks(history.moments[-1].state)
    for path, mask in jax.tree_util.tree_leaves_with_path(
        found, is_leaf=lambda x: x is None
    ):
        assert (mask is not None) == (path[-1].key == "kernel"), path


def test_leaves_without_mask_train_as_without_the_method(case, history):
    last = history.moments[-1]
    params = case.params()
    inner = optax.adamw(0.1, weight_decay=0.1)
    state = inner.init(params)
    for i in range(STEPS):
        updates, state = jax.jit(inner.update)(gradients(params, i), state, params)
        params = optax.apply_updates(params, updates)
    found = jp.get_masks(last.state)
    for mask, ours, plain in zip(
        _arrays(found), _arrays(last.params), _arrays(params), strict=True
    ):
        if mask is None and plain is not None:
            np.testing.assert_allclose(ours, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", PLAIN)
def test_a_donated_state_takes_nothing_else_along(case):
    """Initialised in eager mode, its buffers are its own, and each is there once."""
    params = case.params()
    tx = jp.masked(optax.sgd(0.1), case.make(params))
    state = tx.init(params)
    buffers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(state)]
    assert len(set(buffers)) == len(buffers)
    jax.jit(lambda s: jax.tree.map(jnp.zeros_like, s), donate_argnums=0)(state)
    tx.init(params)
    jax.random.uniform(KEY)


def test_nothing_is_sorted(case, history):
    params, state = case.params(), history.moments[-1].state
    program = jax.jit(history.tx.update).lower(params, state, params).as_text()
    assert "stablehlo.select" in program
    assert "stablehlo.sort" not in program and "top_k" not in program


def test_eager_equals_jit(history):
    before, after = history.moments[BEGIN : BEGIN + 2]
    params, state = jax.tree.map(jnp.asarray, (before.params, before.state))
    updates, state = history.tx.update(gradients(params, BEGIN), state, params)
    jax.tree.map(
        np.testing.assert_array_equal, jp.get_masks(state), jp.get_masks(after.state)
    )
    # Fused and single operations round differently: a few float32 ulps of the weights.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        (updates, state.inner), (after.updates, after.state.inner),
    )  # fmt: skip


def test_gradients_may_be_taken_outside_of_jit(history):
    """Through the forward view of weights and state that come in as arguments."""
    before = history.moments[BEGIN + EVERY]
    params, state = jax.tree.map(jnp.asarray, (before.params, before.state))

    def loss(params, state):
        return _loss(jp.sparse_params(params, state))

    outside = jax.grad(jax.jit(loss))(params, state)
    inside = jax.jit(jax.grad(loss))(params, state)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        outside, inside,
    )  # fmt: skip


def test_checkpoint_in_mid_cycle(case, history, tmp_path):
    """Saved between two mask updates, restored into a fresh state: the same bits on."""
    halfway = BEGIN + EVERY + 2
    saved = jax.tree.map(jnp.asarray, history.moments[halfway])
    jp.checkpoint.save(tmp_path / "run", {"params": saved.params, "state": saved.state})
    params = case.params()
    like = jax.eval_shape(lambda: {"params": params, "state": history.tx.init(params)})
    tree = jp.checkpoint.restore(tmp_path / "run", like=like)
    params, state = tree["params"], tree["state"]
    for i in range(halfway, STEPS):
        params, state, _ = history.step(params, state, i)
    last = history.moments[-1]
    jax.tree.map(
        np.testing.assert_array_equal, (params, state), (last.params, last.state)
    )


def test_masks_take_one_bit_a_weight(history):
    state = history.moments[-1].state
    kept = jax.tree.leaves(state.method.masks)
    assert sum(x.nbytes for x in kept) == jp.masks.count(jp.get_masks(state)).total // 8


@pytest.mark.parametrize("case", PLAIN)
def test_bfloat16_and_nonfinite_weights(case):
    """NaN and infinity spoil themselves alone, and are counted."""
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), case.params())
    leaf, treedef = jax.tree.flatten(params)
    first = next(i for i, x in enumerate(leaf) if x.ndim > 1)
    leaf[first] = leaf[first].at[0, 0].set(jnp.nan).at[1, 1].set(jnp.inf)
    params = treedef.unflatten(leaf)
    tx = jp.masked(optax.adamw(0.1), case.make(params))

    @jax.jit
    def step(params, state):
        updates, state = tx.update(params, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.jit(tx.init)(params)
    for _ in range(END + 2):
        params, state = step(params, state)
        assert jp.get_info(state)["nonfinite"] == 2
    for i, x in enumerate(jax.tree.leaves(params)):
        assert x.dtype == jnp.bfloat16
        assert jnp.sum(~jnp.isfinite(x)) == (2 if i == first else 0)
    check_zeros(case, params, state)


@pytest.mark.parametrize("case", ONE_OF_EACH)
def test_vmap(case):
    """Models side by side, each with masks of its own."""
    models = [case.params(), jax.tree.map(jnp.flip, case.params())]
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *models)
    tx = jp.masked(optax.sgd(0.1), case.make(models[0]))

    def run(params):
        def body(i, carry):
            params, state = carry
            updates, state = tx.update(gradients(params, i), state, params)
            return optax.apply_updates(params, updates), state

        return jax.lax.fori_loop(0, BEGIN + 2, body, (params, tx.init(params)))[0]

    together = jax.jit(jax.vmap(run))(stacked)
    alone = [jax.jit(run)(params) for params in models]
    for i, params in enumerate(alone):
        jax.tree.map(
            lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-5, atol=1e-6),
            together, params,
        )  # fmt: skip


@pytest.mark.parametrize("case", LARGE)
def test_large_leaves(case):
    """Leaves large enough to be sampled and folded while the threshold is searched."""
    params = {"dense": {"kernel": jax.random.normal(jax.random.key(1), (256, 512))}}
    shapes = {"dense/kernel": (256, 512)}
    tx = jp.masked(optax.sgd(0.1), case.make(params))
    state = jax.jit(tx.init)(params)
    update = jax.jit(tx.update)
    for i in range(END + 1):
        _, state = update(params, state, params)
        assert jp.get_info(state)["kept"] == case.expected(shapes, i)


# Containers. Their paths are those of the dictionaries, so that one result serves all.


def _named_tuples(tree):
    if not isinstance(tree, dict):
        return tree
    kind = _named(tuple(sorted(tree)))
    return kind(**{k: _named_tuples(v) for k, v in tree.items()})


def _modules(tree):
    if not isinstance(tree, dict):
        return tree
    kind = _module(tuple(sorted(tree)))
    return kind(**{k: _modules(v) for k, v in tree.items()})


_KINDS: dict = {}


def _named(fields):
    return _KINDS.setdefault(("tuple", fields), collections.namedtuple("Layer", fields))


def _module(fields):
    if ("module", fields) not in _KINDS:
        body = {"__annotations__": dict.fromkeys(fields, Any), "__module__": __name__}
        _KINDS["module", fields] = type("Layer", (eqx.Module,), body)
    return _KINDS["module", fields]


def _nnx_state(tree):
    return nnx.State(jax.tree.map(nnx.Param, tree))


CONTAINERS = [
    pytest.param(lambda tree: {"params": tree}, id="linen"),
    pytest.param(_nnx_state, id="nnx"),
    pytest.param(_modules, id="equinox"),
    pytest.param(_named_tuples, id="named-tuple"),
]


@pytest.mark.parametrize("wrap", CONTAINERS)
@pytest.mark.parametrize("case", ONE_OF_EACH)
def test_containers(case, wrap):
    params = wrap(case.params())
    tx = jp.masked(optax.adam(0.1), case.make(params))
    state = jax.jit(tx.init)(params)
    update = jax.jit(tx.update)
    for i in range(case.first + 1):
        updates, state = update(gradients(params, i), state, params)
        assert jax.tree.structure(updates) == jax.tree.structure(params)
        params = optax.apply_updates(params, updates)
    kept = jp.get_info(state)["kept"]
    assert all(path.endswith("kernel") for path in kept), kept
    names = {"dense/kernel": plain_params, "layer/up/kernel": transformer_params}
    assert [case.params] == [f for path, f in names.items() if path in kept]
    check_zeros(case, params, state)


# Places where `masked` may stand.


def _is_kernel(params, yes, no):
    def label(path, _):
        return yes if getattr(path[-1], "key", None) == "kernel" else no

    return jax.tree_util.tree_map_with_path(label, params)


def _adam(learning_rate=0.1):
    return optax.adam(learning_rate)


def _sparse_beside_dense(method):
    parts = {"sparse": jp.masked(_adam(), method), "dense": optax.sgd(0.1)}
    return optax.partition(parts, lambda params: _is_kernel(params, "sparse", "dense"))


def _sparse_beside_frozen(method):
    parts = {"sparse": jp.masked(_adam(), method), "frozen": optax.set_to_zero()}
    return optax.partition(parts, lambda params: _is_kernel(params, "sparse", "frozen"))


def _two_optimizers(method):
    parts = {"adam": _adam(), "sgd": optax.sgd(0.1, momentum=0.9)}
    inner = optax.partition(parts, lambda params: _is_kernel(params, "adam", "sgd"))
    return jp.masked(inner, method)


def _injected_outside(method):
    return optax.inject_hyperparams(
        lambda learning_rate: jp.masked(_adam(learning_rate), method)
    )(learning_rate=0.1)


def _injected_inside(method):
    return jp.masked(optax.inject_hyperparams(_adam)(learning_rate=0.1), method)


COMPOSITIONS = [
    pytest.param(
        lambda m: optax.MultiSteps(jp.masked(_adam(), m), 2), id="multi-outside"
    ),
    pytest.param(
        lambda m: jp.masked(optax.MultiSteps(_adam(), 2), m), id="multi-inside"
    ),
    pytest.param(_injected_outside, id="inject-outside"),
    pytest.param(_injected_inside, id="inject-inside"),
    pytest.param(_sparse_beside_dense, id="partition-outside"),
    pytest.param(_two_optimizers, id="partition-inside"),
    pytest.param(_sparse_beside_frozen, id="frozen-leaves"),
    pytest.param(
        lambda m: optax.chain(optax.clip_by_global_norm(1.0), jp.masked(_adam(), m)),
        id="clip-outside",
    ),
    pytest.param(
        lambda m: jp.masked(optax.chain(optax.clip_by_global_norm(1.0), _adam()), m),
        id="clip-inside",
    ),
]


@pytest.mark.parametrize("compose", COMPOSITIONS)
@pytest.mark.parametrize("case", ONE_OF_EACH)
def test_compositions(case, compose, request):
    start = params = case.params()
    tx = compose(case.make(params))

    @jax.jit
    def step(params, state, i):
        updates, state = tx.update(gradients(params, i), state, params)
        return optax.apply_updates(params, updates), state

    state = jax.jit(tx.init)(params)
    for i in range(2 * STEPS):
        params, state = step(params, state, i)
    name = request.node.callspec.id
    info = jp.get_info(state)
    assert info["step"] == (STEPS if "multi-outside" in name else 2 * STEPS)
    found = jp.get_masks(state)
    assert all(m is None or m.dtype == jnp.bool_ for m in _arrays(found))
    assert jp.masks.count(found).kept == sum(info["kept"].values())
    check_zeros(case, params, state)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(start), jax.tree.leaves(params), strict=True
    ):
        is_frozen = "frozen-leaves" in name and path[-1].key != "kernel"
        assert bool(jnp.all(a == b)) == is_frozen
    if case.expected is not None:
        shapes = {p: _shape(params, p) for p in info["kept"]}
        assert info["kept"] == case.expected(shapes, END)


def _shape(params, path):
    for name in path.split("/"):
        params = params[name]
    return params.shape


class _Model(nnx.Module):
    """Nested dictionaries as modules; the gradient of its loss is `gradients`."""

    def __init__(self, tree):
        for name, x in tree.items():
            is_array = hasattr(x, "shape")
            setattr(self, name, nnx.Param(x) if is_array else x and _Model(x))


def _loss(params):
    return sum(jnp.sum(jnp.sin(7 * p)) / 7 for p in jax.tree.leaves(params))


@pytest.mark.parametrize("case", ONE_OF_EACH)
def test_nnx_optimizer(case):
    model = _Model(case.params())
    tx = jp.masked(optax.adam(0.1), case.make(nnx.state(model, nnx.Param)))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        grads = nnx.grad(lambda m: _loss(nnx.state(m, nnx.Param)))(model)
        optimizer.update(model, grads)

    for _ in range(END + 2):
        step(model, optimizer)
    params = nnx.state(model, nnx.Param)
    found, info = jp.get_masks(optimizer), jp.get_info(optimizer)
    assert info["step"] == END + 2
    assert sum(info["kept"].values()) == jp.masks.count(found).kept
    check_zeros(case, params, optimizer)
    check_zeros(case, nnx.as_pure(params), optimizer)


@pytest.mark.parametrize("case", ONE_OF_EACH)
def test_train_state(case):
    params = {"params": case.params()}
    tx = optax.chain(optax.clip(1.0), jp.masked(optax.adam(0.1), case.make(params)))
    state = train_state.TrainState.create(apply_fn=_loss, params=params, tx=tx)
    step = jax.jit(lambda s: s.apply_gradients(grads=gradients(s.params, s.step)))
    for _ in range(END + 2):
        state = step(state)
    assert jp.get_info(state)["step"] == END + 2
    check_zeros(case, state.params, state)
