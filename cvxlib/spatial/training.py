"""Training of image classifiers that can be stopped and resumed, and the two controls: a small CNN and permuted patches."""

from __future__ import annotations

import io
import math
import os
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from cvxlib.ground.checks import positive_float, positive_int, require, wrong_value
from cvxlib.ground.tensor_files import is_there, replacing

Augmentation = Callable[[Tensor, torch.Generator], Tensor]


def permute_patches(images: Tensor, grid: int, seed: int = 0) -> Tensor:
    """Images cut into ``grid`` by ``grid`` patches that are shuffled, by one permutation for all images.

    Args:
        images: (n, channels, height, width); both sides multiples of ``grid``.
        grid: patches along a side; 1 leaves the images as they are, the side itself shuffles pixels.
        seed: of the permutation.

    Returns:
        (n, channels, height, width).

    Raises:
        ValueError: a grid that does not divide the sides.

    Source: Jelassi, Sander and Li 2022, section 5.
    """
    n, channels, height, width = images.shape
    grid = positive_int("grid", grid)
    require(height % grid == 0 and width % grid == 0, "grid", f"a divisor of both sides ({height}, {width})", f"{grid}")
    order = torch.randperm(grid * grid, generator=torch.Generator().manual_seed(seed)).to(images.device)
    h, w = height // grid, width // grid
    cells = images.reshape(n, channels, grid, h, grid, w).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)[:, order]
    return cells.reshape(n, grid, grid, channels, h, w).permute(0, 3, 1, 4, 2, 5).reshape(images.shape)


def small_cnn(classes: int, *, channels: int = 3, width: int = 32) -> nn.Sequential:
    """A convolutional network to compare with: three 3 x 3 convolutions with batch norm, two poolings, a global mean."""
    layers: list[nn.Module] = []
    for i, (before, after) in enumerate(((channels, width), (width, 2 * width), (2 * width, 4 * width))):
        layers += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if i < 2 else [nn.AdaptiveAvgPool2d(1)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * width, classes))


def crop_and_flip(padding: int = 4, flip: bool = True) -> Augmentation:
    """The standard augmentation of small images: a random crop of the padded image, and a mirror image half of the time.

    Mirrors are wrong for digits (SVHN among them): leave them out there.
    """

    def augment(images: Tensor, generator: torch.Generator) -> Tensor:
        n, _, height, width = images.shape
        padded = functional.pad(images, (padding,) * 4)
        top, left = torch.randint(0, 2 * padding + 1, (2, n), generator=generator).to(images.device)
        rows = top.unsqueeze(1) + torch.arange(height, device=images.device)
        columns = left.unsqueeze(1) + torch.arange(width, device=images.device)
        if flip:
            mirrored = torch.rand(n, generator=generator).to(images.device) < 0.5
            columns = torch.where(mirrored.unsqueeze(1), columns.flip(1), columns)
        index = torch.arange(n, device=images.device)[:, None, None]
        return padded.permute(0, 2, 3, 1)[index, rows.unsqueeze(2), columns.unsqueeze(1)].permute(0, 3, 1, 2)

    return augment


