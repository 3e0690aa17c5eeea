"""A small task, networks trained on it, and a merge short enough for a test."""

import copy

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

SHORT = {"merge_epochs": 2, "finetune_epochs": 1, "lam_step": 5.0, "seed": 0, "progress": False}


class SmallNet(nn.Module):
    def __init__(self, classes: int = 3, width: int = 6) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.hidden = nn.Linear(width * 9, 16)
        self.head = nn.Linear(16, classes)

    def forward(self, x):
        x = nn.functional.max_pool2d(self.norm(self.conv(x)).relu(), 2)
        return self.head(self.hidden(x.flatten(1)).relu())


def task(samples: int = 320):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, 1, 6, 6, generator=generator)
    hidden = (x.flatten(1) @ torch.randn(36, 8, generator=generator)).relu()
    return x, (hidden @ torch.randn(8, 3, generator=generator)).argmax(1)


X, Y = task()
TRAIN = TensorDataset(X[:256], Y[:256])
VAL = [(X[256:], Y[256:])]


def train_loader(batch_size: int = 32) -> DataLoader:
    return DataLoader(TRAIN, batch_size, shuffle=True)


def train_teachers(count: int = 3) -> list[SmallNet]:
    """Networks in eval mode that know the task a little, each from its own seed."""
    teachers = []
    for seed in range(count):
        torch.manual_seed(seed)
        teacher = SmallNet()
        optimizer = torch.optim.SGD(teacher.parameters(), 0.02, momentum=0.9)
        for _ in range(10):
            for x, y in train_loader():
                optimizer.zero_grad()
                cross_entropy(teacher(x), y).backward()
                optimizer.step()
        teachers.append(teacher.eval())
    return teachers


def copies(teachers: list[SmallNet]) -> list[SmallNet]:
    """Teachers for one test."""
    return [copy.deepcopy(teacher) for teacher in teachers]
