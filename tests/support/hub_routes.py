"""The paths that the Hub answers, each with the name of what answers it in `hub`. The first that matches counts."""

from __future__ import annotations

import re

NAME = r"[^/]+(?:/[^/]+)?"
ROUTES: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("whoami", re.compile(r"/api/whoami-v2")),
    ("create_repo", re.compile(r"/api/repos/create")),
    ("validate_yaml", re.compile(r"/api/validate-yaml")),
    ("lfs_batch", re.compile(rf"/(?P<repo>{NAME})\.git/info/lfs/objects/batch")),
    ("lfs_put", re.compile(r"/lfs/(?P<oid>[0-9a-f]{64})")),
    ("lfs_verify", re.compile(r"/lfs-verify")),
    ("cdn", re.compile(r"/cdn/(?P<oid>[0-9a-f]{64})/(?P<name>.+)")),
    ("resolve", re.compile(rf"/(?P<repo>{NAME})/resolve/(?P<revision>[^/]+)/(?P<name>.+)")),
    ("auth_check", re.compile(rf"/api/models/(?P<repo>{NAME})/auth-check(?P<write>/write)?")),
    ("refs", re.compile(rf"/api/models/(?P<repo>{NAME})/refs")),
    ("info", re.compile(rf"/api/models/(?P<repo>{NAME})/revision/(?P<revision>[^/]+)")),
    ("tree", re.compile(rf"/api/models/(?P<repo>{NAME})/tree/(?P<revision>[^/]+)(?:/(?P<folder>.*))?")),
    ("paths_info", re.compile(rf"/api/models/(?P<repo>{NAME})/paths-info/(?P<revision>[^/]+)")),
    ("preupload", re.compile(rf"/api/models/(?P<repo>{NAME})/preupload/(?P<revision>[^/]+)")),
    ("commit", re.compile(rf"/api/models/(?P<repo>{NAME})/commit/(?P<revision>[^/]+)")),
    ("branch", re.compile(rf"/api/models/(?P<repo>{NAME})/branch/(?P<branch>[^/]+)")),
    ("info", re.compile(rf"/api/models/(?P<repo>{NAME})")),
)
