"""An image of a recipe: what it needs in one layer that changes seldom, the recipe itself in the last
(https://docs.docker.com/reference/dockerfile/).

Texts of the recipe stand only in its last command, as JSON, in which nothing is replaced.
"""

from __future__ import annotations

import json
import re
import shlex

from .argo import USER
from .targets import Target
from .work import Work

TEXT = """\
# Written by `bigpipe export dockerfile`: write it anew with another version of bigpipe, or other kinds of stages.
# Build it where the recipe's path begins; .dockerignore says what stays out. The store is a volume: keep it, and what
# was made once is not made again.
ARG BASE=python:3.12-slim-bookworm
FROM ${{BASE}}

RUN useradd --uid {user} --create-home bigpipe && install --directory --owner={user} /store /work
# The versions that this version of bigpipe is tested with; they come with it.
RUN pip install --no-cache-dir --no-deps {bare}
RUN pip install --no-cache-dir --constraint "$({constraints})" {requirements}

ENV BIGPIPE_HOME=/store/bigpipe HF_HOME=/store/huggingface PYTHONUNBUFFERED=1
VOLUME /store
WORKDIR /work
COPY --chown={user} . .
USER {user}
ENTRYPOINT ["bigpipe"]
CMD {command}
"""
CONSTRAINTS = "python -c 'import bigpipe.versions; print(bigpipe.versions.TESTED)'"


def dockerfile(work: Work) -> str:
    bare = re.sub(r"\[.*\]", "", work.requirements[0])
    command = [*work.run()[1:], *work.given]
    return TEXT.format(
        user=USER,
        bare=shlex.quote(bare),
        requirements=shlex.join(work.requirements),
        constraints=CONSTRAINTS,
        command=json.dumps(command),
    )


TARGET = Target(title="an image", write=dockerfile, machines=True)
