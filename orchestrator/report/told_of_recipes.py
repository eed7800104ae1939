"""What `--json` holds of commands about a recipe, as models; `answers` says which is which."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from bigpipe.machine import Machine
from bigpipe.orchestrator.running import Gate, NodeRun

Actions = Literal["run", "cached", "remote", "maybe", "skipped"]


class Strict(BaseModel):
    model_config = ConfigDict(
        extra="forbid", json_schema_serialization_defaults_required=True, use_attribute_docstrings=True
    )


class Told(Strict):
    """Why an exit code is not 0."""

    code: str
    """Of errors in manifests, or the name of an error's class."""
    cause: str
    """What is wrong."""
    cure: str
    """What to do about it."""
    file: str | None
    """The manifest that it is about; None: it has no place."""
    line: int | None
    """Counted from 1."""
    column: int | None
    """Counted from 1, in characters."""
    node: str | None
    """The node of the recipe that it is about; None: none."""


class Answer(Strict):
    """What every object has."""

    exit_code: int
    """What the command exits with."""
    errors: list[Told]
    """Why that is not 0; the first decides."""


class Checkout(Strict):
    """What git says of the checkout that the manifest lies in."""

    commit: str
    """40 digits."""
    dirty: bool
    """There were changes that are in no commit."""


class Smaller(Strict):
    """A value that a smoke run has instead of the recipe's."""

    path: str
    """`params.max_steps`, `launch.num_processes`."""
    old: Any
    """As the recipe has it."""
    new: Any
    """As the run has it."""


class Smoke(Strict):
    """What a smoke run is of."""

    smaller: dict[str, list[Smaller]]
    """By node."""
    not_shown: list[str]
    """What it says nothing of, in words."""
    store: str | None
    """Of one that failed, which stays for a look at its logs; None: it is gone."""


class Run(Answer):
    """What a run did."""

    run: str | None
    """None: it was refused before it began, or another machine has it."""
    status: Literal["succeeded", "failed", "interrupted", "refused", "attended"]
    """refused: before it began. attended: by another machine, which drives it."""
    manifest: str
    """Its path."""
    params: dict[str, Any]
    """The recipe's, as they were used, `-p` included."""
    git: Checkout | None
    """None: the manifest lies in no checkout."""
    seconds: float
    """From the first node to the last."""
    nodes: dict[str, NodeRun]
    """By name, in the order of the graph."""
    smoke: Smoke | None
    """None: it was no smoke run. Else no gate failed it, whatever `gates` say."""


class Change(Strict):
    """A value that made a key another one."""

    path: str
    """`params.scheme`, `inputs.model`, `packages.torch`."""
    old: Any
    """As the last record has it."""
    new: Any
    """As it is now."""
    place: str | None
    """`file:line:column` of the value in the manifest; None: it stands in none."""


class PlannedMisfit(Strict):
    """Something that does not fit."""

    node: str
    """Whose need it is."""
    cause: str
    """What it needs, and what there is."""
    cure: str
    """The smallest change under which it fits."""


class Foreseen(Strict):
    """Bytes and seconds; None: not known."""

    download_bytes: int | None
    """From elsewhere."""
    write_bytes: int | None
    """Into the store, or where it saves."""
    ram: int | None
    """Of all its processes together."""
    vram: dict[str, int] | None
    """GPU's number → bytes; of one that uses none it is empty."""
    seconds: float | None
    """How long it may take."""
    metrics: dict[str, Any]
    """Those of the run that can be known now."""
    unknown: list[str]
    """What is not known, and why."""
    details: list[str]
    """What `--explain` shows besides."""


class Fetched(Strict):
    """What comes from the remote store."""

    bytes: int
    """Of files that are not here."""
    seconds: float | None
    """How long it may take; None: how fast they come is not known."""


class UsedRemote(Strict):
    """A store that others share."""

    address: str
    """Without passwords."""
    away: str | None
    """Why it is not used any more; None: it is."""


class Planned(Strict):
    """What a run would do with a node."""

    kind: str
    """What it uses."""
    action: Actions
    """remote: it comes from the remote store. maybe: known once its inputs are."""
    reason: str
    """Why."""
    key: str | None
    """Of the computation; None: not known before its inputs are."""
    pins: dict[str, Any]
    """Field → what a branch or another floating value means now."""
    changes: list[Change]
    """Against its last record under this manifest."""
    gates: list[Gate]
    """In their order."""
    tried: list[dict[str, Any]]
    """Of a stage with `first`: what is known of each variant."""
    problem: str | None
    """What its preflight found; None: nothing."""
    fetch: Fetched | None
    """None: nothing comes from a remote store."""
    forecast: Foreseen | None
    """None: nothing of it has to be known."""


class Probed(Strict):
    """What a node is foreseen to take of a device, and what could be had. Bytes."""

    node: str
    """`the run`: of all nodes together."""
    device: str
    """RAM, `GPU 0`, disk."""
    predicted: int
    """As the plan foresees it."""
    held: int | None
    """None: it was not tried."""
    why: str
    """Why that is not all of it."""
    ok: bool
    """It is not short."""


