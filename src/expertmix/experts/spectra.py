"""Singular values and vectors of adapters, without ever forming `B @ A`.

Aligned pair (SpectR, arXiv 2504.03454): scale * B @ A = U S Vᵀ, B* = U S, A* = Vᵀ. Both sides are
small turns of the factors themselves, Vᵀ = reads @ A and U = B @ writesᵀ, so only r × r matrices
are computed and kept; the vectors are made when asked for. From the Gram matrices in float64,
A Aᵀ = L Lᵀ and Lᵀ BᵀB L = V' S² V'ᵀ; where those are too badly conditioned, from QR of both factors
and an SVD of the core. Deterministic; each module is decomposed alone, whatever stands beside it.

Knows no model, no router and no file.

Legend: m rows and n columns of the weight, r rank of the adapter, s directions that are not null,
K modules of one rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from expertmix.experts.lora import Adapter, Factors

_NULL = 4.0  # times r * eps * the largest: what rounding alone leaves in a null direction
_WORST = 1e4  # its square, times float64's rounding, is below float32's
_ROOM = 1 << 20  # numbers in one stack of r × r matrices


@dataclass(frozen=True, eq=False)
class Spectrum:
    """scale * B @ A of one adapter at one module, as left * singular @ right.

    Attributes:
        factors: A and B, as they were given.
        singular: S, (s,), falling, all above zero.
        reads: (s, r) float64, right = reads @ A.
        writes: (s, r) float64, left = B @ writesᵀ.
    """

    factors: Factors
    singular: Tensor
    reads: Tensor
    writes: Tensor

    @property
    def right(self) -> Tensor:
        """Vᵀ, (s, n), rows of unit length and canonical sign; computed at each call."""
        return (self.reads @ _wide(self.factors.down)).to(self.singular.dtype)

    @property
    def left(self) -> Tensor:
        """U, (m, s), columns of unit length; computed at each call."""
        return (_wide(self.factors.up) @ self.writes.T).to(self.singular.dtype)

    @property
    def rank(self) -> int:
        """s: 0 where the adapter does nothing."""
        return len(self.singular)

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features) of the weight that it fits."""
        return self.factors.shape


@dataclass(frozen=True, eq=False)
class Spectra:
    """One adapter, decomposed.

    Attributes:
        adapter: Its factors; they are kept, not copied.
        modules: A spectrum per module.
    """

    adapter: Adapter
    modules: Mapping[str, Spectrum]

    @property
    def name(self) -> str:
        """Of the adapter."""
        return self.adapter.name

    @property
    def digest(self) -> str:
        """Hash of the factors; computed when it is first asked for."""
        return self.adapter.digest

    @property
    def base(self) -> str:
        """The base model as the adapter's config names it."""
        return self.adapter.base


def decompose(factors: Factors) -> Spectrum:
    """The thin SVD of scale * B @ A, null directions dropped, in float32 or better.

    A direction is null where its singular value is within rounding of zero. Signs are canonical:
    each right vector has a positive product with (cos 0, cos 1, cos 2, …), so that (-A, -B) gives
    the same.
    """
    return _of_one_rank([factors])[0]


def decompose_adapter(adapter: Adapter) -> Spectra:
    """The spectrum of every module of an adapter, whose tensors are kept and must not change."""
    return decompose_adapters([adapter])[0]


def decompose_adapters(adapters: Sequence[Adapter]) -> list[Spectra]:
    """The same for several at once, which is faster and gives the same bits."""
    by_rank: dict[int, list[Factors]] = {}
    for adapter in adapters:
        for factors in adapter.factors.values():
            by_rank.setdefault(factors.down.shape[0], []).append(factors)
    found = {rank: iter(_of_one_rank(members)) for rank, members in by_rank.items()}
    return [
        Spectra(
            adapter,
            {module: next(found[one.down.shape[0]]) for module, one in adapter.factors.items()},
        )
        for adapter in adapters
    ]


