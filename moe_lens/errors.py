"""Every error of ours that a user can meet: what is wrong, the value it got, the next step."""

from __future__ import annotations


class MoeLensError(Exception):
    """Root of the errors that moe_lens raises on purpose."""


class TraceError(MoeLensError):
    """A trace cannot be opened or read: missing, empty, foreign, damaged, or of a newer format."""


class TraceLocked(TraceError):
    """Another process is writing this trace (or this rank of it)."""


class TraceWriteError(MoeLensError):
    """The trace writer could not write. What it had written before stays readable."""


class UnsupportedRouter(MoeLensError):
    """A module routes in a way that capture cannot see, or cannot see correctly."""


class NoMoELayers(UnsupportedRouter):
    """The model has no layer that any adapter recognises as Mixture-of-Experts."""


class CaptureBreach(MoeLensError):
    """An invariant of the capture failed: routing was seen twice, in part, or not at all."""


class ControlError(MoeLensError):
    """A recorder cannot be controlled from outside: its port, its token, or what it is."""


class SteeringError(MoeLensError):
    """Routing cannot be forced: the decisions do not fit the model or its batch."""


class RuntimeInputError(MoeLensError):
    """The MoE runtime cannot run this: ids, shapes, weights or a backend that do not fit."""


class RuntimeUnavailable(MoeLensError):
    """The CUDA kernels cannot be compiled or loaded here: a package, a driver or a device."""


class ReplayError(MoeLensError):
    """A trace cannot be replayed as asked: nothing to replay, no shapes, no room, or no place."""


class ImportRefused(MoeLensError):
    """Another recorder's file cannot become a trace: damaged, ambiguous, or short of a fact."""


class ExportRefused(MoeLensError):
    """A trace does not hold what another tool's format needs."""


class LabError(MoeLensError):
    """The laboratory cannot run this: sizes that cannot be, other settings, a process that died."""


class QueryError(MoeLensError):
    """A SQL text or a stored question could not be run."""


class CommandError(MoeLensError):
    """A command-line mistake; ``exit_code`` is what the process returns."""

    def __init__(self, message: str, exit_code: int = 2) -> None:
        super().__init__(message)
        self.exit_code = exit_code
