"""The lessons' mathematics again, in plain NumPy; the tests compare the PyTorch scripts with it.

No torch, no classes: each function follows its formula step by step, with the shapes beside the steps. Only the
convolution is written for speed, as an einsum over a view of all windows.
"""

from reference_numpy.attention import (
    attention,
    attention_block,
    causal_attention,
    convolution_by_attention,
    cross_attention,
    gelu,
    layer_norm,
    multi_head_self_attention,
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
    sample_flow,
    sample_heun,
)
from reference_numpy.embedding import shift_matrix, timestep_embedding
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
