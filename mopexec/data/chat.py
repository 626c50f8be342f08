"""Messages of a chat as text: by the tokenizer's own template, else a plain one."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mopsim.common.errors import MopError


@dataclass(frozen=True)
class Chat:
    """template: Jinja2, as `chat_template` of a tokenizer_config.json, with the special tokens it may use
    (bos_token, eos_token, ...); '' = one line a message, `ROLE: CONTENT`.
    """

    template: str = ""
    specials: tuple[tuple[str, str], ...] = ()

    def parts(self, messages: Any, where: str) -> list[tuple[str, str]]:
        """(role, text) of each message; the texts together are the whole chat. Raises MopError."""
        if not _is_chat(messages):
            raise MopError(f"--data: {where}: 'messages' is not a list of objects with 'role' and 'content'")
        if not self.template:
            return [(m["role"], f"{m['role']}: {m['content']}\n") for m in messages]
        parts, before = [], ""
        for count, message in enumerate(messages, 1):
            text = self._render(messages[:count], where)
            if not text.startswith(before):
                raise MopError(
                    f"--data: {where}: the chat template rewrites earlier messages, so none can be told apart"
                )
            parts.append((message["role"], text[len(before) :]))
            before = text
        return parts

    def _render(self, messages: Sequence[Any], where: str) -> str:
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _refuse
        try:
            template = environment.from_string(self.template)
            return template.render(messages=messages, add_generation_prompt=False, **dict(self.specials))
        except Exception as error:  # a template is a program
            raise MopError(f"--data: {where}: the tokenizer's chat template: {error}") from None


def _refuse(message: str) -> None:
    raise ValueError(message)


def _is_chat(messages: Any) -> bool:
    return (
        isinstance(messages, list)
        and bool(messages)
        and all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
            for m in messages
        )
    )
