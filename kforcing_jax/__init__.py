"""K-Forcing in JAX: distil an autoregressive model into one that emits k tokens per forward pass.

Array names carry their shape. B batch, N context positions, K window length, A anchors (prefix positions
that windows hang from), G tokens in the group at one anchor, P earlier window tokens, S prefix (cache)
length, T tokens, H heads, C head width, D model width, F noise features, V vocabulary, L layers.
"""

__version__ = "0.1.0"
