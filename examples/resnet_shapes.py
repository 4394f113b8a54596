"""The shapes of ResNet-50, layer by layer, by `conv2d_output_shape`.

    python examples/resnet_shapes.py [--batch 32] [--input 224 224]

Each shape is compared with that of PyTorch's own layer, on its `meta` device: nothing is allocated. The last two columns say
how much a layer's output takes, and how many bytes batch normalisation of it moves in a training step, at five passes over
the values.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from hw3gpu import conv2d_output_shape

Shape = tuple[int, int, int, int]  # (B, W, H, C)
PASSES = 5  # forward reads x and writes y; backward reads x and dy and writes dx
STAGES = ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2))  # width, blocks, stride of the first


@dataclass(frozen=True)
class Layer:
    """A convolution without bias, or the pooling after the first one, which has the same law of shapes."""

    name: str
    channels: int
    kernel: int
    stride: int
    pooling: bool = False

    def output(self, shape: Shape) -> Shape:
        return conv2d_output_shape(shape, self.channels, self.kernel, self.stride, padding=self.kernel // 2)

    def of_torch(self, shape: Shape) -> Shape:
        """What PyTorch's layer gives: it has (B, C, H, W)."""
        B, W, H, C = shape
        x = torch.empty(B, C, H, W, device="meta")
        options = {"stride": self.stride, "padding": self.kernel // 2}
        if self.pooling:
            y = torch.nn.functional.max_pool2d(x, self.kernel, **options)
        else:
            y = torch.nn.Conv2d(C, self.channels, self.kernel, bias=False, device="meta", **options)(x)
        B, C, H, W = y.shape
        return B, W, H, C


def resnet50() -> Iterator[tuple[Layer, bool]]:
    """The layers in order, and whether a layer takes the block's input again (the shortcut) instead of the last output."""
    yield Layer("conv1", 64, 7, 2), False
    yield Layer("maxpool", 64, 3, 2, pooling=True), False
    for stage, (width, blocks, first) in enumerate(STAGES, 1):
        for block in range(blocks):
            stride, name = (first if block == 0 else 1), f"layer{stage}.{block}"
            if block == 0:
                yield Layer(f"{name}.downsample", 4 * width, 1, stride), True
            yield Layer(f"{name}.conv1", width, 1, 1), False
            yield Layer(f"{name}.conv2", width, 3, stride), False
            yield Layer(f"{name}.conv3", 4 * width, 1, 1), False


def shapes(image: Shape) -> Iterator[tuple[Layer, Shape]]:
    """Each layer and the shape of its output; ValueError where the image is too small for one."""
    shape = image
    for layer, shortcut in resnet50():
        output = layer.output(shape)
        yield layer, output
        shape = shape if shortcut else output


def main(arguments: list[str] | None = None) -> list[tuple[str, Shape]]:
    """Prints the table and returns the names and shapes."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--batch", type=int, default=32, help="images (%(default)s)")
    parser.add_argument("--input", type=int, nargs=2, default=(224, 224), metavar=("W", "H"), help="pixels (%(default)s)")
    options = parser.parse_args(arguments)

    image = (options.batch, *options.input, 3)
    found, before, total = [], image, 0.0
    print(f"{'layer':22}{'kernel':>7}{'stride':>7}  {'(B, W, H, C)':22}{'MB':>8}{'MB of batch norm':>18}")
    for (layer, shortcut), (_, shape) in zip(resnet50(), shapes(image), strict=True):
        assert shape == layer.of_torch(before), (layer, shape)
        values = shape[0] * shape[1] * shape[2] * shape[3]
        megabytes = 4 * values / 1e6
        moved = 0.0 if layer.pooling else PASSES * megabytes
        total += moved
        print(f"{layer.name:22}{layer.kernel:7}{layer.stride:7}  {shape!s:22}{megabytes:8.1f}{moved:18.1f}")
        found.append((layer.name, shape))
        before = before if shortcut else shape
    print(f"\nbatch normalisation of a training step moves {total / 1e3:.1f} GB in float32; PyTorch's shapes are the same")
    return found


if __name__ == "__main__":
    main()
