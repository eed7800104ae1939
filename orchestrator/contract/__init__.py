"""What a stage kind and the engine agree on: `Stage` and its contexts, plain values, events, the passing of files."""

from .contexts import Assignment, CheckContext, ForecastContext, StageContext, Surroundings
from .events import (
    Bounded,
    Event,
    LogLine,
    NodeFinished,
    NodeRetried,
    NodeStarted,
    OneAtATime,
    Progress,
    RankHello,
    Reporter,
    RunFinished,
    RunStarted,
    event_from_json,
)
from .stage import (
    BYTES,
    Bytes,
    Code,
    ContentField,
    File,
    FileOrLiteral,
    Folder,
    Metrics,
    OneOf,
    Params,
    Passing,
    Pinned,
    PinnedFile,
    Planning,
    Port,
    Ranks,
    Size,
    Stage,
    StageResult,
    Tree,
    Written,
    late,
    read_size,
)
from .types import Count, Forecast, Gpu, Json, Launch, Lineage, Machine, Misfit, Status, Text, Trust
