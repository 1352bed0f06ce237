"""SmolLM2 in NNX and in linen, decoding, perplexity, and the example from end to end."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from flax import nnx

import jaxprune as jp

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

import prune_smollm2 as example
from smollm2 import measure, model, text, weights

pytestmark = pytest.mark.usefixtures("quick_compilation")

TINY = model.Config(layers=2, width=64, ff=96, heads=4, kv_heads=2, vocab=288)


@pytest.fixture(scope="module")
def lm():
    return model.SmolLM(TINY, rngs=nnx.Rngs(3))


@pytest.fixture(scope="module")
def ids():
    return np.random.default_rng(4).integers(0, TINY.vocab, (3, 24)).astype(np.int32)


def test_linen_is_nnx(lm, ids):
    nets = example.in_nnx(lm), example.in_linen(lm)
    one, other = (jax.jit(net.logits)(net.params, ids) for net in nets)
    np.testing.assert_allclose(one, other, atol=1e-5 * np.abs(one).max())

    back = nets[1].as_nnx(nets[1].params)
    jax.tree.map(np.testing.assert_array_equal, back, nnx.to_pure_dict(nets[0].params))


def test_completions_are_those_without_a_cache(lm, ids):
    static, params = nnx.split(lm)
    prompts = [ids[0, :5].tolist(), ids[1, :2].tolist()]
    found = measure.completer(static, prompts, length=12)(params)

    logits = jax.jit(lambda params, ids: nnx.merge(static, params)(ids))
    for row, prompt in zip(np.asarray(found), prompts, strict=True):
        assert row[: len(prompt)].tolist() == prompt
        wanted = np.zeros((1, 12), np.int32)
        wanted[0, : len(prompt)] = prompt
        for at in range(len(prompt), 12):
            wanted[0, at] = logits(params, wanted)[0, at - 1].argmax()
        assert row.tolist() == wanted[0].tolist()


def test_perplexity(ids):
    table = np.random.default_rng(5).normal(size=(TINY.vocab, TINY.vocab))
    losses = measure.losses(lambda p, ids: p[ids], jnp.asarray(table), ids, title="")
    shares = np.exp(table) / np.exp(table).sum(-1, keepdims=True)
    wanted = [-np.log(shares[row[:-1], row[1:]]).mean() for row in ids]
    np.testing.assert_allclose(losses, wanted, rtol=1e-5)
    assert measure.perplexity(losses) == pytest.approx(np.exp(np.mean(wanted)))


def test_reloaded_is_what_was_saved(ids, tmp_path):
    one_shape = model.Config(layers=1, width=32, ff=32, heads=2, kv_heads=2, vocab=288)
    net = example.in_linen(model.SmolLM(one_shape, rngs=nnx.Rngs(6)))
    logits = jax.jit(net.logits)
    for name, structure in example.STRUCTURES.items():
        params, masks = example.prune(net, ids, "magnitude", structure)
        assert jp.masks.sparsity(masks) == 0.5
        assert masks["embed"]["embedding"] is None

        packed = example.pack(params, masks, structure)
        jax.tree.map(np.testing.assert_array_equal, example.unpack(packed), params)
        kernels = packed["layers"]["mlp"]["up"]["kernel"]
        assert kernels.nbytes < 0.6 * 4 * 32 * 32
        example.save(example.folder(tmp_path, name), logits, params, packed, ids)
    example.verify(tmp_path, net, ids)
    with pytest.raises(SystemExit, match="the logits have checksum"):
        example.verify(tmp_path, net, ids + 1)


def test_from_end_to_end(ids, tmp_path, monkeypatch, capsys):
    """`main` with a tiny model and no files; its new process runs in this one."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE({x: i for i, x in enumerate(alphabet)}, [])
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    one_shape = model.Config(layers=1, width=32, ff=32, heads=2, kv_heads=2, vocab=288)
    lm = model.SmolLM(one_shape, rngs=nnx.Rngs(7))
    monkeypatch.setattr(
        weights, "pretrained", lambda: weights.Pretrained(lm, tokenizer)
    )
    monkeypatch.setattr(text, "read", lambda data_dir, tokenizer, wanted: ids)
    again = []

    def run(command):
        again.append(command)
        monkeypatch.setattr(sys, "argv", command[1:])
        return subprocess.CompletedProcess(command, example.main() or 0)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(sys, "argv", ["prune_smollm2.py", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        example.main()

    assert stopped.value.code == 0
    assert "--verify" in again[0]
    said = capsys.readouterr().out
    for part in ("Emma: 72 tokens in 3 windows.", "magnitude, 50 %", "50.00"):
        assert part in said
    assert said.count("reloaded in a new process") == len(example.STRUCTURES)


def test_cashes_in_where_it_pays(monkeypatch, capsys):
    monkeypatch.setattr(measure, "tokens_per_second", lambda complete, params: 7.0)
    wide = model.Config(layers=1, width=512, ff=1024, heads=8, kv_heads=8, vocab=32)
    lm = model.SmolLM(wide, rngs=nnx.Rngs(8))
    net = example.in_nnx(lm)
    complete = measure.completer(nnx.split(lm)[0], [[1]] * 64, length=3)
    params, masks = jp.prune(
        net.params, 0.9, structure=jp.Block(128, 128), where="*/mlp/up/*"
    )
    example.cash_in(net, complete, params, masks, "blocks")
    said = capsys.readouterr().out
    assert "blocks: 1 of 1 matrices run packed." in said
    assert "Tokens a second, dense and packed: 7.0, 7.0." in said
