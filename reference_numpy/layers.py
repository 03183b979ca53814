"""The layers a U-Net is made of. Activations are (n, c, h, w): images, channels, height, width."""

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view


def linear(x, weight, bias):
    """(n, in) -> (n, out): weight is (out, in), bias (out,)."""
    return x @ weight.T + bias


def silu(x):
    """x times a number between 0 and 1 that grows with x: nearly x if x is large, nearly 0 if it is very negative."""
    return x / (1 + np.exp(-x))


def group_norm(x, groups, weight, bias, eps=1e-5):
    """(n, c, h, w): normalise each group of an image's channels to mean 0 and variance 1, then scale and shift."""
    n, c, h, w = x.shape
    grouped = x.reshape(n, groups, -1)
    normed = (grouped - grouped.mean(axis=2, keepdims=True)) / np.sqrt(grouped.var(axis=2, keepdims=True) + eps)
    return normed.reshape(n, c, h, w) * weight[:, None, None] + bias[:, None, None]


def convolution(x, weight, bias, stride=1, padding=0):
    """(n, c, h, w) -> (n, out, h', w'): at each position, the window of pixels times weight (out, c, i, j), summed.

    padding: rows and columns of zeros on each side of an image. stride: the step from one window to the next.
    """
    x = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    windows = sliding_window_view(x, weight.shape[2:], axis=(2, 3))  # (n, c, h', w', i, j): a view, nothing is copied
    windows = windows[:, :, ::stride, ::stride]
    y = np.einsum("nchwij,ocij->nohw", windows, weight, optimize=True)
    return y + bias[:, None, None]


def upsample(x):
    """(n, c, h, w) -> (n, c, 2 h, 2 w): each pixel becomes four."""
    return x.repeat(2, axis=2).repeat(2, axis=3)


def pixel_unshuffle(x, patch):
    """(n, c, h, w) -> (n, c patch², h / patch, w / patch): the pixels of each patch become channels, row after row."""
    n, c, h, w = x.shape
    y = np.empty((n, c * patch**2, h // patch, w // patch))
    for row in range(patch):
        for column in range(patch):
            y[:, row * patch + column :: patch**2] = x[:, :, row::patch, column::patch]
    return y


def pixel_shuffle(x, patch):
    """(n, c patch², h, w) -> (n, c, h patch, w patch): the inverse of `pixel_unshuffle`."""
    n, c, h, w = x.shape
    y = np.empty((n, c // patch**2, h * patch, w * patch))
    for row in range(patch):
        for column in range(patch):
            y[:, :, row::patch, column::patch] = x[:, row * patch + column :: patch**2]
    return y


def with_prefix(parameters, prefix):
    """The parameters whose names begin with the prefix, with the prefix removed."""
    return {name.removeprefix(prefix): array for name, array in parameters.items() if name.startswith(prefix)}
