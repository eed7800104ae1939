"""What would run, why, what it costs and whether it fits: sessions, keys, decisions, forecasts, the machine."""

from typing import TYPE_CHECKING

from bigpipe.faces import face

if TYPE_CHECKING:
    from . import fallback, schedule
    from .beside import examined
    from .content import content_paths, gathered_files, named_code
    from .decision import Action, Decision, GateVerdict, decide, difference_json, difference_text
    from .doctor import doctor_text, examine, unsound
    from .effects import clash_with
    from .explaining import explain
    from .keys import ABSENT, Difference, changed, differences, shown
    from .misfits import takes_any_gpus
    from .plan import Plan, PlannedNode, machine_line, make_plan, plan_rows, plan_text, totals
    from .schedule import Do, Step, may_follow, passes_on, step
    from .session import Session, lock_path, node_folder, open_session
    from .sharing import Fetch, find_claim, shares
    from .smoke import Smoke, smaller
    from .states import GOOD, SETTLED, NodeState, States, judge_gates
    from .suggestion import with_parameters

__getattr__, __all__ = face(__name__)
