"""A Kolmogorov-Arnold network that solves one Poisson problem is adapted to another by Tucker updates (LoTRA).

    python -m examples.kan

The network learns u with -Laplace u = f on a square and u = 0 on its edge, as physics-informed networks do: the loss is
the mean square of Laplace u + f on a grid. Each layer holds a tensor of spline coefficients. LoTRA (Gao, Ng and Tan,
arXiv 2502.06153) freezes this tensor and trains a Tucker update of its shape, whose core and factors may want different
learning rates. The program trains the network on one f, adapts it to another in several ways, and prints the errors.
"""

if __name__ == "__main__":  # as a module, or as a file
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).parents[1]))

    import tenslora.harness.early  # noqa: F401  catches Ctrl-C from here on

import copy
import math

import torch
from torch import nn

from tenslora import adapt_tensor
from tenslora.harness.commands import command_parser, mistakes_in_one_line

WIDTHS, SPLINES = (2, 12, 12, 1), 8


class SplineLayer(nn.Module):
    """y_o = sum_i sum_k c[o, i, k] B_k(x_i), where B_k are cubic B-splines on a uniform grid over [-1, 1]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.coefficients = nn.Parameter(0.1 * torch.randn(outputs, inputs, SPLINES) / math.sqrt(inputs))
        self.spacing = 2 / (SPLINES - 3)
        self.register_buffer("centres", -1 + self.spacing * (torch.arange(SPLINES) - 1))

    def forward(self, x: torch.Tensor, dx: torch.Tensor, ddx: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """From x (points, inputs) and its derivatives along both axes (2, points, inputs) to the outputs' own."""
        t = (x.unsqueeze(-1) - self.centres) / self.spacing
        near, far = (1 - t.abs()).clamp(min=0), (2 - t.abs()).clamp(min=0)
        basis = (far**3 - 4 * near**3) / 6
        first = -t.sign() * (far**2 - 4 * near**2) / (2 * self.spacing)
        second = (far - 4 * near) / self.spacing**2
        c, dx, ddx = self.coefficients.flatten(1).T, dx.unsqueeze(-1), ddx.unsqueeze(-1)
        return basis.flatten(1) @ c, (first * dx).flatten(2) @ c, (second * dx**2 + first * ddx).flatten(2) @ c


class KAN(nn.Module):
    """A small Kolmogorov-Arnold network on the square [-1, 1]^2 that is zero on the square's edge."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(map(SplineLayer, WIDTHS[:-1], WIDTHS[1:]))

    def forward(self, points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """From points (n, 2) to u and Laplace u, (n,) each."""
        dx = torch.eye(2).unsqueeze(1).expand(2, len(points), 2)
        y, dy, ddy = self.layers[0](points, dx, torch.zeros_like(dx))
        for layer in self.layers[1:]:
            z = torch.tanh(y)
            slope = 1 - z**2
            y, dy, ddy = layer(z, slope * dy, slope * (ddy - 2 * z * dy**2))
        y, dy, ddy = y.squeeze(-1), dy.squeeze(-1), ddy.squeeze(-1)
        # u = w y with w = (1 - a^2) (1 - b^2), and the product rule on both axes.
        side = 1 - points.T**2
        other = side.flip(0)
        laplace = side.prod(0) * ddy + 2 * (-2 * points.T * other) * dy - 2 * other * y
        return side.prod(0) * y, laplace.sum(0)


def problem(size: int, waves: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The inner points of a grid over the square, and u = sin(a pi x) sin(b pi y) there with its f."""
    line = torch.linspace(-1, 1, size + 2)[1:-1]
    points = torch.cartesian_prod(line, line)
    u = (math.pi * torch.tensor(waves) * points).sin().prod(1)
    return points, u, sum(wave**2 for wave in waves) * math.pi**2 * u


def train(model: KAN, waves: tuple[int, int], groups: list[dict], steps: int) -> float:
    """Train on one problem's f, and return the relative error of u on a finer grid."""
    points, _, f = problem(12, waves)
    optimizer = torch.optim.AdamW(groups, weight_decay=0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        loss = (model(points)[1] + f).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        points, u, _ = problem(41, waves)
        return ((model(points)[0] - u).norm() / u.norm()).item()


def adapt(model: KAN, waves: tuple[int, int], lr: float, core_lr_ratio: float, scaling: str, steps: int):
    """Train a Tucker update of each layer's coefficients, and return the number of its parameters and the error."""
    updates = [
        adapt_tensor(layer, "coefficients", ranks=4, scaling=scaling, seed=index)
        for index, layer in enumerate(model.layers)
    ]
    cores = [update.tensor.core for update in updates]
    factors = [p for update in updates for name, p in update.tensor.named_parameters() if name != "core"]
    groups = [{"params": factors, "lr": lr}, {"params": cores, "lr": core_lr_ratio * lr}]
    return sum(p.numel() for p in cores + factors), train(model, waves, groups, steps)


def compare(seed: int, steps: int, lr: float) -> dict[str, tuple[int, float]]:
    """For each way to adapt, the number of trained parameters and the relative error on the second problem."""
    torch.manual_seed(seed)
    backbone = KAN()
    first, second = (1, 1), (1, 2)
    error = train(backbone, first, [{"params": backbone.parameters(), "lr": lr}], 2 * steps)
    print(f"seed {seed}: relative error {error:.3f} on the first problem")

    full = copy.deepcopy(backbone)
    count = sum(p.numel() for p in full.parameters())
    rows = {"full fine-tuning": (count, train(full, second, [{"params": full.parameters(), "lr": lr}], steps))}
    for scaling in ("direct", "first_step"):
        for ratio in (0.25, 1, 4):
            row = f"Tucker, {scaling}, core_lr_ratio {ratio:g}"
            rows[row] = adapt(copy.deepcopy(backbone), second, lr, ratio, scaling, steps)
    return rows


def main(steps: int = 200, lr: float = 2e-2, seeds: int = 3) -> dict[str, tuple[int, list[float]]]:
    """Print and return, for each way to adapt, the number of trained parameters and each seed's relative error."""
    runs = [compare(seed, steps, lr) for seed in range(seeds)]
    rows = {row: (count, sorted(run[row][1] for run in runs)) for row, (count, _) in runs[0].items()}
    print(f"\n{'on the second problem':40} parameters   relative error of each seed")
    for row, (count, errors) in rows.items():
        print(f"{row:40} {count:10}   {'  '.join(f'{error:.3f}' for error in errors)}")
    return rows


if __name__ == "__main__":
    with mistakes_in_one_line():
        command_parser("examples.kan", __doc__).parse_args()
        main()
