"""ResNet-18 (He et al. 2016): 11.2 million parameters."""

from __future__ import annotations

from torch import Tensor, nn


class Block(nn.Module):
    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        self.first_norm, self.relu = nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        self.second = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(width)
        same = stride == 1 and channels == width
        short = [] if same else [nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width)]
        self.short = nn.Sequential(*short)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.first_norm(self.first(x)))
        y = self.second_norm(self.second(y))
        out: Tensor = self.relu(y + self.short(x))
        return out


def resnet18(classes: int = 10, *, small: bool = True) -> nn.Module:
    """small: for images of 32 x 32, with a first convolution of 3 x 3 and no pooling; else with that of 7 x 7 in steps
    of two and the pooling after it, as published."""
    first = nn.Conv2d(3, 64, 3, padding=1, bias=False) if small else nn.Conv2d(3, 64, 7, 2, padding=3, bias=False)
    layers: list[nn.Module] = [first, nn.BatchNorm2d(64), nn.ReLU(inplace=True)]
    if not small:
        layers.append(nn.MaxPool2d(3, 2, padding=1))
    channels = 64
    for width, stride in ((64, 1), (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), (512, 1)):
        layers.append(Block(channels, width, stride))
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, classes))
