"""What a shell offers where a recipe, a run, a kind or a model may be named. What cannot be read offers nothing."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bigpipe.errors import BigpipeError, ManifestError
from bigpipe.files import read_file

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from bigpipe.orchestrator.recipe import Recipe

SHELLS = ("bash", "zsh", "fish")
PROGRAM, VARIABLE = "bigpipe", "_BIGPIPE_COMPLETE"
"""What a shell calls, and how click, which then answers with what may come next, knows that it is a shell."""
LARGEST = 1_000_000
"""Bytes of a recipe."""
Offer = Callable[[click.Context, click.Parameter, str], "list[CompletionItem]"]


BASH = r"""
%(complete_func)s() {
    local IFS=$'\n' rest=${COMP_LINE#*"${COMP_WORDS[0]}"} index=0 at word value prefix type
    local words=("${COMP_WORDS[0]}")
    for at in "${!COMP_WORDS[@]}"; do
        (( at == 0 )) && continue
        word=${COMP_WORDS[at]}
        if [[ $rest == [[:space:]]* ]]; then
            rest=${rest#"${rest%%%%[![:space:]]*}"}
            words+=("$word")
        else
            words[${#words[@]}-1]+=$word
        fi
        rest=${rest#"$word"}
        (( at == COMP_CWORD )) && index=$(( ${#words[@]} - 1 ))
    done
    value=${words[index]}
    [[ $value == -*=* ]] && value=${value#*=}
    prefix=${value%%"$2"}
    COMPREPLY=()
    while IFS=',' read -r type value; do
        case $type in
            dir) compopt -o dirnames ;;
            file) compopt -o default ;;
            plain)
                [[ $value == *= ]] && compopt -o nospace
                value=${value#"$prefix"}
                [[ -n $value ]] && COMPREPLY+=("$value") ;;
        esac
    done < <(COMP_WORDS="${words[*]}" COMP_CWORD=$index %(complete_var)s=bash_complete "$1")
}
complete -o nosort -F %(complete_func)s %(prog_name)s
"""
"""click's own script takes a word for several where bash breaks it, at each `=`, `@` and `:` of `$COMP_WORDBREAKS`.
This one puts words together again as they are typed, and of an answer offers what follows the last break: bash
replaces only that (`$2`)."""


def script(shell: str) -> str:
    """Return what makes a shell complete the command: one of `SHELLS`, in its own language."""
    from click.shell_completion import BashComplete, get_completion_class

    class Bash(BashComplete):
        source_template = BASH.lstrip()

    kind = Bash if shell == Bash.name else get_completion_class(shell)
    assert kind is not None  # noqa: S101  one of SHELLS
    return kind(click.Command(PROGRAM), {}, PROGRAM, VARIABLE).source()


def offering(names: Callable[[dict[str, Any]], Iterable[str]], *, files: bool = False) -> Offer:
    """Return what click asks: those of the names that begin as what is written. names: of what is given so far. files:
    where none does, a file or directory may be meant."""

    def offer(context: click.Context, parameter: click.Parameter, written: str) -> list[CompletionItem]:
        from click.shell_completion import CompletionItem

        found: list[str] = []
        with suppress(BigpipeError, OSError, ValueError):
            found.extend(names(context.params))
        given = context.params.get(parameter.name or "")
        taken = given if isinstance(given, tuple) else ()
        fitting = [name for name in dict.fromkeys(found) if name.startswith(written) and name not in taken]
        return [CompletionItem(name) for name in fitting] or ([CompletionItem(written, type="file")] if files else [])

    return offer


def _or_written(given: dict[str, Any], part: str, names: Callable[[Recipe], Iterable[str]]) -> list[str]:
    """The names that a recipe has; where it cannot be read as it is, for lack of a parameter perhaps, those written
    under `part` at its top. While the value of an option is open, click has not come to the manifest."""
    import bigpipe
    from bigpipe import plainyaml

    words = [word for word in os.environ.get("COMP_WORDS", "").split() if word.endswith((".yaml", ".yml"))]
    manifest = given.get("manifest") or next(iter(words), None)
    if manifest is None:
        return []
    try:
        return list(names(bigpipe.load_manifest(manifest)))
    except ManifestError:
        top = plainyaml.load(read_file(Path(manifest), LARGEST))
        written = top.get(part) if isinstance(top, dict) else None
        return [str(name) for name in written] if isinstance(written, dict) else []


def _nodes(given: dict[str, Any]) -> Iterable[str]:
    """Nodes, and the stages that stand for all their variants."""
    for name in _or_written(given, "stages", lambda recipe: recipe.nodes):
        yield name.partition("@")[0]
        yield name


def _parameters(given: dict[str, Any]) -> Iterable[str]:
    return [f"{name}=" for name in _or_written(given, "params", lambda recipe: recipe.params)]


def _runs(given: dict[str, Any]) -> Iterable[str]:
    from bigpipe.orchestrator import report

    return ["last", *reversed(report.run_ids(given.get("store")))]


def _ran(given: dict[str, Any]) -> Iterable[str]:
    """Nodes of a run."""
    from bigpipe.orchestrator import report

    return list(report.show_run(given.get("run") or "last", store=given.get("store")).data["nodes"])


def _removable(given: dict[str, Any]) -> Iterable[str]:
    return [*_ran(given), *_runs(given)]


def _kinds(given: dict[str, Any]) -> Iterable[str]:
    from bigpipe.orchestrator.recipe import stage_kinds

    return stage_kinds()


def _targets(given: dict[str, Any]) -> Iterable[str]:
    from bigpipe.orchestrator.export import TARGETS

    return TARGETS


def _models(given: dict[str, Any]) -> Iterable[str]:
    """Those in the Hub cache."""
    from bigpipe.bigmodel.hub import Hub

    folders = Hub.from_environment().cache.glob("models--*")
    return sorted(folder.name.removeprefix("models--").replace("--", "/") for folder in folders)


NODES, PARAMETERS, RUNS, RAN, KINDS = map(offering, (_nodes, _parameters, _runs, _ran, _kinds))
REMOVABLE, TARGETS = map(offering, (_removable, _targets))
MODELS = offering(_models, files=True)
