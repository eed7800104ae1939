"""What would run, why, what it costs and whether it fits: sessions, keys, decisions, forecasts, the machine."""

from typing import TYPE_CHECKING

from bigpipe.faces import face

if TYPE_CHECKING:
    from . import schedule as schedule
    from .decision import Action as Action, change_json as change_json, decide as decide
    from .doctor import doctor_text as doctor_text, examine as examine
    from .keys import (
        ABSENT as ABSENT,
        Change as Change,
        Identity as Identity,
        changed as changed,
        differences as differences,
        shown as shown,
    )
    from .plan import Plan as Plan, PlannedNode as PlannedNode, machine_line as machine_line, make_plan as make_plan
    from .rehearsal import facts_of as facts_of
    from .schedule import (
        GOOD as GOOD,
        SETTLED as SETTLED,
        Do as Do,
        Facts as Facts,
        NodeState as NodeState,
        States as States,
        may_follow as may_follow,
        passes_on as passes_on,
        step as step,
    )
    from .session import Session as Session, exact as exact, open_session as open_session, require_file as require_file
    from .suggestion import with_parameters as with_parameters
else:
    __getattr__ = face(
        __name__,
        decision="Action change_json decide",
        doctor="doctor_text examine",
        keys="ABSENT Change Identity changed differences shown",
        plan="Plan PlannedNode machine_line make_plan",
        rehearsal="facts_of",
        schedule="Do Facts GOOD NodeState SETTLED States may_follow passes_on step",
        session="Session exact open_session require_file",
        suggestion="with_parameters",
    )
