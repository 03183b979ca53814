"""How far two sets of images are apart, seen through a classifier's features (Heusel et al. 2017)."""

import numpy as np


def square_root(matrix):
    """The symmetric matrix whose square is this symmetric one, (d, d), without negative eigenvalues."""
    values, vectors = np.linalg.eigh(matrix)
    roots = np.sqrt(values.clip(min=0))  # rounding may leave a zero slightly negative
    return vectors @ np.diag(roots) @ vectors.T


def frechet_distance(a, b):
    """Features (n, d) and (m, d) -> the squared Fréchet distance of the Gaussians with their means and covariances.

    |mean_a - mean_b|² + trace(A + B - 2 (A B)^(1/2)). The last root is hard to take, but has the same trace as that of
    A^(1/2) B A^(1/2), which is symmetric.
    """
    mean_a, mean_b = a.mean(axis=0), b.mean(axis=0)  # (d,)
    cov_a = (a - mean_a).T @ (a - mean_a) / (len(a) - 1)  # (d, d)
    cov_b = (b - mean_b).T @ (b - mean_b) / (len(b) - 1)  # (d, d)
    root_a = square_root(cov_a)
    both = square_root(root_a @ cov_b @ root_a)
    return np.sum((mean_a - mean_b) ** 2) + np.trace(cov_a + cov_b - 2 * both)
