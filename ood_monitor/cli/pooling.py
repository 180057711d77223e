"""`ood-monitor pool`: one verdict on the streams of several watches of one detector."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from ood_monitor.alerts.alert import Status
from ood_monitor.checks import number, whole
from ood_monitor.cli.console import AsJson, Debug, checked, print_facts
from ood_monitor.cli.state import StateFile
from ood_monitor.cli.watching import EXIT_CODES
from ood_monitor.drift.evidence import checked_ert, pooled_log_e_value
from ood_monitor.monitor.memory import overall

__all__ = ["pool"]


@checked
def pool(
    states: Annotated[
        list[Path], typer.Argument(metavar="STATE...", help="What each `watch --state` writes.")
    ],
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    r"""Tell how several watches of one detector stand together.

    A change that all of them see is found by their common evidence before any of them finds it
    alone. This is the mean of their e-values, and the status is ALERT when it reaches `ert`. A
    watch that is in a drift counts as `ert`. You may run this while the watches go on.

    \b
    Exit codes:
        0  OK
        1  an error
        3  WARN     one of them is not OK
        4  ALERT    their common evidence reaches ert, or all of them have a drift

    \b
    Example:
        ood-monitor pool /shared/states/replica-*.json
    """
    found = [_Replica.read(path) for path in states]
    _check_alike(found)
    evidence = pooled_log_e_value(replica.counted for replica in found)
    status = _status(found, evidence)
    print_facts(_facts(found, evidence, status, as_json=as_json), as_json=as_json)
    raise typer.Exit(EXIT_CODES[status])


@dataclass(frozen=True)
class _Replica:
    """Where one watch stands; ``of`` is what all must have in common."""

    path: Path
    status: Status
    has_drift: bool
    samples_seen: int
    log_e_value: float
    ert: float
    of: tuple[Any, ...]

    @classmethod
    def read(cls, path: Path) -> "_Replica":
        """Of the file of a state.

        Raises:
            ValueError: It is none.
            OSError: It cannot be read.
        """
        try:
            monitor = StateFile.opened(path)["monitor"]
            data, evidence = monitor["drift"]["data"], monitor["log_e_value"]
            if monitor["status"] not in get_args(Status):
                raise ValueError(f"status {monitor['status']!r}")
            return cls(
                path=path,
                status=overall(monitor["status"], blind=monitor["blind"], stale=monitor["stale"]),
                has_drift=monitor["status"] == "ALERT",
                samples_seen=whole("samples_seen", monitor["samples_seen"]),
                log_e_value=-math.inf if evidence is None else number("log_e_value", evidence),
                ert=checked_ert(data["ert"]),
                of=(monitor["model"], data["calibration"], data["ert"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"Expected the state of a watch in {path}, got {error}.") from error

    @property
    def counted(self) -> float:
        """Its evidence in nats; the test has begun anew where an alarm stands."""
        return max(self.log_e_value, math.log(self.ert) if self.has_drift else -math.inf)


def _check_alike(found: Sequence[_Replica]) -> None:
    for replica in found:
        if replica.of != found[0].of:
            raise ValueError(
                "Expected states of one detector and one ert, got others in "
                f"{found[0].path} and {replica.path}."
            )
    files = {(found.st_dev, found.st_ino) for found in (each.path.stat() for each in found)}
    if len(files) < len(found):
        raise ValueError("Expected each state once, got one twice.")


def _status(found: Sequence[_Replica], evidence: float) -> Status:
    # The mean of what are all ert may round to less.
    if evidence >= math.log(found[0].ert) or all(each.has_drift for each in found):
        return "ALERT"
    return "OK" if all(each.status == "OK" for each in found) else "WARN"


def _facts(
    found: Sequence[_Replica], evidence: float, status: Status, *, as_json: bool
) -> Mapping[str, Any]:
    facts = {
        "status": status,
        "log_e_value": evidence if math.isfinite(evidence) else None,
        "alarm_at": math.log(found[0].ert),
        "samples_seen": sum(replica.samples_seen for replica in found),
    }
    if as_json:
        replicas = [
            {
                "state": str(replica.path),
                "status": replica.status,
                "samples_seen": replica.samples_seen,
                "log_e_value": replica.log_e_value if math.isfinite(replica.log_e_value) else None,
            }
            for replica in found
        ]
        return {**facts, "replicas": replicas}
    told = {replica.path.name: f"{replica.status} {replica.samples_seen:,}" for replica in found}
    return facts | told
