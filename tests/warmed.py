"""Imported by the server that tests fork processes from: none of them loads PyTorch's compiler for its first big student."""

import os

import torch
from torch import nn
from tqdm import tqdm

from fastmerge import BigStudent


def _network() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))


torch.set_num_threads(1)
# A forked process makes PyTorch's pool of threads anew at the first call; two threads there at once would crash it.
os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))
interval, tqdm.monitor_interval = tqdm.monitor_interval, 0  # no thread, as who forks should have none
with torch.random.fork_rng():
    BigStudent(_network(), _network())
tqdm.monitor_interval = interval
