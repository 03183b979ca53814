"""The conditional U-Net (Ronneberger et al. 2015), and the simpler ones of lesson 3.

Parameters are a dictionary of arrays, named as in the PyTorch network. They show how many layers there are, and which
of them have attention. They don't show the number of groups or the channels per head, so those are arguments.
"""

import numpy as np

from reference_numpy.attention import attention_block
from reference_numpy.embedding import timestep_embedding
from reference_numpy.layers import convolution, group_norm, linear, silu, upsample, with_prefix


def residual_block(x, embedding, parameters, groups):
    """(n, c, h, w) -> (n, out, h, w): x plus the output of two convolutions.

    embedding: (n, dim), or None; gives each channel a scale and a shift.
    """
    p = parameters
    h = group_norm(x, groups, p["conv1.norm.weight"], p["conv1.norm.bias"])
    h = convolution(silu(h), p["conv1.conv.weight"], p["conv1.conv.bias"], padding=1)  # (n, out, h, w)
    h = group_norm(h, groups, p["conv2.norm.weight"], p["conv2.norm.bias"])
    if embedding is not None:
        weight, bias = p["conv2.scale_shift.linear.weight"], p["conv2.scale_shift.linear.bias"]
        scale_shift = linear(silu(embedding), weight, bias)  # (n, 2 out)
        scale, shift = np.split(scale_shift, 2, axis=1)  # (n, out) each
        h = (1 + scale[:, :, None, None]) * h + shift[:, :, None, None]
    h = convolution(silu(h), p["conv2.conv.weight"], p["conv2.conv.bias"], padding=1)
    if "shortcut.weight" in p:  # if the number of channels changes
        x = convolution(x, p["shortcut.weight"], p["shortcut.bias"])  # (n, out, h, w)
    return x + h


def block(x, embedding, parameters, groups, head_dim):
    """(n, c, h, w) -> (n, out, h, w): a residual block and, if there are parameters for it, self-attention."""
    x = residual_block(x, embedding, parameters, groups)
    if "attention.attention.qkv.weight" in parameters:
        heads = x.shape[1] // head_dim
        x = attention_block(x, with_prefix(parameters, "attention."), heads, groups)
    return x


def embed(time, label, parameters):
    """(n,) and (n,) -> (n, dim): the embedding of time and label for every block; None if the network has none."""
    p = parameters
    if "embed_time.linear1.weight" not in p:
        return None
    weight, bias = p["embed_time.linear1.weight"], p["embed_time.linear1.bias"]
    h = linear(timestep_embedding(time, weight.shape[1]), weight, bias)  # (n, dim)
    embedding = linear(silu(h), p["embed_time.linear2.weight"], p["embed_time.linear2.bias"])  # (n, dim)
    if "embed_label.weight" in p:
        rows = p["embed_label.weight"]  # (labels + 1, dim): one row for each label, and the last for "no label"
        if label is None:
            label = np.full(len(time), len(rows) - 1)
        embedding = embedding + rows[label]
    return embedding


def cond_unet(x, time, label, parameters, groups, head_dim=None):
    """(n, channels, h, w) -> (n, channels, h, w). time: (n,). label: (n,) whole numbers, or None for "no label".

    The U-Nets without label or time are this function with fewer parameters.
    """
    p = parameters
    embedding = embed(time, label, p)

    h = convolution(x, p["conv_in.weight"], p["conv_in.bias"], padding=1)
    skips = [h]
    level = 0
    while with_prefix(p, f"down.{level}."):
        if level > 0:  # half the height and width
            between = with_prefix(p, f"downsample.{level - 1}.")
            h = convolution(h, between["weight"], between["bias"], stride=2, padding=1)
            skips.append(h)
        i = 0
        while layer := with_prefix(p, f"down.{level}.{i}."):
            h = block(h, embedding, layer, groups, head_dim)
            skips.append(h)
            i += 1
        level += 1

    h = block(h, embedding, with_prefix(p, "middle.0."), groups, head_dim)
    h = block(h, embedding, with_prefix(p, "middle.1."), groups, head_dim)

    level = 0
    while with_prefix(p, f"up.{level}."):  # the lowest level first
        if level > 0:  # twice the height and width
            between = with_prefix(p, f"upsample.{level - 1}.1.")
            h = convolution(upsample(h), between["weight"], between["bias"], padding=1)
        i = 0
        while layer := with_prefix(p, f"up.{level}.{i}."):
            h = np.concatenate([h, skips.pop()], axis=1)  # the channels of both
            h = block(h, embedding, layer, groups, head_dim)
            i += 1
        level += 1

    h = group_norm(h, groups, p["conv_out.norm.weight"], p["conv_out.norm.bias"])
    return convolution(silu(h), p["conv_out.conv.weight"], p["conv_out.conv.bias"], padding=1)
