"""`flowrl report RUN`: writes the run's page again, for instance after a run that was killed."""

from __future__ import annotations

from pathlib import Path

from flowrl.train.report import make_report


def run(run: Path) -> None:
    """Write RUN/report.html and print its path.

    Raises:
        ConfigError: the folder is not a run's.
    """
    print(make_report(run))
