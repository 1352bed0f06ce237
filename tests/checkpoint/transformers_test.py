"""Pruned models as `transformers` reads them on PyTorch; run with `make test-references`.

Logits are compared in float32: both sides add up the same products in another order, so
they differ by some ulp of the largest term in each of the sums that follow one another.
1e-4 of the largest logit is more than that, and far less than what a single weight in the
wrong place does.
"""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxprune as jp

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

from minilm import model as minilm
from smollm2 import model as smollm2
from smollm2 import weights

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

_TOLERANCE = 1e-4
TINY = smollm2.Config(layers=2, width=64, ff=96, heads=4, kv_heads=2, vocab=288)


def _close(found, wanted):
    found, wanted = np.asarray(found), np.asarray(wanted)
    assert np.isfinite(wanted).all() and found.shape == wanted.shape
    assert np.abs(found - wanted).max() <= _TOLERANCE * np.abs(wanted).max()


def _llama_config(config: smollm2.Config, **changes):
    return transformers.LlamaConfig(
        vocab_size=config.vocab,
        hidden_size=config.width,
        intermediate_size=config.ff,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        rms_norm_eps=config.eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.theta},
        tie_word_embeddings=True,
        **changes,
    )


def _export(folder, params, names, config, architecture, **kw):
    """A folder as on the Hugging Face hub, and what is read of it again."""
    tensors = jp.checkpoint.to_huggingface(params, names)
    path = folder if kw else folder / "model.safetensors"
    if not kw:
        folder.mkdir()
    jp.checkpoint.save_safetensors(path, tensors, **kw)
    said = config.to_dict() | {"architectures": [architecture]}
    (folder / "config.json").write_text(json.dumps(said))
    back = jp.checkpoint.load_safetensors(folder)
    assert back.keys() == tensors.keys()
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    back = jp.checkpoint.from_huggingface(back, names, like=like)
    jax.tree.map(np.testing.assert_array_equal, back, params)
    return back


def _torch_logits(model, ids, **kw):
    with torch.no_grad():
        return model.eval()(torch.tensor(ids), **kw)


@pytest.fixture(scope="module")
def ids():
    return np.random.default_rng(0).integers(0, TINY.vocab, (2, 24))


@pytest.mark.parametrize("files", ["one file", "several files"])
def test_llama_of_ours(tmp_path, ids, files):
    lm = smollm2.SmolLM(TINY, rngs=nnx.Rngs(0))
    static, params = nnx.split(lm)
    params, _ = jp.prune(params, 0.5, structure=jp.NM(2, 4))
    names, config = weights.huggingface_names(TINY), _llama_config(TINY)
    kw = {} if files == "one file" else {"shard_bytes": 100_000}
    folder = tmp_path / "llama"
    _export(folder, params, names, config, "LlamaForCausalLM", **kw)
    assert (len(list(folder.glob("*.safetensors"))) > 2) == (files == "several files")

    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    wanted = jax.jit(lambda p, i: nnx.merge(static, p)(i))(params, ids)
    _close(_torch_logits(model, ids).logits, wanted)


def test_llama_of_theirs(tmp_path, ids):
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(_llama_config(TINY))
    model.save_pretrained(tmp_path)
    tensors = jp.checkpoint.load_safetensors(tmp_path, separator="")
    static, shapes = nnx.split(smollm2.abstract(TINY))
    names = weights.huggingface_names(TINY)
    params = jp.checkpoint.from_huggingface(tensors, names, like=shapes)
    found = jax.jit(lambda p, i: nnx.merge(static, p)(i))(params, ids)
    _close(_torch_logits(model, ids).logits, found)


