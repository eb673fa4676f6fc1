"""`gpt2core generate`: a prompt in, the prompt and what follows it out."""

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gpt2core._machine import peak_memory_nbytes
from gpt2core.cli.command import Command
from gpt2core.cli.console import (
    adapter_option,
    finite,
    format_nbytes,
    json_option,
    load,
    model_options,
    options,
    read_stdin,
    speculation_options,
    table_lines,
    write,
    write_json,
)
from gpt2core.cli.sampling_options import sampling_options, to_fields
from gpt2core.errors import RequestError

if TYPE_CHECKING:
    from gpt2core.cli.prompt_file import Given
    from gpt2core.model import GPT2, Generation
    from gpt2core.sampling.draw import SamplingParams, TokenLogprob

PROMPT_LIMIT_NBYTES = 2**20  # several times what the longest tokens could fit into any GPT-2's context


@dataclass(frozen=True, slots=True)
class Speed:
    """How fast a run wrote."""

    new_tokens: int
    ttft_s: float | None  # until the first token, from the moment when the model was ready
    decode_s: float | None  # from the first token to the last


@click.command(
    cls=Command,
    short_help="Continue a text.",
    examples=(
        'gpt2core generate "Once upon a time" -t 0.8 -s 7',
        'gpt2core generate "Once upon a time" "The king said" -n 20 --json',
        "gpt2core generate 'The king was' --choice ' happy' --choice ' sad'",
        'echo "The king said" | gpt2core generate - --no-prompt',
        "gpt2core generate --prompts prompts.jsonl -m openai-community/gpt2 -b torch",
    ),
)
@click.argument("prompts", metavar="[PROMPT]...", nargs=-1)
@click.option(
    "--prompts",
    "prompt_file",
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Further prompts: one a line; in FILE.jsonl a line is a JSON string, token ids, or an object with "
    '"prompt".',
)
@options(*model_options, *speculation_options, *sampling_options)
@options(adapter_option)
@click.option(
    "--echo/--no-prompt",
    "echo",
    default=None,
    help="Whether the prompt comes before its text.  [default: not with --json]",
)
@click.option("--strict", is_flag=True, help="Refuse a config.json with fields that are not known.")
@click.option("--allow-special", is_flag=True, help="Read <|endoftext|> in the prompt as the special token.")
@click.option("--no-stream", is_flag=True, help="Print the text once it is complete.")
@click.option("--stats", is_flag=True, help="Report speed and memory on stderr.")
@json_option
def generate(
    prompts: tuple[str, ...],
    *,
    prompt_file: Path | None,
    model: str,
    revision: str | None,
    offline: bool,
    backend: str,
    precision: str,
    device: str,
    threads: int | None,
    speculation: str,
    draft_model: str | None,
    adapter: str | None,
    echo: bool | None,
    strict: bool,
    allow_special: bool,
    no_stream: bool,
    stats: bool,
    as_json: bool,
    **sampling: Any,
) -> None:
    """Continue PROMPT: print it and, as it is written, what follows it. Several prompts run as one batch.

    `-`, or no PROMPT where stdin is not a terminal, reads the prompt from stdin; one line break at its end
    is left out. With --json nothing is streamed, and each text is what was generated, without the prompt.
    """
    from gpt2core.sampling.draw import SamplingParams

    if sampling["seed"] is None:
        sampling["seed"] = int.from_bytes(os.urandom(4))  # drawn here so that --stats can tell it
    texts = _prompts(prompts, prompt_file)
    echo = not as_json if echo is None else echo
    # `echo` is the library's where it gives what is printed; text from the command line is printed as it is.
    params = SamplingParams(**to_fields(sampling), echo=as_json and echo)
    start_s = time.perf_counter()
    with load(
        model,
        revision=revision,
        offline=offline,
        backend=backend,
        precision=precision,
        device=device,
        threads=threads,
        speculation=speculation,
        draft_model=draft_model,
        adapter=adapter,
        strict=strict,
    ) as loaded:
        load_s = time.perf_counter() - start_s
        if as_json or no_stream or params.n > 1 or params.num_beams > 1 or len(texts) > 1:
            # One prompt alone is named without its place in a list.
            given = texts if len(texts) > 1 else texts[0]
            got = loaded.generate(given, params, allow_special=allow_special)
            result = got if isinstance(got, list) else [got]
            speed = _measure_speed(result)
            if as_json:
                head = {
                    "model": model,
                    "backend": loaded.backend.name,
                    "precision": getattr(loaded.backend, "precision", "float32"),
                }
                write_json(head | _to_results(texts, result, params.n) | {"load_s": load_s})
            else:
                shown = [_as_text(text, loaded) if echo else "" for text in texts]
                _write_whole(shown, result, params.n)
            logprobs = [entry for generation in result for entry in generation.logprobs or ()]
            truncated = [generation.truncated_tokens for generation in result[:: params.n]]
        else:
            speed, logprobs, left_out = _write_stream(loaded, texts[0], params, allow_special, echo=echo)
            truncated = [left_out]
        _report_truncated(truncated, params.overflow)
        if logprobs and not as_json:
            _report_logprobs(loaded, logprobs)
        if stats:
            speculates = speculation != "off" or draft_model is not None
            count = len(texts) * params.n
            _report(loaded, sampling["seed"], count, speed, load_s, speculates=speculates)


