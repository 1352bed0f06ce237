"""Statistics of activations, by the place where a weight is used."""

from jaxprune.calibration._inputs import Inputs as Inputs
