"""How far two sets of images are apart, seen through a classifier's features, by comparing every pair of images
(Bińkowski et al. 2018, "Demystifying MMD GANs": the kernel distance, KID)."""

import numpy as np


def kernel_sum(a, b):
    """Features (n, d) and (m, d) -> the sum of (a_i · b_j / d + 1)³ over all pairs; as if of all products of up to
    three features. A thousand rows at a time: 10,000² pairs are a lot of memory."""
    total = 0.0
    for rows in np.array_split(a, len(a) // 1000 + 1):
        k = rows @ b.T / a.shape[1] + 1  # (rows, m)
        total += np.sum(k * k * k)
    return total


def kernel_distance(a, b):
    """Features (n, d) and (m, d) -> the squared distance of their means in the kernel's space of features.

    mean k(a_i, a_j) + mean k(b_i, b_j) - 2 mean k(a_i, b_j). A pair of an image and itself says nothing about the
    others, and is left out: so the expected value is right however few the images, and may fall a little below zero.
    """
    n, m, d = len(a), len(b), a.shape[1]
    own_a, own_b = (np.sum((np.sum(x * x, axis=1) / d + 1) ** 3) for x in (a, b))
    within = (kernel_sum(a, a) - own_a) / (n * (n - 1)) + (kernel_sum(b, b) - own_b) / (m * (m - 1))
    return within - 2 * kernel_sum(a, b) / (n * m)
