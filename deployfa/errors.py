"""Every deliberate error of deployfa.

Each message is one line that says what is wrong and, after a semicolon, what to do about it.  The command line prints
it after ``error:`` and exits with status 2.

::

    DeployfaError                    caught by the command line, exit status 2
    ├── InputError                   a file, a path or an option that the caller gave
    │   ├── AdapterFormatError       not an adapter file, truncated, or not made of tensors
    │   ├── DataError                a CSV or JSONL file without the rows or columns it needs
    │   ├── BaseMismatchError        the adapter was trained on another base model
    │   ├── BundleError              not a bundle, or its files are not the ones its manifest names
    │   └── OutputExistsError        the output is there already and --force was not given
    ├── SiteError                    a site of the adapter that the graph lacks, or finds twice
    ├── EditError                    an edit that does not fit its site: shape, dtype, non-finite values
    ├── PlanError                    a placement that was asked for and is not exact
    ├── LeftoverError                tensors of the adapter that no rewrite consumed, or that changed nothing
    ├── GraphError                   a graph whose types are unknown, or contradict each other
    ├── ExportError                  the base model could not be turned into a graph
    ├── RequestError                 a request that a server does not answer, with its HTTP status
    ├── RuntimeTargetError           a runtime that did not give what was asked for
    ├── LoadError                    a server to be loaded that is not there, or does not speak the protocol
    ├── StatisticsError              a figure that the samples cannot support
    ├── StorageError                 no space, no permission; nothing half-written is left
    └── MissingExtraError            an optional dependency that is not installed
"""

from __future__ import annotations

from collections.abc import Iterable

__all__ = [
    "AdapterFormatError",
    "BaseMismatchError",
    "BundleError",
    "DataError",
    "DeployfaError",
    "EditError",
    "ExportError",
    "GraphError",
    "InputError",
    "LeftoverError",
    "LoadError",
    "MissingExtraError",
    "OutputExistsError",
    "PlanError",
    "RequestError",
    "RuntimeTargetError",
    "SiteError",
    "StatisticsError",
    "StorageError",
]


class DeployfaError(Exception):
    """Root of the tree above; its text is one line made for the person at the keyboard."""


class InputError(DeployfaError):
    """A file, a path or an option that the caller gave is wrong."""


class AdapterFormatError(InputError):
    """The file is not an adapter, is truncated, or holds something other than tensors and plain values."""


class DataError(InputError):
    """A data file lacks the rows, columns or labels that it needs."""


class BaseMismatchError(InputError):
    """The adapter was trained on another base model than the one given."""


class BundleError(InputError):
    """The directory is not a bundle, or its files are not the ones that its manifest names."""


class OutputExistsError(InputError):
    """The output exists already."""

    def __init__(self, path: object, *, instead: str = ", or another --out") -> None:
        super().__init__(f"'{path}' exists; pass --force to replace it{instead}")


class SiteError(DeployfaError):
    """A site of the adapter is not in the graph, or is found in more than one place."""

    @classmethod
    def unknown(cls, missing: Iterable[str], known: Iterable[str]) -> SiteError:
        """``site 'fc3' not found; sites in this graph: fc1, fc2``, nearest names first when there are many."""
        import difflib

        names, choices = sorted(missing), sorted(known)
        shown = choices
        if len(choices) > 6:
            shown = difflib.get_close_matches(names[0], choices, n=4, cutoff=0.0)
        more = f" and {len(choices) - len(shown)} more" if len(choices) > len(shown) else ""
        others = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
        listed = ", ".join(shown) if shown else "none"
        return cls(f"site '{names[0]}'{others} not found; sites in this graph: {listed}{more}")


class EditError(DeployfaError):
    """An edit does not fit its site."""


class PlanError(DeployfaError):
    """A placement was asked for that is not exact at a site."""


class LeftoverError(DeployfaError):
    """Tensors of the adapter were not consumed by any rewrite, or changed nothing."""


class GraphError(DeployfaError):
    """A value of a graph has no known type, or a node reads values of types that do not go together."""


class ExportError(DeployfaError):
    """The base model could not be turned into a graph."""


class RequestError(DeployfaError):
    """A request that a server does not answer.

    ``status``: of HTTP, as Triton gives it: 400 for what is wrong, 404 for what there is not, 503 for not now, and then
    ``retry_after_s`` says when.
    """

    def __init__(self, message: str, status: int = 400, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after_s = retry_after_s


class RuntimeTargetError(DeployfaError):
    """A runtime did not give what was asked for: another provider, a wrong feed."""


class LoadError(DeployfaError):
    """A server that load is to be sent to is not there, refuses, or does not speak the protocol."""


class StatisticsError(DeployfaError):
    """A figure was asked for that the samples cannot support."""


class StorageError(DeployfaError):
    """The disk said no; what was being written has been removed."""


class MissingExtraError(DeployfaError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs {package}, which is not installed; run: pip install 'deployfa[{extra}]'")
        self.package = package
        self.extra = extra
