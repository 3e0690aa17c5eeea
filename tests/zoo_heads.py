"""Networks with several inputs or outputs, or with something after the last layer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Trunk(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 5, 3, padding=1)

    def features(self, x: Tensor) -> Tensor:
        return F.relu(self.conv2(F.relu(self.bn1(self.conv1(x)))))


class TupleHeads(Trunk):
    """Class scores, and a box for each: one output is pooled, one is dense."""

    def __init__(self) -> None:
        super().__init__()
        self.classes = nn.Linear(5, 4)
        self.boxes = nn.Conv2d(5, 2, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.features(x)
        return self.classes(x.mean((2, 3))), self.boxes(x)


class DictHeads(TupleHeads):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.features(x)
        return {"classes": self.classes(x.mean((2, 3))), "boxes": self.boxes(x)}


class TwoInputs(Trunk):
    """An image and a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 5)
        self.fc = nn.Linear(10, 4)

    def forward(self, image: Tensor, vector: Tensor) -> Tensor:
        seen = self.features(image).mean((2, 3))
        return self.fc(torch.cat([seen, torch.tanh(self.embed(vector))], dim=1))


class AuxiliaryInTraining(Trunk):
    """A second head that only runs in training mode, as GoogLeNet's."""

    def __init__(self) -> None:
        super().__init__()
        self.auxiliary_conv = nn.Conv2d(6, 4, 1)
        self.auxiliary = nn.Linear(4, 4)
        self.fc = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = F.relu(self.bn1(self.conv1(x)))
        auxiliary = None
        if self.training:
            auxiliary = self.auxiliary(F.relu(self.auxiliary_conv(F.avg_pool2d(x, 2))).mean((2, 3)))
        out = self.fc(F.relu(self.conv2(x)).mean((2, 3)))
        return out if auxiliary is None else (out, auxiliary)


class LogSoftmax(Trunk):
    """Ends in log-probabilities: the mean of the teachers' outputs is not that of the mean scores."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.log_softmax(self.fc(self.features(x).mean((2, 3))), dim=1)


class DirectHead(Trunk):
    """Scores to which a layer that reads the input itself adds, with a sigmoid after them."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.direct = nn.Linear(5, 4), nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.fc(self.features(x).mean((2, 3))) + self.direct(x).mean((2, 3)))
