"""Runs as events of OpenLineage (https://openlineage.io/docs/spec/object-model): the recipe is a job, each node one
below it; what a node gives is a dataset whose version is the artifact's digest.

Where: OPENLINEAGE_URL, or a file that OPENLINEAGE_CONFIG names; the jobs' namespace by OPENLINEAGE_NAMESPACE.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from bigpipe.tables import as_text

from .values import flat

if TYPE_CHECKING:
    from openlineage.client import OpenLineageClient
    from openlineage.client.facet_v2 import RunFacet
    from openlineage.client.generated.base import InputDataset, OutputDataset

PRODUCER = "urn:bigpipe:"
GOOD = ("succeeded", "cached")
NAMESPACE = "bigpipe"


def tell(about: Mapping[str, Any], events: Iterator[Mapping[str, Any]], failed: Callable[[Exception], None]) -> None:
    """failed: told of events that could not be sent; those after them are sent all the same."""
    from openlineage.client import set_producer

    set_producer(f"{PRODUCER}{about['version']}")
    teller = _Teller(about, _client(), os.environ.get("OPENLINEAGE_NAMESPACE") or NAMESPACE, failed)
    teller.now = about["time"]
    teller.of_recipe("START")
    ended = False
    for event in events:
        teller.hear(event)
        if event["event"] == "run_finished":
            ended = True
            break
    if not ended:
        teller.abort()


def _client() -> OpenLineageClient:
    """As the environment says. Where that names no more than an address, it is tried twice, not for ten seconds."""
    from openlineage.client import OpenLineageClient

    file = os.environ.get("OPENLINEAGE_CONFIG")
    if file and not os.path.isfile(file):
        raise FileNotFoundError(f"OPENLINEAGE_CONFIG names {file}, which is no file")  # else it would tell a console
    if file or any(name.startswith("OPENLINEAGE__TRANSPORT__") for name in os.environ):
        return OpenLineageClient()
    key = os.environ.pop("OPENLINEAGE_API_KEY", None)
    transport = {
        "type": "http",
        "url": os.environ.pop("OPENLINEAGE_URL"),
        "endpoint": os.environ.pop("OPENLINEAGE_ENDPOINT", "api/v1/lineage"),
        "retry": {"total": 1},
        **({"auth": {"type": "api_key", "apiKey": key}} if key else {}),
    }
    return OpenLineageClient(config={"transport": transport})


@dataclass(slots=True)
class _Teller:
    about: Mapping[str, Any]
    client: OpenLineageClient
    namespace: str
    failed: Callable[[Exception], None]
    digests: dict[str, str] = field(default_factory=dict)
    """Node → the digest of what it gave."""
    now: float = 0.0
    """Of the event that is told, in seconds of the epoch."""
    begun: set[str] = field(default_factory=set)
    """Nodes that have started and not ended."""

    def hear(self, event: Mapping[str, Any]) -> None:
        self.now = event["time"]
        if event["event"] == "node_started" and event["node"] not in self.begun:
            self.begun.add(event["node"])
            self.of_node("START", event["node"])
        elif event["event"] == "node_finished" and event["status"] != "skipped":
            self.ended(event)
        elif event["event"] == "run_finished":
            if event["status"] == "interrupted":
                self.abort()
            else:
                self.of_recipe("COMPLETE" if event["status"] == "succeeded" else "FAIL")

    def ended(self, event: Mapping[str, Any]) -> None:
        node = event["node"]
        if node not in self.begun:  # it was in the store
            self.of_node("START", node)
        self.begun.discard(node)
        if event["digest"]:
            self.digests[node] = event["digest"]
        self.of_node("COMPLETE" if event["status"] in GOOD else "FAIL", node, event)

    def abort(self) -> None:
        for node in sorted(self.begun):
            self.of_node("ABORT", node)
        self.begun.clear()
        self.of_recipe("ABORT")

    def of_recipe(self, state: str) -> None:
        self._emit(state, self.about["recipe"], self.about["run"], "RECIPE", self.about["params"])

    def of_node(self, state: str, node: str, event: Mapping[str, Any] | None = None) -> None:
        name, run = f"{self.about['recipe']}.{node}", f"{self.about['run']}/{node}"
        from openlineage.client.facet_v2 import parent_run

        recipe = parent_run.ParentRunFacet(
            parent_run.Run(_identifier(self.about["run"])), parent_run.Job(self.namespace, self.about["recipe"])
        )
        facets: dict[str, RunFacet] = {"parent": recipe, **(_became(event) if event else {})}
        outputs = [self._output(node, event)] if event and event["digest"] else []
        self._emit(state, name, run, "STAGE", self.about["nodes"][node]["params"], facets, self._inputs(node), outputs)

    def _inputs(self, node: str) -> list[InputDataset]:
        from openlineage.client.event_v2 import InputDataset
        from openlineage.client.facet_v2 import dataset_version_dataset

        found = [InputDataset(each["namespace"], each["name"]) for each in self.about["nodes"][node]["sources"]]
        for producer in self.about["nodes"][node]["inputs"]:
            digest = self.digests.get(producer)
            facets = {"version": dataset_version_dataset.DatasetVersionDatasetFacet(digest)} if digest else {}
            found.append(InputDataset(self.namespace, f"{self.about['recipe']}.{producer}", facets=facets))
        return found

    def _output(self, node: str, event: Mapping[str, Any]) -> OutputDataset:
        from openlineage.client.event_v2 import OutputDataset
        from openlineage.client.facet_v2 import dataset_version_dataset, datasource_dataset

        version = dataset_version_dataset.DatasetVersionDatasetFacet(event["digest"])
        source = {"dataSource": datasource_dataset.DatasourceDatasetFacet(node, event["uri"])} if event["uri"] else {}
        return OutputDataset(self.namespace, f"{self.about['recipe']}.{node}", facets={"version": version, **source})

    def _emit(
        self,
        state: str,
        name: str,
        run: str,
        kind: str,
        params: Mapping[str, Any],
        facets: Mapping[str, RunFacet] = MappingProxyType({}),
        inputs: Sequence[InputDataset] = (),
        outputs: Sequence[OutputDataset] = (),
    ) -> None:
        from openlineage.client.event_v2 import Job, Run, RunEvent, RunState
        from openlineage.client.facet_v2 import (
            execution_parameters_run as parameters,
            job_type_job,
            processing_engine_run,
            source_code_location_job,
        )

        values = [parameters.ExecutionParameter(key, value=as_text(value)) for key, value in flat(params)]
        run_facets: dict[str, RunFacet] = {
            "processing_engine": processing_engine_run.ProcessingEngineRunFacet(self.about["version"], "bigpipe"),
            **({"executionParameters": parameters.ExecutionParametersRunFacet(values)} if values else {}),
            **facets,
        }
        job_facets: dict[str, Any] = {"jobType": job_type_job.JobTypeJobFacet("BATCH", "BIGPIPE", kind)}
        if (git := self.about["git"]) and self.about["repository"]:
            job_facets["sourceCodeLocation"] = source_code_location_job.SourceCodeLocationJobFacet(
                "git", _address(self.about["repository"]), path=self.about["manifest"], version=git["commit"]
            )
        event = RunEvent(
            eventType=RunState[state],
            eventTime=datetime.fromtimestamp(self.now, UTC).isoformat(),
            run=Run(_identifier(run), run_facets),
            job=Job(self.namespace, name, job_facets),
            inputs=list(inputs),
            outputs=list(outputs),
        )
        try:
            self.client.emit(event)
        except Exception as error:  # of any transport, about any server
            self.failed(error)


def _address(repository: str) -> str:
    """`github.com/owner/name`, or the folder of a checkout without a remote, as a URI."""
    return Path(repository).as_uri() if repository.startswith("/") else f"https://{quote(repository, safe='/:~')}"


def _identifier(run: str) -> str:
    """The same for the same run, or node of it."""
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"{PRODUCER}{run}"))


def _became(event: Mapping[str, Any]) -> dict[str, RunFacet]:
    """What came of a node: numbers and keys as tags, gates as tests, and why it failed."""
    from openlineage.client.facet_v2 import error_message_run, tags_run, test_run

    own = ("status", "key", "digest", "verdict", "seconds", "peak_rss")
    told = {**dict(flat(event["metrics"])), **{name: event[name] for name in own}}
    tags = [
        tags_run.TagsRunFacetFields(key, as_text(value), "BIGPIPE") for key, value in told.items() if value is not None
    ]
    found: dict[str, RunFacet] = {"tags": tags_run.TagsRunFacet(tags)}
    if event["gates"]:
        words = {True: "pass", False: "fail", None: "skip"}
        tests = [
            test_run.TestExecution(gate["text"], words[gate["passed"]], type="gate", actual=gate["measured"])
            for gate in event["gates"]
        ]
        found["test"] = test_run.TestRunFacet(tests)
    if event["error"]:
        found["errorMessage"] = error_message_run.ErrorMessageRunFacet(event["error"], "Python")
    return found
