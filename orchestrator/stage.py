"""All that a stage kind needs of the engine, in one import: `from bigpipe.orchestrator.stage import Stage, …`."""

from .contract.stage import (
    BigpipeError as BigpipeError,
)
from .contract.stage import (
    CheckContext as CheckContext,
)
from .contract.stage import (
    Code as Code,
)
from .contract.stage import (
    ContentField as ContentField,
)
from .contract.stage import (
    DoesNotFit as DoesNotFit,
)
from .contract.stage import (
    File as File,
)
from .contract.stage import (
    FileOrLiteral as FileOrLiteral,
)
from .contract.stage import (
    Forecast as Forecast,
)
from .contract.stage import (
    ForecastContext as ForecastContext,
)
from .contract.stage import (
    GatedRepository as GatedRepository,
)
from .contract.stage import (
    GateFailed as GateFailed,
)
from .contract.stage import (
    Gpu as Gpu,
)
from .contract.stage import (
    InvalidCheckpoint as InvalidCheckpoint,
)
from .contract.stage import (
    Json as Json,
)
from .contract.stage import (
    Launch as Launch,
)
from .contract.stage import (
    Lineage as Lineage,
)
from .contract.stage import (
    Machine as Machine,
)
from .contract.stage import (
    Metrics as Metrics,
)
from .contract.stage import (
    Misfit as Misfit,
)
from .contract.stage import (
    NotAuthorised as NotAuthorised,
)
from .contract.stage import (
    Offline as Offline,
)
from .contract.stage import (
    Params as Params,
)
from .contract.stage import (
    Pinned as Pinned,
)
from .contract.stage import (
    PinnedFile as PinnedFile,
)
from .contract.stage import (
    Port as Port,
)
from .contract.stage import (
    Size as Size,
)
from .contract.stage import (
    Stage as Stage,
)
from .contract.stage import (
    StageContext as StageContext,
)
from .contract.stage import (
    StageFailed as StageFailed,
)
from .contract.stage import (
    StageResult as StageResult,
)
from .contract.stage import (
    Transient as Transient,
)
from .contract.stage import (
    Tree as Tree,
)
from .contract.stage import (
    Trust as Trust,
)
from .contract.stage import (
    UsageError as UsageError,
)
from .contract.stage import (
    format_size as format_size,
)
from .contract.stage import (
    late as late,
)
from .contract.stage import (
    parse_size as parse_size,
)
