"""The settings of an adapter. Nothing here needs torch: settings are checked, and parameters counted, without it."""

from __future__ import annotations

from dataclasses import dataclass, field

from tenslora.constructions import HEAD_LAYOUTS, INITS, SCALINGS, TENSOR_SEEDS, adapted_matrices, stacked_axes
from tenslora.errors import TensLoRAError, require_numbers, require_one_of
from tenslora.factorizations import FACTORIZATIONS
from tenslora.ranks import RankStrategy

LARGEST_SCALE = 1e6
"""The largest factor of the updates. With far larger ones the updates, or even their zeros, are NaN in float32."""


@dataclass(frozen=True)
class AdapterConfig:
    """The settings of an adapter. They do not include the backbone's dimensions, so they suit any backbone.

    Args:
        tensor_mode: the construction, one of `constructions.CONSTRUCTIONS`.
        rank_strategy: how the ranks are chosen; by default so that there are about as many parameters as LoRA has at
            rank 4.
        alpha: multiplies the update; unlike PEFT's lora_alpha, it is not divided by the rank.
        dropout: the probability that an entry of the adapter's input is zeroed in training. Query, key and value of a
            layer share one mask, because they share the input.
        rank_dropout: the probability that a component of h = x @ left is zeroed in a training step, in all tokens at
            once.
        init: how the factors start, see `tensor.FactorizedTensor`. It has no effect on lora, which starts as PEFT's
            LoRA does.
        head_layout: "aligned" or "interleaved", see `Factorization.slices`.
        tensor_seeds: "distinct" draws every tensor from a random stream of its own; "equal" starts all tensors of one
            shape alike, as the paper's released code does.
        scaling: "direct" multiplies the updates by alpha; "first_step" multiplies them by alpha and by the one number
            that gives the adapter the first step of LoRA at rank_strategy.rank, see `first_step.first_step`.
        seed: the seed of the tensors' random streams. Nothing else is drawn from these streams.
        factorization: one of `factorizations.FACTORIZATIONS`. It has no effect on lora, whose tensors are matrices.
        adapt: which matrices of a layer are adapted, see `constructions.adapted_matrices`.

    Raises:
        TensLoRAError: for a value that is out of range; the message names the field, its value and what is valid.
    """

    tensor_mode: str = "qkv_depth"
    rank_strategy: RankStrategy = field(default_factory=RankStrategy)
    alpha: float = 4.0
    dropout: float = 0.0
    rank_dropout: float = 0.0
    init: str = "orthogonal"
    head_layout: str = "aligned"
    tensor_seeds: str = "distinct"
    seed: int = 0
    factorization: str = "tucker"
    adapt: str = "qkv"
    scaling: str = "direct"

    def __post_init__(self) -> None:
        stacked_axes(self.tensor_mode)
        if not isinstance(self.rank_strategy, RankStrategy):
            raise TensLoRAError(
                f"rank_strategy={self.rank_strategy!r}: must be a RankStrategy, such as RankStrategy('isorank')"
            )
        require_numbers(self, "alpha", "dropout", "rank_dropout")
        require_numbers(self, "seed", whole=True)
        for name in ("dropout", "rank_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise TensLoRAError(f"{name}={getattr(self, name)}: must be at least 0 and below 1")
        if not abs(self.alpha) <= LARGEST_SCALE:
            raise TensLoRAError(f"alpha={self.alpha}: must be a finite number, from -1,000,000 to 1,000,000")
        require_one_of("init", self.init, INITS)
        require_one_of("head_layout", self.head_layout, HEAD_LAYOUTS)
        require_one_of("tensor_seeds", self.tensor_seeds, TENSOR_SEEDS)
        require_one_of("scaling", self.scaling, SCALINGS)
        require_one_of("factorization", self.factorization, FACTORIZATIONS)
        adapted_matrices(self.adapt)
        for name, value in vars(self).items():
            if isinstance(value, str):  # an enumeration's or numpy's text becomes Python's, as numbers do
                object.__setattr__(self, name, str.__str__(value))
