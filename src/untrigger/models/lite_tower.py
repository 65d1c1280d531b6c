"""EfficientNet-Lite as a vision tower: convolutions only, features of several depths at each cell of an 8 x 8 grid.

Batch norms are folded into the convolutions before them. So a frozen tower computes the same function in training and
in evaluation mode, independent of the batch.
"""

from __future__ import annotations

from typing import Any, ClassVar, cast, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

STRIDE = 32  # pixels of a grid cell, each way


@final
class LiteConfig(PreTrainedConfig):
    """Configuration of an EfficientNet-Lite; Lite0 by default.

    Attributes:
        stages: (kernel, stride, expansion ratio, channels, number of blocks) of each stage.
        tapped: (stage, stride of its grid) of the stages whose features are returned besides the last ones.
        hidden_size: number of features of a grid cell.
    """

    model_type = "untrigger-lite"

    def __init__(
        self,
        stem: int = 32,
        stages: tuple[tuple[int, int, int, int, int], ...] = (
            (3, 1, 1, 16, 1),
            (3, 2, 6, 24, 2),
            (5, 2, 6, 40, 2),
            (3, 2, 6, 80, 3),
            (5, 1, 6, 112, 3),
            (5, 2, 6, 192, 4),
            (3, 1, 6, 320, 1),
        ),
        head: int = 1280,
        tapped: tuple[tuple[int, int], ...] = ((2, 8), (4, 16)),
        **kwargs: Any,
    ) -> None:
        self.stem, self.head = stem, head
        self.stages, self.tapped = [list(s) for s in stages], [list(t) for t in tapped]
        self.hidden_size = head + sum(self.stages[i][3] * (STRIDE // stride) ** 2 for i, stride in tapped)
        super().__init__(**{name: value for name, value in kwargs.items() if name != "hidden_size"})


class _Conv(nn.Conv2d):
    """A convolution with TensorFlow's "same" padding, which pads more at the end at even sizes; then ReLU6 if set."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, relu6: bool = True):
        super().__init__(inputs, outputs, kernel, stride, groups=groups)
        self.relu6 = relu6

    def forward(self, input: Tensor) -> Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        # of width, then of height; each is split into before and after
        pads = [max((-(-n // stride) - 1) * stride + kernel - n, 0) for n in (input.shape[3], input.shape[2])]
        padded = F.pad(input, [side for pad in pads for side in (pad // 2, pad - pad // 2)]) if any(pads) else input
        out = super().forward(padded)
        return F.relu6(out) if self.relu6 else out


class _Block(nn.Module):
    """An inverted residual block: expand, depthwise convolution, project."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = inputs * expansion
        self.expand = _Conv(inputs, wide, 1) if expansion > 1 else nn.Identity()
        self.depthwise = _Conv(wide, wide, kernel, stride, groups=wide)
        self.project = _Conv(wide, outputs, 1, relu6=False)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        out = self.project(self.depthwise(self.expand(x)))
        return x + out if self.residual else out


@final
class LiteTower(PreTrainedModel):
    """Pixels [B, 3, H, W] in -1..1 to features [B, H/32 * W/32, hidden_size], with grid cells row by row."""

    config_class: ClassVar[Any] = LiteConfig
    main_input_name = "pixel_values"

    def __init__(self, config: LiteConfig) -> None:
        super().__init__(config)
        self.stem = _Conv(3, config.stem, 3, 2)
        self.stages = nn.ModuleList()
        inputs = config.stem
        for kernel, stride, expansion, channels, count in config.stages:
            blocks = [
                _Block(channels if i else inputs, channels, kernel, 1 if i else stride, expansion) for i in range(count)
            ]
            self.stages.append(nn.Sequential(*blocks))
            inputs = channels
        self.head = _Conv(inputs, config.head, 1)
        self.post_init()

    def grids(self, pixel_values: Tensor) -> list[Tensor]:
        """Features of the tapped stages, then the last ones [B, head, H/32, W/32]."""
        x, tapped = self.stem(pixel_values.to(self.dtype)), list[Tensor]()
        for number, stage in enumerate(self.stages):
            x = stage(x)
            tapped += [x for at, _ in self.config.tapped if at == number]
        return [*tapped, self.head(x)]

    def forward(self, pixel_values: Tensor, **_: Any) -> BaseModelOutputWithPooling:
        grids = self.grids(pixel_values)
        factors = [STRIDE // stride for _, stride in self.config.tapped]
        cells = [F.pixel_unshuffle(x, factor) for x, factor in zip(grids, [*factors, 1], strict=True)]
        # layer norm brings the depths to one scale: ReLU6 limits the last features, the others are unlimited
        flat = [x.flatten(2).transpose(1, 2) for x in cells]
        features = torch.cat([F.layer_norm(x, x.shape[-1:]) for x in flat], dim=-1)
        return BaseModelOutputWithPooling(last_hidden_state=cast(Any, features), hidden_states=cast(Any, (features,)))


def folded(weights: dict[str, Tensor], config: LiteConfig) -> dict[str, Tensor]:
    """Convert weights of the package ``efficientnet-lite-pytorch`` to a `LiteTower`'s, without its classifier."""
    converted: dict[str, Tensor] = {}

    def fold(name: str, conv: str, norm: str) -> None:
        mean, var, gain, bias = (weights[f"{norm}.{n}"] for n in ("running_mean", "running_var", "weight", "bias"))
        scale = gain / torch.sqrt(var + 1e-3)  # TensorFlow's epsilon
        converted[f"{name}.weight"] = weights[f"{conv}.weight"] * scale[:, None, None, None]
        converted[f"{name}.bias"] = bias - mean * scale

    fold("stem", "_conv_stem", "_bn0")
    at = 0
    for number, (_, _, expansion, _, count) in enumerate(config.stages):
        for block in range(count):
            name, source = f"stages.{number}.{block}", f"_blocks.{at}"
            if expansion > 1:
                fold(f"{name}.expand", f"{source}._expand_conv", f"{source}._bn0")
            fold(f"{name}.depthwise", f"{source}._depthwise_conv", f"{source}._bn1")
            fold(f"{name}.project", f"{source}._project_conv", f"{source}._bn2")
            at += 1
    fold("head", "_conv_head", "_bn1")
    return converted


def register() -> None:
    """Register the tower with transformers' Auto classes, so that loading it needs no code from the model's folder."""
    AutoConfig.register(LiteConfig.model_type, LiteConfig, exist_ok=True)
    AutoModel.register(LiteConfig, LiteTower, exist_ok=True)
