"""Attention, and what is built from it (Vaswani et al. 2017, section 3.2).

Parameters are a dictionary of arrays, named as in the PyTorch module; a linear layer is `x @ weight.T + bias`.
"""

import math

import numpy as np

from reference_numpy.layers import group_norm, with_prefix


def softmax(scores):
    """Positive weights that sum to one along the last axis; a larger score gets a larger weight."""
    positive = np.exp(scores - scores.max(axis=-1, keepdims=True))  # the shift avoids overflow and cancels out
    return positive / positive.sum(axis=-1, keepdims=True)


def attention(q, k, v):
    """Queries, keys and values, each (tokens, d) -> for each token a weighted average of the values, (tokens, d)."""
    scores = q @ k.T / np.sqrt(q.shape[1])  # (tokens, tokens): how well query i matches key j
    return softmax(scores) @ v


def multi_head_self_attention(tokens, parameters, heads):
    """(s, c) -> (s, c): each head has its own q, k, v, from all channels; the heads' outputs are concatenated.

    A single matrix serves all heads: its rows make q first, head by head, then k, then v.
    """
    p = parameters
    q, k, v = np.split(tokens @ p["qkv.weight"].T + p["qkv.bias"], 3, axis=1)  # (s, c) each
    d = q.shape[1] // heads
    averages = np.empty_like(q)
    for head in range(heads):
        columns = slice(head * d, (head + 1) * d)
        averages[:, columns] = attention(q[:, columns], k[:, columns], v[:, columns])
    return averages @ p["proj.weight"].T + p["proj.bias"]  # (s, c)


def attention_block(x, parameters, heads, groups=1):
    """(n, c, h, w) -> (n, c, h, w): every pixel is a token, and the output of attention is added to it."""
    n, c, h, w = x.shape
    p = parameters
    normed = group_norm(x, groups, p["norm.weight"], p["norm.bias"])
    y = np.empty_like(x)
    for i in range(n):
        tokens = normed[i].reshape(c, h * w).T  # (h w, c)
        attended = multi_head_self_attention(tokens, with_prefix(p, "attention."), heads)  # (h w, c)
        y[i] = x[i] + attended.T.reshape(c, h, w)
    return y


def cross_attention(pixels, words, parameters):
    """(s, c) and (words, c_words) -> (s, d): queries from the pixels, keys and values from the words."""
    p = parameters
    q = pixels @ p["q.weight"].T + p["q.bias"]  # (s, d)
    k = words @ p["k.weight"].T + p["k.bias"]  # (words, d)
    v = words @ p["v.weight"].T + p["v.bias"]  # (words, d)
    return attention(q, k, v)


def causal_attention(q, k, v):
    """Queries, keys and values, each (tokens, d) -> (tokens, d): each token attends only to itself and earlier ones."""
    averages = np.empty_like(v)
    for i in range(len(q)):
        averages[i] = attention(q[i : i + 1], k[: i + 1], v[: i + 1])[0]
    return averages


# A transformer block adds the output of attention to each token, then the output of a small network (an MLP).


def layer_norm(tokens, weight, bias, eps=1e-5):
    """(s, c): normalise each token to mean 0 and variance 1, then scale and shift it."""
    deviation = tokens - tokens.mean(axis=1, keepdims=True)
    return deviation / np.sqrt(tokens.var(axis=1, keepdims=True) + eps) * weight + bias


def gelu(x):
    """x times the probability that a standard normal variable is below x."""
    return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2


def transformer_block(tokens, parameters, heads):
    """(s, c) -> (s, c)."""
    p = parameters
    normed = layer_norm(tokens, p["norm1.weight"], p["norm1.bias"])
    tokens = tokens + multi_head_self_attention(normed, with_prefix(p, "attention."), heads)
    normed = layer_norm(tokens, p["norm2.weight"], p["norm2.bias"])
    hidden = gelu(normed @ p["mlp.0.weight"].T + p["mlp.0.bias"])  # (s, 4 c)
    return tokens + hidden @ p["mlp.2.weight"].T + p["mlp.2.bias"]


def vision_transformer(image, parameters, heads, depth, patch):
    """One image (c, h, w) -> a score for each class, (classes,)."""
    p = parameters
    _, h, w = image.shape
    patches = []
    for row in range(0, h, patch):
        for column in range(0, w, patch):
            pixels = image[:, row : row + patch, column : column + patch]  # (c, patch, patch)
            patches.append(np.moveaxis(pixels, 0, -1).flatten())  # row after row, the channels of a pixel together
    tokens = np.stack(patches) @ p["embed.weight"].T + p["embed.bias"] + p["positions"]
    for i in range(depth):
        tokens = transformer_block(tokens, with_prefix(p, f"blocks.{i}."), heads)
    mean = layer_norm(tokens, p["norm.weight"], p["norm.bias"]).mean(axis=0)
    return p["classify.weight"] @ mean + p["classify.bias"]


def convolution_by_attention(image, weight, bias):
    """A zero-padded 3×3 convolution as attention with nine heads, one for each offset (Cordonnier et al. 2020).

    image: (c, h, w). weight: (out, c, 3, 3). bias: (out,). Returns (out, h, w).
    """
    c, h, w = image.shape
    pixels = [(row, column) for row in range(h) for column in range(w)]
    values = np.vstack([image.reshape(c, h * w).T, np.zeros(c)])  # (h w + 1, c): one for each pixel, and one of zeros
    y = np.tile(bias[:, None], h * w)  # (out, h w)
    for i in range(3):
        for j in range(3):  # the head that attends to the pixel under weight[:, :, i, j]
            for query, (row, column) in enumerate(pixels):
                distances = [(row + i - 1 - r) ** 2 + (column + j - 1 - s) ** 2 for r, s in pixels]
                weights = softmax(-100 * np.array([*distances, 0.5]))  # the zeros win if there is no such pixel
                y[:, query] += weight[:, :, i, j] @ (weights @ values)
    return y.reshape(-1, h, w)