def _prompts(arguments: tuple[str, ...], file: Path | None) -> "list[Given]":
    """What is to be continued.

    Raises:
        RequestError: it cannot be read, or there is nothing.
    """
    if not arguments and file is None:
        if sys.stdin is not None and sys.stdin.isatty():
            raise click.UsageError("no prompt; give a PROMPT, or - to read it from stdin")
        arguments = ("-",)
    prompts: list[Given] = [_prompt(argument) for argument in arguments]
    if file is not None:
        from gpt2core.cli.prompt_file import read_prompt_file

        prompts += read_prompt_file(file)
    return prompts


def _prompt(argument: str) -> str:
    if argument == "-":
        text = read_stdin(PROMPT_LIMIT_NBYTES)
        return text.removesuffix("\r\n") if text.endswith("\r\n") else text.removesuffix("\n")
    try:
        argument.encode()
    except UnicodeEncodeError as error:  # what the shell passes on as it is, Python reads as a lone surrogate
        raise RequestError(
            f"PROMPT is not UTF-8 at character {error.start}; convert it, or check the locale"
        ) from error
    return argument


def _as_text(prompt: "Given", loaded: "GPT2") -> str:
    return prompt if isinstance(prompt, str) else loaded.tokenizer.decode(prompt)


def _write_stream(
    loaded: "GPT2", prompt: "Given", params: "SamplingParams", allow_special: bool, *, echo: bool
) -> "tuple[Speed, list[TokenLogprob], int]":
    """What it took, and how many of the prompt's tokens were left out."""
    start_s = time.perf_counter()
    pieces = loaded.stream(prompt, params, allow_special=allow_special)
    if echo:
        write(_as_text(prompt, loaded))
    times_s = []
    logprobs: list[TokenLogprob] = []
    truncated_tokens = 0
    for piece in pieces:
        truncated_tokens = piece.truncated_tokens
        if piece.token_id is not None:
            times_s.append(time.perf_counter() - start_s)
        logprobs += piece.logprobs
        write(piece.text)
    write("\n")
    if not times_s:
        return Speed(0, None, None), logprobs, truncated_tokens
    speed = Speed(len(times_s), times_s[0], times_s[-1] - times_s[0])
    return speed, logprobs, truncated_tokens


def _write_whole(prompts: list[str], generations: "list[Generation]", n: int) -> None:
    """Each text; where there are several, each below a line that says which of how many it is."""
    for i, generation in enumerate(generations):
        place = [f"{i // n + 1} of {len(prompts)}"] if len(prompts) > 1 else []
        if n > 1:
            place.append(f"{i % n + 1} of {n}")
        if place:
            write(f"--- {', '.join(place)} ---\n")
        write(f"{prompts[i // n]}{generation.text}\n")


