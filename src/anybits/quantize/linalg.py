"""Least squares over sign planes, many small positive definite systems at once, and chunks on cores.

LAPACK is called once per matrix and costs microseconds each; here one elementwise operation eliminates
the same entry of all matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import torch

# Added to the diagonal of the normal equations, relative to it: planes that coincide in a group give a
# finite answer, and the error that this costs elsewhere is its square.
RIDGE = 1e-7


def solve(matrices: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Solve `[q, q, R]` @ x = `[q, R]` for x `[q, R]` by elimination without pivoting; positive definite only."""
    size = matrices.shape[0]
    rows = torch.cat([matrices, right[:, None]], dim=1)
    for k in range(size - 1):
        factors = rows[k + 1 :, k] / rows[k, k]
        rows[k + 1 :, k + 1 :] -= factors[:, None] * rows[k, k + 1 :]
    solution = rows[:, size]
    for k in range(size - 1, -1, -1):
        solution[k] /= rows[k, k]
        solution[:k] -= rows[:k, k] * solution[k]
    return solution.clone()


def inverse(matrices: torch.Tensor) -> torch.Tensor:
    """Invert `[q, q, R]` by Gauss-Jordan elimination without pivoting; positive definite only."""
    out = matrices.clone()
    for k in range(out.shape[0]):
        pivot = out[k, k].clone()
        column = out[:, k].clone()
        column[k] = 0
        row = out[k] / pivot
        row[k] = 1 / pivot
        out[:, k] = 0
        out -= column[:, None] * row
        out[k] = row
    return out


def apply(matrices: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """Return `[q, q, R]` @ `[q, R]` as `[q, R]`."""
    return (matrices * vectors).sum(1)


def design(precision: int, symmetric: bool, like: torch.Tensor) -> torch.Tensor:
    """Return float64 `[q, 2**precision]`: the sign of each plane in each code, then ones for the offset."""
    codes = torch.arange(2**precision, device=like.device)
    planes = torch.arange(precision - 1, -1, -1, device=like.device)
    signs = (codes >> planes[:, None] & 1).double() * 2 - 1
    return signs if symmetric else torch.cat([signs, torch.ones_like(signs[:1])])


def normal_matrix(design: torch.Tensor, mass: torch.Tensor) -> torch.Tensor:
    """Return the normal matrices `[q, q, R]` of codes that hold mass `[C, R]`, ridge included."""
    size = len(design)
    products = (design[:, None] * design).view(size * size, -1)
    normal = (products @ mass).view(size, size, -1)
    normal.diagonal().add_(ridge(mass.sum(0))[:, None])
    return normal


def ridge(mass: torch.Tensor) -> torch.Tensor:
    """Return what is added to the diagonal of groups whose weights sum to mass `[R]`."""
    # A group without any weight still needs a positive pivot.
    return (mass * RIDGE).clamp_min(1e-200)


def mean(values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return the weighted mean `[R]` of `[R, g]`, 0 where no weight lies."""
    total = weights.sum(1)
    return torch.where(total > 0, (values * weights).sum(1) / total.clamp_min(1e-200), 0.0)


def least_squares(
    signs: torch.Tensor, values: torch.Tensor, weights: torch.Tensor | None, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the scales `[R, p]` and offsets `[R]` of least sum_k h_k (w_k - offset - sum_i scale_i b_ik)^2.

    signs: {-1, +1} `[R, p, g]`; values: float32 or float64 `[R, g]`, the dtype of the sums and the result; weights
    h >= 0: `[R, g]` or None. Offsets are zeros when symmetric. Planes that coincide share their scale.
    """
    rows, planes, columns = signs.shape
    heavy = torch.ones_like(values) if weights is None else weights.to(values.dtype)
    centre = values.new_zeros(rows) if symmetric else mean(values, heavy)
    basis = signs.to(values.dtype)
    if not symmetric:
        basis = torch.cat([basis, basis.new_ones(rows, 1, columns)], dim=1)
    weighted = basis * heavy[:, None]
    normal = torch.bmm(weighted, basis.transpose(1, 2)).permute(1, 2, 0).double()
    right = torch.bmm(weighted, (values - centre[:, None])[..., None])[..., 0].T.double()
    # Sums in float32 are good to about seven digits: a ridge below them would not hold.
    share = RIDGE if values.dtype == torch.float64 else 10 * RIDGE
    normal.diagonal().add_((heavy.sum(1, dtype=torch.float64) * share).clamp_min(1e-200)[:, None])
    found = solve(normal, right).to(values.dtype)
    offsets = torch.zeros_like(centre) if symmetric else found[planes] + centre
    return found[:planes].T.contiguous(), offsets


def for_each_chunk(work: Callable[[int], None], starts: Iterable[int], device: torch.device) -> None:
    """Call `work` for each start, on a CPU with one chunk per core.

    A chunk is thousands of operations of microseconds: splitting each over cores costs more in barriers than it
    gains. So every chunk has one core to itself, which also makes its sums the same on every number of cores.
    """
    threads, inference = torch.get_num_threads(), torch.is_inference_mode_enabled()

    def run(start: int) -> None:
        # Autograd's modes belong to a thread too: a worker takes over the caller's, and never records.
        with torch.inference_mode(inference), torch.no_grad():
            work(start)

    if device.type != "cpu":
        for start in starts:
            run(start)
        return
    try:
        # OpenMP's thread count belongs to the calling thread: the workers' does not touch the caller's.
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            list(pool.map(run, starts))
    finally:
        # MKL's is global, so the workers changed it.
        torch.set_num_threads(threads)
