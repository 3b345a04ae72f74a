"""The CIFAR residual network of He et al. 2016 §4.2: three stages of n blocks, 6n + 2 layers."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut; the shortcut is a 1×1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            projection = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(outputs))

    def forward(self, images: Tensor) -> Tensor:
        """Map `[batch, inputs, h, w]` to `[batch, outputs, h / stride, w / stride]`."""
        hidden = functional.relu(self.norm1(self.conv1(images)))
        return functional.relu(self.norm2(self.conv2(hidden)) + self.shortcut(images))


class ResNet(nn.Module):
    """Stem, three stages of residual blocks at widths w, 2w, 4w, average pooling and a linear classifier."""

    def __init__(self, blocks_per_stage: int, in_channels: int, num_classes: int, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        stages = []
        inputs = width
        for stage in range(3):
            outputs = width * 2**stage
            strides = [1 if stage == 0 else 2] + [1] * (blocks_per_stage - 1)
            blocks = []
            for stride in strides:
                blocks.append(ResidualBlock(inputs, outputs, stride))
                inputs = outputs
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.classifier = nn.Linear(inputs, num_classes)
        self.apply(_initialize)

    def forward(self, images: Tensor) -> Tensor:
        """Map images `[batch, in_channels, h, w]` to logits `[batch, num_classes]`."""
        hidden = self.stages(functional.relu(self.norm(self.conv(images))))
        logits: Tensor = self.classifier(hidden.mean(dim=(2, 3)))
        return logits


def resnet20(in_channels: int = 3, num_classes: int = 10, width: int = 16) -> ResNet:
    """Build the 20-layer network (three blocks a stage).

    Args:
        in_channels: Channels of the images.
        num_classes: Outputs of the classifier.
        width: Channels of the first stage.
    """
    return ResNet(3, in_channels, num_classes, width)


def _initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    elif isinstance(module, nn.Linear):
        nn.init.kaiming_uniform_(module.weight, nonlinearity="linear")
        nn.init.zeros_(module.bias)
