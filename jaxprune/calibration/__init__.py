"""Statistics of activations, by the place where a weight is used."""

from jaxprune.calibration._calibrate import Plan as Plan
from jaxprune.calibration._calibrate import calibrate as calibrate
from jaxprune.calibration._calibrate import init as init
from jaxprune.calibration._calibrate import plan as plan
from jaxprune.calibration._gradients import Gradients as Gradients
from jaxprune.calibration._gradients import gradients as gradients
from jaxprune.calibration._gradients import merge_gradients as merge_gradients
from jaxprune.calibration._inputs import Inputs as Inputs
from jaxprune.calibration._routing import Routing as Routing
from jaxprune.calibration._routing import routing as routing
from jaxprune.calibration._similarity import Similarity as Similarity
from jaxprune.calibration._similarity import similarity as similarity
from jaxprune.calibration._statistics import SiteInputs as SiteInputs
from jaxprune.calibration._statistics import Statistics as Statistics
from jaxprune.calibration._statistics import merge as merge
