"""Measure generation, keep the raw data, draw it.

    from gpt2core.bench import ClassicSettings, run_classic

    result = run_classic(ClassicSettings(model="demo", runs=5), output="my-benchmark")

Importing the package imports nothing else: each name below is loaded when it is first used. All but the
errors need the extra `bench`.
"""

TYPE_CHECKING = False  # type checkers take it for true
if TYPE_CHECKING:
    from gpt2core.bench.components import measure_components as measure_components
    from gpt2core.bench.errors import BenchmarkError as BenchmarkError
    from gpt2core.bench.errors import ServerError as ServerError
    from gpt2core.bench.progress import Progress as Progress
    from gpt2core.bench.report.analysis import analyse as analyse
    from gpt2core.bench.report.page import write_report as write_report
    from gpt2core.bench.store import fingerprint as fingerprint
    from gpt2core.bench.sweep.run import ClassicResult as ClassicResult
    from gpt2core.bench.sweep.run import run_classic as run_classic
    from gpt2core.bench.sweep.summary import Summary as Summary
    from gpt2core.bench.sweep.workload import ClassicSettings as ClassicSettings

_MODULE_OF = {
    "BenchmarkError": "errors",
    "ClassicResult": "sweep.run",
    "ClassicSettings": "sweep.workload",
    "Progress": "progress",
    "ServerError": "errors",
    "Summary": "sweep.summary",
    "analyse": "report.analysis",
    "fingerprint": "store",
    "measure_components": "components",
    "run_classic": "sweep.run",
    "write_report": "report.page",
}
__all__ = list(_MODULE_OF)


def __getattr__(name: str) -> object:
    module = _MODULE_OF.get(name)
    if module is None:
        raise AttributeError(f"module 'gpt2core.bench' has no attribute {name!r}")
    from importlib import import_module

    from gpt2core.bench.errors import ALWAYS, check_installed

    if module != "errors":
        check_installed(*ALWAYS)
    value = globals()[name] = getattr(import_module(f"gpt2core.bench.{module}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
