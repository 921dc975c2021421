"""Small nets that few-shot papers use, for tensors and images."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from lightning_ft.functional.errors import Refusal

Activation = Literal["relu", "tanh"]


class MLP(nn.Sequential):
    """Linear layers with an activation between them.

    Args:
        sizes: widths from the input to the output, e.g. ``[1, 40, 40, 1]`` for the sinusoids of Finn et al., 2017.
        activation: ``relu`` or ``tanh``.
    """

    def __init__(self, sizes: list[int], activation: Activation = "relu") -> None:
        if len(sizes) < 2 or min(sizes) < 1:
            raise Refusal(f"MLP.sizes must be at least two widths, each at least 1, got {sizes}.")
        layers: list[nn.Module] = []
        for at, (inputs, outputs) in enumerate(zip(sizes, sizes[1:], strict=False)):
            if at:
                layers.append(nn.ReLU() if activation == "relu" else nn.Tanh())
            layers.append(nn.Linear(inputs, outputs))
        super().__init__(*layers)


class ConvNet(nn.Module):
    """Four blocks of convolution, normalisation, ReLU and pooling, then a linear layer (Vinyals et al., 2016).

    Differs from the paper: groups of channels are normalised, not the batch, so that a row's output does not depend on its
    neighbours, in adapting least of all.

    Args:
        classes: outputs; 0 leaves the linear layer out, so that the net gives embeddings.
        image_size: height and width.
        channels: of the images.
        width: channels inside; 64 in the paper for Omniglot, 32 for mini-ImageNet in Finn et al., 2017.
    """

    def __init__(self, classes: int = 5, image_size: int = 84, channels: int = 3, width: int = 32) -> None:
        super().__init__()
        if image_size < 16 or width % 8:
            raise Refusal(
                f"ConvNet needs images of at least 16 pixels and a width of whole eights, got {image_size}, {width}."
            )
        blocks: list[nn.Module] = []
        for inputs in (channels, width, width, width):
            blocks += [nn.Conv2d(inputs, width, 3, padding=1), nn.GroupNorm(8, width), nn.ReLU(), nn.MaxPool2d(2)]
        self.body = nn.Sequential(*blocks, nn.Flatten())
        side = image_size // 16
        self.head = nn.Linear(width * side * side, classes) if classes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(S, channels, size, size) -> (S, classes), or (S, D) embeddings."""
        out: Tensor = self.head(self.body(x))
        return out


__all__ = ["MLP", "ConvNet"]
