from ood_monitor.cli.console import checked
@checked
def report() -> None:
    """x"""
