"""The systems that runs can be told to, by name. One more is a file with a function, and an entry here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec


@dataclass(frozen=True, slots=True, kw_only=True)
class Sink:
    """A system that wants to know of runs."""

    tell: str
    """`module:function`, called in a process of its own with what is known when the run begins, an iterator of its
    events, both JSON, and what to call with an error that it survives; see `child`."""
    package: str
    """The module that it cannot do without; the extra that brings it is called as the sink is."""
    address: tuple[str, ...]
    """Variables of the environment of which one must say where the system is."""
    environment: tuple[str, ...] = field(repr=False)
    """What the names of variables begin with that only its process sees, beside what any child sees."""
    settings: tuple[str, ...]
    """Of these the ones that a runner elsewhere is given by name: where the system is, and who may tell it."""

    @property
    def installed(self) -> bool:
        return find_spec(self.package) is not None


SINKS: Mapping[str, Sink] = {
    "mlflow": Sink(
        tell="bigpipe.orchestrator.sinks.to_mlflow:tell",
        package="mlflow",
        address=("MLFLOW_TRACKING_URI",),
        environment=("MLFLOW_", "DATABRICKS_"),
        settings=(
            "MLFLOW_TRACKING_URI",
            "MLFLOW_EXPERIMENT_ID",
            "MLFLOW_EXPERIMENT_NAME",
            "MLFLOW_TRACKING_USERNAME",
            "MLFLOW_TRACKING_PASSWORD",
            "MLFLOW_TRACKING_TOKEN",
            "DATABRICKS_HOST",
            "DATABRICKS_TOKEN",
        ),
    ),
    "openlineage": Sink(
        tell="bigpipe.orchestrator.sinks.to_openlineage:tell",
        package="openlineage",
        address=("OPENLINEAGE_URL", "OPENLINEAGE_CONFIG", "OPENLINEAGE__TRANSPORT__TYPE"),
        environment=("OPENLINEAGE_",),
        settings=("OPENLINEAGE_URL", "OPENLINEAGE_NAMESPACE", "OPENLINEAGE_API_KEY"),
    ),
}


def install(name: str) -> str:
    """Return what installs a sink's package."""
    return f"pip install 'bigpipe-ml[{name}]'"
