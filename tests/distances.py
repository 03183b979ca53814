"""How far apart two sets of images are in the features of a classifier, (n, d) and (m, d)."""

import numpy as np


def frechet_distance(a, b):
    """The squared Fréchet distance of the Gaussians with their means and covariances A and B (Heusel et al. 2017):
    |mean_a - mean_b|² + trace(A + B - 2 (A B)^(1/2))."""
    centred = [(x - x.mean(axis=0)) / np.sqrt(len(x) - 1) for x in (a, b)]
    p, q = (np.linalg.qr(x, mode="r") for x in centred)  # A = pᵀ p and B = qᵀ q
    root_trace = np.linalg.norm(p @ q.T, "nuc")  # the eigenvalues of A B are the squared singular values of p qᵀ
    return np.sum((a.mean(axis=0) - b.mean(axis=0)) ** 2) + np.sum(p**2) + np.sum(q**2) - 2 * root_trace


def kernel_sum(a, b):
    """The sum of the kernel (a_i · b_j / d + 1)³ over all pairs."""
    total = 0.0
    for rows in np.array_split(a, len(a) // 1000 + 1):  # 10,000² pairs at once would take too much memory
        k = rows @ b.T / a.shape[1] + 1
        total += np.sum(k * k * k)
    return total


def kernel_distance(a, b):
    """The squared distance of their means in the kernel's feature space (Bińkowski et al. 2018, "Demystifying MMD
    GANs", KID): mean k(a_i, a_j) + mean k(b_i, b_j) - 2 mean k(a_i, b_j).

    Pairs of an image with itself are left out. So the expected value is right even for few images, and the result may
    fall a little below zero.
    """

    def mean_within(x):
        own = np.sum((np.sum(x * x, axis=1) / x.shape[1] + 1) ** 3)
        return (kernel_sum(x, x) - own) / (len(x) * (len(x) - 1))

    return mean_within(a) + mean_within(b) - 2 * kernel_sum(a, b) / (len(a) * len(b))
