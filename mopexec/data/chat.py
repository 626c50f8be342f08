"""Messages of a chat as text: by the tokenizer's template as transformers renders it, else by a plain one."""

import json
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mopsim.common.errors import MopError, shown

Interval = tuple[int, int]
"""First character, and the first one behind."""

PLAIN = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
_OPEN, _CLOSE, _MARK = "\ufdd0", "\ufdd1", "\ufdd2"  # Unicode's noncharacters: no text has them
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Chat:
    """template: Jinja2, as `chat_template` of a tokenizer_config.json, with the special tokens it may use
    (bos_token, eos_token, ...).
    """

    template: str = PLAIN
    specials: tuple[tuple[str, str], ...] = ()

    def read(
        self, messages: Any, where: str, *, answers: bool = True
    ) -> tuple[str, tuple[Interval, ...] | None]:
        """The whole chat and what the assistant writes of it, None where `answers` are not asked for: what
        stands in {% generation %}; in a template without, each message of role "assistant" from the end of
        its generation prompt on (where the template has none, its content), with its end marker. Without a
        marker the end of the document, one character behind the text, is the last one's. Raises MopError
        where the template does not show where one is.
        """
        said = _said(messages, where)
        whole = self._render(said, where)
        text = re.sub(f"[{_OPEN}{_CLOSE}]", "", whole)
        if not answers:
            return text, None
        if _GENERATION.search(self.template):
            return text, _between(whole)
        places = [place for place, message in enumerate(said) if message["role"] == "assistant"]
        return text, tuple(self._answer(said, place, whole, where) for place in places)

    def _answer(self, messages: Sequence[Any], place: int, whole: str, where: str) -> Interval:
        """Of message `place`: found by another content there, before and behind which all is the same; where
        the template writes its tool calls alone, by what there is with and without the message."""
        marked = [*messages[:place], messages[place] | {"content": _MARK}, *messages[place + 1 :]]
        before, *behind = self._render(marked, where).split(_MARK)
        prompt = before
        with suppress(MopError):  # of a template that asks for a message before the assistant's
            prompt = self._render(messages[:place], where, add_generation_prompt=True)
        if "add_generation_prompt" not in self.template and before[len(prompt) :].strip():
            prompt = before
        start = len(prompt) if whole.startswith(prompt) else len(before)
        if not behind and "tool_calls" in messages[place]:
            upto = self._render(messages[: place + 1], where).rstrip()
            if whole.startswith(upto) and upto.startswith(prompt) and len(prompt) < len(upto):
                return len(prompt), len(upto)
        if len(behind) != 1 or not whole.endswith(behind[0]) or not whole.startswith((prompt, before)):
            raise MopError(
                f"--data: {where}: the chat template does not show where message {place + 1} is; "
                "{% generation %} in it would, or --loss-mask all"
            )
        stop = len(whole) - len(behind[0])
        tail = self._render(marked[: place + 1], where).partition(_MARK)[2]
        if not tail.strip() and place == len(messages) - 1:
            return start, len(whole) + 1
        marker = tail.rstrip() or tail
        return start, stop + len(marker) * behind[0].startswith(marker)

    def _render(self, messages: Sequence[Any], where: str, *, add_generation_prompt: bool = False) -> str:
        given = {"messages": messages, "tools": None, "documents": None, **dict(self.specials)}
        try:
            return _compiled(self.template).render(add_generation_prompt=add_generation_prompt, **given)
        except Exception as error:  # a template is a program
            raise MopError(f"--data: {where}: the tokenizer's chat template: {error}") from None


@lru_cache(maxsize=4)
def _compiled(template: str) -> jinja2.Template:
    """With what transformers gives templates. Raises jinja2's errors."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _refuse, "strftime_now": _today}
    return environment.from_string(template)


class _Generation(Extension):
    """`{% generation %}`: what stands in it lies between _OPEN and _CLOSE."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_enclosed"), [], [], body).set_lineno(line)

    def _enclosed(self, caller: Callable[[], str]) -> str:
        return f"{_OPEN}{caller()}{_CLOSE}"


def _between(text: str) -> tuple[Interval, ...]:
    """What lies between _OPEN and _CLOSE, in the text without these."""
    found, place, start = [], 0, 0
    for part in re.split(f"([{_OPEN}{_CLOSE}])", text):
        if part == _OPEN:
            start = place
        elif part == _CLOSE:
            found.append((start, place))
        else:
            place += len(part)
    return tuple(found)


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _today(form: str) -> str:
    return datetime.now().strftime(form)


def _refuse(message: str) -> None:
    raise ValueError(message)


def _said(messages: Any, where: str) -> list[dict[str, Any]]:
    """The messages as templates take them: parts of text as one text, without what they leave open (null).
    The content of a message that calls tools may be null. Raises MopError."""
    if not isinstance(messages, list) or not messages:
        raise MopError(f"--data: {where}: 'messages' is not a list of messages")
    found = [_message(message, f"--data: {where}: message {n}") for n, message in enumerate(messages, 1)]
    if any(mark in (message.get("content") or "") for message in found for mark in (_OPEN, _CLOSE, _MARK)):
        raise MopError(f"--data: {where}: U+FDD0, U+FDD1 or U+FDD2 is in it, which are no characters")
    return found


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise MopError(f"{where} is not an object with 'role' and 'content'")
    said = {name: value for name, value in message.items() if value is not None}
    content = said.get("content")
    if content is None and said.get("tool_calls"):
        return said | ({"content": None} if "content" in message else {})
    if isinstance(content, list):
        for part in content:
            if not (
                isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
            ):
                raise MopError(f"{where}: its content has {shown(part)}, only parts of text are trained on")
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise MopError(f"{where}: content: {shown(content)} is no text, nor parts of text")
    return said | {"content": content}
