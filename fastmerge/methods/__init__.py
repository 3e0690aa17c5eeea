"""All ways to make one network of several, side by side.

Each method is a file with one function ``method(teachers, batches, **options)`` that returns a network, registered by name.
:func:`apply` runs one by its name and says what it took; :func:`register` adds one.
"""

from fastmerge.methods.average import average
from fastmerge.methods.combination import combine, own_places, places_of_kept
from fastmerge.methods.comparison import Row, compare
from fastmerge.methods.cost import Prediction, predict
from fastmerge.methods.distill import distill, train
from fastmerge.methods.ensemble import Ensemble, ensemble
from fastmerge.methods.gates import gates
from fastmerge.methods.rebasin import rebasin
from fastmerge.methods.reconstruct import reconstruct
from fastmerge.methods.registry import METHODS, Method, Outcome, apply, register
from fastmerge.methods.repair import repair
from fastmerge.methods.samples import family_of
from fastmerge.methods.soup import soup
from fastmerge.methods.transplant import largest, transplant
from fastmerge.methods.zipit import zipit
from fastmerge.wide.blueprint import join_heads

__all__ = [
    "METHODS",
    "Ensemble",
    "Method",
    "Outcome",
    "Prediction",
    "Row",
    "apply",
    "average",
    "combine",
    "compare",
    "distill",
    "ensemble",
    "family_of",
    "gates",
    "join_heads",
    "largest",
    "own_places",
    "places_of_kept",
    "predict",
    "rebasin",
    "reconstruct",
    "register",
    "repair",
    "soup",
    "train",
    "transplant",
    "zipit",
]
