"""Use the weights of an encoder for RGB images in an encoder for other channels."""

from __future__ import annotations

import dataclasses

import torch

from ijepa_enhanced.models.vit import PatchMLP, VisionTransformer


def inflated(network: VisionTransformer, channels: int) -> VisionTransformer:
    """Return a copy of a network for another number of channels. Each channel gets the mean weights of the old ones.

    The weights are scaled by the old number of channels divided by the new one, so that a gray image gives the same
    features as before (as in timm's `adapt_input_conv`).

    Args:
        network: a network for C channels.
        channels: number of channels of the copy.
    """
    state = dict(network.state_dict())
    name = "patch_embed.hidden.weight" if isinstance(network.patch_embed, PatchMLP) else "patch_embed.weight"
    weight = state[name].unflatten(1, (-1, network.config.channels))  # [hidden width, P * P, C]
    mean = weight.mean(dim=2, keepdim=True) * (network.config.channels / channels)
    state[name] = mean.expand(-1, -1, channels).flatten(1)
    with torch.device("meta"):  # do not draw weights that are replaced below
        copy = VisionTransformer(dataclasses.replace(network.config, channels=channels))
    copy.load_state_dict({key: value.clone() for key, value in state.items()}, assign=True)
    return copy