def train_classifier(
    model: nn.Module,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    *,
    epochs: int,
    batch: int = 128,
    lr: float = 1e-3,
    weight_decay: float = 0.05,
    warmup: float = 0.05,
    label_smoothing: float = 0.0,
    augment: Augmentation | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    max_seconds: float | None = None,
    amp: bool = False,
    seed: int = 0,
    progress: bool | None = None,
) -> list[dict[str, float]]:
    """Train an image classifier in place with AdamW and a cosine schedule; images stay on the model's device.

    A run stopped at any time and called again with the same arguments goes on from ``checkpoint`` and ends with the weights of an
    unbroken run on the same machine: order and augmentation depend on the seed and the epoch alone.

    Args:
        model: returns logits (n, classes).
        train: images (n, channels, height, width), float, and labels (n,).
        test: likewise.
        epochs: length of the schedule.
        batch: images per step.
        lr: peak learning rate.
        weight_decay: of AdamW, on matrices only.
        warmup: share of the steps with a rising learning rate.
        label_smoothing: of the cross-entropy.
        augment: maps images and a generator to images, such as :func:`crop_and_flip`.
        checkpoint: file written after every epoch, by renaming a finished temporary file.
        max_seconds: stop after the epoch in which this time runs out, with the schedule unfinished.
        amp: bfloat16 products (CUDA devices).
        seed: of order and augmentation.
        progress: show a bar; by default only on a terminal.

    Returns:
        One record per epoch: ``epoch``, ``train_loss``, ``test_error`` and ``seconds`` since the start, earlier runs counted.

    Raises:
        ValueError: a checkpoint that belongs to other settings.
    """
    epochs, batch = positive_int("epochs", epochs), positive_int("batch", batch)
    device = next(model.parameters()).device
    images, labels = (part.to(device) for part in train)
    test_images, test_labels = (part.to(device) for part in test)
    matrices = [weight for weight in model.parameters() if weight.ndim >= 2]
    others = [weight for weight in model.parameters() if weight.ndim < 2]
    groups = [{"params": matrices, "weight_decay": positive_float("weight_decay", weight_decay, zero=True)}]
    optimiser = torch.optim.AdamW([*groups, {"params": others, "weight_decay": 0.0}], lr=positive_float("lr", lr))
    per_epoch = math.ceil(len(images) / batch)
    total, rising = epochs * per_epoch, max(1, round(warmup * epochs * per_epoch))

    def factor(step: int) -> float:
        return min((step + 1) / rising, 0.5 * (1 + math.cos(math.pi * max(0, step - rising) / max(1, total - rising))))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, factor)
    settings = {"epochs": epochs, "batch": batch, "lr": lr, "weight_decay": weight_decay, "warmup": warmup}
    settings |= {"label_smoothing": label_smoothing, "seed": seed, "images": len(images)}
    history: list[dict[str, float]] = []
    if checkpoint is not None and is_there(checkpoint):
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        if state["settings"] != settings:
            raise wrong_value("checkpoint", f"one written with {settings}", f"one written with {state['settings']}")
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        schedule.load_state_dict(state["schedule"])
        history = state["history"]

    earlier = history[-1]["seconds"] if history else 0.0
    start = time.perf_counter()
    bar = tqdm(range(len(history), epochs), desc="training", disable=None if progress is None else not progress)
    for epoch in bar:
        generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
        model.train()
        losses = torch.zeros((), device=device)
        for index in torch.randperm(len(images), generator=generator).split(batch):
            index = index.to(device)
            inputs = images[index] if augment is None else augment(images[index], generator)
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=amp):
                logits = model(inputs)
            loss = functional.cross_entropy(logits.float(), labels[index], label_smoothing=label_smoothing)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            losses += loss.detach() * len(index)
        error = classification_error(model, (test_images, test_labels))
        seconds = earlier + time.perf_counter() - start
        history.append(
            {"epoch": epoch + 1, "train_loss": float(losses) / len(images), "test_error": error, "seconds": seconds}
        )
        bar.set_postfix_str(f"test error {error:.1%}")
        if checkpoint is not None:
            state = {"settings": settings, "model": model.state_dict(), "optimiser": optimiser.state_dict()}
            buffer = io.BytesIO()  # torch's own writer makes a full disk an error of its format
            torch.save({**state, "schedule": schedule.state_dict(), "history": history}, buffer)
            with replacing(checkpoint) as temporary:
                temporary.write_bytes(buffer.getbuffer())
        if max_seconds is not None and seconds - earlier > max_seconds:
            break
    return history


@torch.no_grad()
def classification_error(model: nn.Module, data: tuple[Tensor, Tensor], batch: int = 512) -> float:
    """The share of wrong predictions on images and labels."""
    model.eval()
    wrong = sum(
        int((model(images).argmax(1) != labels).sum())
        for images, labels in zip(data[0].split(batch), data[1].split(batch), strict=True)
    )
    return wrong / len(data[1])
