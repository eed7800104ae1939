"""The Hugging Face Hub: commits, access, headers by range, verified snapshots, and errors with a cure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bigpipe.faces import face

if TYPE_CHECKING:
    from .access import Login, check_access, faults_of_card, whoami
    from .bringing import Brought, DirectorySource, Expected, HubSource, Source, Watch
    from .connection import OFFICIAL, guard_answers, http_client, uploading
    from .errors import LOGIN, hub_errors
    from .exchange import Exchange, exchanging
    from .remote import Need, answers, describe_pipeline, describe_repository
    from .repository import Hub, Repository, address_of, cached_commit, describe, read_range, resolve_commit
    from .responses import BUSY, COMMIT, NOT_A_HUB, asked_pause, bound_body
    from .selection import ANY, Choice, Library
    from .snapshot import fetch

__getattr__, __all__ = face(__name__)