def _of_one_rank(members: Sequence[Factors]) -> list[Spectrum]:
    """Spectra of any number of modules, a limited number at a time."""
    rank = members[0].down.shape[0]
    if rank == 0:
        return [_by_qr(factors) for factors in members]
    step = max(1, _ROOM // rank**2)
    parts = [members[start : start + step] for start in range(0, len(members), step)]
    return [spectrum for part in parts for spectrum in _by_grams(part)]


def _by_grams(members: Sequence[Factors]) -> list[Spectrum]:
    """K spectra. Large products go one by one, so that none depends on its neighbors."""
    grams = _Grams.of(members)
    low_Krr, failed_K = torch.linalg.cholesky_ex(grams.down)
    squares_Kr, turn_Krr = torch.linalg.eigh(low_Krr.mT @ grams.up @ low_Krr)
    singular_Kr, turn_Krr = squares_Kr.flip(1).clamp_min(0).sqrt(), turn_Krr.flip(2)
    eye_rr = torch.eye(low_Krr.shape[1]).to(low_Krr)
    inverse_Krr = torch.linalg.solve_triangular(low_Krr, eye_rr.expand_as(low_Krr), upper=False)
    reads_Krr = turn_Krr.mT @ inverse_Krr
    signs_Kr1 = _signs(reads_Krr @ grams.probes)
    reads_Krr *= signs_Kr1
    writes_Krr = (low_Krr @ (turn_Krr / singular_Kr[:, None])).mT * (signs_Kr1 * grams.sides)
    strengths_Kr = (singular_Kr * grams.scales).to(torch.float32)
    counts_K = _count(singular_Kr, strengths_Kr)
    weakest_K = singular_Kr.gather(1, (counts_K - 1).clamp_min(0)[:, None])[:, 0]
    condition_K = low_Krr.flatten(1).norm(dim=1) * inverse_Krr.flatten(1).norm(dim=1)
    # Where squaring costs nothing that float32 would show; nan is not below anything.
    lost_K = (counts_K > 0) & (grams.sizes > _WORST * weakest_K)
    fine_K = (failed_K == 0) & (condition_K < _WORST) & ~lost_K
    columns = (strengths_Kr.unbind(), reads_Krr.unbind(), writes_Krr.unbind())
    return [
        Spectrum(factors, *(value[:count] for value in values))
        if fine and factors.down.dtype != torch.float64
        else _by_qr(factors)
        for factors, count, fine, *values in zip(
            members, counts_K.tolist(), fine_K.tolist(), *columns, strict=True
        )
    ]


@dataclass(frozen=True, eq=False)
class _Grams:
    """What r × r algebra needs of K pairs of factors, in float64.

    Attributes:
        down: (K, r, r) A Aᵀ.
        up: (K, r, r) Bᵀ B.
        probes: (K, r, 1) A times the probe.
        scales: (K, 1) without their signs.
        sides: (K, 1, 1) those signs.
    """

    down: Tensor
    up: Tensor
    probes: Tensor
    scales: Tensor
    sides: Tensor

    @classmethod
    def of(cls, members: Sequence[Factors]) -> _Grams:
        device, rank = members[0].down.device, members[0].down.shape[0]
        down_Krr = torch.empty(len(members), rank, rank, dtype=torch.float64, device=device)
        up_Krr, probes_Kr1 = torch.empty_like(down_Krr), down_Krr.new_empty(len(members), rank, 1)
        probe_n1 = _probe(max(factors.down.shape[1] for factors in members), device)
        for number, factors in enumerate(members):
            down_rn, up_mr = _wide(factors.down), _wide(factors.up)
            torch.mm(down_rn, down_rn.T, out=down_Krr[number])
            torch.mm(up_mr.T, up_mr, out=up_Krr[number])
            torch.mm(down_rn, probe_n1[: down_rn.shape[1]], out=probes_Kr1[number])
        scales_K1 = down_Krr.new_tensor([[factors.scale] for factors in members])
        return cls(down_Krr, up_Krr, probes_Kr1, scales_K1.abs(), _signs(scales_K1)[:, :, None])

    @property
    def sizes(self) -> Tensor:
        """(K,) product of the Frobenius norms of A and B."""
        down_K, up_K = (gram.diagonal(dim1=1, dim2=2).sum(1) for gram in (self.down, self.up))
        return (down_K * up_K).sqrt()


def _by_qr(factors: Factors) -> Spectrum:
    """In float64 without squaring anything: QR of both factors, SVD of the core."""
    down_rn, up_mr = _wide(factors.down), _wide(factors.up)
    r_kr, l_kr = torch.linalg.qr(down_rn.T, mode="r")[1], torch.linalg.qr(up_mr, mode="r")[1]
    left_kk, singular_k, right_kk = torch.linalg.svd(l_kr @ r_kr.T, full_matrices=False)
    strengths_k = (abs(factors.scale) * singular_k).to(dtype_of(factors))
    count = int(_count(singular_k[None], strengths_k[None]))
    # Neither factor is inverted: v = (u B A) / s, and u = (B A v) / s.
    reads_sr = left_kk.T[:count] @ l_kr / singular_k[:count, None]
    writes_sr = right_kk[:count] @ r_kr / singular_k[:count, None]
    signs_s1 = _signs(reads_sr @ (down_rn @ _probe(down_rn.shape[1], down_rn.device)))
    side = -signs_s1 if factors.scale < 0 else signs_s1
    return Spectrum(factors, strengths_k[:count], reads_sr * signs_s1, writes_sr * side)


def _count(singular_Kr: Tensor, strengths_Kr: Tensor) -> Tensor:
    """(K,) how many of the falling singular values are not null, in the type that comes out.

    In float64 a direction counts as null below the root of its precision: its vectors would be
    noise.
    """
    kind = torch.finfo(strengths_Kr.dtype)
    wide = strengths_Kr.dtype == torch.float64
    share = kind.eps**0.5 if wide else _NULL * singular_Kr.shape[1] * kind.eps
    kept_Kr = (singular_Kr > share * singular_Kr[:, :1]) & (strengths_Kr > kind.tiny)
    return kept_Kr.sum(1)


def _signs(products: Tensor) -> Tensor:
    """One or minus one."""
    return torch.where(products < 0, -1.0, 1.0).to(products)


def _probe(width: int, device: torch.device) -> Tensor:
    """(n, 1): no vector of any use is at right angles to it."""
    return torch.arange(width, dtype=torch.float64, device=device).cos()[:, None]


def _wide(factor: Tensor) -> Tensor:
    return factor.detach().to(torch.float64)


def dtype_of(factors: Factors) -> torch.dtype:
    """Of the vectors: float64 for float64, else float32; not promote_types: it knows no float8."""
    return torch.float64 if factors.down.dtype == torch.float64 else torch.float32
