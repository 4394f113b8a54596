"""Handwritten digits with this library's layers: `python examples/digits.py [--epochs 5]`.

Needs scikit-learn, with which the 1797 images of 8 by 8 pixels come: `pip install 'hw3gpu[demo]'`. `hw3gpu train` trains such
a net beside the same one of PyTorch's layers.
"""

from __future__ import annotations

import argparse

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

import hw3gpu.nn

BATCH = 64


def network() -> nn.Sequential:
    """Images (B, 1, 8, 8) to logits (B, 10). Batch norm and ReLU are one layer, and one pass over the values."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        hw3gpu.nn.BatchNormAct2d(16),
        nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False),
        hw3gpu.nn.BatchNormAct2d(32),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, 10),
    )


def main(arguments: list[str] | None = None) -> float:
    """Trains, prints loss and accuracy of each epoch, and returns the accuracy on the images that were not trained on."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=5, help="passes over the training images (%(default)s)")
    epochs = parser.parse_args(arguments).epochs

    device = "cuda" if torch.cuda.is_available() else "cpu"
    pixels, digits = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32, device=device).reshape(-1, 1, 8, 8) / 16
    classes = torch.tensor(digits, device=device)
    train, test = (torch.tensor(part) for part in train_test_split(range(len(digits)), random_state=0, stratify=digits))

    torch.manual_seed(0)
    model = network().to(device)
    criterion = hw3gpu.nn.CrossEntropyLoss(label_smoothing=0.1)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    accuracy = 0.0
    for epoch in range(1, epochs + 1):
        model.train()
        losses = []
        for batch in train[torch.randperm(len(train))].split(BATCH):
            loss = criterion(model(images[batch]), classes[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        model.eval()
        with torch.no_grad():
            accuracy = (model(images[test]).argmax(1) == classes[test]).float().mean().item()
        print(f"epoch {epoch}: loss {torch.stack(losses).mean():.3f}, {100 * accuracy:.1f} % of {len(test)} test images right")
    return accuracy


if __name__ == "__main__":
    main()
