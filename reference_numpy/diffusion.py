"""From noise to images: the denoiser, guidance, and the samplers (Karras et al. 2022).

A noisy image is x = x0 + sigma · noise. A denoiser predicts x0 from x and sigma: x0_hat.
"""

import numpy as np

from reference_numpy.attention import softmax
from reference_numpy.layers import pixel_shuffle, pixel_unshuffle


def denoise(network, x, sigma, label, sigma_data, patch, time_scale):
    """Noisy images x (n, c, h, w) and their sigma (n,) -> x0_hat (n, c, h, w).

    network(x, time, label): see `cond_unet`. sigma_data: standard deviation of the images. patch: side of the patches
    whose pixels become the network's channels. time_scale: the network's time is time_scale · ln(sigma) / 4.
    """
    s = sigma[:, None, None, None]  # (n, 1, 1, 1)
    c_skip = sigma_data**2 / (s**2 + sigma_data**2)  # how much of x stays
    c_out = s * sigma_data / np.sqrt(s**2 + sigma_data**2)  # standard deviation of the rest, x0 - c_skip x
    c_in = 1 / np.sqrt(s**2 + sigma_data**2)  # scales the network's input to variance 1
    h = network(pixel_unshuffle(c_in * x, patch), time_scale * np.log(sigma) / 4, label)
    return c_skip * x + c_out * pixel_shuffle(h, patch)


def denoising_loss(x0_hat, x0, sigma, sigma_data):
    """(n,): the mean squared error per image, divided by c_out²: the error of the network's own output."""
    squared = (x0_hat - x0) ** 2
    return squared.mean(axis=(1, 2, 3)) * (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2


def ideal_denoiser(x, sigma, images):
    """Noisy x (n, c, h, w), one number sigma, and the whole data set, (m, c, h, w) -> for each x the best guess of
    x0, (n, c, h, w): the mean of all images, each weighted by how likely the noise x - image is (Bayes' rule)."""
    x0_hat = np.empty_like(x)
    for i in range(len(x)):
        squared = ((x[i] - images) ** 2).sum(axis=(1, 2, 3))  # (m,): the squared distance to each image
        weights = softmax(-squared / (2 * sigma**2))  # (m,)
        x0_hat[i] = np.tensordot(weights, images, axes=1)  # (c, h, w)
    return x0_hat


def guide(with_label, without, guidance):
    """x0_hat with and without the label -> a point on the line through both, past the first (Ho and Salimans 2022)."""
    return with_label + guidance * (with_label - without)


def noise_levels(steps, sigma_min, sigma_max, rho=7):
    """(steps + 1,): from sigma_max down to sigma_min, denser towards the small ones, and then 0 (equation 5)."""
    sigmas = np.zeros(steps + 1)
    for i in range(steps):
        way = i / max(steps - 1, 1)  # from 0 to 1
        sigmas[i] = (sigma_max ** (1 / rho) + way * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho
    return sigmas


# Each sampler takes denoise(x, sigma), with one number sigma; noise (n, c, h, w) of variance 1; and noise levels
# that fall to 0. It returns x at each of them: the first is pure noise, the last the images.


def sample_ddim(denoise, noise, sigmas):
    """Split x into x0_hat and noise, and mix them again at the next noise level (Song et al. 2021)."""
    states = [sigmas[0] * noise]
    for i in range(len(sigmas) - 1):
        x = states[-1]
        x0_hat = denoise(x, sigmas[i])
        noise_hat = (x - x0_hat) / sigmas[i]
        states.append(x0_hat + sigmas[i + 1] * noise_hat)
    return states


def sample_dpm(denoise, noise, sigmas):
    """DPM-Solver++(2M): DDIM's step, with x0_hat extrapolated half a step ahead (Lu et al. 2022, algorithm 2)."""
    states = [sigmas[0] * noise]
    x0_hats = []
    for i in range(len(sigmas) - 1):
        x = states[-1]
        x0_hat = denoise(x, sigmas[i])
        x0_hats.append(x0_hat)
        if sigmas[i + 1] == 0:  # all noise is gone, and x0_hat remains
            states.append(x0_hat)
            continue
        step = np.log(sigmas[i] / sigmas[i + 1])
        if i > 0:
            r = np.log(sigmas[i - 1] / sigmas[i]) / step
            x0_hat = (1 + 1 / (2 * r)) * x0_hat - 1 / (2 * r) * x0_hats[i - 1]
        states.append(sigmas[i + 1] / sigmas[i] * x - (np.exp(-step) - 1) * x0_hat)
    return states


def sample_heun(denoise, noise, sigmas):
    """Follow the mean of the slopes dx / dsigma at both ends of the step (Karras et al. 2022, algorithm 1)."""
    states = [sigmas[0] * noise]
    for i in range(len(sigmas) - 1):
        x = states[-1]
        slope = (x - denoise(x, sigmas[i])) / sigmas[i]
        x_next = x + (sigmas[i + 1] - sigmas[i]) * slope
        if sigmas[i + 1] > 0:
            slope_next = (x_next - denoise(x_next, sigmas[i + 1])) / sigmas[i + 1]
            x_next = x + (sigmas[i + 1] - sigmas[i]) * (slope + slope_next) / 2
        states.append(x_next)
    return states


def sample_flow(denoise, noise, times):
    """Flow matching: as t grows, z = (1 - t) x0 + t noise moves with velocity noise - x0 (Lipman et al. 2023).
    times: from below 1 down to 0. Returns z at each of them."""
    states = [times[0] * noise]
    for i in range(len(times) - 1):
        z, t = states[-1], times[i]
        x0_hat = denoise(z / (1 - t), t / (1 - t))
        noise_hat = (z - (1 - t) * x0_hat) / t
        states.append(z + (times[i + 1] - t) * (noise_hat - x0_hat))
    return states
