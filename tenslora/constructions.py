"""The constructions: which axes of the updates are stacked into one tensor (arXiv 2509.19391, section 2).

A backbone has L layers, P projections per layer and H heads. The update of projection p in layer l is a matrix
dW[p, l] of shape (d_in, d_out), with d_out = H * d_head. A construction stacks some of the axes head, projection and
depth. d_in is always the side of the residual stream and d_out the side inside the block, so a matrix that writes to
the stream is adapted by a transposed slice. Nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from tenslora.errors import TensLoRAError, require_numbers, require_one_of, require_type

HEAD, PROJECTION, DEPTH = "head", "projection", "depth"
SITE = "site"  # projection and depth as one axis of P * L positions: index = projection * L + layer

CONSTRUCTIONS: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        "lora": frozenset(),
        "att": frozenset({HEAD}),
        "qkv": frozenset({PROJECTION}),
        "depth": frozenset({DEPTH}),
        "att_qkv": frozenset({HEAD, PROJECTION}),
        "att_depth": frozenset({HEAD, DEPTH}),
        "qkv_depth": frozenset({PROJECTION, DEPTH}),
        "att_qkv_depth": frozenset({HEAD, PROJECTION, DEPTH}),
        "site": frozenset({SITE}),
        "att_site": frozenset({HEAD, SITE}),
    }
)
"""The axes that each construction stacks: LoRA, the paper's seven, and the two of FacT (site) and CaRA (att_site)."""

PAPER_CONSTRUCTIONS = tuple(name for name, stacked in CONSTRUCTIONS.items() if SITE not in stacked)
"""The rows of the paper's tables."""

# The valid values of four settings. The lists stand here and not in the modules that use them, because checking the
# settings must not import torch.
INITS = ("orthogonal", "normal", "kaiming_uniform")
HEAD_LAYOUTS = ("aligned", "interleaved")
TENSOR_SEEDS = ("distinct", "equal")
SCALINGS = ("direct", "first_step")

_ATTENTION = {"q": "query", "k": "key", "v": "value", "o": "output"}


def adapted_matrices(adapt: str, gated: bool = False) -> tuple[str, ...]:
    """The weight matrices of a layer that `adapt` names, in the order of the projection axis.

    >>> adapted_matrices("qv"), adapted_matrices("all")
    (('query', 'value'), ('query', 'key', 'value', 'output', 'up', 'down'))

    Args:
        adapt: some of the letters q, k, v and o (the attention's output), in that order; "mlp" for the matrices of the
            feed-forward block; or "all".
        gated: whether the feed-forward block has a gate.

    Returns:
        The names of the matrices.

    Raises:
        TensLoRAError: if `adapt` is anything else.
    """
    in_order = "".join(letter for letter in _ATTENTION if letter in str(adapt))
    if not isinstance(adapt, str) or not adapt or adapt not in ("mlp", "all", in_order):
        raise TensLoRAError(f"adapt={adapt}: must be letters of qkvo in that order, or mlp, or all")
    feed_forward = ("gate", "up", "down") if gated else ("up", "down")
    if adapt == "mlp":
        return feed_forward
    if adapt == "all":
        return (*_ATTENTION.values(), *feed_forward)
    return tuple(_ATTENTION[letter] for letter in adapt)


