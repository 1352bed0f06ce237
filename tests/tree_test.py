"""Paths and the choice of leaves, over the libraries that make parameter trees."""

import re
from typing import NamedTuple

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, traverse_util

from jaxprune import _tree

MATRIX = jnp.ones((2, 4))


class Attention(NamedTuple):
    query: jax.Array
    key: jax.Array
    value: jax.Array


class LinenModel(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(5, 8, name="tokens")(tokens)
        x = nn.LayerNorm(name="norm")(x)
        x = nn.MultiHeadDotProductAttention(2, name="attn")(x)
        x = nn.BatchNorm(use_running_average=True, name="batch_norm")(x)
        return nn.Dense(
            3, name="head", kernel_init=nn.with_partitioning(nn.zeros, (None, None))
        )(x)


class NnxModel(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(5, 8, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(8, 8, rngs=rngs) for _ in range(2)])
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.moving = nnx.BatchStat(jnp.ones((4, 4)))


class EquinoxModel(eqx.Module):
    embedding: eqx.nn.Embedding
    wte: eqx.nn.Embedding
    tok_emb: eqx.nn.Embedding
    layers: list
    norm: eqx.nn.LayerNorm
    ln_1: eqx.nn.LayerNorm
    activation: object
    missing: None

    def __init__(self, key):
        self.embedding, self.wte, self.tok_emb = (
            eqx.nn.Embedding(5, 4, key=key) for _ in range(3)
        )
        self.layers = [eqx.nn.Linear(4, 4, key=key), eqx.nn.MLP(4, 2, 3, 1, key=key)]
        self.norm, self.ln_1 = (eqx.nn.LayerNorm((2, 4)) for _ in range(2))
        self.activation = jax.nn.relu
        self.missing = None


def _chosen(tree, where=None):
    paths, _, _ = _tree.flatten(tree)
    chosen = _tree.selection(tree, where)
    return [p for p, c in zip(paths, chosen, strict=True) if c]


def test_linen():
    variables = LinenModel().init(jax.random.key(0), jnp.zeros((1, 3), int))
    expected = ["attn/key/kernel", "attn/out/kernel", "attn/query/kernel"]
    expected += ["attn/value/kernel", "head/kernel"]
    assert _chosen(variables) == expected
    assert _chosen(variables["params"]) == expected
    paths, _, _ = _tree.flatten(variables)
    assert {"norm/scale", "tokens/embedding", "batch_stats/batch_norm/mean"} <= {*paths}


@pytest.mark.parametrize("form", ["module", "state", "params", "pure"])
def test_nnx(form):
    model = NnxModel(nnx.Rngs(0))
    tree = {
        "module": lambda: model,
        "state": lambda: nnx.state(model),
        "params": lambda: nnx.state(model, nnx.Param),
        "pure": lambda: nnx.to_pure_dict(nnx.state(model, nnx.Param)),
    }[form]()
    assert _chosen(tree) == ["layers/0/kernel", "layers/1/kernel"]
    paths, _, _ = _tree.flatten(tree)
    assert {"layers/0/bias", "embed/embedding", "norm/scale"} <= {*paths}
    assert not any("value" in p for p in paths)


def test_nnx_variables_other_than_parameters_cannot_be_chosen():
    state = nnx.state(NnxModel(nnx.Rngs(0)))
    assert "moving" in _tree.flatten(state)[0]
    assert "moving" not in _chosen(state, "*")
    assert "norm/mean" not in _chosen(state, lambda path, leaf: True)
    assert {"norm/scale", "embed/embedding"} <= {*_chosen(state, "*")}
    with pytest.raises(ValueError, match="'moving' matches no floating-point leaf"):
        _chosen(state, "moving")


def test_equinox():
    model = EquinoxModel(jax.random.key(0))
    weights = [
        "layers/0/weight",
        "layers/1/layers/0/weight",
        "layers/1/layers/1/weight",
    ]
    assert _chosen(model) == weights
    paths, leaves, treedef = _tree.flatten(model)
    assert "activation" in paths and "missing" in paths
    assert eqx.tree_equal(treedef.unflatten(leaves), model)
    stacked = eqx.filter_vmap(lambda k: eqx.nn.MLP(4, 2, 3, 1, key=k))(
        jax.random.split(jax.random.key(0), 3)
    )
    assert _chosen(stacked) == ["layers/0/weight", "layers/1/weight"]


def test_tuples_and_named_tuples():
    tree = (MATRIX, [{"a": MATRIX}, Attention(MATRIX, MATRIX, MATRIX)])
    names = ["0", "1/0/a", "1/1/query", "1/1/key", "1/1/value"]
    assert _tree.flatten(tree)[0] == names
    assert _tree.flatten(MATRIX)[0] == [""]
    assert _chosen(MATRIX) == [""]


def test_leading_params_is_dropped_once():
    assert _tree.flatten({"params": {"params": {"w": 1}}})[0] == ["params/w"]
    assert _tree.flatten({"params": MATRIX})[0] == ["params"]


def test_leaves_of_plain_dicts_that_are_no_weights():
    stacked = {
        "dense": {"kernel": MATRIX, "bias": MATRIX, "in_proj_bias": MATRIX},
        "norm": {"scale": MATRIX, "var": MATRIX, "weight": MATRIX},
        "torch": {"wte": {"weight": MATRIX}, "wpe": MATRIX, "pos_embedding": MATRIX},
        "blocks": {"ln_f": {"weight": MATRIX}, "bn1": {"weight": MATRIX}},
        "haiku": {"w": MATRIX, "b": MATRIX, "offset": MATRIX},
        "vector": jnp.ones(3),
        "scalar": jnp.float32(1),
        "number": 1.0,
        "integer": jnp.ones((2, 2), int),
        "boolean": jnp.ones((2, 2), bool),
        "key": jax.random.split(jax.random.key(0), (2, 2)),
        "numpy": np.ones((2, 2), np.float32),
        "half": jnp.ones((2, 2), jnp.bfloat16),
        "shape": jax.ShapeDtypeStruct((2, 2), jnp.float32),
        "none": None,
        "masked": optax.MaskedNode(),
        "learned": {"weight": MATRIX},
        "names.wte.weight": MATRIX,
        "names.h.0.ln_1.weight": MATRIX,
        "names.h.0.mlp.weight": MATRIX,
        "restored": {"embedding": {"value": MATRIX}, "kernel": {"value": MATRIX}},
    }
    weights = ["dense/kernel", "haiku/w", "half", "learned/weight"]
    weights += ["names.h.0.mlp.weight", "numpy", "restored/kernel/value", "shape"]
    assert _chosen(stacked) == weights
    everything = {*_chosen(stacked, "*")}
    assert {"vector", "scalar", "norm/var", "torch/wpe"} <= everything
    assert not everything & {"integer", "boolean", "key", "none", "masked", "number"}


TREE = {
    "body": [{"kernel": MATRIX, "bias": jnp.ones(3)}, {"kernel": MATRIX}],
    "head": {"kernel": MATRIX},
    "table": {"embedding": MATRIX},
}
BODY = ["body/0/kernel", "body/1/kernel"]


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        (None, [*BODY, "head/kernel"]),
        ("body/*/kernel", BODY),
        (["body/*", "!*/bias"], BODY),
        (["!*/bias", "body/*"], ["body/0/bias", *BODY, "head/kernel"]),
        (("*", "!body/*", "body/1/kernel"),
         ["body/1/kernel", "head/kernel", "table/embedding"]),
        ("!head/*", BODY),
        (["!head/*", "table/*"], [*BODY, "table/embedding"]),
        ("body/[01]/kernel", BODY),
        (lambda path, leaf: path.startswith("body") and leaf.ndim == 1, ["body/0/bias"]),
        (lambda path, leaf: jnp.bool_(path == "head/kernel"), ["head/kernel"]),
    ],
)  # fmt: skip
def test_where(where, expected):
    assert _chosen(TREE, where) == expected


