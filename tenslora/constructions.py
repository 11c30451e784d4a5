"""The ways to stack attention updates into tensors, as data.

A backbone has L layers, P projections per layer and H heads. The update of projection p in layer l is a
matrix dW[p, l] of shape (d_in, d_out), d_out = H * d_head. A construction says which of the axes head,
projection and depth are stacked into one tensor (arXiv 2509.19391, section 2). The d_in mode is the side of the
residual stream, the d_out mode the side inside the block: a matrix that writes to the stream is adapted by its
transposed slice. Nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from tenslora.errors import TensLoRAError

HEAD, PROJECTION, DEPTH = "head", "projection", "depth"
SITE = "site"  # projection and depth as one axis, of P * L places: index = projection * L + layer

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
"""Name of each construction and the set S of axes it stacks: LoRA, the paper's seven, and the two of FacT and CaRA."""

PAPER_CONSTRUCTIONS = tuple(name for name, stacked in CONSTRUCTIONS.items() if SITE not in stacked)
"""The rows of the paper's tables."""

# What else of a tensor is chosen by name; the modules that act on it need torch, the check of the settings does not.
INITS = ("orthogonal", "normal", "kaiming_uniform")
HEAD_LAYOUTS = ("aligned", "interleaved")
TENSOR_SEEDS = ("distinct", "equal")


ATTENTION = {"q": "query", "k": "key", "v": "value", "o": "output"}


def adapted_matrices(adapt: str, gated: bool = False) -> tuple[str, ...]:
    """Which weight matrices of a layer an adapter is on, in the order of the projection axis.

    adapt: letters of q, k, v and o (the attention's output), in that order; mlp, the feed-forward block's two (three
    where it is gated); or all. Raises TensLoRAError for anything else.

    >>> adapted_matrices("qv"), adapted_matrices("all")
    (('query', 'value'), ('query', 'key', 'value', 'output', 'up', 'down'))
    """
    feed_forward = ("gate", "up", "down") if gated else ("up", "down")
    if adapt == "mlp":
        return feed_forward
    if adapt == "all":
        return (*ATTENTION.values(), *feed_forward)
    if not adapt or adapt != "".join(letter for letter in ATTENTION if letter in adapt):
        raise TensLoRAError(f"adapt={adapt}: must be letters of qkvo in that order, or mlp, or all")
    return tuple(ATTENTION[letter] for letter in adapt)


@dataclass(frozen=True)
class Geometry:
    """The dimensions of a backbone's layers, and which of their matrices are adapted.

    d_in: width of the residual stream, which every adapted matrix reads or writes. heads (H) and d_head: of the
    attention inside. layers (L): how many layers. adapt: see `adapted_matrices`. kv_heads: fewer than H where groups
    of heads share their key and value; None: H. d_ff: width inside the feed-forward block, needed only to adapt it.
    gated: whether that has a gate beside its first matrix.
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
        for name in ("d_in", "heads", "d_head", "layers", "kv_heads", "d_ff"):
            size = getattr(self, name)
            if size is not None and size < 1:
                raise TensLoRAError(f"{name}={size}: must be at least 1")
        if self.d_ff is None and {"up", "down"} & set(self.matrices):
            raise TensLoRAError(f"adapt={self.adapt}: needs d_ff, the feed-forward block's width")

    @property
    def d_out(self) -> int:
        return self.heads * self.d_head

    @property
    def matrices(self) -> tuple[str, ...]:
        """Names of the adapted matrices of one layer."""
        return adapted_matrices(self.adapt, self.gated)

    @property
    def widths(self) -> tuple[int, ...]:
        """How wide each adapted matrix is on the side away from the residual stream."""
        narrow = (self.kv_heads or self.heads) * self.d_head
        inside = {"key": narrow, "value": narrow, "gate": self.d_ff, "up": self.d_ff, "down": self.d_ff}
        return tuple(inside.get(name) or self.d_out for name in self.matrices)

    @property
    def slices_per_matrix(self) -> tuple[int, ...]:
        """How many slices of width d_out each matrix takes on the projection axis; it may fill the last one in part."""
        return tuple(-(-width // self.d_out) for width in self.widths)

    @property
    def projections(self) -> int:
        """The size P of the projection axis: 3 for query, key and value."""
        return sum(self.slices_per_matrix)


def stacked_axes(construction: str) -> frozenset[str]:
    """The set S of a construction.

    Raises TensLoRAError for an unknown name.
    """
    try:
        return CONSTRUCTIONS[construction]
    except KeyError:
        raise TensLoRAError(f"tensor_mode={construction}: must be one of {', '.join(CONSTRUCTIONS)}") from None


def modes(construction: str, geometry: Geometry, matrix: int = 0) -> dict[str, int]:
    """Name and size of each mode of one tensor, in order.

    d_in, then d_out or (d_head, head), then projection and depth, or site, if stacked. Where projections are not
    stacked, a tensor is as wide as its own matrix; where they are, a wider matrix takes several slices and a narrower
    one a part of its slice (`Geometry.slices_per_matrix`).

    >>> modes("att_qkv", Geometry(d_in=768, heads=12, d_head=64, layers=12))
    {'d_in': 768, 'd_head': 64, 'head': 12, 'projection': 3}

    matrix: which of the geometry's. Raises TensLoRAError if its width does not divide into heads.
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


def tensor_grid(construction: str, geometry: Geometry) -> tuple[int, int]:
    """How many tensors there are, as (over matrices, over layers): 1 where the axis is stacked.

    >>> tensor_grid("depth", Geometry(d_in=768, heads=12, d_head=64, layers=12))
    (3, 1)
    """
    stacked = stacked_axes(construction)
    return (
        1 if stacked & {PROJECTION, SITE} else len(geometry.matrices),
        1 if stacked & {DEPTH, SITE} else geometry.layers,
    )
