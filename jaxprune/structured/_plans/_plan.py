"""What is kept of each group, as data: it shrinks trees and rewrites functions."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxprune import _tree
from jaxprune._tree import PyTree
from jaxprune.structured._plans import _state
from jaxprune.structured._plans._costs import Cost
from jaxprune.structured._plans._rewrite import Removed, rewritten
from jaxprune.structured._plans._state import Cuts
from jaxprune.structured._plans._verify import Verification, verified
from jaxprune.structured._reading import _graph
from jaxprune.structured._reading._propagate import Rule

_FORMAT = 1


class Choice(NamedTuple):
    """What becomes of a group.

    Attributes:
      kind: of its units.
      size: how many there were.
      kept: numbers of those that stay, [kept]; with axes ahead where they differ from unit
        to unit of other groups, see `Graph.within`.
      notes: see `Group`.
    """

    kind: str
    size: int
    kept: np.ndarray
    notes: tuple[str, ...]

    @property
    def left(self) -> int:
        """How many stay: of each layer or head, if these keep units of their own."""
        return self.kept.shape[-1]


class Apart(NamedTuple):
    """One member of a group that keeps other units in each layer or head.

    Attributes:
      path: of the leaf.
      axes: the axis of the units, then those of their owners.
      units: for each place along these axes the unit, or -1.
    """

    path: str
    axes: tuple[int, ...]
    units: tuple[np.ndarray, ...]

    def to_list(self) -> list[Any]:
        """For JSON."""
        return [self.path, list(self.axes), [x.tolist() for x in self.units]]

    @classmethod
    def from_list(cls, data: list[Any]) -> "Apart":
        """Of `to_list`."""
        return cls(data[0], tuple(data[1]), tuple(np.asarray(x, int) for x in data[2]))


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """Which units are kept, and where they lie in each leaf; `str(plan)` is a table.

    Attributes:
      groups: by name. Groups all of whose units stay are there too.
      shapes: of the leaves of the full parameters, by path.
      cuts: by path, then axis, the places that are kept.
      input_shapes: full shapes of resizable inputs, by path in the tuple of arguments.
      input_cuts: what is kept of these.
      before: cost of the function as it was.
      after: cost of what is left.
      apart: by name of a group that keeps other units in each layer or head, where such
        units lie; see `Apart`.
      same: of leaves with such groups, places as if all layers and heads kept the same.
    """

    groups: dict[str, Choice]
    shapes: dict[str, tuple[int, ...]]
    cuts: Cuts
    input_shapes: dict[str, tuple[int, ...]]
    input_cuts: Cuts
    before: Cost
    after: Cost
    apart: dict[str, tuple[Apart, ...]] = dataclasses.field(default_factory=dict)
    same: Cuts = dataclasses.field(default_factory=dict)

    def shrink(self, params: PyTree) -> PyTree:
        """The parameters with what is kept, of smaller shapes; differentiable.

        Args:
          params: of full size, in the tree that was traced: any leaves of these paths.

        Raises:
          ValueError: if they are not those of the plan.
        """
        self._check(params, self.shapes, "params", "full")
        return _state.cut_tree(params, self.cuts)

    def mask(self, params: PyTree) -> PyTree:
        """The parameters, of full size, with zeros where something is removed.

        Raises:
          ValueError: if they are not those of the plan.
        """
        self._check(params, self.shapes, "params", "full")
        return _state.mask_tree(params, self.cuts)

    def masks(self, params: PyTree) -> PyTree:
        """Masks, True where a weight is kept; `None` for leaves that stay whole.

        Raises:
          ValueError: if the parameters are not those of the plan.
        """
        self._check(params, self.shapes, "params", "full")
        return _state.masks_of(params, self.cuts)

    def shrink_state(self, state: PyTree, params: PyTree) -> PyTree:
        """An optimizer state, an average of weights or masks, for the shrunk parameters.

        Subtrees like `params` are cut as these are, whatever holds them: moments of any
        optax optimizer, `TrainState`, packed masks of `jp.masked`. Factored moments lose
        what their axes lose (but optax no longer factors those of a matrix that became
        small: initialise them anew there), and stacks of moments, such as the history of
        L-BFGS, what each of them loses. All else stays, such as counts of steps.

        Args:
          state: of the full parameters.
          params: the full parameters, or shapes of them.

        Raises:
          ValueError: if the parameters are not those of the plan, or a leaf of the state
            belongs to a weight that is cut and has a shape that does not say how.
        """
        self._check(params, self.shapes, "params", "full")
        return _state.cut_state(state, params, self.cuts)

    def shrink_inputs(self, *args: Any) -> tuple[Any, ...]:
        """The arguments behind the parameters, with resizable inputs of smaller shapes.

        Raises:
          ValueError: if they do not have the shapes that were traced.
        """
        self._check(args, self.input_shapes, "args", "full")
        return _state.cut_tree(args, self.input_cuts)

    def mask_inputs(self, *args: Any) -> tuple[Any, ...]:
        """The arguments behind the parameters, of full size, zeros where they are cut.

        Raises:
          ValueError: if they do not have the shapes that were traced.
        """
        self._check(args, self.input_shapes, "args", "full")
        return _state.mask_tree(args, self.input_cuts)

    def rewrite(
        self,
        fn: Callable[..., Any],
        *,
        removed: Removed = "zero",
        rules: Mapping[str, Rule] | None = None,
    ) -> Callable[..., Any]:
        """The function at the new sizes: `f(small, *args)` as `fn(params, *args)` was.

        Nothing of `fn` is changed or called with small arrays. It is read at its full
        sizes, on shapes, once for each signature of the arguments, and its equations are
        run anew. So sizes that are written in the code of a model do no harm, and numbers
        that were computed from sizes, such as frequencies of a rotation, stay with their
        units. The result can go through `jit`, `grad`, `vmap`, `scan` and other batch
        sizes, and functions with derivatives of their own keep them (the backward rule of
        a `custom_vjp` recomputes its forward pass).

        Args:
          fn: the function that was traced, or another of the same parameters, such as the
            loss or the function in training mode.
          removed: what a unit that is gone means where units are summed or averaged.
            `"zero"`: one whose weights are 0, so that the function equals `fn` of masked
            parameters: a mean still divides by the number of units that there were, and
            a variance or softmax still counts those that are gone. `"absent"`: none at
            all: means, variances and softmax are those of the units that are kept, as in
            a model built at the smaller size. The square root in attention stays.
          rules: as in `trace`.

        Returns:
          A function of the shrunk parameters and the other arguments. It raises
          `ValueError` if parameters have other shapes, or if `fn` does with its arguments
          what the plan does not allow.
        """
        return rewritten(self, fn, rules, removed)

    def verify(
        self,
        fn: Callable[..., Any],
        params: PyTree,
        *args: Any,
        tolerance: float = 1e-5,
        rules: Mapping[str, Rule] | None = None,
    ) -> Verification:
        """Runs the masked and the shrunk function, and compares.

        Args:
          fn: the function.
          params: of full size.
          *args: of full size.
          tolerance: largest difference of an output, relative to its largest value.
          rules: as in `trace`.
        """
        return verified(self, fn, params, args, tolerance, rules)

    def to_dict(self) -> dict[str, Any]:
        """The plan as lists, numbers and strings, for JSON."""
        return {
            "format": _FORMAT,
            "shapes": {p: list(s) for p, s in self.shapes.items()},
            "groups": {
                name: {
                    "kind": g.kind, "size": g.size, "kept": g.kept.tolist(),
                    "notes": list(g.notes),
                }
                for name, g in self.groups.items()
            },
            "cuts": _state.cuts_to_lists(self.cuts),
            "input_shapes": {p: list(s) for p, s in self.input_shapes.items()},
            "input_cuts": _state.cuts_to_lists(self.input_cuts),
            "before": list(self.before),
            "after": list(self.after),
            "apart": {n: [x.to_list() for x in xs] for n, xs in self.apart.items()},
            "same": _state.cuts_to_lists(self.same),
        }  # fmt: skip

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Plan":
        """The plan of `to_dict`.

        Raises:
          ValueError: if it was written in another format.
        """
        found = data.get("format") if isinstance(data, Mapping) else type(data)
        if found != _FORMAT:
            raise ValueError(
                f"data: got a plan of the format {found!r}, expected {_FORMAT}. Pass what "
                "Plan.to_dict of this version gives."
            )
        missing = (
            {f.name for f in dataclasses.fields(cls)} - {"apart", "same"} - data.keys()
        )
        if missing:
            raise ValueError(
                f"data: {sorted(missing)} are missing. Pass what Plan.to_dict gives, whole."
            )
        return cls(
            groups={
                name: Choice(
                    g["kind"], g["size"], np.asarray(g["kept"], int), tuple(g["notes"])
                )
                for name, g in data["groups"].items()
            },
            shapes={p: tuple(s) for p, s in data["shapes"].items()},
            cuts=_state.cuts_from_lists(data["cuts"]),
            input_shapes={p: tuple(s) for p, s in data["input_shapes"].items()},
            input_cuts=_state.cuts_from_lists(data["input_cuts"]),
            before=Cost(*data["before"]),
            after=Cost(*data["after"]),
            apart={
                n: tuple(map(Apart.from_list, xs))
                for n, xs in data.get("apart", {}).items()
            },
            same=_state.cuts_from_lists(data.get("same", {})),
        )

    def __str__(self) -> str:
        rows = [("group", "kind", "units", "kept", "notes")]
        for name, g in self.groups.items():
            sizes = str(g.size), str(g.left)
            rows.append((name, g.kind, *sizes, "; ".join(g.notes)))
        lines = _graph.align(rows)
        for what, old, new in zip(Cost._fields, self.before, self.after, strict=True):
            share = f" ({new / old:.1%})" if old else ""
            lines.append(f"{what}: {old:,} -> {new:,}{share}")
        return "\n".join(lines)

    @property
    def small_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the shrunk parameters, by path."""
        return _state.cut_shapes(self.shapes, self.cuts)

    def _check(
        self, tree: PyTree, shapes: Mapping[str, tuple[int, ...]], name: str, which: str
    ):
        paths, leaves, _ = _tree.flatten(tree)
        found = {p: jnp.shape(x) for p, x in zip(paths, leaves, strict=True)
                 if not _tree.is_hole(x)}  # fmt: skip
        _state.check_shapes(found, shapes, name=name, which=which)
