"""The statistics of a model: what is known of the inputs of each leaf."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxprune import _tree
from jaxprune.calibration._inputs import Inputs
from jaxprune.calibration._moments import empty, merge_inputs
from jaxprune.tracing import Site, Trace


class SiteInputs(NamedTuple):
    """A use of a leaf, and what is known of the inputs there.

    Attributes:
      site: the use; `site.to_matrix(leaf)` is `[stack, batch, K, N]`.
      inputs: of these matrices, `[stack, batch, K]`, Gram matrices
        `[stack, batch, K, K]`, counts `[stack, batch]`.
    """

    site: Site
    inputs: Inputs


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Statistics:
    """What calibration found: a pytree of arrays, one set for each activation.

    `stats[path]` is a tuple of `SiteInputs`, one for each use of the leaf. Leaves that
    read the same activation share what is known of it. It may be saved as it is, merged
    with others under `jax.jit`, and gone on with.

    Attributes:
      inputs: by number of the activation.
      sites: all uses that were traced, in the order of evaluation.
      others: `(path, reasons)` of uses that were not.
    """

    inputs: tuple[Inputs, ...]
    sites: tuple[Site, ...] = dataclasses.field(metadata={"static": True})
    others: tuple[tuple[str, tuple[str, ...]], ...] = dataclasses.field(
        metadata={"static": True}
    )

    @property
    def untraced(self) -> dict[str, tuple[str, ...]]:
        """Uses that nothing is known of: by path of the leaf, what it was used for."""
        return dict(self.others)

    @property
    def paths(self) -> tuple[str, ...]:
        """Leaves with a site."""
        return tuple(dict.fromkeys(s.path for s in self.sites))

    @property
    def statistics(self) -> tuple[str, ...]:
        """Names of what was collected."""
        found = self.inputs[0] if self.inputs else Inputs(jnp.zeros(()))
        return tuple(n for n in found._fields[1:] if getattr(found, n) is not None)

    def __contains__(self, path: str) -> bool:
        return path in self.paths

    def __iter__(self) -> Iterator[str]:
        return iter(self.paths)

    def __getitem__(self, path: str) -> tuple[SiteInputs, ...]:
        """The uses of a leaf.

        Raises:
          KeyError: if the leaf has no site; the message has the reason.
        """
        sites = [s for s in self.sites if s.path == path]
        if not sites:
            reasons = self.untraced.get(path)
            raise KeyError(
                f"{path} has no site: "
                + (
                    f"it is used by {', '.join(reasons)}, which is not followed."
                    if reasons
                    else f"the leaves are {_tree.listing(self.paths)}."
                )
            )
        return tuple(
            SiteInputs(s, _of_site(s, self.inputs[s.activation])) for s in sites
        )


def _of_site(site: Site, inputs: Inputs) -> Inputs:
    """The inputs of the matrices of a site, stacked along one axis."""
    for axis, pick in enumerate(site.picks):
        if pick is not None:
            inputs = jax.tree.map(
                lambda x, axis=axis, pick=pick: jax.lax.slice_in_dim(
                    x, pick[0], sum(pick), axis=axis
                ),
                inputs,
            )
    n = len(site.picks)
    stack = site.matrix.stack
    return jax.tree.map(lambda x: x.reshape(stack, *x.shape[n:]), inputs)


def of_trace(trace: Trace, statistics: Sequence[str]) -> Statistics:
    """Statistics of no rows."""
    inputs = tuple(
        empty((*r.stack, r.shape[0]), r.shape[1], statistics) for r in trace.readings
    )
    return Statistics(inputs, trace.sites, tuple(trace.untraced.items()))


def merge(a: Statistics, b: Statistics) -> Statistics:
    """The statistics of the batches of both.

    Associative and commutative up to rounding; statistics of no batch (`init`) change
    nothing. So batches, devices and hosts may be put together in any order.

    Raises:
      ValueError: if they are of different functions, or hold different statistics.

    Example:
      >>> from jaxprune import calibration
      >>> fn, params = lambda p, x: x @ p["w"], {"w": jnp.ones((2, 2))}
      >>> one = calibration.calibrate(fn, params, [jnp.ones((3, 2))])
      >>> two = calibration.calibrate(fn, params, [jnp.zeros((1, 2))])
      >>> calibration.merge(one, two)["w"][0].inputs.square.tolist()
      [[[0.75, 0.75]]]
    """
    check_alike(a, b, "b")
    inputs = map(merge_inputs, a.inputs, b.inputs)
    return dataclasses.replace(a, inputs=tuple(inputs))


def check_alike(a: Statistics, b: Statistics, name: str) -> None:
    """Raises `ValueError` unless two statistics can be merged."""
    if a.sites != b.sites:
        mine, other = dict.fromkeys(a.sites), dict.fromkeys(b.sites)
        odd = [s for s in (*mine, *other) if s not in mine or s not in other]
        raise ValueError(
            f"{name}: its sites are others than those it is merged with, first at "
            f"{odd[0].path if odd else 'another order'}. Statistics can be merged if they "
            "are of the same function, and of parameters of the same shapes."
        )
    if a.statistics != b.statistics:
        raise ValueError(
            f"{name}: it holds {', '.join(b.statistics)}, and what it is merged with "
            f"{', '.join(a.statistics)}. Pass the same statistics= to both."
        )
