"""`compose`: a base model and its adapters in, one model out that decides which of them to use.

The front door to `Composed`; holds no state of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from expertmix.errors import ConfigError
from expertmix.experts.composed import Composed
from expertmix.experts.fitting import calibrate
from expertmix.experts.fused import Combination
from expertmix.experts.own_text import own_text
from expertmix.experts.passes import refuse_two_texts
from expertmix.experts.places import check_bases, find_places, pretrained
from expertmix.experts.plan import Plan
from expertmix.experts.shelf import Shelf
from expertmix.experts.silence import silenced
from expertmix.experts.stack import Projections
from expertmix.routers.pooled import Pooled, is_calibrated
from expertmix.routers.router import Router
from expertmix.routers.table import router_of

Adapters = Shelf | str | Path | Sequence[str | Path] | nn.Module
Calibration = Literal["own"] | Tensor | Sequence[Tensor] | None


def compose(
    model: nn.Module,
    adapters: Adapters,
    router: Router | str | Mapping[str, Any] = "pooled",
    *,
    calibration: Calibration = "own",
    combination: Combination = "outputs",
    projections: Projections = None,
    any_base: bool = False,
) -> Any:
    """Put a shelf of LoRA adapters on a model, routed per token and module, without training.

    The model is changed in place, by hooks only, and stays the transformers model that it was:
    `forward`, `generate`, caches and `record` work. Called again on the same model, it puts another
    shelf and router in the place of the first, all at once or not at all.
    `Composed.of(model).uninstall()` takes them off.

    Args:
        model: A transformers model, or a PeftModel around one, whose own adapters rest meanwhile.
        adapters: A `Shelf`, a folder of PEFT adapters, a hub id, a list of those, or a PeftModel
            that has them loaded.
        router: Who decides: a router, its name in `routers.table.ROUTERS`, or a mapping with its
            name as `kind` beside its settings.
        calibration: What makes the evidence of `pooled` comparable between adapters. `own`: 512
            tokens that the base writes by itself, so that no text is needed. Or token ids (B, S) of
            any unlabelled text, or several of them. Or None, for raw scores. Other routers are used
            as they are; `experts.fitting.calibrate` wraps them.
        combination: `outputs`, Σ w_i B_i A_i x, or `aligned`, (Σ w_i B*_i)(Σ w_i A*_i) x (SpectR's
            published code).
        projections: See `Composed`.
        any_base: Allow adapters whose config names another base model.

    Returns:
        The transformers model: `model`, or what the PeftModel holds.

    Raises:
        CheckpointError: An adapter is broken, not a plain LoRA, or of another base.
        ConfigError: An unknown router or setting, or one that does not fit the shelf.
        UnsupportedModelError: An encoder with a decoder, and a router with a memory.
        UnsupportedRuntimeError: The model is composed already, and a recording is open.

    Example:
        >>> model = em.compose(model, "adapters/")
        >>> with em.record(model) as trace:
        ...     model.generate(**inputs)
    """
    made = router_of(router)
    shelf = as_shelf(adapters)
    base = pretrained(model)
    if not any_base:
        check_bases(base, shelf)
    _check_width(router, shelf)
    before = Composed.of(base)
    with nullcontext() if before is None else before.resting():
        made = ready(base, shelf, made, calibration)
    if before is None:
        Composed(model, shelf, made, combination=combination, projections=projections)
    else:
        before.put(Plan.lay(base, shelf, made, combination, projections))
    return base


def _check_width(router: Any, shelf: Shelf) -> None:
    """A router's own top_k may be more than a small shelf has; one that was asked for may not."""
    asked = router.get("top_k") if isinstance(router, Mapping) else None
    if isinstance(asked, int) and asked > len(shelf):
        raise ConfigError(
            f"top_k={asked}, and the shelf has {len(shelf)} adapters: lower it, or leave it out"
        )


def as_shelf(adapters: Adapters) -> Shelf:
    """A shelf of whatever holds adapters.

    Raises:
        CheckpointError: An adapter is broken, or not a plain LoRA.
        ConfigError: It is nothing that can hold adapters.
    """
    if isinstance(adapters, Shelf):
        return adapters
    if isinstance(adapters, nn.Module):
        return Shelf.from_peft(adapters)
    one = isinstance(adapters, str | Path)
    if not one and not (
        isinstance(adapters, Sequence) and all(isinstance(place, str | Path) for place in adapters)
    ):
        raise ConfigError(
            f"adapters must be a Shelf (Shelf.of makes one of Adapter objects), a folder, a hub "
            f"id, a list of those, or a PeftModel: {type(adapters).__name__}"
        )
    return Shelf.open(adapters)


def ready(base: Any, shelf: Shelf, router: Router, calibration: Calibration = "own") -> Router:
    """The router, its evidence calibrated where it pools any and is not calibrated yet.

    Args:
        base: The base model, without the shelf on it.
        shelf: The adapters.
        router: Any router.
        calibration: See `compose`.

    Raises:
        CheckpointError: The shelf does not fit the model.
        ConfigError: The model writes no text of its own, or what was given is no text.
        UnsupportedModelError: An encoder with a decoder; or an adapted module that does not run.
    """
    if calibration is None or not isinstance(router, Pooled) or is_calibrated(router):
        return router
    refuse_two_texts(base, "evidence that is gathered over a text")
    if isinstance(calibration, Tensor):
        return calibrate(base, shelf, router, [calibration])
    if not isinstance(calibration, str):
        return calibrate(base, shelf, router, calibration)
    if calibration != "own":
        raise ConfigError(f"calibration must be 'own', token ids, or None: {calibration!r}")
    if not base.can_generate():
        raise ConfigError(
            f"{type(base).__name__} writes no text of its own to calibrate on: give token ids of "
            f"some text as calibration, or another router"
        )
    wrappers = [place.wrapper for place in find_places(base, shelf) if place.wrapper is not None]
    with silenced(wrappers):
        texts = [own_text(base)]
    return calibrate(base, shelf, router, texts)
