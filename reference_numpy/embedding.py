"""A number becomes a vector (Vaswani et al. 2017, section 3.5)."""

import numpy as np


def timestep_embedding(timesteps, dim, max_period=10_000):
    """(n,) -> (n, dim): column k is sin(t · f_k), column half + k is cos(t · f_k), with half = dim // 2.

    The frequencies f_k = max_period ** (-k / (half - 1)) go from 1 down to 1 / max_period. An odd dim gets a last
    column of zeros.
    """
    half = dim // 2
    frequencies = max_period ** -np.linspace(0, 1, half)  # (half,)
    angles = np.outer(timesteps, frequencies)  # (n, half)
    embedding = np.zeros((len(timesteps), dim))
    embedding[:, :half] = np.sin(angles)
    embedding[:, half : 2 * half] = np.cos(angles)
    return embedding


def shift_matrix(shift, dim, max_period=10_000):
    """The (dim, dim) matrix that takes the embedding of t to that of t + shift: it rotates each (sin, cos) pair."""
    half = dim // 2
    matrix = np.zeros((dim, dim))
    for k, frequency in enumerate(max_period ** -np.linspace(0, 1, half)):
        sine, cosine = np.sin(shift * frequency), np.cos(shift * frequency)
        pair = [k, half + k]
        matrix[np.ix_(pair, pair)] = [[cosine, sine], [-sine, cosine]]
    return matrix
