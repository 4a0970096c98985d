"""Kernels: how much a neighbor counts, from how near it is.

All work per sample: a bandwidth is the median of that sample's own neighbors, so samples of a batch
do not influence each other. Weights are made in float64 from logarithms, so a narrow kernel cannot
underflow to a row of zeros.

Legend: B samples, k neighbors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from expertmix.errors import ConfigError


def _check_bandwidth(bandwidth: float | None) -> None:
    if bandwidth is not None and not bandwidth > 0:
        raise ConfigError(f"a bandwidth is above 0, not {bandwidth}; None is the median rule")


class Kernel(Protocol):
    """A weight for each neighbor, before normalization."""

    def log(self, distance_Bk: Tensor, similarity_Bk: Tensor, present_Bk: Tensor) -> Tensor:
        """(B, k) logarithm of the kernel; minus infinity where it is 0."""


@dataclass(frozen=True, slots=True)
class Gaussian:
    """K = exp(−d² / 2h²).

    Attributes:
        bandwidth: h, in units of distance. None is the median rule: h is the median of the
            distances of this sample's own neighbors (of an even number, the lower one of the middle
            two).
    """

    bandwidth: float | None = None

    def __post_init__(self) -> None:
        _check_bandwidth(self.bandwidth)

    def log(self, distance_Bk: Tensor, similarity_Bk: Tensor, present_Bk: Tensor) -> Tensor:
        """−d² / 2h²."""
        return -0.5 * _scaled(distance_Bk, present_Bk, self.bandwidth).square()


@dataclass(frozen=True, slots=True)
class Matern:
    """Matérn kernels of r = d / h.

    ν = 1/2: exp(−r); ν = 3/2: (1 + √3 r) exp(−√3 r); ν = 5/2: (1 + √5 r + 5r²/3) exp(−√5 r).

    Attributes:
        nu: ν: 0.5, 1.5 or 2.5.
        bandwidth: h; None is the median rule, see `Gaussian`.
    """

    nu: float = 1.5
    bandwidth: float | None = None

    def __post_init__(self) -> None:
        _check_bandwidth(self.bandwidth)
        if self.nu not in (0.5, 1.5, 2.5):
            raise ConfigError(f"a Matérn kernel has nu 0.5, 1.5 or 2.5, not {self.nu}")

    def log(self, distance_Bk: Tensor, similarity_Bk: Tensor, present_Bk: Tensor) -> Tensor:
        """The logarithm of the formulas above."""
        r_Bk = _scaled(distance_Bk, present_Bk, self.bandwidth) * math.sqrt(2 * self.nu)
        if self.nu == 0.5:
            return -r_Bk
        square_Bk = r_Bk.square() / 3 if self.nu == 2.5 else torch.zeros_like(r_Bk)
        # where r is infinite the kernel is 0, and log1p(inf) − inf is not a number
        return (torch.log1p(r_Bk + square_Bk) - r_Bk).where(r_Bk.isfinite(), -torch.inf)


@dataclass(frozen=True, slots=True)
class Polynomial:
    """K = max(0, s + offset)^degree of the similarity s.

    Attributes:
        degree: At least 1.
        offset: Added to the similarity.
    """

    degree: int = 2
    offset: float = 1.0

    def __post_init__(self) -> None:
        if self.degree < 1:
            raise ConfigError(f"a polynomial kernel needs a degree of 1 or more, not {self.degree}")

    def log(self, distance_Bk: Tensor, similarity_Bk: Tensor, present_Bk: Tensor) -> Tensor:
        """degree · log(s + offset)."""
        return self.degree * (similarity_Bk.double() + self.offset).clamp(min=0).log()


@dataclass(frozen=True, slots=True)
class Linear:
    """K = max(0, s)."""

    def log(self, distance_Bk: Tensor, similarity_Bk: Tensor, present_Bk: Tensor) -> Tensor:
        """log(s)."""
        return similarity_Bk.double().clamp(min=0).log()


KERNELS: dict[str, Kernel] = {
    "gaussian": Gaussian(),
    "matern": Matern(),
    "matern12": Matern(0.5),
    "matern32": Matern(1.5),
    "matern52": Matern(2.5),
    "polynomial": Polynomial(),
    "linear": Linear(),
}


def kernel_of(name: str | Kernel, bandwidth: float | None = None) -> Kernel:
    """A kernel by name; the bandwidth is for those that have one.

    Raises:
        ConfigError: An unknown name, or a bandwidth for a kernel without one.
    """
    kernel = KERNELS.get(name) if isinstance(name, str) else name
    if kernel is None:
        raise ConfigError(f"unknown kernel {name!r}; known: {', '.join(KERNELS)}")
    if bandwidth is None:
        return kernel
    if isinstance(kernel, Gaussian):
        return Gaussian(bandwidth)
    if isinstance(kernel, Matern):
        return Matern(kernel.nu, bandwidth)
    raise ConfigError(f"kernel {name!r} has no bandwidth: leave it out, or use gaussian or matern")


def weigh(kernel: Kernel, distance_Bk: Tensor, similarity_Bk: Tensor, present_Bk: Tensor) -> Tensor:
    """(B, k) float32 weights that sum to 1 in each row.

    Where the kernel is 0 for every neighbor of a row, all of them count the same. A row without
    neighbors is 0.
    """
    log_Bk = kernel.log(distance_Bk, similarity_Bk, present_Bk).double()
    log_Bk = log_Bk.masked_fill(~present_Bk, -torch.inf)
    dead_B1 = torch.isneginf(log_Bk).all(1, keepdim=True)
    log_Bk = torch.where(dead_B1 & present_Bk, 0.0, log_Bk)
    none_B1 = ~present_Bk.any(1, keepdim=True)
    return log_Bk.masked_fill(none_B1, 0).softmax(1).masked_fill(none_B1, 0).float()


def _scaled(distance_Bk: Tensor, present_Bk: Tensor, bandwidth: float | None) -> Tensor:
    """(B, k) d / h. Where h is 0, what lies at 0 stays there and all else is infinitely far."""
    distance_Bk = distance_Bk.double()
    if bandwidth is not None:
        return distance_Bk / bandwidth
    middle_B1 = distance_Bk.masked_fill(~present_Bk, torch.nan).nanmedian(1, keepdim=True).values
    return torch.where(distance_Bk == 0, 0.0, distance_Bk / middle_B1)
