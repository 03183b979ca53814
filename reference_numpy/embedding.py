"""A number becomes a vector (Vaswani et al. 2017, section 3.5)."""

import numpy as np


def timestep_embedding(timesteps, dim, max_period=10_000):
    """(n,) -> (n, dim): column k is sin(t · f_k), column dim/2 + k is cos(t · f_k), f from 1 down to 1 / max_period.

    An odd dim gets a last column of zeros.
    """
    half = dim // 2
    frequencies = max_period ** -np.linspace(0, 1, half)  # (half,)
    angles = np.outer(timesteps, frequencies)  # (n, half)
    embedding = np.zeros((len(timesteps), dim))
    embedding[:, :half] = np.sin(angles)
    embedding[:, half : 2 * half] = np.cos(angles)
    return embedding
