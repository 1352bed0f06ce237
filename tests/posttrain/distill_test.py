"""Losses of distillation against their formulas in NumPy, and data from a teacher."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxprune import posttrain

pytestmark = pytest.mark.usefixtures("quick_compilation")

B, T, V = 2, 5, 7
KEY = jax.random.key(0)


def _case(dtype=np.float32):
    rng = np.random.default_rng(0)
    student, teacher = 2 * rng.normal(size=(2, B, T, V))
    labels = rng.integers(0, V, (B, T))
    weights = np.array([[1, 1, 1, 0, 0], [1, 1, 0, 0, 0]], np.float32)
    return (
        jnp.asarray(student, dtype),
        jnp.asarray(teacher, dtype),
        jnp.asarray(labels),
        weights,
    )


def _softmax(x, temperature=1.0):
    e = np.exp(np.asarray(x, np.float64) / temperature)
    return e / e.sum(-1, keepdims=True)


def _mean(x, weights):
    return x.mean() if weights is None else (x * weights).sum() / weights.sum()


def _kl(p, q):
    return (p * np.log(p / q)).sum(-1)


WEIGHTED = pytest.mark.parametrize("weighted", [False, True])


@WEIGHTED
@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_logits(temperature, direction, weighted):
    student, teacher, _, weights = _case()
    weights = weights if weighted else None
    p, q = _softmax(teacher, temperature), _softmax(student, temperature)
    kl = _kl(p, q) if direction == "forward" else _kl(q, p)
    loss = functools.partial(
        posttrain.distill_logits, temperature=temperature, direction=direction
    )
    found = jax.jit(loss)(student, teacher, weights=weights)
    np.testing.assert_allclose(found, temperature**2 * _mean(kl, weights), rtol=1e-5)
    assert abs(loss(student, student)) < 1e-6


@pytest.mark.parametrize("k", [1, 3, 6])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_top_k_puts_the_others_together(k, direction):
    student, teacher, *_ = _case()
    order = np.argsort(-np.asarray(teacher), axis=-1)

    def group(x):
        sorted_ = np.take_along_axis(_softmax(x), order, axis=-1)
        return np.concatenate(
            [sorted_[..., :k], sorted_[..., k:].sum(-1, keepdims=True)], -1
        )

    p, q = group(teacher), group(student)
    expected = (_kl(p, q) if direction == "forward" else _kl(q, p)).mean()
    loss = functools.partial(
        posttrain.distill_logits, student, teacher, direction=direction
    )
    np.testing.assert_allclose(loss(top_k=k), expected, rtol=1e-5)
    assert loss(top_k=k) <= loss() * (1 + 1e-6)
    assert loss(top_k=V) == loss()


@WEIGHTED
def test_labels_and_teacher_together(weighted):
    student, teacher, labels, weights = _case()
    weights = weights if weighted else None
    hard = -np.log(
        np.take_along_axis(_softmax(student), np.asarray(labels)[..., None], -1)
    )[..., 0]
    soft = 4 * _kl(_softmax(teacher, 2.0), _softmax(student, 2.0))
    found = posttrain.distill(
        student, teacher, labels, alpha=0.3, temperature=2.0, weights=weights
    )
    np.testing.assert_allclose(
        found, 0.7 * _mean(hard, weights) + 0.3 * _mean(soft, weights), rtol=1e-5
    )
    found = posttrain.cross_entropy(student, labels, weights=weights)
    np.testing.assert_allclose(found, _mean(hard, weights), rtol=1e-5)


@WEIGHTED
def test_hidden_states(weighted):
    student, teacher, _, weights = _case()
    weights = weights if weighted else None
    a, b = np.asarray(student, np.float64), np.asarray(teacher, np.float64)
    expected = _mean(((a - b) ** 2).mean(-1), weights)
    found = jax.jit(posttrain.distill_hidden)(student, teacher, weights=weights)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    relative = posttrain.distill_hidden(
        student, teacher, weights=weights, relative=True
    )
    np.testing.assert_allclose(
        relative, expected / _mean((b**2).mean(-1), weights), rtol=1e-5
    )


LOSSES = {
    "forward": posttrain.distill_logits,
    "reverse": functools.partial(posttrain.distill_logits, direction="reverse"),
    "top_k": functools.partial(posttrain.distill_logits, top_k=2),
    "hidden": posttrain.distill_hidden,
    "relative": functools.partial(posttrain.distill_hidden, relative=True),
    "both": lambda s, t, weights: posttrain.distill(s, t, _case()[2], weights=weights),
}
EACH = pytest.mark.parametrize("name", sorted(LOSSES))


@EACH
def test_gradients_reach_only_counted_tokens_of_the_student(name):
    student, teacher, _, weights = _case()
    loss = functools.partial(LOSSES[name], weights=jnp.asarray(weights))
    student, teacher = (x.at[0, 4].set(jnp.nan) for x in (student, teacher))
    by_student, by_teacher = jax.jit(jax.grad(loss, argnums=(0, 1)))(student, teacher)
    np.testing.assert_array_equal(by_teacher, 0)
    counted = np.abs(np.asarray(by_student)).sum(-1)
    assert np.isfinite(loss(student, teacher))
    assert (counted[weights > 0] > 0).all()
    assert (counted[weights == 0] == 0).all()


def test_labels_that_do_not_exist():
    student, _, labels, weights = _case()
    expected = posttrain.cross_entropy(student, labels, weights=weights)
    for nothing in (-100, -1, V):
        marked = jnp.where(weights > 0, labels, nothing)
        assert posttrain.cross_entropy(student, marked, weights=weights) == expected
        assert np.isnan(posttrain.cross_entropy(student, marked))


@EACH
def test_descent_finds_the_teacher(name):
    student, teacher, *_ = _case()
    loss = functools.partial(LOSSES[name], weights=None)
    step = jax.jit(lambda s: s - 2.0 * jax.grad(loss)(s, teacher))
    new = student
    for _ in range(30):
        new = step(new)
    assert loss(new, teacher) < 0.9 * loss(student, teacher)


@EACH
def test_bfloat16_is_summed_in_float32(name):
    student, teacher, *_ = _case(jnp.bfloat16)
    found = LOSSES[name](student, teacher, weights=None)
    assert found.dtype == jnp.float32
    wide = [x.astype(jnp.float32) for x in (student, teacher)]
    np.testing.assert_allclose(found, LOSSES[name](*wide, weights=None), rtol=1e-6)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_forbidden_tokens_count_nothing(direction):
    student, teacher, *_ = _case()
    loss = functools.partial(posttrain.distill_logits, direction=direction)
    with_hole = [x.at[..., 3].set(-jnp.inf) for x in (student, teacher)]
    without = [jnp.delete(x, 3, axis=-1) for x in (student, teacher)]
    np.testing.assert_allclose(loss(*with_hole), loss(*without), rtol=1e-6)
    grads = jax.grad(loss)(*with_hole)
    assert np.isfinite(grads).all()


def test_no_token_counted_is_no_loss():
    student, teacher, labels, weights = _case()
    none = np.zeros_like(weights)
    assert posttrain.distill_logits(student, teacher, weights=none) == 0
    assert posttrain.cross_entropy(student, labels, weights=none) == 0


def _chain(params, tokens):
    """A causal model: what follows depends on the token itself."""
    return params[tokens]


def test_self_data_samples_what_the_teacher_says():
    params = jnp.log(jnp.array([[0.2, 0.8, 0.0], [0.5, 0.0, 0.5], [0.0, 0.1, 0.9]]))
    prompts = jnp.zeros((400, 2), jnp.int32)
    given = jnp.ones(400, jnp.int32)
    write = jax.jit(functools.partial(posttrain.self_data, _chain))
    found = write(params, prompts, given, key=KEY)
    assert found.tokens.dtype == jnp.int32
    share = np.bincount(np.asarray(found.tokens[:, 1]), minlength=3) / 400
    np.testing.assert_allclose(share, [0.2, 0.8, 0.0], atol=0.07)
    assert (
        found.tokens != write(params, prompts, given, key=jax.random.key(1)).tokens
    ).any()
    sharp = posttrain.self_data(
        _chain, params, prompts, given, key=KEY, temperature=0.1
    )
    assert (sharp.tokens[:, 1] == 1).all()


def test_self_data_keeps_prompts_and_stops():
    params = jnp.log(jnp.array([[0.1, 0.9, 0.0], [0.5, 0.0, 0.5], [0.0, 0.1, 0.9]]))
    tokens = jnp.array([[2, 1, 0, 1, 1, 1, 1, 1]] * 64)
    given = jnp.arange(64) % 4 + 1
    found = posttrain.self_data(_chain, params, tokens, given, key=KEY, stop=2)
    for row, weight, n in zip(
        *map(np.asarray, (found.tokens, found.weights, given)), strict=True
    ):
        np.testing.assert_array_equal(row[:n], tokens[0, :n])
        end = n + int(np.argmax(row[n:] == 2)) + 1 if (row[n:] == 2).any() else len(row)
        np.testing.assert_array_equal(
            weight, [float(n <= i < end) for i in range(len(row))]
        )
        assert (row[end:] == 2).all()


def test_self_data_teaches_a_student():
    teacher = 3 * jax.random.normal(KEY, (V, V))
    prompts = jax.random.randint(KEY, (64, 12), 0, V)
    data = posttrain.self_data(_chain, teacher, prompts, jnp.ones(64, int), key=KEY)

    def loss(student):
        logits = _chain(student, data.tokens)[:, :-1]
        return posttrain.cross_entropy(
            logits, data.tokens[:, 1:], weights=data.weights[:, 1:]
        )

    tx = optax.adam(0.3)
    student = jnp.zeros((V, V))
    state = tx.init(student)
    step = jax.jit(lambda s, o: tx.update(jax.grad(loss)(s), o))
    for _ in range(60):
        updates, state = step(student, state)
        student = optax.apply_updates(student, updates)
    before = posttrain.distill_logits(jnp.zeros((V, V)), teacher)
    assert posttrain.distill_logits(student, teacher) < 0.1 * before


def _self_data(**change):
    arguments = {
        "tokens": jnp.zeros((2, 3), int),
        "given": jnp.ones(2, int),
        "key": KEY,
        **change,
    }
    tokens, given = arguments.pop("tokens"), arguments.pop("given")
    return posttrain.self_data(_chain, jnp.zeros((3, 3)), tokens, given, **arguments)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda s, t, y: posttrain.distill_logits(s, t[..., :3]),
            ValueError,
            "distill_logits: student has the shape (2, 5, 7) and teacher (2, 5, 3)",
        ),
        (
            lambda s, t, y: posttrain.distill_logits(s, t, temperature=0),
            ValueError,
            "distill_logits: got temperature=0; expected it above 0",
        ),
        (
            lambda s, t, y: posttrain.distill_logits(s, t, direction="back"),
            ValueError,
            "distill_logits: got direction='back'; expected 'forward'",
        ),
        (
            lambda s, t, y: posttrain.distill_logits(s, t, top_k=0),
            ValueError,
            "got top_k=0",
        ),
        (
            lambda s, t, y: posttrain.distill_logits(s, t, weights=jnp.ones(3)),
            ValueError,
            "distill_logits: weights have the shape (3,); expected (2, 5)",
        ),
        (
            lambda s, t, y: posttrain.distill_hidden(s, t[0]),
            ValueError,
            "distill_hidden: student has the shape (2, 5, 7) and teacher (5, 7)",
        ),
        (
            lambda s, t, y: posttrain.distill(s, t, y, alpha=2),
            ValueError,
            "distill: got alpha=2; expected a share in [0, 1]",
        ),
        (
            lambda s, t, y: posttrain.cross_entropy(s, y[0]),
            ValueError,
            "cross_entropy: labels have the shape (5,); expected (2, 5)",
        ),
        (
            lambda s, t, y: posttrain.cross_entropy(s, y.astype(float)),
            TypeError,
            "cross_entropy: labels hold float32; expected integers",
        ),
        (
            lambda s, t, y: _self_data(given=jnp.ones(3, int)),
            ValueError,
            "self_data: got tokens of (2, 3) and given of (3,)",
        ),
        (
            lambda s, t, y: _self_data(tokens=jnp.zeros((2, 3))),
            TypeError,
            "self_data: tokens holds float32; expected integers",
        ),
        (lambda s, t, y: _self_data(key=None), ValueError, "self_data: got key=None"),
        (lambda s, t, y: _self_data(temperature=-1), ValueError, "got temperature=-1"),
    ],
)
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call(*_case()[:3])
