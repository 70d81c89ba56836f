"""blemish: visual anomaly detection that learns from normal images."""

TYPE_CHECKING = False  # typing's own, whose import would cost time, counts as false at work and as true in an editor
if TYPE_CHECKING:
    from blemish.api import AnomalyDetector
    from blemish.edge.errors import InputError
    from blemish.edge.result import Result

    __version__: str

__all__ = ["AnomalyDetector", "InputError", "Result", "__version__"]

_HOMES = {"AnomalyDetector": "blemish.api", "InputError": "blemish.edge.errors", "Result": "blemish.edge.result"}


def __getattr__(name: str) -> object:
    from importlib import import_module, metadata

    if name == "__version__":
        return metadata.version("blemish")
    if name not in _HOMES:
        raise AttributeError(f"module 'blemish' has no attribute {name!r}")
    try:
        return getattr(import_module(_HOMES[name]), name)  # with torch and lightning, for which `import blemish` does not wait
    except ModuleNotFoundError as error:
        raise ImportError(f"{name} needs {error.name}, which is not here: pip install blemish; exports run by blemish.edge") from error


def __dir__() -> list[str]:
    return sorted(__all__)
