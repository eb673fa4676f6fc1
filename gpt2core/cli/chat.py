"""`gpt2core chat`: a conversation in the terminal; the model and what it has read stay between the turns."""

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from gpt2core.cli.command import Command, respell
from gpt2core.cli.console import adapter_option, load, model_options, one_line, options, read_text, write
from gpt2core.cli.sampling_options import text_options, to_fields
from gpt2core.errors import RequestError, did_you_mean, in_short

if TYPE_CHECKING:
    from gpt2core.chat_template import ChatTemplate
    from gpt2core.model import GPT2
    from gpt2core.sampling.params import SamplingParams

HELP = """/reset       forget the conversation
/seed [N]    show the seed of the last answer, or take N for all that follow
/help        this list
/quit        leave; so does the end of the input
//TEXT       say /TEXT
Ctrl-C ends an answer where it is.
"""
COMMANDS = ("/reset", "/seed", "/help", "/quit")
PROMPT = "> "
HISTORY_LINES = 1000


@click.command(
    cls=Command,
    short_help="Talk with a model, turn by turn.",
    examples=(
        "gpt2core chat -m microsoft/DialoGPT-small --chat-template dialogpt",
        "gpt2core chat --chat-template plain -n 40 -s 7",
        'echo "Does money buy happiness?" | gpt2core chat --chat-template plain',
    ),
)
@options(*model_options, adapter_option)
@click.option(
    "--chat-template",
    metavar="FILE|dialogpt|plain",
    help="How messages become a prompt.  [default: the model's, or plain where it has none]",
)
@click.option("--system", metavar="TEXT", help="A message of the role `system` before the first turn.")
@options(*text_options)
@click.pass_context
def chat(
    context: click.Context,
    /,
    *,
    chat_template: str | None,
    system: str | None,
    model: str,
    revision: str | None,
    offline: bool,
    **given: Any,
) -> None:
    """Talk with a model: each line of the input is a message, and the answer is streamed.

    The prompt of a turn is the whole conversation, by the model's chat template. What of it was read in the
    turn before stays in the cache and is not read again. A line that begins with / is a command; /help lists
    them. Lines that were typed at a terminal are kept for the arrow keys, in the user's cache folder.
    """
    from gpt2core.chat_template import ChatTemplate
    from gpt2core.sampling.params import SamplingParams

    names = SamplingParams.__dataclass_fields__
    sampling = {name: given.pop(name) for name in list(given) if name in names}
    params = SamplingParams(**to_fields(sampling))
    find = ChatTemplate.find(chat_template)
    with load(model, revision=revision, offline=offline, max_batch=1, prefix_cache=True, **given) as loaded:
        template = find(loaded.tokenizer)
        if template is None:
            print("gpt2core: this model has no chat template; taking `plain`", file=sys.stderr)
            template = ChatTemplate.find("plain")(loaded.tokenizer)
            assert template is not None
        conversation = Conversation(loaded, template, params, system)
        for line in _lines():
            try:
                if not _obey(conversation, line):
                    return
            except RequestError as error:  # the next turn may do better
                message = respell(str(error), context.command.params)
                print(f"gpt2core: {one_line(message)}", file=sys.stderr)


class Conversation:
    """The messages so far, and the model that answers.

    Args:
        model: holds the conversation in its cache.
        template: how messages become a prompt.
        params: of every answer.
        system: what a message of the role `system` says before the first turn.
    """

    def __init__(
        self, model: "GPT2", template: "ChatTemplate", params: "SamplingParams", system: str | None
    ) -> None:
        self._model = model
        self._template = template
        self._params = params
        self._system = [] if system is None else [{"role": "system", "content": system}]
        self.messages: list[dict[str, str]] = []
        self.seed = params.seed
        self.last_seed = params.seed

    def reset(self) -> None:
        """Forget all messages."""
        self.messages.clear()

    def answer(self, text: str) -> Iterator[str]:
        """What the model says to `text`, piece by piece; leaving early keeps what was said until then.

        Raises:
            RequestError: the template refuses the messages, or they do not fit the context; then `text` was
                not said.
        """
        from dataclasses import replace

        self.last_seed = int.from_bytes(os.urandom(4)) if self.seed is None else self.seed
        params = replace(self._params, seed=self.last_seed, stop=(*self._params.stop, *self._template.stop))
        messages = [*self.messages, {"role": "user", "content": text}]
        ids = self._template.encode(
            [*self._system, *messages],
            self._model.tokenizer,
            context=self._model.config.n_positions,
            add_generation_prompt=True,
        )
        pieces = self._model.stream(ids, params)
        said: list[str] = []
        try:
            for piece in pieces:
                begun = bool(said) and bool("".join(said).strip())
                said.append(piece.text)
                yield piece.text if begun else piece.text.lstrip()
        finally:
            self.messages = [*messages, {"role": "assistant", "content": "".join(said).strip()}]


def _obey(conversation: Conversation, line: str) -> bool:
    """Do what a line says; False when it says to leave."""
    if line.startswith("/") and not line.startswith("//"):
        return _command(conversation, *line.split())
    text = line.removeprefix("/")
    if not text.strip():
        return True
    pieces = conversation.answer(text)
    try:
        for piece in pieces:
            write(piece)
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
        pieces.close()  # type: ignore[attr-defined]  # a generator: what was said is kept
    write("\n")
    return True


def _command(conversation: Conversation, name: str, *values: str) -> bool:
    if name == "/quit":
        return False
    if name == "/help":
        sys.stderr.write(HELP)
    elif name == "/reset":
        conversation.reset()
    elif name == "/seed" and not values:
        print(f"seed {conversation.last_seed}", file=sys.stderr)
    elif name == "/seed":
        from gpt2core.sampling.params import MAX_SEED

        if not (values[0].isdecimal() and int(values[0]) <= MAX_SEED):
            raise RequestError(f"/seed is {in_short(values[0])}; give a whole number from 0 to {MAX_SEED}")
        conversation.seed = conversation.last_seed = int(values[0])
    else:
        near = did_you_mean(name, COMMANDS) or "; /help lists those that there are"
        raise RequestError(f"there is no command {in_short(name)}{near}; //{name[1:]:.20} ... says it")
    return True


def _lines() -> Iterator[str]:
    """The lines of the input; at a terminal with a prompt, editing and the lines of earlier times."""
    if sys.stdin is None:  # started with `<&-`
        raise RequestError("standard input is closed; there is nobody to talk with")
    if not sys.stdin.isatty():
        for line in sys.stdin.buffer:
            yield read_text(io.BytesIO(line), "standard input").rstrip("\r\n")
        return
    print("gpt2core: /help lists the commands", file=sys.stderr)
    with _history():
        while True:
            try:
                yield input(PROMPT)
            except EOFError:
                write("\n")
                return


@contextlib.contextmanager
def _history() -> Iterator[None]:
    """Let `input` edit lines and know those of earlier conversations, where the system can."""
    try:
        import readline
    except ModuleNotFoundError:  # Windows
        yield
        return
    from gpt2core._files import cache_folder

    path = cache_folder("chat") / "history"
    with contextlib.suppress(OSError):  # there is none yet, or it cannot be read: then it is a new one
        readline.read_history_file(path)
    readline.set_history_length(HISTORY_LINES)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # no folder of the user's: lines are known for this time only
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            path.touch(mode=0o600)  # what people say is theirs alone
            readline.write_history_file(path)
