"""The names and layouts that Hugging Face's libraries give to parameters."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped

from jaxprune import _tree
from jaxprune._tree import PyTree
from jaxprune.checkpoint import _named_trees as named_trees
from jaxprune.checkpoint import _packed_tensors as packed_tensors

Turn: TypeAlias = Literal["same", "kernel", "out_kernel", "flat"]
Tensor: TypeAlias = Shaped[Array, "..."] | Shaped[np.ndarray, "..."]


class Rule(NamedTuple):
    """How a tensor of PyTorch is called here, and how it is turned.

    A table of names is a sequence of rules, and the first that fits a name is taken. To
    fit a table to a model with other paths, replace them:
    `[r._replace(ours=r.ours.replace("attn/", "self_attn/")) for r in jp.checkpoint.LLAMA]`.

    Attributes:
      theirs: the name there; `{}` stands for a number.
      ours: the path of the leaf here, with the same number; without a `{}`, layers are
        stacked along a first axis. `None` for a tensor that is left out on purpose.
      turn: `"same"`; `"kernel"`, a matrix `[out, in]` there and `[in, *out]` here, where
        the outputs may be heads and their dimensions; `"out_kernel"`, `[out, in]` there
        and `[*in, out]` here; `"flat"`, a vector there that may be heads and their
        dimensions here.
      rotary: dimensions of a head, for queries and keys of a model whose rotary embedding
        turns neighbours, `(2 i, 2 i + 1)`. Hugging Face's turns `(i, i + rotary / 2)`, so
        the outputs change places within each head. `None` leaves them as they are.
    """

    theirs: str
    ours: str | None
    turn: Turn = "same"
    rotary: int | None = None


def _linear(theirs: str, ours: str, turn: Turn = "kernel") -> tuple[Rule, Rule]:
    return (
        Rule(f"{theirs}.weight", f"{ours}/kernel", turn),
        Rule(f"{theirs}.bias", f"{ours}/bias", "flat" if turn == "kernel" else "same"),
    )


def _norm(theirs: str, ours: str) -> tuple[Rule, Rule]:
    return Rule(f"{theirs}.weight", f"{ours}/scale"), Rule(
        f"{theirs}.bias", f"{ours}/bias"
    )


_BLOCK = "model.layers.{}"
LLAMA: tuple[Rule, ...] = (
    Rule("model.embed_tokens.weight", "embed/embedding"),
    *_linear(f"{_BLOCK}.self_attn.q_proj", "layers/{}/attn/query"),
    *_linear(f"{_BLOCK}.self_attn.k_proj", "layers/{}/attn/key"),
    *_linear(f"{_BLOCK}.self_attn.v_proj", "layers/{}/attn/value"),
    *_linear(f"{_BLOCK}.self_attn.o_proj", "layers/{}/attn/out", "out_kernel"),
    *_norm(f"{_BLOCK}.self_attn.q_norm", "layers/{}/attn/query_norm"),
    *_norm(f"{_BLOCK}.self_attn.k_norm", "layers/{}/attn/key_norm"),
    *_linear(f"{_BLOCK}.mlp.gate_proj", "layers/{}/mlp/gate"),
    *_linear(f"{_BLOCK}.mlp.up_proj", "layers/{}/mlp/up"),
    *_linear(f"{_BLOCK}.mlp.down_proj", "layers/{}/mlp/down"),
    *_norm(f"{_BLOCK}.input_layernorm", "layers/{}/attn_norm"),
    *_norm(f"{_BLOCK}.post_attention_layernorm", "layers/{}/mlp_norm"),
    *_norm("model.norm", "norm"),
    *_linear("lm_head", "head"),
    # A table of constants, in files of old versions.
    Rule(f"{_BLOCK}.self_attn.rotary_emb.inv_freq", None),
)
"""Llama, and what is built like it: Mistral, Qwen2, Qwen3, SmolLM2."""

_LAYER = "encoder.layer.{}"
BERT: tuple[Rule, ...] = (
    Rule("embeddings.word_embeddings.weight", "embeddings/word/embedding"),
    Rule("embeddings.position_embeddings.weight", "embeddings/position/embedding"),
    Rule("embeddings.token_type_embeddings.weight", "embeddings/segment/embedding"),
    *_norm("embeddings.LayerNorm", "embeddings/norm"),
    *_linear(f"{_LAYER}.attention.self.query", "layers/{}/attn/query"),
    *_linear(f"{_LAYER}.attention.self.key", "layers/{}/attn/key"),
    *_linear(f"{_LAYER}.attention.self.value", "layers/{}/attn/value"),
    *_linear(f"{_LAYER}.attention.output.dense", "layers/{}/attn/out", "out_kernel"),
    *_norm(f"{_LAYER}.attention.output.LayerNorm", "layers/{}/attn_norm"),
    *_linear(f"{_LAYER}.intermediate.dense", "layers/{}/mlp/up"),
    *_linear(f"{_LAYER}.output.dense", "layers/{}/mlp/down"),
    *_norm(f"{_LAYER}.output.LayerNorm", "layers/{}/mlp_norm"),
    *_linear("pooler.dense", "pooler"),
    # 0, 1, 2 and so on, in files of old versions.
    Rule("embeddings.position_ids", None),
)
"""`BertModel`, and what is built like it: MiniLM, RoBERTa."""


def from_huggingface(
    tensors: Mapping[str, Tensor],
    names: Sequence[Rule],
    *,
    like: PyTree = None,
) -> PyTree:
    """Parameters out of tensors with the names and layouts of Hugging Face's libraries.

    Args:
      tensors: `{name: array}`, as `load_safetensors(path, separator="")` gives it.
      names: a table such as `LLAMA` or `BERT`, or rules of one's own.
      like: a tree of arrays or of `jax.ShapeDtypeStruct`, with the parameters of the
        model. Each of them must get a tensor, and has its axes (heads, and their
        dimensions) from here. By default, dicts and lists by the paths of the rules, and
        kernels of two axes.

    Returns:
      The parameters, in the containers of `like`; of the types that the tensors have.

    Raises:
      ValueError: naming tensors that no rule fits, or that have no place in `like`;
        parameters that no tensor is for; or shapes that do not fit.
      TypeError: if a tensor is packed, or no array.

    Example:
      >>> tensors = {"pooler.dense.weight": jnp.ones((2, 3))}
      >>> params = jp.checkpoint.from_huggingface(tensors, jp.checkpoint.BERT)
      >>> params["pooler"]["kernel"].shape
      (3, 2)
    """
    rules = _compiled(names, "theirs")
    wanted = _wanted(like)
    found: dict[str, dict[int | None, tuple[str, Rule, Tensor]]] = {}
    containers: dict[str, str] = {}
    left = []
    for name, x in tensors.items():
        rule, number = _match(rules, name)
        if rule is None:
            left.append(name)
            continue
        if rule.ours is None:
            continue
        if not hasattr(x, "ndim") or packed_tensors.is_packed(x):
            raise TypeError(
                f"tensors: {name} is a {type(x).__name__}; expected an array. Unpack "
                "packed weights with jaxprune.formats.unpack_tree."
            )
        path, stacked = _path(rule, number)
        here = found.setdefault(path, {})
        if (other := here.get(stacked)) is not None:
            raise ValueError(
                f"tensors: {other[0]} and {name} are both for {path}; expected one of "
                "them. Drop the other."
            )
        here[stacked] = name, rule, x
        parts = rule.ours.split("/")
        if "{}" in parts:
            containers[path.rsplit("/", len(parts) - parts.index("{}"))[0]] = "list"
    if left:
        raise ValueError(
            f"tensors: no rule of names fits {_tree.listing(sorted(left))}. Add rules for "
            "them, with ours=None for those that the model does without."
        )
    if wanted is not None:
        _check_paths(found, wanted)
    _check_lengths(found)
    leaves = {
        path: _read(path, parts, None if wanted is None else wanted[path])
        for path, parts in found.items()
    }
    if wanted is None:
        try:
            return named_trees.nested(leaves, containers, "/")
        except ValueError as e:
            raise ValueError(f"tensors: {e}. Pass the tensors of all files.") from e
    paths, old, treedef = _tree.flatten(like)
    return treedef.unflatten(
        x if _tree.is_hole(x) else leaves[path]
        for path, x in zip(paths, old, strict=True)
    )


def to_huggingface(params: PyTree, names: Sequence[Rule]) -> dict[str, Tensor]:
    """Tensors with the names and layouts of Hugging Face's libraries.

    Args:
      params: arrays; pruned ones with their zeros.
      names: a table such as `LLAMA` or `BERT`, or rules of one's own.

    Returns:
      Arrays by their names, for `save_safetensors`. With a `config.json` beside the file,
      the library `transformers` loads it.

    Raises:
      ValueError: naming parameters that no rule fits, or several of one name.
      TypeError: if a leaf is packed.

    Example:
      >>> params = {"pooler": {"kernel": jnp.ones((3, 2))}}
      >>> jp.checkpoint.to_huggingface(params, jp.checkpoint.BERT)["pooler.dense.weight"].shape
      (2, 3)
    """
    rules = _compiled([r for r in names if r.ours is not None], "ours")
    paths, leaves, _ = _tree.flatten(params, packed_tensors.is_packed)
    found: dict[str, Tensor] = {}
    left = []
    for path, x in zip(paths, leaves, strict=True):
        if _tree.is_hole(x):
            continue
        if packed_tensors.is_packed(x):
            raise TypeError(
                f"params: {path} is a {type(x).__name__}; expected an array. Unpack it "
                "with jaxprune.formats.unpack: PyTorch reads no packed weights."
            )
        rule, number = _match(rules, path)
        if rule is None:
            left.append(path)
            continue
        if number is None and "{}" in rule.theirs:
            new = {rule.theirs.format(i): _written(rule, x[i]) for i in range(len(x))}
        else:
            new = {rule.theirs.format(number): _written(rule, x)}
        if both := sorted(found.keys() & new.keys()):
            raise ValueError(
                f"params: {path} and another leaf are both called {both[0]}; expected one "
                "of them. Give them rules of their own."
            )
        found |= new
    if left:
        raise ValueError(
            f"params: no rule of names fits {_tree.listing(left)}. Add rules for them, or "
            "leave them out."
        )
    return found


def _check_lengths(
    found: Mapping[str, Mapping[int | None, tuple[str, Rule, Tensor]]],
) -> None:
    """Raises `ValueError` if one stack of layers is shorter than another beside it."""
    stacks: dict[str, dict[str, int]] = {}
    for path, parts in found.items():
        if (last := max((n for n in parts if n is not None), default=None)) is None:
            continue
        owner = parts[last][1].theirs.partition("{}")[0]
        stacks.setdefault(owner, {})[path] = last + 1
    for owner, lengths in stacks.items():
        short, long = (f(lengths, key=lengths.__getitem__) for f in (min, max))
        if lengths[short] != lengths[long]:
            raise ValueError(
                f"tensors: of {owner}... there are {lengths[short]} layers for {short} and "
                f"{lengths[long]} for {long}; expected as many. Pass the tensors of all "
                "files."
            )


def _compiled(names: Sequence[Rule], side: str) -> list[tuple[re.Pattern[str], Rule]]:
    found = []
    for rule in names:
        if not isinstance(rule, Rule):
            raise TypeError(f"names: got {rule!r}; expected jaxprune.checkpoint.Rule.")
        if rule.turn not in (turns := get_args(Turn)):
            raise ValueError(
                f"names: turn is {rule.turn!r}; expected {', '.join(turns)}, in {rule}."
            )
        theirs, ours = rule.theirs.count("{}"), (rule.ours or "").count("{}")
        if theirs > 1 or ours > theirs:
            raise ValueError(
                f"names: {rule} has {theirs} and {ours} numbers; expected one at most, and "
                "none in ours alone."
            )
        pattern = re.escape(getattr(rule, side)).replace(r"\{\}", "(0|[1-9][0-9]*)")
        found.append((re.compile(pattern), rule))
    return found


def _match(
    rules: Sequence[tuple[re.Pattern[str], Rule]], name: str
) -> tuple[Rule | None, int | None]:
    """The first rule that fits, and the number of the layer."""
    for pattern, rule in rules:
        if found := pattern.fullmatch(name):
            return rule, int(found[1]) if found.groups() else None
    return None, None


def _path(rule: Rule, number: int | None) -> tuple[str, int | None]:
    """Where a tensor belongs, and its place in the stack there if it is one."""
    ours = rule.ours or ""
    return ours.format(number), None if "{}" in ours else number


def _wanted(like: PyTree) -> dict[str, tuple[int, ...]] | None:
    if like is None:
        return None
    paths, leaves, _ = _tree.flatten(like)
    return {
        path: tuple(x.shape)
        for path, x in zip(paths, leaves, strict=True)
        if not _tree.is_hole(x)
    }


def _check_paths(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    if missing := [path for path in wanted if path not in found]:
        raise ValueError(
            f"tensors: there is nothing for {_tree.listing(missing)}, which like holds. "
            "Pass the tensors of all files, or add rules of names."
        )
    if extra := [path for path in found if path not in wanted]:
        theirs = [name for path in extra for name, _, _ in found[path].values()]
        raise ValueError(
            f"tensors: like has no place for {_tree.listing(theirs)}, which would be "
            f"{_tree.listing(extra)}. Leave them out with rules that have ours=None; "
            "lm_head, say, if the embedding is tied to it and both are the same."
        )


def _read(
    path: str,
    parts: Mapping[int | None, tuple[str, Rule, Tensor]],
    shape: tuple[int, ...] | None,
) -> Tensor:
    """A leaf out of a tensor, or out of those of all layers."""
    if None in parts:
        return _turned(path, *parts[None], shape)
    numbers = sorted(n for n in parts if n is not None)
    if numbers != list(range(len(numbers))):
        raise ValueError(
            f"tensors: for {path} there are the layers {numbers}; expected 0, 1, 2 and so "
            "on. Pass the tensors of all files."
        )
    if shape is not None and shape[:1] != (len(numbers),):
        raise ValueError(
            f"tensors: for {path} there are {len(numbers)} layers, and like has the shape "
            f"{shape}; expected as many. Make like with the sizes of the model."
        )
    inner = None if shape is None else shape[1:]
    layers = [_turned(path, *parts[n], inner) for n in numbers]
    of_numpy = isinstance(layers[0], np.ndarray)
    return np.stack(layers) if of_numpy else jnp.stack(layers)


def _turned(
    path: str, name: str, rule: Rule, x: Tensor, shape: tuple[int, ...] | None
) -> Tensor:
    """A tensor as the leaf that the rule says."""
    axes = {"kernel": 2, "out_kernel": 2, "flat": 1}.get(rule.turn, x.ndim)
    if x.ndim != axes:
        raise ValueError(
            f"tensors: {name} has the shape {tuple(x.shape)}; expected {axes} axes, as its "
            f"rule for {path} says."
        )
    if rule.rotary is not None:
        x = _rows(name, x, rule.rotary, (2, -1))
    if rule.turn in ("kernel", "out_kernel"):
        x = x.T
    if shape is None or rule.turn == "same":
        fits = shape is None or tuple(x.shape) == shape
    else:
        fits = math.prod(shape) == x.size and len(shape) > 0
        fits = fits and (rule.turn != "kernel" or shape[:1] == tuple(x.shape[:1]))
        fits = fits and (rule.turn != "out_kernel" or shape[-1:] == tuple(x.shape[-1:]))
    if not fits:
        raise ValueError(
            f"tensors: {name}, turned to {tuple(x.shape)}, is for {path} of the shape "
            f"{shape}; expected the same weights. Make like with the sizes of the model."
        )
    return x if shape is None else x.reshape(shape)


def _written(rule: Rule, x: Tensor) -> Tensor:
    """Undoes `_turned`."""
    if rule.turn == "kernel":
        x = x.reshape(x.shape[0], -1).T
    elif rule.turn == "out_kernel":
        x = x.reshape(-1, x.shape[-1]).T
    elif rule.turn == "flat":
        x = x.reshape(-1)
    return x if rule.rotary is None else _rows(rule.theirs, x, rule.rotary, (-1, 2))


def _rows(name: str, x: Tensor, rotary: int, split: tuple[int, int]) -> Tensor:
    """Outputs of each head from pairs of neighbours to pairs of halves, or back."""
    if rotary < 2 or rotary % 2 or x.shape[0] % rotary:
        raise ValueError(
            f"names: {name} has {x.shape[0]} outputs and rotary is {rotary}; expected an "
            "even number that divides them."
        )
    first, second = (rotary // 2 if n < 0 else n for n in split)
    pairs = x.reshape(-1, first, second, *x.shape[1:])  # [heads, …, in]
    return pairs.swapaxes(1, 2).reshape(x.shape)
