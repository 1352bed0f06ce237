"""Names and layouts of Hugging Face: there and back, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune import checkpoint, formats, structures
from jaxprune.checkpoint import BERT, LLAMA, Rule

# As `transformers` names them.
_BERT_LAYER = {
    f"encoder.layer.{{}}.{name}.{kind}": shape
    for name, shapes in {
        "attention.self.query": [(4, 4), (4,)],
        "attention.self.key": [(4, 4), (4,)],
        "attention.self.value": [(4, 4), (4,)],
        "attention.output.dense": [(4, 4), (4,)],
        "attention.output.LayerNorm": [(4,), (4,)],
        "intermediate.dense": [(6, 4), (6,)],
        "output.dense": [(4, 6), (4,)],
        "output.LayerNorm": [(4,), (4,)],
    }.items()
    for kind, shape in zip(("weight", "bias"), shapes, strict=True)
}
_BERT = {
    "embeddings.word_embeddings.weight": (9, 4),
    "embeddings.position_embeddings.weight": (8, 4),
    "embeddings.token_type_embeddings.weight": (2, 4),
    "embeddings.LayerNorm.weight": (4,),
    "embeddings.LayerNorm.bias": (4,),
    "pooler.dense.weight": (4, 4),
    "pooler.dense.bias": (4,),
}
_LLAMA_LAYER = {
    f"model.layers.{{}}.{name}.weight": shape
    for name, shape in {
        "self_attn.q_proj": (8, 8),
        "self_attn.k_proj": (4, 8),
        "self_attn.v_proj": (4, 8),
        "self_attn.o_proj": (8, 8),
        "mlp.gate_proj": (6, 8),
        "mlp.up_proj": (6, 8),
        "mlp.down_proj": (8, 6),
        "input_layernorm": (8,),
        "post_attention_layernorm": (8,),
    }.items()
}
_LLAMA = {
    "model.embed_tokens.weight": (9, 8),
    "model.norm.weight": (8,),
    "lm_head.weight": (9, 8),
}


def _tensors(own, layer, layers=2):
    shapes = own | {n.format(i): s for i in range(layers) for n, s in layer.items()}
    random = np.random.default_rng(0)
    return {name: random.normal(size=s).astype("f4") for name, s in shapes.items()}


def _equal(a, b):
    assert a.keys() == b.keys()
    for name, x in a.items():
        np.testing.assert_array_equal(x, b[name], err_msg=name)


@pytest.mark.parametrize(
    ("names", "tensors"),
    [(BERT, _tensors(_BERT, _BERT_LAYER)), (LLAMA, _tensors(_LLAMA, _LLAMA_LAYER))],
    ids=["BERT", "LLAMA"],
)
def test_every_name_there_and_back(names, tensors):
    params = checkpoint.from_huggingface(tensors, names)
    assert len(params["layers"]) == 2
    assert len(jax.tree.leaves(params)) == len(tensors)
    _equal(checkpoint.to_huggingface(params, names), tensors)
    in_jax = jax.tree.map(jnp.asarray, params)
    assert all(
        isinstance(x, jax.Array)
        for x in checkpoint.to_huggingface(in_jax, names).values()
    )
    # In linen and NNX, paths have a name more; `like` gives the containers.
    linen = checkpoint.from_huggingface(tensors, names, like={"params": params})
    _equal(checkpoint.to_huggingface(linen, names), tensors)


def test_kernels_are_turned():
    tensors = _tensors(_LLAMA, _LLAMA_LAYER)
    layer = checkpoint.from_huggingface(tensors, LLAMA)["layers"][1]
    theirs = tensors["model.layers.1.mlp.down_proj.weight"]
    np.testing.assert_array_equal(layer["mlp"]["down"]["kernel"], theirs.T)
    q, o = (tensors[f"model.layers.1.self_attn.{x}_proj.weight"] for x in "qo")
    like = {
        "layers": [
            {
                "attn": {
                    "query": {"kernel": np.empty((8, 2, 4))},
                    "out": {"kernel": np.empty((2, 4, 8))},
                }
            }
        ]
    }
    tensors = {
        "model.layers.0.self_attn.q_proj.weight": q,
        "model.layers.0.self_attn.o_proj.weight": o,
    }
    attn = checkpoint.from_huggingface(tensors, LLAMA, like=like)["layers"][0]["attn"]
    x = np.random.default_rng(1).normal(size=(3, 8))
    found = np.einsum("si,ihd->shd", x, attn["query"]["kernel"])
    np.testing.assert_allclose(found.reshape(3, 8), x @ q.T, rtol=1e-6)
    y = x.reshape(3, 2, 4)
    found = np.einsum("shd,hdo->so", y, attn["out"]["kernel"])
    np.testing.assert_allclose(found, x @ o.T, rtol=1e-5)


def test_stacked_layers():
    tensors = _tensors({}, _LLAMA_LAYER, layers=3)
    names = [r._replace(ours=r.ours and r.ours.replace("/{}", "")) for r in LLAMA]
    params = checkpoint.from_huggingface(tensors, names)
    kernel = params["layers"]["mlp"]["up"]["kernel"]
    assert kernel.shape == (3, 8, 6)
    np.testing.assert_array_equal(
        kernel[2], tensors["model.layers.2.mlp.up_proj.weight"].T
    )
    _equal(checkpoint.to_huggingface(params, names), tensors)
    back = checkpoint.from_huggingface(tensors, names, like=params)
    assert back["layers"]["attn_norm"]["scale"].shape == (3, 8)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(
        ValueError, match=r"layers/mlp/up/kernel .* layers \[0, 2\]; expected"
    ):
        checkpoint.from_huggingface(tensors, names)
    del tensors["model.layers.2.mlp.up_proj.weight"]
    with pytest.raises(ValueError, match="1 layers for layers/mlp/up/kernel and 3 for"):
        checkpoint.from_huggingface(tensors, names)
    with pytest.raises(ValueError, match="there are 3 layers, and like has the shape"):
        short = {"layers": {"attn_norm": {"scale": np.ones((2, 8))}}}
        name = "model.layers.{}.input_layernorm.weight"
        of_norms = {name.format(i): np.ones(8) for i in range(3)}
        checkpoint.from_huggingface(of_norms, names, like=short)


def test_pairs_of_the_rotary_embedding():
    """Rows 0, 1, 2, 3 of a head there are 0, 2, 1, 3 here."""
    rule = Rule("q.weight", "q/kernel", "kernel", rotary=4)
    tensors = {"q.weight": np.arange(8)[:, None] * np.ones(3)}
    params = checkpoint.from_huggingface(tensors, [rule])
    assert params["q"]["kernel"][0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    _equal(checkpoint.to_huggingface(params, [rule]), tensors)
    with pytest.raises(ValueError, match="q.weight has 8 outputs and rotary is 3"):
        checkpoint.from_huggingface(tensors, [rule._replace(rotary=3)])


def test_what_is_left_over_is_named():
    tensors = _tensors(_BERT, _BERT_LAYER)
    from_huggingface = checkpoint.from_huggingface
    with pytest.raises(
        ValueError, match="tensors: no rule of names fits cls.weight, new."
    ):
        from_huggingface(tensors | {"new": 1, "cls.weight": 1}, BERT)
    params = from_huggingface(tensors, BERT)
    without = {k: v for k, v in tensors.items() if k != "pooler.dense.bias"}
    with pytest.raises(
        ValueError, match="there is nothing for pooler/bias, which like"
    ):
        from_huggingface(without, BERT, like=params)
    pooler = params.pop("pooler")
    message = (
        "like has no place for pooler.dense.weight, pooler.dense.bias, which would"
    )
    with pytest.raises(ValueError, match=message):
        from_huggingface(tensors, BERT, like=params)
    names = [r._replace(ours=None) if "pooler" in r.theirs else r for r in BERT]
    assert "pooler" not in from_huggingface(tensors, names, like=params)
    with pytest.raises(
        ValueError, match="params: no rule of names fits pooler/bias, pool"
    ):
        checkpoint.to_huggingface({"pooler": pooler}, names)
    gap = {k: v for k, v in tensors.items() if ".layer.0." not in k}
    with pytest.raises(ValueError, match="layers, a list, has gaps; expected 0, 1, 2"):
        from_huggingface(gap, BERT)


def test_what_else_is_refused():
    from_huggingface, to_huggingface = (
        checkpoint.from_huggingface,
        checkpoint.to_huggingface,
    )
    kernel = Rule("a.weight", "a/kernel", "kernel")
    with pytest.raises(TypeError, match=r"names: got \('a', 'b'\); expected .*Rule"):
        from_huggingface({}, [("a", "b")])
    with pytest.raises(ValueError, match="has 0 and 1 numbers; expected one at most"):
        from_huggingface({}, [Rule("a", "b/{}")])
    with pytest.raises(
        ValueError, match="turn is 'turned'; expected same, kernel, out_ker"
    ):
        from_huggingface({}, [Rule("a", "b", "turned")])
    with pytest.raises(
        ValueError, match=r"a.weight has the shape \(3,\); expected 2 axes"
    ):
        from_huggingface({"a.weight": np.ones(3)}, [kernel])
    packed = formats.pack(jnp.eye(4), jnp.eye(4) > 0, structures.Unstructured())
    for x, kind in ((packed, "BitmapArray"), (None, "NoneType")):
        with pytest.raises(
            TypeError, match=f"tensors: a.weight is a {kind}; .*unpack_tr"
        ):
            from_huggingface({"a.weight": x}, [kernel])
    like = {"a": {"kernel": np.ones((2, 3))}}
    with pytest.raises(
        ValueError, match=r"turned to \(3, 2\), is for a/kernel of the shape"
    ):
        from_huggingface({"a.weight": np.ones((2, 3))}, [kernel], like=like)
    both = [kernel, Rule("b", "a/kernel", "kernel")]
    with pytest.raises(ValueError, match="a.weight and b are both for a/kernel"):
        from_huggingface({"a.weight": np.ones((2, 3)), "b": np.ones((2, 3))}, both)
    same = [kernel, Rule("a.weight", "b")]
    with pytest.raises(ValueError, match="b and another leaf are both called a.weight"):
        to_huggingface(like | {"b": np.ones(1)}, same)
    w = jnp.ones((2, 2))
    packed = formats.pack(w, w > 0, structures.Unstructured())
    with pytest.raises(
        TypeError, match="a/kernel is a BitmapArray; expected .* Unpack it"
    ):
        to_huggingface({"a": {"kernel": packed}}, [kernel])
