"""Every error that expertmix raises on purpose, in one tree.

    ExpertmixError
    ├── ModelError                 the model cannot be used as asked
    │   ├── NoSitesError             no routed layer found: a dense model
    │   ├── UnsupportedModelError    routed, but in a way that no binding fits
    │   ├── UnsupportedRuntimeError  compiled, captured or otherwise out of reach of hooks
    │   ├── CheckpointError          files missing, of the wrong kind, or unsafe (pickle)
    │   └── ContextLengthError       a text is longer than the model can read
    ├── AddressError               an intervention points at nothing
    │   ├── UnknownSiteError         no site matches the pattern
    │   ├── UnknownExpertError       the site has no expert of that number
    │   └── StageError               the site's router has no such stage
    ├── InterventionError          the edit itself is not possible (all experts masked …)
    │   └── ReplayError              the trace has no decision for this token
    ├── TraceError                 a trace cannot be read, written or used
    │   ├── CorruptTraceError        truncated, or not a trace at all
    │   └── FingerprintError         the trace belongs to another model
    ├── ConfigError                a config or input file has a wrong key or value
    ├── OutputError                results cannot be written: permission, full disk
    └── MissingDependencyError     an optional package is not installed

A message says what happened, where (site, expert, key, file), and what to do.
This file imports nothing.
"""

from __future__ import annotations


class ExpertmixError(Exception):
    """Base of all errors raised on purpose; catch it to catch them all."""


class ModelError(ExpertmixError):
    """The model cannot be used as asked."""


class NoSitesError(ModelError):
    """The model has no routed layer: it is dense."""


class UnsupportedModelError(ModelError):
    """The model routes, but in a way that no binding can observe faithfully."""


class UnsupportedRuntimeError(ModelError):
    """The model runs where hooks do not reach: compiled, captured, or recomputed ambiguously."""


class CheckpointError(ModelError):
    """A checkpoint is missing files, has the wrong kind, or holds pickled weights."""


class ContextLengthError(ModelError):
    """A text is longer than the model's context."""


class AddressError(ExpertmixError):
    """An intervention points at nothing."""


class UnknownSiteError(AddressError):
    """No site matches the pattern."""


class UnknownExpertError(AddressError):
    """The site has no expert of that number."""


class StageError(AddressError):
    """The router at this site has no such stage, or none that can be edited."""


class InterventionError(ExpertmixError):
    """The edit is not possible, such as a mask that leaves too few experts."""


class ReplayError(InterventionError):
    """The replayed trace holds no decision for a token of this run."""


class TraceError(ExpertmixError):
    """A trace cannot be read, written or used."""


class CorruptTraceError(TraceError):
    """The file is truncated, or is not an expertmix trace."""


class FingerprintError(TraceError):
    """The trace was recorded on another model."""


class ConfigError(ExpertmixError):
    """A config or an input file has an unknown key or a wrong value."""


class OutputError(ExpertmixError):
    """Results cannot be written: no permission, a full disk, a path in the way."""


class MissingDependencyError(ExpertmixError):
    """An optional package is needed and not installed."""
