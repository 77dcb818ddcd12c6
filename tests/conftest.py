"""What holds for every test: one thread, no hub, and a skipped test is a failure."""

import os

import pytest

# Before torch and transformers are imported; inherited by the processes that tests start.
os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", DS_ACCELERATOR="cpu")


def pytest_sessionfinish(session: pytest.Session) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None:  # one of several processes: the one that started them counts
        return
    skipped = len(reporter.stats.get("skipped", []))
    if skipped:
        reporter.write_line(f"\nskipped: {skipped}; a test that does not run shows nothing", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
