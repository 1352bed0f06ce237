"""Packed weights behind the user's own function, where they pay."""

from ._accelerate import accelerate as accelerate
from ._predict import predict as predict
from ._report import Candidate as Candidate
from ._report import Choice as Choice
from ._report import Report as Report
