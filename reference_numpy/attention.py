"""Pixels look at each other (Vaswani et al. 2017, section 3.2)."""

import numpy as np


def softmax(scores):
    """Positive weights that sum to one along the last axis; a larger score gets a larger weight."""
    positive = np.exp(scores - scores.max(axis=-1, keepdims=True))  # the shift changes nothing but avoids overflow
    return positive / positive.sum(axis=-1, keepdims=True)


def self_attention(q, k, v):
    """Queries, keys and values, each (tokens, d) -> for each token the weighted average of the values, (tokens, d)."""
    scores = q @ k.T / np.sqrt(q.shape[1])  # (tokens, tokens): how well query i fits key j
    return softmax(scores) @ v


def group_norm(x, groups, weight, bias, eps=1e-5):
    """(n, c, h, w): each image's channels in groups, each group to mean 0 and variance 1, then scaled and shifted."""
    n, c, h, w = x.shape
    grouped = x.reshape(n, groups, -1)
    normed = (grouped - grouped.mean(axis=2, keepdims=True)) / np.sqrt(grouped.var(axis=2, keepdims=True) + eps)
    return normed.reshape(n, c, h, w) * weight[:, None, None] + bias[:, None, None]


def multi_head_self_attention(x, parameters, heads, groups=1):
    """(n, c, h, w) -> (n, c, h, w). parameters: a dictionary with the names of the PyTorch module, as arrays."""
    p = parameters
    n, c, h, w = x.shape
    d = c // heads
    normed = group_norm(x, groups, p["norm.weight"], p["norm.bias"])
    y = np.empty_like(x)
    for i in range(n):
        tokens = normed[i].reshape(c, h * w).T  # (h w, c)
        q, k, v = np.split(tokens @ p["qkv.weight"].T + p["qkv.bias"], 3, axis=1)  # (h w, c) each
        heard = np.empty_like(q)
        for head in range(heads):
            columns = slice(head * d, (head + 1) * d)
            heard[:, columns] = self_attention(q[:, columns], k[:, columns], v[:, columns])
        projected = heard @ p["proj.weight"].T + p["proj.bias"]  # (h w, c)
        y[i] = x[i] + projected.T.reshape(c, h, w)
    return y