class KnownBytes(Strict):
    """Sums of the bytes that are known."""

    download_bytes: int
    """Of the nodes that run and whose downloads are known."""
    write_bytes: int
    """Of the nodes that run and of which it is known what they write."""
    peak_disk_bytes: int
    """At any time, of those."""


class PlannedCluster(Strict):
    """Machines that nodes are sent to."""

    name: str
    """What kind it is, and where."""
    machines: list[Machine]
    """What each has that the cluster gives out."""


class Plan(Answer):
    """What a run would do."""

    manifest: str
    """Its path."""
    machine: Machine
    """That it is planned for: this one, or that of `--machine`."""
    cluster: PlannedCluster | None
    """Whose machines run the nodes, of `--executor`; None: `machine` does."""
    fits: bool
    """Nothing is among the misfits."""
    remote: UsedRemote | None
    """None: there is none."""
    fetch_bytes: int
    """From the remote store."""
    download_bytes: int | None
    """Of all nodes that run; None: some of it is not known."""
    write_bytes: int | None
    """Of all nodes that run; None: some of it is not known."""
    peak_disk_bytes: int | None
    """The most that the run adds to the disk of the store at any time; None: some of it is not known."""
    at_least: KnownBytes
    """The same three, of what is known."""
    misfits: list[PlannedMisfit]
    """What does not fit, and the change that does."""
    not_installed: dict[str, list[str]]
    """Node that may run and cannot run here → the packages that it lacks."""
    smoke: Smoke | None
    """None: it is of no smoke run."""
    probe: list[Probed] | None
    """None: it was not asked for."""
    nodes: dict[str, Planned]
    """By name, in the order of the graph."""


class Validity(Strict):
    """Whether a manifest is right."""

    valid: bool
    """Else `errors` say why."""


class Validated(Answer):
    """Which manifests are right."""

    manifests: dict[str, Validity]
    """By path."""


class NodeStatus(Strict):
    """Whether a node is cached."""

    action: Actions
    """What a run would do now."""
    reason: str
    """Why."""
    shared: bool | None
    """The remote store has it; None: it was not asked, or cannot be, or the node is never shared."""


class Status(Answer):
    """Which nodes are cached."""

    remote: UsedRemote | None
    """None: there is none."""
    nodes: dict[str, NodeStatus]
    """By name."""


class Last(Strict):
    """When a node last ran."""

    run: str
    """That run's id."""
    created: str
    """When its artifact was published."""
    seconds: float
    """How long it took."""


class Reason(Strict):
    """Why a node would run, or ran last."""

    action: Actions
    """What a run would do now."""
    reason: str
    """In words."""
    key: str | None
    """None: not known before its inputs are."""
    changes: list[Change]
    """Against its last record."""
    tried: list[dict[str, Any]]
    """Of a stage with `first`: what is known of each variant."""
    because_of: dict[str, str]
    """Node that it stands on → why that would run."""
    last: Last | None
    """None: it never ran under this manifest."""


class Why(Answer):
    """Why nodes would run."""

    nodes: dict[str, Reason]
    """Those that were asked about."""


class Wired(Strict):
    """A node, and what it stands on."""

    kind: str
    """What it uses."""
    inputs: dict[str, list[str]]
    """Port → the nodes that are wired to it."""
    needs: list[str]
    """Nodes that it waits for besides."""
    after: list[str]
    """All that it waits for: those of `inputs` and `needs`, those that `when` reads, and the judges of `first`."""
    first: dict[str, Any] | None
    """`axis`, `of` and `values` of a stage that takes the first variant that passes."""
    status: str | None
    """What a run made of it, where one was asked about; `verdict` and `tried` as in its record."""
    verdict: str | None
    """As in that run's record."""
    tried: list[dict[str, str]] | None
    """As in that run's record."""


class Graph(Answer):
    """The nodes after matrix expansion."""

    manifest: str
    """Its path."""
    path: str | None
    """Where it was drawn, of `-o`; None: nowhere."""
    nodes: dict[str, Wired]
    """By name, in topological order."""


class Export(Answer):
    """A recipe as the file of another system."""

    target: str
    """The system."""
    manifest: str
    """Its path."""
    path: str | None
    """Where it was written, of `-o`; None: nowhere."""
    text: str
    """The file."""
    unknown: list[str]
    """What could not be foreseen: for it no memory is asked."""


class ExchangedNode(Strict):
    """What was done about a node."""

    status: Literal["sent", "there", "other", "fetched", "here", "absent", "refused", "own"]
    """sent, fetched: now it is there, or here. there, here: it was already. other: another result was there first.
    absent: there is nothing to send, or to fetch. refused: it could not be, or may not be. own: it acts outside the
    store, and is never shared."""
    bytes: int
    """Of its files."""


class Exchanged(Answer):
    """What was given to a remote store, or brought from there."""

    remote: str
    """Its address, without passwords."""
    nodes: dict[str, ExchangedNode]
    """By name, in the order of the graph."""


class Lock(Answer):
    """The lock file was written, or holds."""

    lock: str
    """Its path."""


class Written(Answer):
    """What was written."""

    files: list[str]
    """Their paths."""
