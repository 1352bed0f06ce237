"""Settings of the test run: names for doctests, and no time limit for an example."""

from fractions import Fraction

import hypothesis
import pytest

# The first example of a test compiles, which no fixed deadline allows for.
hypothesis.settings.register_profile("jaxprune", deadline=None, max_examples=25)
hypothesis.settings.load_profile("jaxprune")


@pytest.fixture(autouse=True)
def _doctests(request, doctest_namespace):
    # Imported here: the virtual devices of tests/conftest.py have to be set up first.
    import jax
    import jax.numpy as jnp
    import optax

    import jaxprune as jp

    doctest_namespace.update(jp=jp, jnp=jnp, jax=jax, optax=optax, Fraction=Fraction)
    if isinstance(
        request.node, pytest.DoctestItem
    ):  # most of their time is compilation
        jax.config.update("jax_disable_most_optimizations", True)
        yield
        jax.config.update("jax_disable_most_optimizations", False)
    else:
        yield