@dataclass(frozen=True)
class Geometry:
    """The dimensions of a backbone's layers, and which of their matrices are adapted.

    Args:
        d_in: the width of the residual stream, which every adapted matrix reads or writes.
        heads: the number of attention heads, H.
        d_head: the width of a head.
        layers: the number of layers, L.
        adapt: which matrices are adapted, see `adapted_matrices`.
        kv_heads: the number of key heads, and of value heads; below H in grouped-query attention. None means H.
        d_ff: the width inside the feed-forward block; needed only to adapt it.
        gated: whether the feed-forward block has a gate beside its first matrix.

    Raises:
        TensLoRAError: for a size that is no whole number or below 1, or if the feed-forward block is to be adapted and
            d_ff is missing.
    """

    d_in: int
    heads: int
    d_head: int
    layers: int
    adapt: str = "qkv"
    kv_heads: int | None = None
    d_ff: int | None = None
    gated: bool = False

    def __post_init__(self) -> None:
        optional = [name for name in ("kv_heads", "d_ff") if getattr(self, name) is not None]
        sizes = ("d_in", "heads", "d_head", "layers", *optional)
        require_numbers(self, *sizes, whole=True)
        for name in sizes:
            if (size := getattr(self, name)) < 1:
                raise TensLoRAError(f"{name}={size}: must be at least 1")
        require_type("gated", self.gated, bool)
        if self.d_ff is None and {"up", "down"} & set(self.matrices):
            raise TensLoRAError(f"adapt={self.adapt}: needs d_ff, the feed-forward block's width")

    @property
    def d_out(self) -> int:
        """The width of all heads together, H * d_head."""
        return self.heads * self.d_head

    @property
    def matrices(self) -> tuple[str, ...]:
        """The names of the adapted matrices of one layer."""
        return adapted_matrices(self.adapt, self.gated)

    @property
    def widths(self) -> tuple[int, ...]:
        """The width of each adapted matrix on the side away from the residual stream."""
        kv_width = (self.kv_heads or self.heads) * self.d_head
        widths = {"key": kv_width, "value": kv_width, "gate": self.d_ff, "up": self.d_ff, "down": self.d_ff}
        return tuple(widths.get(name) or self.d_out for name in self.matrices)

    @property
    def slices_per_matrix(self) -> tuple[int, ...]:
        """How many slices of width d_out each matrix takes on the projection axis: width / d_out, rounded up."""
        return tuple(-(-width // self.d_out) for width in self.widths)

    @property
    def projections(self) -> int:
        """The size P of the projection axis: 3 for query, key and value."""
        return sum(self.slices_per_matrix)


def stacked_axes(construction: str) -> frozenset[str]:
    """The axes that a construction stacks.

    Args:
        construction: the construction's name.

    Returns:
        Some of head, projection and depth, or of head and site.

    Raises:
        TensLoRAError: for an unknown name.
    """
    require_one_of("tensor_mode", construction, CONSTRUCTIONS)
    return CONSTRUCTIONS[construction]


def modes(construction: str, geometry: Geometry, matrix: int = 0) -> dict[str, int]:
    """The modes of one tensor: d_in, then d_out or (d_head, head), then projection, depth or site where stacked.

    >>> modes("att_qkv", Geometry(d_in=768, heads=12, d_head=64, layers=12))
    {'d_in': 768, 'd_head': 64, 'head': 12, 'projection': 3}

    Where projections are stacked, every slice is d_out wide. A wider matrix takes several slices, and a narrower matrix
    takes a part of one slice (`Geometry.slices_per_matrix`). Otherwise each tensor is as wide as its own matrix.

    Args:
        construction: the construction's name.
        geometry: the backbone's dimensions.
        matrix: an index in `Geometry.matrices`, which matters only where projections are not stacked.

    Returns:
        The name and the size of each mode, in order.

    Raises:
        TensLoRAError: if heads are stacked and the width does not divide into heads.
    """
    stacked = stacked_axes(construction)
    width = geometry.d_out if stacked & {PROJECTION, SITE} else geometry.widths[matrix]
    sizes = {"d_in": geometry.d_in}
    if HEAD in stacked:
        if width % geometry.d_head:
            raise TensLoRAError(
                f"tensor_mode={construction}: the {geometry.matrices[matrix]} matrix is {width} wide, which does not "
                f"divide into heads of {geometry.d_head}"
            )
        sizes |= {"d_head": geometry.d_head, HEAD: width // geometry.d_head}
    else:
        sizes |= {"d_out": width}
    if PROJECTION in stacked:
        sizes |= {PROJECTION: geometry.projections}
    if DEPTH in stacked:
        sizes |= {DEPTH: geometry.layers}
    if SITE in stacked:
        sizes |= {SITE: geometry.projections * geometry.layers}
    return sizes


def weight_modes(shape: Sequence[int]) -> dict[str, int]:
    """The modes of an update of any weight tensor: d_out and d_in, as torch orders a weight, then mode_3, mode_4, ...

    >>> weight_modes((64, 32, 3, 3))  # the kernels of a Conv2d
    {'d_out': 64, 'd_in': 32, 'mode_3': 3, 'mode_4': 3}

    Args:
        shape: the weight's shape.

    Returns:
        The name and the size of each mode, in the order of the weight's dimensions.

    Raises:
        TensLoRAError: for fewer than two dimensions, or a dimension of size 0.
    """
    if len(shape) < 2 or min(shape) < 1:
        raise TensLoRAError(f"shape={list(shape)}: must have at least two dimensions, all of size 1 or more")
    names = ("d_out", "d_in", *(f"mode_{position}" for position in range(3, len(shape) + 1)))
    return dict(zip(names, shape, strict=True))


def tensor_grid(construction: str, geometry: Geometry) -> tuple[int, int]:
    """How many tensors a construction has, as the size of a grid of tensors.

    >>> tensor_grid("depth", Geometry(d_in=768, heads=12, d_head=64, layers=12))
    (3, 1)

    Args:
        construction: the construction's name.
        geometry: the backbone's dimensions.

    Returns:
        (rows, columns). There is one row for each adapted matrix of a layer, or a single row if projections are
        stacked; and one column for each layer, or a single column if layers are stacked.
    """
    stacked = stacked_axes(construction)
    return (
        1 if stacked & {PROJECTION, SITE} else len(geometry.matrices),
        1 if stacked & {DEPTH, SITE} else geometry.layers,
    )
