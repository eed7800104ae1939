"""Chat templates made to hurt, and a stage that lets the library render one, as a rank does."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from pydantic import Field

from bigpipe.bigmodel.sources import Sources
from bigpipe.bigmodel.tasks import Row
from bigpipe.bigmodel.tasks.tokenizing import encode, load_tokenizer
from bigpipe.orchestrator.stage import Forecast, Metrics, Params, Stage, StageContext, StageResult

WALK = "''.__class__.__mro__[1].__subclasses__()"
ESCAPES = (
    f"{{{{ {WALK} }}}}",
    "{{ ''['__class__'] }}",
    "{{ ''|attr('__class__') }}",
    "{{ ''|attr('__cla'~'ss__') }}",
    "{{ ['']|map(attribute='__class__')|list }}",
    "{{ cycler.__init__.__globals__.os.popen('touch canary').read() }}",
    "{{ lipsum.__globals__['os'].popen('touch canary').read() }}",
    "{{ joiner.__init__.__globals__.os.system('touch canary') }}",
    "{{ namespace.__init__.__globals__.os.environ }}",
    "{{ self.__init__.__globals__.__builtins__.open('canary', 'w') }}",
    "{{ self._TemplateReference__context.environment }}",
    "{{ messages.__class__.__base__ }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update({'content': 'x'}) }}",
    "{{ raise_exception.__globals__ }}",
    "{{ raise_exception.__code__ }}",
    "{{ strftime_now.__closure__ }}",
    "{{ strftime_now.__func__ }}",
    "{{ bos_token.__class__ }}",
    "{{ '{0.__class__}'.format('') }}",
    "{{ '{0.__init__.__globals__}'.format(cycler) }}",
    "{{ '%s'.__mod__.__self__.__class__ }}",
    "{{ ''.format_map({}).__class__ }}",
    "{% for k in ().__class__.__base__.__subclasses__() %}{{ k }}{% endfor %}",
    "{% set x = ''.join.__self__.__class__ %}{{ x }}",
    "{% import 'os' as os %}",
    "{% include '/etc/passwd' %}",
    "{% include '../../../etc/passwd' %}",
    "{% extends '/etc/passwd' %}",
    "{% from 'x' import y %}",
    "{{ open('/etc/passwd').read() }}",
    "{{ __import__('os').system('touch canary') }}",
    "{{ eval('1') }}",
    "{{ config }}",
    "{{ request.application.__globals__ }}",
    "{{ undefined_function() }}",
    "{{ raise_exception('\x1b[2J') }}",
    "{{ 1/0 }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "{{ (" * 400 + "1" + ") }}" * 400,
    "{% if" + " (1" * 3000,
    "{{ '\\ud800' }}",
    "{{ 'a' | nonsense }}",
    "{% nonsense %}",
    "{{",
    "",
    " ",
    "{{ range(10**9) | list }}",
    "{{ 'a'.encode('idna').decode('punycode') }}",
)
"""Each ends at once: in an error of its row, or in a harmless text."""
BOMBS = (
    "{{ 10 ** (10 ** 9) }}",
    "{{ ((9 ** 9) ** (9 ** 8)) }}",
    "{{ 'a' * 10 ** 10 }}",
    "{{ ([0] * 10 ** 9) | length }}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
    "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
    "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}",
    "{% set ns = namespace(x={}) %}{% for i in range(99999) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    "{{ 'a'.ljust(10 ** 10) }}",
    "{{ 'a' | center(10 ** 10) }}",
    "{{ '%09999999999d' | format(1) }}",
    "{{ '{:>9999999999}'.format(1) }}",
    "{{ lipsum(10 ** 7) }}",
    "{{ ('a' * 10 ** 8).replace('a', 'a' * 100) }}",
    "{{ range(99999) | list | tojson(indent=10 ** 6) }}",
    "{{ (('a' * 10 ** 5) ~ '!') | wordwrap(1) | wordwrap(1) | length }}{{ 'ab' * 10 ** 9 }}",
    "{{ 'a' * 10 ** 8 }}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(100) }}",
    "{% for x in [1] recursive %}{% if loop.depth < 40 %}{{ loop([1, 1]) }}{% endif %}{% endfor %}",
)
"""Each would take for ever, or all memory: it is stopped by a limit, or by an error of its row."""


class Templates(Params):
    templates: list[str]


class Rendered(Metrics):
    ended: list[str] = Field(default_factory=list)
    """Of each template: `tokens`, or the error that its row would have."""
    shown: list[str] = Field(default_factory=list)
    """What each gave."""


def write(folder: Path, template: str) -> None:
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({**settings, "chat_template": template}))


def render(params: Templates, context: StageContext) -> StageResult:
    model, ended, shown = context.input("model"), [], []
    os.chdir(context.scratch)
    watch = Watch(str(context.scratch))
    for template in params.templates:
        write(model, template)
        try:
            tokenizer = load_tokenizer(model, Sources(), context.bounded)
            watch.on = True
            tokens = encode(tokenizer, [Row(0, [{"role": "user", "content": "hi"}], {})], context.bounded)[0]
            ended.append("tokens")
            shown.append(tokenizer.decode(tokens)[:2000])
        except Exception as error:
            ended.append(type(error).__name__)
            shown.append(f"{error}"[:2000].encode("utf-8", "replace").decode())
        finally:
            watch.on = False
    return StageResult(Rendered(ended=ended, shown=shown))


class Watch:
    """Ends the process where a template opens or starts anything, or writes."""

    def __init__(self, folder: str) -> None:
        self.on = False
        sys.dont_write_bytecode = True  # of what is first imported meanwhile, in a fresh clone
        sys.addaudithook(self.hook)

    def hook(self, event: str, given: tuple[object, ...]) -> None:
        harmful = event in ("os.system", "subprocess.Popen", "os.posix_spawn", "os.exec", "socket.connect", "os.remove")
        written = event == "open" and isinstance(given[1], str) and any(sign in given[1] for sign in "wax+")
        if self.on and (harmful or written):
            os._exit(77)


STAGE = Stage(
    kind="render",
    version=1,
    params=Templates,
    metrics=Rendered,
    inputs={},
    output="text",
    run=render,
    forecast=lambda params, context: Forecast(),
)