def test_patterns_mind_case_everywhere():
    assert _chosen({"A": MATRIX, "a": MATRIX}, "A") == ["A"]


@pytest.mark.parametrize(
    ("where", "error", "words"),
    [
        ("heads/*", ValueError, "where: the pattern 'heads/*' matches no floating"),
        (["*", "!heads/*"], ValueError, "where: the pattern '!heads/*' matches no"),
        (
            lambda path, leaf: False,
            ValueError,
            "selects no leaf to prune. The floating",
        ),
        ([], ValueError, "where=[] selects no leaf to prune. The floating"),
        (["body/*", "!body/*"], ValueError, "body/0/bias, body/0/kernel, body/1"),
        (3, TypeError, "where: got 3; expected None, a function (path, leaf) -> bool"),
        ([True], TypeError, "where: got [True]; expected None, a function"),
    ],
)
def test_where_that_cannot_be(where, error, words):
    with pytest.raises(error, match=re.escape(words)):
        _chosen(TREE, where)


def test_select_keeps_containers_and_holes():
    tree = {"a": MATRIX, "b": None, "c": optax.MaskedNode(), "bias": MATRIX}
    selected = _tree.select(tree, None)
    assert selected.pop("a") is MATRIX
    assert selected == {"b": None, "c": optax.MaskedNode(), "bias": None}


def test_map_leaves():
    tree = {"a": MATRIX, "b": None, "c": optax.MaskedNode()}
    doubled = _tree.map_leaves(lambda x, y: 2 * x + y, tree, {**tree, "b": 1, "c": 2})
    np.testing.assert_array_equal(doubled["a"], 3)
    assert doubled["b"] is None and doubled["c"] == optax.MaskedNode()


def test_align():
    model = NnxModel(nnx.Rngs(0))
    params = nnx.state(model, nnx.Param)
    pure = nnx.to_pure_dict(params)
    aligned = _tree.align(pure, params, lambda x: False)
    assert jax.tree.structure(aligned) == jax.tree.structure(params)
    assert jax.tree.structure(_tree.bare(params)) == jax.tree.structure(
        _tree.bare(aligned)
    )
    other = {"else": MATRIX}
    assert _tree.align(other, params, lambda x: False) is other


def test_lookup_takes_the_last_match():
    table = {"*": 1, "a/*": 2, "a/b": 3}
    found = [_tree.lookup(p, table) for p in ("x", "a/x", "a/b")]
    assert found == [1, 2, 3]
    assert _tree.lookup("x", {"a": 1}) is None


def test_long_lists_of_paths_are_cut_short():
    assert _tree.listing(["a", "b"]) == "a, b"
    assert _tree.listing([]) == "(none)"
    assert _tree.listing([str(i) for i in range(20)]).endswith("11, and 8 more")


def test_paths_agree_with_flax():
    params = LinenModel().init(jax.random.key(0), jnp.zeros((1, 3), int))["params"]
    flat = traverse_util.flatten_dict(nn.unbox(params), sep="/")
    assert sorted(_tree.flatten(params)[0]) == sorted(flat)