def _to_results(prompts: "list[Given]", generations: "list[Generation]", n: int) -> dict[str, Any]:
    """Of one prompt its generations; of several one such object each."""
    results = [
        {"prompt": prompt, "generations": [_to_document(one) for one in generations[i * n : (i + 1) * n]]}
        for i, prompt in enumerate(prompts)
    ]
    return results[0] if len(results) == 1 else {"results": results}


def _report_logprobs(loaded: "GPT2", logprobs: "list[TokenLogprob]") -> None:
    """On stderr, each token with its log probability and the likeliest ones."""

    def shown(token_id: int) -> str:
        return ascii(loaded.tokenizer.token_text(token_id))

    rows = [("logprob", "token", "likeliest" if any(entry.top for entry in logprobs) else "")]
    for entry in logprobs:
        top = "  ".join(f"{shown(token_id)} {logprob:.4f}" for token_id, logprob in entry.top)
        value = "-" if entry.logprob is None else f"{entry.logprob:.4f}"
        rows.append((value, shown(entry.token_id), top))
    print(*table_lines(rows), sep="\n", file=sys.stderr)


def _report_truncated(truncated: list[int], overflow: str) -> None:
    """On stderr, what was left out of each prompt."""
    for number, tokens in enumerate(truncated, 1):
        if tokens:
            which = f"prompt {number}" if len(truncated) > 1 else "the prompt"
            what = f"{which}: its first {tokens} tokens were left out (--overflow {overflow})"
            print(what, file=sys.stderr)


def _measure_speed(generations: "list[Generation]") -> Speed:
    """Of a batch: all its tokens, the first of them, and the time after it."""
    new_tokens = sum(len(generation.token_ids) for generation in generations)
    timings = [generation.timing for generation in generations]
    firsts_s = [timing.ttft_s for timing in timings if timing.ttft_s is not None]
    if not firsts_s:
        return Speed(0, None, None)
    return Speed(new_tokens, min(firsts_s), max(timing.elapsed_s for timing in timings) - min(firsts_s))


def _to_document(generation: "Generation") -> dict[str, Any]:
    logprobs = generation.logprobs
    return {
        "text": generation.text,
        "token_ids": generation.token_ids,
        "finish_reason": generation.finish_reason,
        "prompt_tokens": generation.prompt_tokens,
        "truncated_tokens": generation.truncated_tokens,
        "seed": generation.seed,
        "choice": generation.choice,
        "score": generation.score,
        "logprobs": None if logprobs is None else [_to_entry(entry) for entry in logprobs],
        "timing": {
            "ttft_s": generation.timing.ttft_s,
            "elapsed_s": generation.timing.elapsed_s,
            "tokens_per_s": generation.timing.tokens_per_s,
            "proposed_tokens": generation.timing.proposed_tokens,
            "accepted_tokens": generation.timing.accepted_tokens,
        },
    }


def _to_entry(entry: "TokenLogprob") -> dict[str, Any]:
    top = [{"id": token_id, "logprob": finite(logprob)} for token_id, logprob in entry.top]
    return {"id": entry.token_id, "logprob": finite(entry.logprob), "top": top}


def _report(loaded: "GPT2", seed: int, texts: int, speed: Speed, load_s: float, *, speculates: bool) -> None:
    later = speed.new_tokens - texts  # what came after each text's first token
    rate = (
        f"{later / speed.decode_s:.1f} tok/s after it" if speed.decode_s and later > 0 else "no further token"
    )
    peak_nbytes = peak_memory_nbytes()
    lines = [
        f"backend       {loaded.backend.name}",
        f"seed          {seed}",
        f"load          {load_s:.3f} s",
        f"tokens        {speed.new_tokens}",
        "first token   " + ("none" if speed.ttft_s is None else f"{speed.ttft_s:.3f} s, {rate}"),
        "peak memory   " + ("unknown" if peak_nbytes is None else format_nbytes(peak_nbytes)),
    ]
    if speculates:
        proposed, accepted = loaded.speculated
        share = f" ({accepted / proposed:.0%})" if proposed else ""
        lines.insert(5, f"speculation   {accepted} of {proposed} proposed tokens accepted{share}")
    print(*lines, sep="\n", file=sys.stderr)
