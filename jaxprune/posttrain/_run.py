"""A run over the blocks of a model: its weights, and what rests between the blocks."""

import collections
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from jaxprune import _tree, masks, tracing
from jaxprune._tree import PyTree
from jaxprune.calibration import Inputs, Statistics
from jaxprune.calibration._calibrate import collect
from jaxprune.calibration._moments import merge_inputs
from jaxprune.calibration._statistics import of_trace
from jaxprune.masks import PackedMask
from jaxprune.posttrain._work import Work
from jaxprune.tracing import Block, Leaf, Site, Slot

Values = dict[Slot, Any]


class Run:
    """Weights as far as they are pruned, masks, and the activations of each batch."""

    def __init__(
        self,
        params: PyTree,
        work: Work,
        token_weights: Callable[..., Array] | None,
        statistics: tuple[str, ...],
        offload: bool,
        donate: bool,
    ):
        paths, leaves, _ = _tree.flatten(params)
        by_path = dict(zip(paths, leaves, strict=True))
        _check_alive(by_path)
        if offload:
            _check_addressable(by_path)
        self.shardings = {path: placement(x) for path, x in by_path.items()}
        self.offload = offload
        # The caller's arrays that may be deleted, and those that are to be, soon.
        self.donated = _unshared(by_path, work.batches) if donate else {}
        self.spent: list[jax.Array] = []
        self.weights: dict[str, Any] = {}
        self.ours: set[str] = set()  # leaves that may be written into
        for path, x in by_path.items():
            self.weights[path] = x if _tree.is_hole(x) else self.rest(x)
            if self.weights[path] is not x:
                self.ours.add(path)
                self.spend(path)
                self.release()
        # Masks, of whole leaves or of layers, at a bit a weight until the end.
        self.found: dict[str, dict[int | None, PackedMask]] = {}
        self.statistics = statistics
        self.batch_axes, self.empty_rows = work.batch_axes, work.empty_rows
        # Without statistics only shapes are needed, and nothing is run.
        batches = work.batches
        if not statistics:
            batches = jax.eval_shape(lambda: work.batches[:1])
        self.values: list[Values] = []
        self.placed: dict[Slot, Any] = {}  # shardings of activations
        for args in batches:
            self.values.append({})
            self.keep(self.values[-1], work.blocks.inputs, jax.tree.leaves(args))
        self.tokens = None
        if token_weights is not None and statistics:
            self.tokens = [token_weights(*args) for args in batches]
        # Behind which block a value is read for the last time.
        used = enumerate(work.blocks.blocks[: work.last + 1])
        self.until = {s.number: i for i, block in used for s in block.reads}
        self.step = 0
        self.programs: dict[Any, Callable] = {}
        self.steps: dict[Any, dict] = {}

    def leaves(self, block: Block) -> tuple[Array, ...]:
        """What a block reads of the parameters, on their devices."""
        found = tracing.take(block, self.weights)
        if not self.offload:
            return found
        each = zip(found, block.leaves, strict=True)
        # A layer is copied: it is a part of what is written into, and a CPU shares memory.
        return tuple(
            _placed(
                x if layer is None else np.array(x),
                _of_layer(self.shardings[path], layer),
            )
            for x, (path, layer) in each
        )

    def reads(self, block: Block, values: Values) -> tuple[Any, ...]:
        """What a block reads of the activations, on their devices."""
        found = tracing.reads(block, values)
        if not self.offload or not self.statistics:
            return found
        each = zip(found, block.reads, strict=True)
        return tuple(_placed(x, self.placed.get(slot)) for x, slot in each)

    def rest(self, x: Array) -> Any:
        """An array where it is kept until it is needed; keys stay where they are."""
        if not self.offload or isinstance(x, np.ndarray) or _tree.is_key(x):
            return x
        return np.array(x)  # a view would keep what lies on the device

    def keep(self, values: Values, slots: Sequence[Slot], found: Iterable[Any]) -> None:
        """Keeps what a block gave."""
        for slot, x in zip(slots, found, strict=True):
            if self.offload and self.statistics:
                self.placed[slot] = placement(x)
                x = self.rest(x)
            values[slot] = x

    def calibrate(
        self,
        block: Block,
        own: tuple[Array, ...],
        picked: Sequence[int],
        rules: Mapping[str, Any] | None,
    ) -> Statistics:
        """Statistics of some leaves of a block, over all batches."""
        tokens = self.tokens

        def where(path: str, leaf: Any) -> bool:
            del leaf
            return int(path) in picked

        axes = _axes_of(block, picked, self.batch_axes)
        options = {"where": where, "batch_axes": axes, "rules": rules}
        if not self.statistics:
            reads = self.reads(block, self.values[0])
            trace = tracing.sites(block.fn, own, *reads, **options)
            return of_trace(trace, ())

        def fn(own, weights, *reads):
            del weights
            return block.fn(own, *reads)

        batches = (
            (None if tokens is None else tokens[i], *self.reads(block, values))
            for i, values in enumerate(self.values)
        )
        # Blocks that do the same share what is compiled.
        sparse = [str(j) for j in picked if block.leaves[j].path in self.empty_rows]
        key = block.fn, tuple(picked), tuple(axes.items()), tuple(sparse)
        steps = self.steps.setdefault(key, {})
        return collect(
            fn, own, batches, steps, statistics=self.statistics,
            token_weights=None if tokens is None else lambda weights, *_: weights,
            empty_rows=sparse,
            name_of=lambda path: str(block.leaves[int(path)]),
            **options,
        )  # fmt: skip

    def propagate(self, block: Block, own: tuple[Array, ...]) -> None:
        """Runs a block on all batches, and forgets what no other one reads."""
        program = functools.partial(jax.eval_shape, block.fn)
        if self.statistics:
            program = self.programs.setdefault(block.fn, jax.jit(block.fn))
        for values in self.values:
            found = program(own, *self.reads(block, values))
            self.keep(values, block.writes, found)
            over = [s for s in values if self.until.get(s.number, -1) <= self.step]
            for slot in over:
                del values[slot]
        self.step += 1

    def replace(self, leaf: Leaf, w: Array, mask: Bool[Array, "..."]) -> None:
        """Puts pruned weights in the place of dense ones."""
        path, layer = leaf
        packed = jax.tree.map(self.rest, masks.pack_leaf(mask))
        self.found.setdefault(path, {})[layer] = packed
        given = path in self.donated
        self.spend(path)
        if layer is None:
            self.weights[path] = self.rest(w)
            return
        if path not in self.ours:
            self.ours.add(path)
            if not given:
                xnp = np if self.offload else jnp
                self.weights[path] = xnp.copy(self.weights[path])
        self.weights[path] = self.put(self.weights[path], w, layer)

    def spend(self, path: str) -> None:
        """The caller's array, if it was given up, is not read again behind this block."""
        if path in self.donated:
            self.spent.append(self.donated.pop(path))

    def release(self) -> None:
        """Deletes dense weights that were given up, and are not read again."""
        while self.spent:
            self.spent.pop().delete()

    def put(self, whole: Any, x: Array, layer: int) -> Any:
        """Writes a layer into a leaf of which nothing else is read."""
        if not self.offload:
            return _put(whole, x, np.int32(layer))
        whole[layer] = x
        return whole

    def trees(self, params: PyTree) -> tuple[PyTree, PyTree]:
        """The weights and the masks, as trees; the end of the run."""
        self.values.clear()
        paths, leaves, treedef = _tree.flatten(params)
        weights = [self.weights[p] for p in paths]
        found = [
            x if _tree.is_hole(x) else self.mask(p)
            for p, x in zip(paths, leaves, strict=True)
        ]
        return treedef.unflatten(weights), treedef.unflatten(found)

    def mask(self, path: str) -> Any:
        """The mask of a leaf, of booleans."""
        found = self.found.pop(path, None)
        if found is None:
            return None
        layers = {i: packed for i, packed in found.items() if i is not None}
        if not layers:
            return self.rest(masks.as_bool(found[None]))
        xnp = np if self.offload else jnp
        whole = xnp.ones_like(self.weights[path], bool)
        for layer, packed in layers.items():
            whole = self.put(whole, masks.as_bool(packed), layer)
        return whole


