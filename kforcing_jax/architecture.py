"""What a backbone is made of: one description for the paper's decoder and for the Llama family.

    Architecture(num_layers=12, d_model=768, num_heads=12)                                    # the paper's
    Architecture(num_layers=30, d_model=576, num_heads=9, num_kv_heads=3, d_mlp=1536,        # SmolLM2-135M
                 rope=Rope(base=1e5), tied_embeddings=True, **LLAMA)

`models/` builds the pieces by their names; `config.py` has the fields as `model.*`; `interop/huggingface.py` reads them
from `config.json` or GGUF. Nothing here needs JAX.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import NamedTuple

# Pre-normalisation of every block, and of the output layer. layer_norm has a scale and no bias.
NORMS = ("layer_norm", "rms_norm")
# gelu: D -> F -> D with tanh GELU. swiglu: (SiLU of one product) times another, D -> F -> D.
MLPS = ("gelu", "swiglu")
# Of rotary frequencies, for texts longer than a model was first trained on.
ROPE_SCALINGS = ("default", "linear", "llama3", "yarn")


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary positions: channel c of a head pairs with channel c + C / 2, and turns by base^(-2c / C) per position."""

    base: float = 10_000.0
    scaling: str = "default"  # default | linear | llama3 | yarn
    factor: float = 1.0  # linear, llama3, yarn: low frequencies are divided by it
    original_length: int = 0  # llama3, yarn: positions of the text before scaling
    low_freq_factor: float = 1.0  # llama3: turns in original_length at and below which frequencies are divided
    high_freq_factor: float = 4.0  # llama3: turns above which they stay
    beta_fast: float = 32.0  # yarn: turns in original_length above which frequencies stay
    beta_slow: float = 1.0  # yarn: turns below which they are divided
    truncate: bool = True  # yarn: these bounds are rounded to whole channels
    attention_factor: float = 1.0  # yarn: cosines and sines are multiplied by it

    def problems(self) -> Iterator[str]:
        """What is wrong with the fields, one line each."""
        if self.scaling not in ROPE_SCALINGS:
            yield f"model.rope.scaling = {self.scaling!r} is not one of {', '.join(ROPE_SCALINGS)}"
        if not 1 < self.base < float("inf"):
            yield f"model.rope.base = {self.base} should be above 1, and finite"
        for name in ("factor", "beta_fast", "beta_slow", "attention_factor"):
            if not 0 < getattr(self, name) < float("inf"):
                yield f"model.rope.{name} = {getattr(self, name)} should be positive and finite"
        if self.scaling in ("llama3", "yarn") and self.original_length < 1:
            yield f"model.rope.original_length = {self.original_length} should be at least 1 with {self.scaling}"
        if self.scaling == "llama3" and not 0 < self.low_freq_factor < self.high_freq_factor:
            yield (
                f"model.rope.low_freq_factor = {self.low_freq_factor} should be positive and below "
                f"model.rope.high_freq_factor = {self.high_freq_factor}"
            )


class Product(NamedTuple):
    """A product with one matrix of a block, or with several side by side along the first axis of the outputs."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    has_bias: bool
    parts: int = 1

    @property
    def matrices(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of each."""
        return [(math.prod(self.inputs), math.prod(self.outputs) // self.parts)] * self.parts


@dataclasses.dataclass(frozen=True)
class Architecture:
    """Sizes and pieces of a pre-normalised decoder with rotary positions; the defaults are the paper's pieces."""

    num_layers: int
    d_model: int
    num_heads: int
    num_kv_heads: int = 0  # heads of keys and values, each shared by num_heads / num_kv_heads; 0: num_heads
    d_head: int = 0  # width of a head; 0: d_model / num_heads
    d_mlp: int = 0  # width of the MLP; 0: 4 d_model
    norm: str = "layer_norm"  # layer_norm | rms_norm
    norm_epsilon: float = 1e-5
    mlp: str = "gelu"  # gelu | swiglu
    mlp_bias: bool = True
    qkv_bias: bool = False
    attention_out_bias: bool = False
    qk_norm: bool = False  # RMS normalisation of every head's queries and keys, before they are rotated
    sliding_window: int = 0  # a token sees so many, itself included; 0: all
    tied_embeddings: bool = False  # the output layer is the embedding
    output_bias: bool = True
    rope: Rope = Rope()

    @property
    def head_width(self) -> int:
        """Channels of one head, C; even."""
        return self.d_head or self.d_model // self.num_heads

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.num_kv_heads or self.num_heads

    @property
    def mlp_width(self) -> int:
        """Columns of the MLP, F."""
        return self.d_mlp or 4 * self.d_model

    @property
    def products(self) -> dict[str, Product]:
        """Of one block, by the names that they have among the parameters."""
        width, mlp, heads = (self.d_model,), (self.mlp_width,), (self.num_heads, self.head_width)
        products = {"attn_qkv": Product(width, (3, *heads), self.qkv_bias, 3)}
        if self.kv_heads != self.num_heads:
            shared = 2, self.kv_heads, self.head_width
            products = {
                "attn_q": Product(width, heads, self.qkv_bias),
                "attn_kv": Product(width, shared, self.qkv_bias, 2),
            }
        products["attn_out"] = Product(heads, width, self.attention_out_bias)
        if self.mlp == "swiglu":
            products["mlp_gate"] = Product(width, mlp, self.mlp_bias)
        products["mlp_in"] = Product(width, mlp, self.mlp_bias)
        products["mlp_out"] = Product(mlp, width, self.mlp_bias)
        return products

    @property
    def matrices(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of the matrices of one block; those of queries, keys and values first."""
        return [matrix for product in self.products.values() for matrix in product.matrices]

    @property
    def block_entries(self) -> int:
        """Of all matrices of one block."""
        return sum(inputs * outputs for inputs, outputs in self.matrices)

    def problems(self) -> list[str]:
        """Everything that is wrong with the fields, one line each; none for one that can be built."""
        return [*self._wrong_names(), *self._wrong_sizes(), *self.rope.problems()]

    def _wrong_names(self):
        for name, choices in (("norm", NORMS), ("mlp", MLPS)):
            if getattr(self, name) not in choices:
                yield f"model.{name} = {getattr(self, name)!r} is not one of {', '.join(choices)}"

    def _wrong_sizes(self):
        for name in ("num_layers", "d_model", "num_heads"):
            if getattr(self, name) < 1:
                yield f"model.{name} = {getattr(self, name)} should be at least 1"
        for name in ("num_kv_heads", "d_head", "d_mlp", "sliding_window"):
            if getattr(self, name) < 0:
                yield f"model.{name} = {getattr(self, name)} should be at least 0"
        if not 0 < self.norm_epsilon < 1:
            yield f"model.norm_epsilon = {self.norm_epsilon} is not in (0, 1)"
        if self.num_heads < 1 or self.num_kv_heads < 0:
            return
        if not self.d_head and self.d_model % self.num_heads:
            yield f"model.d_model = {self.d_model} is not divisible by model.num_heads = {self.num_heads}"
        elif self.head_width % 2:
            name = "model.d_head" if self.d_head else "model.d_model / model.num_heads"
            yield f"{name} = {self.head_width} is odd; rotary positions need an even head width"
        if self.num_heads % self.kv_heads:
            yield f"model.num_heads = {self.num_heads} is not divisible by model.num_kv_heads = {self.num_kv_heads}"


# The pieces that all of the Llama family have; what differs between its members is left at Llama's own.
LLAMA = {
    "norm": "rms_norm",
    "mlp": "swiglu",
    "mlp_bias": False,
    "output_bias": False,
}
