"""The oracle: a shrunk function equals the function of masked parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune import structured


def _random(params, seed=0):
    """Other values: no bias stays 0, and variances are positive."""
    keys = iter(jax.random.split(jax.random.key(seed), 1000))

    def new(path, x):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        y = x + 0.3 * jax.random.normal(next(keys), x.shape, x.dtype)
        last = jax.tree_util.keystr(path[-2:])
        return jnp.abs(y) + 0.1 if "'var'" in last else y

    return jax.tree_util.tree_map_with_path(new, params)


def _half(graph, names=None, seed=0):
    """A plan that keeps a random half of each group, or of the named ones."""
    random = np.random.default_rng(seed)
    kept = {
        g.name: random.choice(g.size, max(g.minimum, g.size // 2), replace=False)
        for g in graph.groups
        if names is None or g.name in names
    }
    return structured.planned(graph, kept)


def _differ(fn, params, masked, args):
    pairs = zip(
        jax.tree.leaves(fn(params, *args)),
        jax.tree.leaves(fn(masked, *args)),
        strict=True,
    )
    return any(not jnp.allclose(a, b, rtol=1e-3) for a, b in pairs)


def _check(fn, params, *args, each=False, **options):
    """Traces, shrinks and compares; returns the graph."""
    graph = structured.trace(fn, params, *args, **options)
    assert graph.groups
    names = [g.name for g in graph.groups]
    for chosen in [names, *([n] for n in names if each)]:
        plan = _half(graph, chosen)
        found = plan.verify(fn, params, *args, rules=options.get("rules"))
        assert found.equal, f"{chosen}: {found}"
        # Outputs that do not see the units at all would be equal too.
        assert chosen != names or _differ(jax.jit(fn), params, plan.mask(params), args)
        small = plan.shrink(params)
        sizes = [jnp.size(x) for x in jax.tree.leaves(small)]
        assert sum(sizes) == plan.after.parameters < plan.before.parameters
        assert [jnp.shape(x) for x in jax.tree.leaves(small)] == list(
            plan.small_shapes.values()
        )
        for g in graph.groups:
            for m in g.members:
                if m.path in plan.cuts and g.name in chosen:
                    assert len(plan.cuts[m.path][m.axis]) < graph.shapes[m.path][m.axis]
    return graph


@pytest.fixture(scope="session")
def random_params():
    """`random_params(params)`."""
    return _random


@pytest.fixture(scope="session")
def half():
    """`half(graph, names=None, seed=0)`."""
    return _half


@pytest.fixture(scope="session")
def check():
    """`check(fn, params, *args, each=False, **options of trace)`."""
    return _check
