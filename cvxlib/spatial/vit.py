"""Positional attention as a layer, and a vision transformer with positional or vanilla attention by one switch."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor, nn

from cvxlib.ground.checks import needs_extra, positive_float, positive_int, require

ATTENTIONS = ("positional", "vanilla")


class PositionalAttention(nn.Module):
    r"""Multi-head attention whose scores come from positions alone and whose values come from the tokens.

    .. math:: \operatorname{head}_h(X) = \operatorname{softmax}\!\Big(\frac{P W_Q^h (P W_K^h)^\top}{\sqrt{d_h}}\Big) X W_V^h,

    concatenated over heads and multiplied by an output matrix.

    Args:
        features: d, a multiple of ``heads``.
        heads: number of heads.

    Raises:
        ValueError: d is not a multiple of the number of heads.

    Source: Jelassi, Sander and Li 2022, Definition 3.2; book, chapter "Spatial structure".
    """

    def __init__(self, features: int, heads: int) -> None:
        super().__init__()
        require(
            positive_int("features", features) % positive_int("heads", heads) == 0,
            "heads",
            f"a divisor of features = {features}",
            f"{heads}",
        )
        self.heads = heads
        self.query_key = nn.Linear(features, 2 * features, bias=False)
        self.value = nn.Linear(features, features)
        self.output = nn.Linear(features, features)

    def scores(self, positions: Tensor) -> Tensor:
        """(heads, s, s) scores before the softmax, from position vectors (s, d)."""
        s, d = positions.shape
        query, key = self.query_key(positions).reshape(s, 2, self.heads, -1).permute(1, 2, 0, 3)  # (heads, s, d_h)
        return query @ key.mT / (d // self.heads) ** 0.5

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """(n, s, d) for tokens (n, s, d) and positions (s, d)."""
        n, s, d = tokens.shape
        values = self.value(tokens).reshape(n, s, self.heads, -1).transpose(1, 2)  # (n, heads, s, d_h)
        mixed = torch.softmax(self.scores(positions), -1) @ values
        return self.output(mixed.transpose(1, 2).reshape(n, s, d))


class Block(nn.Module):
    """Attention and a token-wise MLP, each behind a layer norm and around a skip connection."""

    def __init__(self, features: int, heads: int, attention: str) -> None:
        super().__init__()
        parts = timm_layers()
        self.norm1, self.norm2 = nn.LayerNorm(features), nn.LayerNorm(features)
        self.positional = attention == "positional"
        self.attention = (
            PositionalAttention(features, heads) if self.positional else parts.Attention(features, heads, qkv_bias=True)
        )
        self.mlp = parts.Mlp(features, 4 * features)

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        normed = self.norm1(tokens)
        tokens = tokens + (self.attention(normed, positions) if self.positional else self.attention(normed))
        return tokens + self.mlp(self.norm2(tokens))


class VisionTransformer(nn.Module):
    r"""A vision transformer, from timm's patch embedding, attention and MLP.

    With ``attention="vanilla"`` position vectors are added to the patches once, as usual; with ``"positional"`` they enter the scores
    of every layer and nothing else. The defaults are the paper's: 7 layers, 12 heads, width 384, patches of 4.

    Args:
        classes: number of classes.
        attention: ``"positional"`` or ``"vanilla"``.
        image_size: side of the square images, a multiple of ``patch``.
        channels: of the images.
        patch: side of a patch.
        width: d, a multiple of ``heads``.
        depth: number of layers.
        heads: number of heads.
        position_scale: standard deviation of the position vectors at the start. The customary 0.02 is slow to become visible
            beside the patches, which short schedules do not forgive.

    Raises:
        ValueError: sizes that do not divide each other, or an unknown attention.
        ModuleNotFoundError: timm is not installed.

    Source: Jelassi, Sander and Li 2022, section 5; book, experiment "Vision transformers with positional attention".
    """

    def __init__(
        self,
        classes: int,
        attention: str = "positional",
        *,
        image_size: int = 32,
        channels: int = 3,
        patch: int = 4,
        width: int = 384,
        depth: int = 7,
        heads: int = 12,
        position_scale: float = 1.0,
    ) -> None:
        super().__init__()
        require(attention in ATTENTIONS, "attention", "'positional' or 'vanilla'", attention)
        require(
            positive_int("image_size", image_size) % positive_int("patch", patch) == 0,
            "patch",
            f"a divisor of image_size = {image_size}",
            f"{patch}",
        )
        require(
            positive_int("width", width) % positive_int("heads", heads) == 0,
            "heads",
            f"a divisor of width = {width}",
            f"{heads}",
        )
        self.attention = attention
        self.embed = timm_layers().PatchEmbed(image_size, patch, channels, width)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.empty(self.embed.num_patches + 1, width))
        nn.init.trunc_normal_(self.positions, std=positive_float("position_scale", position_scale))
        nn.init.trunc_normal_(self.class_token, std=0.02)
        self.blocks = nn.ModuleList(Block(width, heads, attention) for _ in range(positive_int("depth", depth)))
        self.norm, self.classifier = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """(n, classes) logits of images (n, channels, side, side)."""
        tokens = self.embed(images)
        tokens = torch.cat([self.class_token.expand(len(tokens), -1, -1), tokens], 1)
        if self.attention == "vanilla":
            tokens = tokens + self.positions
        for block in self.blocks:
            tokens = block(tokens, self.positions)
        return self.classifier(self.norm(tokens[:, 0]))

    @torch.no_grad()
    def position_scores(self) -> Tensor:
        """(depth, heads, s, s) scores of every layer between patches, the class token left out; positional attention only."""
        require(
            self.attention == "positional",
            "attention",
            "'positional' for scores that depend on positions alone",
            self.attention,
        )
        layers = [layer for layer in self.modules() if isinstance(layer, PositionalAttention)]
        return torch.stack([layer.scores(self.positions) for layer in layers])[:, :, 1:, 1:]


def timm_layers() -> ModuleType:
    """timm's layers, or one clear sentence."""
    with needs_extra("vision transformers", "vision"):
        import timm.layers
    return timm.layers
