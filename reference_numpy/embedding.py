"""A number becomes a vector (Vaswani et al. 2017, section 3.5), and what a denoiser can at best make of it."""

import numpy as np

from reference_numpy.attention import softmax


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


def rotation(shift, dim, max_period=10_000):
    """The (dim, dim) matrix that takes the embedding of t to that of t + shift: each pair of columns turns alone."""
    half = dim // 2
    matrix = np.zeros((dim, dim))
    for k, frequency in enumerate(max_period ** -np.linspace(0, 1, half)):
        sine, cosine = np.sin(shift * frequency), np.cos(shift * frequency)
        pair = [k, half + k]
        matrix[np.ix_(pair, pair)] = [[cosine, sine], [-sine, cosine]]
    return matrix


def ideal_denoiser(x, sigma, peaks, shares, peak_width):
    """One noisy pixel x, a mixture of Gaussian peaks with noise of level sigma -> the mean of what it may have been."""
    variance = peak_width**2 + sigma**2  # a peak of noisy pixels is as wide as the peak and the noise together
    weights = softmax(np.log(shares) - (x - peaks) ** 2 / (2 * variance))  # (peaks,): Bayes' rule
    means = peaks + (x - peaks) * peak_width**2 / variance  # (peaks,): the noise's part of the way back to the peak
    return weights @ means
