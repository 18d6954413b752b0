"""Chats to prompts: the Jinja template that came with a model, run where it can do no harm."""

from __future__ import annotations

import datetime
import json
from typing import Any

from .extra import need


def render_chat(
    template: str | None,
    messages: Any,
    add_generation_prompt: bool = False,
    bos_token: str | None = None,
    eos_token: str | None = None,
) -> str:
    """The text that a chat template makes of messages, in Jinja's immutable sandbox: see `apply_chat_template`."""
    need("jinja2", "a chat template")
    from jinja2 import TemplateError
    from jinja2.exceptions import SecurityError

    if template is None:
        raise ValueError("chat_template: this tokenizer has none; write the prompt as text and use encode()")
    _check_messages(messages)
    environment = _sandbox()
    try:
        return environment.from_string(template).render(
            messages=messages,
            add_generation_prompt=add_generation_prompt,
            bos_token=bos_token or "",
            eos_token=eos_token or "",
        )
    except SecurityError as error:
        raise ValueError(f"chat_template: it reaches for what the sandbox forbids ({error}); do not use it") from error
    except (TemplateError, TypeError, AttributeError, KeyError, ValueError, OverflowError, ArithmeticError) as error:
        raise ValueError(f"chat_template: {type(error).__name__}: {error}") from error


def _sandbox() -> Any:
    """Jinja without assignments to what it is given and without Python's internals, as transformers sets it up."""
    from jinja2.exceptions import SecurityError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Sandbox(ImmutableSandboxedEnvironment):
        def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
            """Jinja would go on with an empty text where nothing is done with what was reached for."""
            raise SecurityError(f"attribute {attribute!r} of {type(obj).__name__}")

    sandbox = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    sandbox.filters["tojson"] = lambda x, indent=None: json.dumps(x, ensure_ascii=False, indent=indent)
    sandbox.globals["raise_exception"] = _raise
    sandbox.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return sandbox


def _raise(message: str) -> None:
    """What templates call when they do not accept a chat."""
    from jinja2 import TemplateError

    raise TemplateError(message)


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, list | tuple) or not messages:
        raise ValueError('messages: a list of {"role": …, "content": …} is accepted, with one at least')
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise ValueError(f'messages[{i}]: got {message!r}; {{"role": text, "content": text}} is accepted')
