"""A run that reads from a data service which runs already: its own processes, kept up when the run is over."""

from pathlib import Path

import pytest

from cluster.config import load_config
from data_service.prepare import prepare
from tests.helpers.data_runs import TOKEN, control_process, worker_process
from tests.helpers.runs import RunProcess, running, step_records, write_run

TRAIN = "  parallel: {dp: 1, pp: 1}\n  steps: 6\n  eval: {every: 1000, max_batches: 2}\n  checkpoint: {every: 3}\n"
TOKEN_VARIABLE = "STORMJIB_DATA_TOKEN"


@pytest.mark.timeout(240)
def test_a_run_reads_from_a_service_that_runs_already(tmp_path: Path) -> None:
    file = write_run(tmp_path, slots=1, train=TRAIN)
    config = load_config(file)
    prepare(config.data, config.dataset_uri)
    with (
        control_process(config.dataset_uri) as (control, address),
        worker_process(config.dataset_uri, address) as (worker, _),
    ):
        override = f"data.service.address=['{address}']"
        refused(file, override, "")
        refused(file, override, "x" * 20)
        with running("train", file, override, env={TOKEN_VARIABLE: TOKEN}) as run:
            assert run.wait() == 0, run.output[-4000:]
            assert len(step_records(run.folder)) == 6
            (ready,) = run.events("data_service_ready")
            assert (ready["workers"], ready["control"]) == ([], [address])
        assert (control.poll(), worker.poll()) == (None, None), "the run ended a service that is not its own"


def refused(file: Path, override: str, token: str) -> None:
    """A run with this token, none or another, ends with a message that names the variable and shows no token."""
    run = RunProcess("train", file, [override], env={TOKEN_VARIABLE: token})
    try:
        code = run.wait(120)
        output = run.output
        assert code == 2, output
        assert TOKEN_VARIABLE in output, output
        assert "data.service.address" in output
        assert "Traceback" not in output, output
        assert TOKEN not in output
        assert not run.events("attempt_started")
    finally:
        run.end()
