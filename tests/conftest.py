"""What holds for every test: one thread, no hub, and a skipped test is a failure.

One kind of skip is only reported: a program that the machine lacks ("this machine lacks pdsh"). Where CI is set in the
environment, as .ci/run does, that is a failure too.
"""

import gc
import os
import signal

import pytest

# Before torch and transformers are imported; inherited by the processes that tests start.
os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", DS_ACCELERATOR="cpu")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell ignores it in its background; so would these processes
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files whose tests start other processes come first: a long one that came last would keep one core only."""
    starts = {path: "from distributed import" in path.read_text() for path in {item.path for item in items}}
    items.sort(key=lambda item: not starts[item.path])


def pytest_collection_finish() -> None:
    gc.freeze()  # what is imported stays: each run in this process, which collects garbage, would go through it


def pytest_sessionfinish(session: pytest.Session) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None:  # one of several processes: the one that started them counts
        return
    skipped = reporter.stats.get("skipped", [])
    lacking = [] if os.environ.get("CI") else [report for report in skipped if _lacks_a_program(report)]
    if lacking:
        reporter.write_line(f"\nnot run: {len(lacking)}; the reasons say what this machine lacks", yellow=True)
    if len(skipped) > len(lacking):
        number = len(skipped) - len(lacking)
        reporter.write_line(f"\nskipped: {number}; a test that does not run shows nothing", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _lacks_a_program(report: pytest.TestReport) -> bool:
    return isinstance(report.longrepr, tuple) and report.longrepr[2].startswith("Skipped: this machine lacks ")
