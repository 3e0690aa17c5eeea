"""BigStudent is exact for networks of the libraries that people take them from, where those are installed (extra ``zoo``)."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from library_networks import NETWORKS
from teachers import check_exact


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # libraries' own
@pytest.mark.parametrize("name", NETWORKS)
def test_network_of_a_library(name: str) -> None:
    network = NETWORKS[name]
    if importlib.util.find_spec(network.package) is None:
        pytest.skip(f"needs {network.package}: make coverage-zoo installs it")
    check_exact(network.make, network.inputs(4, torch.float64), torch.float64, count=2)
