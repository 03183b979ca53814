"""The lecture's mathematics once more, in plain NumPy: what the tests hold the PyTorch scripts against.

No torch here, no classes, no cleverness: each function is the formula, with the shape beside each step.
"""

from reference_numpy.attention import multi_head_self_attention, self_attention, softmax
from reference_numpy.embedding import timestep_embedding

__all__ = ["multi_head_self_attention", "self_attention", "softmax", "timestep_embedding"]
