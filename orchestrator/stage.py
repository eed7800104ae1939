"""All that a stage kind needs of the engine, in one import: `from bigpipe.orchestrator.stage import Stage, …`."""

from bigpipe.errors import (
    BigpipeError as BigpipeError,
    DoesNotFit as DoesNotFit,
    GatedRepository as GatedRepository,
    GateFailed as GateFailed,
    InvalidCheckpoint as InvalidCheckpoint,
    NotAuthorised as NotAuthorised,
    Offline as Offline,
    StageFailed as StageFailed,
    Transient as Transient,
    UsageError as UsageError,
)
from bigpipe.sizes import format_size as format_size, parse_size as parse_size

from .contract.contexts import (
    CheckContext as CheckContext,
    ForecastContext as ForecastContext,
    StageContext as StageContext,
    Surroundings as Surroundings,
)
from .contract.forecast import Forecast as Forecast, Misfit as Misfit
from .contract.stage import (
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
from .contract.types import (
    Gpu as Gpu,
    Json as Json,
    Launch as Launch,
    Lineage as Lineage,
    Machine as Machine,
    Trust as Trust,
)