def uses(
    leaf: Leaf, w: Array, stats: Statistics, path: str
) -> list[tuple[Site, Inputs]]:
    """The matrices of a leaf, each with all that is multiplied with it."""
    if path in stats.untraced:
        raise ValueError(
            f"params: {leaf} cannot be followed to a product in {stats.untraced[path]}. "
            "Leave it out with where=, say with rules= how a primitive of your own "
            "contracts it, or prune it without data by jaxprune.prune."
        )
    found: dict[Any, tuple[Site, Inputs]] = {}
    for site, inputs in stats[path]:
        if site.wraps:
            raise ValueError(
                f"params: {leaf} goes through {', '.join(site.wraps)} in front of its "
                "product, so that its inputs do not say what a weight does. Merge that "
                "into the weights first, or leave it out with where=."
            )
        key = site.stack, site.batch, site.k, site.n, site.offset
        if key in found:
            inputs = merge_inputs(found[key][1], inputs)
        found[key] = site, inputs
    if len(found) > 1:
        seen = np.zeros(w.shape, np.int32)
        for site, _ in found.values():
            ones = jnp.ones(site.matrix, jnp.int32)
            seen += np.asarray(site.from_matrix(ones, jnp.zeros(w.shape, jnp.int32)))
        if seen.max() > 1:
            raise ValueError(
                f"params: {leaf} is used in two ways, as by x @ w and x @ w.T, and cannot "
                "be pruned for one of them. Leave it out with where=."
            )
    return list(found.values())


