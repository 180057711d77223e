"""The command line: `ood-monitor --help`.

Results go to stdout, everything else to stderr. Exit codes: 0 done, 1 an error, 2 a wrong use; and
of `watch` and `pool` 3 for WARN and 4 for ALERT.
"""

from ood_monitor.cli import (
    calibrating,
    fitting,
    hub,
    pooling,
    reporting,
    scoring,
    showing,
    watching,
)
from ood_monitor.cli.application import app, help_of

__all__ = ["app"]

for _command in (
    fitting.fit,
    scoring.score,
    watching.watch,
    pooling.pool,
    calibrating.verify,
    calibrating.recalibrate,
    calibrating.accept,
    reporting.report,
    hub.push,
    hub.pull,
    showing.show,
    showing.guide,
    showing.version,
):
    app.command(help=help_of(_command))(_command)
