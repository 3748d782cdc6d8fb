"""The ``merge`` command: its subcommands, and the one place where errors become exit codes.

Results go to stdout, progress and hints to stderr. Exit codes: 0 done, 2 usage or recipe, 3 an
input was refused, 4 environment (disk, network), 70 a defect of ours, 130 interrupted.
"""

from __future__ import annotations

import json
import signal
import sys
import tempfile
import traceback
from types import FrameType
from typing import NoReturn

import click

import merge
from merge.errors import MergeError

from .align import align_command
from .apply import apply_command
from .barrier import barrier_command
from .coefficients import coefficients_command
from .diff import diff_command
from .extract import extract_command
from .finish import finish_command
from .fuse import fuse_command
from .inspect import inspect_command
from .interpolate import interpolate_command
from .methods import methods_command, schema_command
from .parting import pleas_command, zip_command
from .plan import plan_command
from .push import push_command
from .regmean import regmean_command
from .search import search_command, soup_command, sweep_command
from .shrink import shrink_command
from .statistics import statistics_command
from .task import task_command
from .verify import verify_command

__all__ = ["cli", "main"]


@click.group(
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Example: merge apply recipe.yml merged/   Learn more: merge COMMAND --help",
)
@click.version_option(merge.__version__, prog_name="hf-merge")
def cli() -> None:
    """Merge model weights: lazily, in bounded memory, whole or not at all."""


for command in (
    apply_command,
    finish_command,
    plan_command,
    inspect_command,
    methods_command,
    schema_command,
    shrink_command,
    verify_command,
    push_command,
    diff_command,
    extract_command,
    soup_command,
    sweep_command,
    search_command,
    coefficients_command,
    task_command,
    align_command,
    fuse_command,
    pleas_command,
    zip_command,
    barrier_command,
    statistics_command,
    regmean_command,
    interpolate_command,
):
    cli.add_command(command)


class _Terminated(BaseException):
    """SIGTERM, raised in the main thread so that locks and partial work are left in order."""


def _terminate(_signal: int, _frame: FrameType | None) -> NoReturn:
    raise _Terminated


def main() -> NoReturn:
    """Run the command line and exit with its code."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        code = cli.main(standalone_mode=False) or 0  # a command's own exit code, if it has one
        sys.stdout.flush()
    except click.exceptions.Exit as stop:
        code = stop.exit_code
    except click.Abort:
        code = _say("interrupted; run the same command again to resume", 130)
    except click.ClickException as error:
        error.show()
        code = 2
    except MergeError as error:
        if "--json" in sys.argv:
            click.echo(json.dumps(error.to_json(), indent=2))
        code = _say(f"error: {error}", error.exit_code)
    except KeyboardInterrupt:
        code = _say("interrupted; run the same command again to resume", 130)
    except _Terminated:
        code = _say("terminated; run the same command again to resume", 143)
    except BrokenPipeError:
        sys.stderr.close()  # nobody reads us any more; say nothing
        code = 1
    except Exception:
        with tempfile.NamedTemporaryFile(
            "w", prefix="hf-merge-", suffix=".txt", delete=False
        ) as file:
            traceback.print_exc(file=file)
        code = _say(f"a defect in hf-merge; please report it with the file {file.name}", 70)
    sys.exit(code)


def _say(text: str, code: int) -> int:
    click.echo(text, err=True)
    return code
