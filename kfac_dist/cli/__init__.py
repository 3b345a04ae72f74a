"""The command line: `kfac-dist init|config|train|launch|submit|status|plan|…`: arguments in, hands over.

A file for the commands of each purpose. Modules that need torch are imported inside of them, so that `--help` and a
refused configuration take no time.
"""

import typer

from kfac_dist.cli.doctor import doctor
from kfac_dist.cli.init import init
from kfac_dist.cli.jobs import status, submit
from kfac_dist.cli.keys import config
from kfac_dist.cli.plan import calibrate, plan
from kfac_dist.cli.report import report
from kfac_dist.cli.train import launch, train
from kfac_dist.cli.versions import show_version

app = typer.Typer(
    name="kfac-dist",
    help="Train PyTorch models with distributed K-FAC.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command()(train)
# Arguments after CONFIG go to the launcher's own script.
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(launch)
for command in (init, config, submit, status, plan, calibrate, doctor, report):
    app.command()(command)
app.command("version")(show_version)


def main() -> None:
    """Run the command line; never returns."""
    app(prog_name="kfac-dist")
