"""What would run, why, what it costs and whether it fits: sessions, keys, decisions, forecasts, the machine."""

from typing import TYPE_CHECKING

from bigpipe.faces import face

if TYPE_CHECKING:
    from . import schedule
    from .decision import Action, change_json, decide
    from .doctor import doctor_text, examine
    from .keys import ABSENT, Change, changed, differences, shown
    from .plan import Plan, PlannedNode, machine_line, make_plan
    from .rehearsal import facts_of
    from .schedule import GOOD, SETTLED, Do, Facts, NodeState, States, may_follow, passes_on, step
    from .session import Session, exact, open_session
    from .suggestion import with_parameters

__getattr__, __all__ = face(__name__)
