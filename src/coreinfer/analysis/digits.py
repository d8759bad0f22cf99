"""Two small networks that read scikit-learn's handwritten digits, trained in seconds."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

CLASSES, SIDE = 10, 8
TEST_SHARE = 0.25


@dataclass(frozen=True)
class Digits:
    """Images [n, 8, 8] in 0 to 1 and their labels [n], to train on and to measure on."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


class Convolutional(nn.Module):
    """Two convolutions, a hidden layer, ten classes. Images [n, 8, 8] -> logits [n, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU())
        self.hidden = nn.Sequential(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(1024, 128), nn.ReLU())
        self.head = nn.Linear(128, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.second(self.first(images.unsqueeze(1)))
        logits: Tensor = self.head(self.hidden(maps))
        return logits


class Recurrent(nn.Module):
    """A GRU cell that reads an image row by row. Images [n, 8, 8] -> logits [n, 10]."""

    def __init__(self, size: int = 128) -> None:
        super().__init__()
        self.cell = nn.GRUCell(SIDE, size)
        self.head = nn.Linear(size, CLASSES)

    def read(self, rows: Tensor, state: Tensor | None = None) -> Tensor:
        """The state [n, size] after more rows [n, r, 8]."""
        for row in rows.unbind(dim=1):
            state = self.cell(row, state)
        assert state is not None
        return state

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.read(images))
        return logits


def digits(seed: int) -> Digits:
    """The 1,797 images, three quarters to train on."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    x = torch.from_numpy(images).float().reshape(-1, SIDE, SIDE)[order] / 16
    y = torch.from_numpy(labels).long()[order]
    cut = round(len(y) * (1 - TEST_SHARE))
    return Digits((x[:cut], y[:cut]), (x[cut:], y[cut:]))


def train(network: nn.Module, data: Digits, seed: int, epochs: int) -> float:
    """Train with Adam; the share of the test images that are then told right."""
    images, labels = data.train
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    network.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(labels), generator=generator).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(images[batch]), labels[batch]).backward()
            optimizer.step()
    network.eval()
    with torch.no_grad():
        return float((network(data.test[0]).argmax(dim=-1) == data.test[1]).double().mean())
