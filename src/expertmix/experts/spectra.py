"""Singular values and vectors of adapters, without ever forming `B @ A`.

Aligned pair (SpectR, arXiv 2504.03454): scale * B @ A = U S Vᵀ, B* = U S, A* = Vᵀ. With thin
B = Q_B R_B and Aᵀ = Q_A R_A only the small core scale * R_B @ R_Aᵀ needs an SVD, so the cost is
O((m + n) r²). Deterministic; float32 or better inside.

Knows no model and no router.

Legend: m rows and n columns of the weight, r rank of the adapter, s directions that are not null.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from expertmix.experts.lora import Adapter, Factors

_NULL = 4.0  # times r * eps * the largest: what rounding alone leaves in a null direction


@dataclass(frozen=True, eq=False)
class Spectrum:
    """scale * B @ A of one adapter at one module, as left * singular @ right.

    Attributes:
        left: U, (m, s), columns of unit length.
        singular: S, (s,), falling, all above zero.
        right: Vᵀ, (s, n), rows of unit length; the largest entry of each is positive.
    """

    left: Tensor
    singular: Tensor
    right: Tensor

    @property
    def rank(self) -> int:
        """s: 0 where the adapter does nothing."""
        return len(self.singular)

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features) of the weight that it fits."""
        return self.left.shape[0], self.right.shape[1]


@dataclass(frozen=True, eq=False)
class Spectra:
    """One adapter, decomposed.

    Attributes:
        name: Of the adapter.
        digest: Hash of the factors from which it was made.
        modules: A spectrum per module.
        base: The base model as the adapter's config names it.
    """

    name: str
    digest: str
    modules: Mapping[str, Spectrum]
    base: str = ""


def decompose(factors: Factors) -> Spectrum:
    """The thin SVD of scale * B @ A, null directions dropped, in float32 or better.

    A direction is null where its singular value is within rounding of zero. Signs are those that
    make the largest entry of each right vector positive, so that (-A, -B) gives the same.
    """
    # not promote_types: it knows no float8
    dtype = torch.float64 if factors.down.dtype == torch.float64 else torch.float32
    down_rn, up_mr = factors.down.detach().to(dtype), factors.up.detach().to(dtype)
    q_nk, r_kr = torch.linalg.qr(down_rn.T)
    q_mk, l_kr = torch.linalg.qr(up_mr)
    left_kk, singular_k, right_kk = torch.linalg.svd(
        factors.scale * (l_kr @ r_kr.T), full_matrices=False
    )
    count = _not_null(singular_k)
    right_sn = right_kk[:count] @ q_nk.T
    left_ms = q_mk @ left_kk[:, :count]
    signs_s = _signs(right_sn)
    return Spectrum(left_ms * signs_s, singular_k[:count], right_sn * signs_s[:, None])


def decompose_adapter(adapter: Adapter) -> Spectra:
    """The spectrum of every module of an adapter."""
    modules = {module: decompose(factors) for module, factors in adapter.factors.items()}
    return Spectra(adapter.name, adapter.digest, modules, adapter.base)


def _not_null(singular_k: Tensor) -> int:
    """How many of the falling singular values are above what rounding leaves."""
    kind = torch.finfo(singular_k.dtype)
    largest = float(singular_k[0]) if len(singular_k) else 0.0
    limit = max(_NULL * len(singular_k) * kind.eps * largest, kind.tiny)
    return int((singular_k > limit).sum())


def _signs(right_sn: Tensor) -> Tensor:
    """(s,) one or minus one."""
    largest_s1 = right_sn.abs().argmax(1, keepdim=True) if right_sn.numel() else right_sn[:, :1]
    picked_s = right_sn.gather(1, largest_s1.long())[:, 0]
    return torch.where(picked_s < 0, -1.0, 1.0).to(right_sn.dtype)
