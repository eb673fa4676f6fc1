"""Structured logs: one line of JSON an event, with request ids and without any text of a prompt."""

import json
import logging
import sys
import time
import traceback
from collections.abc import Mapping
from typing import Any, Final

LOGGER: Final = logging.getLogger("gpt2core.serve")
_LEVELS: Final[Mapping[str, int]] = logging.getLevelNamesMapping()


class JsonLines(logging.Formatter):
    """One line of JSON per record; `event` names what happened, its fields stand beside it."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {"time": f"{when}.{int(record.msecs):03}Z", "level": record.levelname.lower()}
        fields = getattr(record, "fields", None)
        if fields is None:  # of uvicorn or asyncio
            line |= {"event": "message", "logger": record.name, "message": record.getMessage()}
        else:
            line |= {"event": record.msg, **fields}
        if record.exc_info and record.exc_info[1] is not None:
            line["error"] = describe_error(record.exc_info[1])
        return json.dumps(line, default=str)


def configure(level: str) -> None:
    """Let the server and uvicorn write JSON lines to stderr, once however often it is called."""
    for name in ("gpt2core.serve", "uvicorn", "uvicorn.error", "asyncio"):
        logger = logging.getLogger(name)
        logger.handlers = []
        logger.propagate = name == "uvicorn.error"  # to "uvicorn", which has the handler
        logger.setLevel(_LEVELS[level.upper()])
        if not logger.propagate:
            handler = logging.StreamHandler(sys.stderr)
            handler.setFormatter(JsonLines())
            logger.addHandler(handler)
    logging.getLogger("uvicorn.access").disabled = True  # the server writes its own line per request


def event(level: str, name: str, **fields: Any) -> None:
    """Write one event."""
    number = _LEVELS[level.upper()]
    if LOGGER.isEnabledFor(number):
        LOGGER.log(number, name, extra={"fields": fields})


def describe_error(error: BaseException) -> str:
    """An error and where it came from, without the values of variables."""
    frames = traceback.extract_tb(error.__traceback__)[-4:]
    where = " < ".join(f"{frame.filename.rpartition('/')[2]}:{frame.lineno}" for frame in reversed(frames))
    cause = f" from {describe_error(error.__cause__)}" if error.__cause__ is not None else ""
    return f"{type(error).__name__}: {error}" + (f" ({where})" if where else "") + cause
