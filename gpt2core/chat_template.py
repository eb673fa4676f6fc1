"""From the messages of a chat to one prompt, by a template in Jinja, as transformers renders it."""

import json
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from gpt2core.errors import BackendUnavailableError, ContextLengthError, RequestError
from gpt2core.tokenizer.tokenizer import Tokenizer

DIALOGPT: Final = "{% for message in messages %}{{ message.content }}{{ eos_token }}{% endfor %}"
PLAIN: Final = (
    "{% for message in messages %}{{ message.role | capitalize }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
BUILT_IN: Final = {"dialogpt": (DIALOGPT, ()), "plain": (PLAIN, ("\nUser:",))}
"""Name -> source, and the strings that end an answer."""


class ChatTemplate:
    """One template.

    Args:
        source: in Jinja, with what transformers gives it: `messages`, `add_generation_prompt`, the names of
            special tokens, `raise_exception`, `strftime_now`, `tojson`, `break`, `continue`, `generation`.
        stop: strings that end an answer.

    Raises:
        RequestError: it is not Jinja.
        BackendUnavailableError: the package jinja2 is missing.
    """

    def __init__(self, source: str, *, stop: tuple[str, ...] = ()) -> None:
        self.stop = stop
        self._template = _compile(source)

    @staticmethod
    def find(given: str | None) -> Callable[[Tokenizer], "ChatTemplate | None"]:
        """What to make the template from, once the tokenizer is known.

        Args:
            given: `dialogpt`, `plain`, or a file; None takes the checkpoint's own.

        Raises:
            RequestError: the file cannot be read, or is not Jinja.
            BackendUnavailableError: the package jinja2 is missing.
        """
        if given is None:
            return lambda tokenizer: None if (own := tokenizer.chat_template) is None else ChatTemplate(own)
        if given in BUILT_IN:
            source, stop = BUILT_IN[given]
            template = ChatTemplate(source, stop=stop)
        else:
            try:
                template = ChatTemplate(Path(given).read_text("utf-8"))
            except (OSError, UnicodeDecodeError) as error:
                names = " or ".join(BUILT_IN)
                raise RequestError(
                    f"the chat template {given!r} cannot be read: {error}; give a file, {names}"
                ) from error
        return lambda tokenizer: template

    def render(
        self, messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer, *, add_generation_prompt: bool
    ) -> str:
        """The prompt.

        Raises:
            RequestError: the template does not take these messages.
        """
        try:
            return self._template.render(
                **tokenizer.special_tokens,
                messages=[dict(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
            )
        except _RefusedError as error:
            message = f"the model's chat template refuses the messages: {error}"
        except Exception:  # of any type: a template is a program
            message = "the model's chat template cannot render the messages; look at their roles and order"
        raise RequestError(message)

    def encode(
        self,
        messages: Sequence[Mapping[str, Any]],
        tokenizer: Tokenizer,
        *,
        context: int | None,
        add_generation_prompt: bool,
    ) -> list[int]:
        """The prompt's token ids: special tokens of the template are tokens, those of a message are text.

        With `context=None` the messages may have any length.

        Raises:
            RequestError: the template does not take these messages.
            ContextLengthError: they have more bytes than the context can hold.
        """
        special = [name for i in sorted(tokenizer.special_ids) if (name := tokenizer.content(i))]
        spelled = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or "(?!)")
        # What a message spells out is hidden from the template's text, and shown again after it is split.
        mark, hidden = f"\ue000{secrets.token_hex(8)}", []  # type: str, list[str]

        def hide(match: re.Match[str]) -> str:
            hidden.append(match[0])
            return f"{mark}{len(hidden) - 1}\ue001"

        safe = [{**one, "content": spelled.sub(hide, one["content"])} for one in messages]
        text = self.render(safe, tokenizer, add_generation_prompt=add_generation_prompt)
        most = None if context is None else context * tokenizer.max_token_bytes
        if most is not None and len(text.encode()) > most:
            raise ContextLengthError(
                f"the messages have {len(text.encode())} bytes; this model's context of {context} tokens "
                f"holds at most {most}; leave the oldest of them out"
            )
        if not text:
            raise RequestError("the messages make an empty prompt; write something")
        if not hidden:
            return tokenizer.encode(text, allow_special=True, begin=False)
        shown = re.compile(f"{mark}(\\d+)\ue001")
        ids: list[int] = []
        for part in re.split(f"({spelled.pattern})", text):
            if spelled.fullmatch(part):
                ids += tokenizer.encode(part, allow_special=True, begin=False)
            elif part:
                own = shown.sub(lambda match: hidden[int(match[1])], part)
                ids += tokenizer.encode(own, begin=False)
        return ids


class _RefusedError(Exception):
    """The template called `raise_exception`."""


def _compile(source: str) -> Any:
    try:
        import jinja2
        from jinja2 import nodes
        from jinja2.ext import Extension, loopcontrols
        from jinja2.parser import Parser
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ModuleNotFoundError as error:
        raise BackendUnavailableError(
            "a chat template needs the package jinja2; install it with: pip install 'gpt2core[chat]'"
        ) from error

    class Generation(Extension):
        """`{% generation %}`, which marks what the assistant said, for training; here it changes nothing."""

        tags: Final = {"generation"}  # type: ignore[misc]  # Jinja's own type

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        raise RequestError(f"the chat template is not Jinja: {error}; mend it") from error


def _raise_exception(message: str) -> None:
    raise _RefusedError(str(message)[:200])


def _to_json(value: Any, **options: Any) -> str:
    return json.dumps(value, **{"ensure_ascii": False, **options})  # not Jinja's own, which escapes HTML
