"""The lecture's mathematics once more, in plain NumPy: what the tests hold the PyTorch scripts against.

No torch here, no classes, no cleverness: each function is the formula, with the shape beside each step.
"""

from reference_numpy.attention import (
    convolution_by_attention,
    gelu,
    group_norm,
    layer_norm,
    multi_head_attention,
    multi_head_self_attention,
    self_attention,
    softmax,
    transformer_block,
    vision_transformer,
)
from reference_numpy.embedding import timestep_embedding

__all__ = [
    "convolution_by_attention",
    "gelu",
    "group_norm",
    "layer_norm",
    "multi_head_attention",
    "multi_head_self_attention",
    "self_attention",
    "softmax",
    "timestep_embedding",
    "transformer_block",
    "vision_transformer",
]