def test_grouped_heads_and_biases_of_theirs(ids):
    """Qwen2 has them: `[in, heads, dim]` here, and biases of `[heads, dim]`."""
    torch.manual_seed(0)
    config = transformers.Qwen2Config(**_llama_config(TINY).to_dict())
    model = transformers.Qwen2ForCausalLM(config)
    for x in model.parameters():
        torch.nn.init.normal_(x)
    tensors = {name: x.detach().numpy() for name, x in model.named_parameters()}
    d = TINY.head_dim
    shapes = {
        "query": {"kernel": (64, 4, d), "bias": (4, d)},
        "key": {"kernel": (64, 2, d), "bias": (2, d)},
        "value": {"kernel": (64, 2, d), "bias": (2, d)},
        "out": {"kernel": (4, d, 64)},
    }
    params = jp.checkpoint.from_huggingface(tensors, jp.checkpoint.LLAMA)
    attn = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        shapes, is_leaf=lambda x: isinstance(x, tuple),
    )  # fmt: skip
    like = params | {"layers": [layer | {"attn": attn} for layer in params["layers"]]}
    params = jp.checkpoint.from_huggingface(tensors, jp.checkpoint.LLAMA, like=like)

    layer = model.model.layers[1].self_attn
    x = np.random.default_rng(1).normal(size=(3, 64)).astype(np.float32)
    ours = params["layers"][1]["attn"]
    for name, theirs in (
        ("query", layer.q_proj),
        ("key", layer.k_proj),
        ("value", layer.v_proj),
    ):
        found = jnp.einsum("si,ihd->shd", x, ours[name]["kernel"]) + ours[name]["bias"]
        wanted = theirs(torch.tensor(x)).detach().numpy()
        _close(found.reshape(3, -1), wanted)
    y = np.random.default_rng(2).normal(size=(3, 4, d)).astype(np.float32)
    wanted = layer.o_proj(torch.tensor(y.reshape(3, -1))).detach().numpy()
    _close(jnp.einsum("shd,hdo->so", y, ours["out"]["kernel"]), wanted)
    back = jp.checkpoint.to_huggingface(params, jp.checkpoint.LLAMA)
    assert back.keys() == tensors.keys()
    for name, x in back.items():
        np.testing.assert_array_equal(x, tensors[name])


def test_smollm2(tmp_path):
    """Half of all weights pruned by magnitude, and 2:4."""
    if not _installed(weights.location):
        pytest.skip("the weights of SmolLM2 are not installed")
    lm, tokenizer = weights.pretrained()
    static, dense = nnx.split(lm)
    ids = np.array([tokenizer.encode("The capital of France is Paris, and").ids])
    logits = jax.jit(lambda p, i: nnx.merge(static, p)(i))
    for name, structure in (("half", jp.Unstructured()), ("two", jp.NM(2, 4))):
        params, masks = jp.prune(dense, 0.5, structure=structure)
        assert jp.masks.sparsity(masks) == 0.5
        names = weights.huggingface_names(lm.config)
        config = _llama_config(lm.config)
        folder = tmp_path / name
        back = _export(folder, params, names, config, "LlamaForCausalLM")
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        wanted = logits(back, ids)
        _close(_torch_logits(model, ids).logits, wanted)
        # A weight in the wrong place would show: the dense model is far away.
        away = np.abs(wanted - logits(dense, ids)).max()
        assert away > 100 * _TOLERANCE * np.abs(wanted).max()


def test_minilm(tmp_path):
    """2:4 and half of all weights, by the hidden states that its logits are made of."""
    if not _installed(minilm.files):
        pytest.skip("the weights of MiniLM are not installed")
    net = minilm.pretrained()
    static, dense = nnx.split(net)
    random = np.random.default_rng(3)
    ids = random.integers(1000, 30000, (2, 20))
    mask = np.arange(20) < np.array([[20], [13]])
    said = json.loads((minilm.files() / "config.json").read_text())
    config = transformers.BertConfig.from_dict(said | {"num_labels": 2})
    hidden = jax.jit(lambda p: nnx.merge(static, p).embed(ids, mask))
    labels = jax.jit(lambda p: nnx.merge(static, p)(ids, mask))
    for name, structure in (("half", jp.Unstructured()), ("two", jp.NM(2, 4))):
        params, _ = jp.prune(dense, 0.5, structure=structure)
        folder = tmp_path / name
        back = _export(folder, params, minilm.NAMES, config, "BertModel")
        model, seen = transformers.BertModel.from_pretrained(
            folder, add_pooling_layer=False, output_loading_info=True
        )
        assert not seen["missing_keys"]
        assert set(seen["unexpected_keys"]) == {"classifier.weight", "classifier.bias"}
        found = _torch_logits(model, ids, attention_mask=torch.tensor(mask))
        states, kept = found.last_hidden_state.numpy(), mask[..., None]
        mean = (states * kept).sum(1) / kept.sum(1)
        _close(hidden(back), mean)
        tensors = jp.checkpoint.load_safetensors(folder)
        matrix, bias = (tensors[f"classifier.{x}"] for x in ("weight", "bias"))
        _close(labels(back), mean @ np.asarray(matrix).T + bias)


def _installed(find) -> bool:
    try:
        return Path(find()).exists()
    except FileNotFoundError:
        return False
