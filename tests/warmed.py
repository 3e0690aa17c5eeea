"""Imported by the server that tests fork processes from: none of them loads PyTorch's compiler for its first big student."""

import torch
from torch import nn
from tqdm import tqdm

from fastmerge import BigStudent


def _network() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))


torch.set_num_threads(1)
interval, tqdm.monitor_interval = tqdm.monitor_interval, 0  # no thread, as who forks should have none
with torch.random.fork_rng():
    BigStudent(_network(), _network())
tqdm.monitor_interval = interval