def _axes_of(
    block: Block, picked: Sequence[int], table: Mapping[str, frozenset[int]]
) -> dict[str, tuple[int, ...]]:
    """`batch_axes` for the leaves of a block, which are called by their numbers."""
    found = {}
    for j in picked:
        path, layer = block.leaves[j]
        axes = sorted(table.get(path, ()))
        if layer is not None:  # the first axis is gone
            axes = [a - 1 for a in axes if a]
        if axes:
            found[str(j)] = tuple(axes)
    return found


def placement(x: Any) -> Any:
    """Where an array was put; `None` where nobody said so."""
    return x.sharding if isinstance(x, jax.Array) and x.committed else None


def _unshared(
    leaves: Mapping[str, Any], batches: Sequence[tuple]
) -> dict[str, jax.Array]:
    """Arrays whose memory no other leaf and no batch has too."""
    found = {path: x for path, x in leaves.items() if _is_plain(x)}
    others = [x for x in jax.tree.leaves(batches) if _is_plain(x)]
    used = collections.Counter(
        buffer for x in (*found.values(), *others) for buffer in _buffers(x)
    )
    return {
        path: x for path, x in found.items() if all(used[b] == 1 for b in _buffers(x))
    }


def _check_alive(leaves: Mapping[str, Any]) -> None:
    gone = [p for p, x in leaves.items() if isinstance(x, jax.Array) and x.is_deleted()]
    if gone:
        raise ValueError(
            f"params: {_tree.listing(gone)} was deleted, as by donate=True of an earlier call, "
            "or by a jitted function that it was donated to. Make or load it again."
        )


def _is_plain(x: Any) -> bool:
    return isinstance(x, jax.Array) and not _tree.is_key(x)


def _buffers(x: jax.Array) -> list[tuple[Any, int]]:
    """Where its shards lie."""
    return [
        (shard.device, shard.data.unsafe_buffer_pointer())
        for shard in x.addressable_shards
    ]


def _check_addressable(leaves: Mapping[str, Any]) -> None:
    for path, x in leaves.items():
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            raise ValueError(
                f"offload: {path} lies on devices of several processes, and cannot rest in "
                "the memory of one; expected arrays of this process. Leave offload out: "
                "each process then holds its shards."
            )


def _placed(x: Any, sharding: Any) -> Array:
    """On the devices where it was before it was put to rest."""
    return jnp.asarray(x) if sharding is None else jax.device_put(x, sharding)


def _of_layer(sharding: Any, layer: int | None) -> Any:
    """How a layer of a stacked leaf lies, which lies so."""
    if layer is None or not isinstance(sharding, jax.sharding.NamedSharding):
        return sharding
    return sharding.update(spec=jax.sharding.PartitionSpec(*sharding.spec[1:]))


_put = jax.jit(lambda whole, x, layer: whole.at[layer].set(x), donate_argnums=0)
