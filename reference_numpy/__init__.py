"""The lecture's mathematics once more, in plain NumPy: what the tests hold the PyTorch scripts against.

No torch here, no classes, no cleverness: each function is the formula, with the shape beside each step.
"""

from reference_numpy.attention import (
    convolution_by_attention,
    gelu,
    layer_norm,
    multi_head_attention,
    multi_head_self_attention,
    self_attention,
    softmax,
    transformer_block,
    vision_transformer,
)
from reference_numpy.diffusion import (
    denoise,
    denoising_loss,
    guide,
    ideal_denoiser,
    noise_levels,
    sample_ddim,
    sample_dpm,
    sample_heun,
    starting_noise,
)
from reference_numpy.embedding import timestep_embedding
from reference_numpy.frechet import frechet_distance
from reference_numpy.kernel import kernel_distance
from reference_numpy.layers import (
    convolution,
    group_norm,
    linear,
    pixel_shuffle,
    pixel_unshuffle,
    silu,
    upsample,
)
from reference_numpy.unet import cond_unet, residual_block

__all__ = [
    "cond_unet",
    "convolution",
    "convolution_by_attention",
    "denoise",
    "denoising_loss",
    "frechet_distance",
    "gelu",
    "group_norm",
    "guide",
    "ideal_denoiser",
    "kernel_distance",
    "layer_norm",
    "linear",
    "multi_head_attention",
    "multi_head_self_attention",
    "noise_levels",
    "pixel_shuffle",
    "pixel_unshuffle",
    "residual_block",
    "sample_ddim",
    "sample_dpm",
    "sample_heun",
    "self_attention",
    "silu",
    "softmax",
    "starting_noise",
    "timestep_embedding",
    "transformer_block",
    "upsample",
    "vision_transformer",
]
