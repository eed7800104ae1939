"""What a stage kind and the engine agree on: `Stage` and its contexts, plain values, events, the passing of files."""

from .contexts import (
    Assignment as Assignment,
    CheckContext as CheckContext,
    ForecastContext as ForecastContext,
    StageContext as StageContext,
    Surroundings as Surroundings,
)
from .events import (
    Event as Event,
    LogLine as LogLine,
    NodeFinished as NodeFinished,
    NodeRetried as NodeRetried,
    NodeStarted as NodeStarted,
    OneAtATime as OneAtATime,
    Progress as Progress,
    RankHello as RankHello,
    Reporter as Reporter,
    RunFinished as RunFinished,
    RunStarted as RunStarted,
    event_from_json as event_from_json,
)
from .forecast import Forecast as Forecast, Misfit as Misfit
from .stage import (
    Code as Code,
    ContentField as ContentField,
    File as File,
    FileOrLiteral as FileOrLiteral,
    Metrics as Metrics,
    OneOf as OneOf,
    Params as Params,
    Passing as Passing,
    Pinned as Pinned,
    PinnedFile as PinnedFile,
    Planning as Planning,
    Port as Port,
    Ranks as Ranks,
    Size as Size,
    Stage as Stage,
    StageResult as StageResult,
    Tree as Tree,
    late as late,
)
from .types import (
    Gpu as Gpu,
    Json as Json,
    Launch as Launch,
    Lineage as Lineage,
    Machine as Machine,
    Resources as Resources,
    Status as Status,
    Trust as Trust,
)
