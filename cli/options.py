"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from merge.hub import current, use

__all__ = [
    "data_option",
    "device_option",
    "download_option",
    "dtype_option",
    "json_option",
    "memory_option",
    "pickle_option",
    "plot_option",
    "quiet_option",
    "rank_options",
    "read_with_token",
    "replace_option",
    "score_options",
    "smoke_options",
    "symmetry_options",
    "threads_option",
    "together",
    "token_option",
    "work_options",
]

F = TypeVar("F", bound=Callable[..., Any])


def together(*options: Callable[[F], F]) -> Callable[[F], F]:
    """Options as one decorator, in the order in which ``--help`` lists them."""

    def decorated(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return decorated


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")
quiet_option = click.option(
    "-q", "--quiet", is_flag=True, help="No progress and no notes on stderr."
)

pickle_option = click.option(
    "--allow-pickle",
    is_flag=True,
    help="Read torch's .bin, .pt and .ckpt files too, from those you trust.",
)


def _read_with(**changes: Any) -> None:
    """Models on the Hub are read in this way from now on."""
    use(current().changed(**changes))


def read_with_token(_context: click.Context, _option: click.Parameter, token: str | None) -> Any:
    """The callback of an option that takes a token: models are read with it, too."""
    if token:
        _read_with(token=token)
    return token


token_option = click.option(
    "--token",
    metavar="TOKEN",
    expose_value=False,
    callback=read_with_token,
    help="To read private and gated models. [default: HF_TOKEN, or the login]",
)

data_option = click.option(
    "--data", required=True, help="Files or module:function; see docs/data.md."
)
device_option = click.option(
    "--device", default="cpu", show_default=True, help="cpu, cuda, cuda:N or auto."
)
dtype_option = click.option("--dtype", help="Storage type of the result.")
memory_option = click.option(
    "--memory", metavar="SIZE", help="Bound of the buffers, such as 256MiB."
)
plot_option = click.option(
    "--plot", type=click.Path(path_type=Path), help="A picture: .png, .svg or .pdf."
)
replace_option = click.option(
    "--replace", is_flag=True, help="Replace an output folder that is not empty."
)
threads_option = click.option("--threads", type=int, help="Workers. [default: the cores there are]")

symmetry_options = together(
    click.option(
        "--symmetry",
        type=click.Path(path_type=Path, exists=True, dir_okay=False),
        help="A symmetry spec. [default: that of the model's type]",
    ),
    click.option("--keep", multiple=True, metavar="GROUP", help="A group that stays. Repeatable."),
)
"""What may be exchanged in a network, and what of it stays."""

download_option = click.option(
    "--download",
    is_flag=True,
    expose_value=False,
    callback=lambda _context, _option, wanted: _read_with(download=True) if wanted else None,
    help="Keep the models on the Hub whole in the cache; else only what is needed is read.",
)

work_options = together(
    device_option,
    memory_option,
    threads_option,
    click.option("--dtype", help="Storage type of the result; goes before the recipe's."),
    click.option("--shard-size", default="5GB", show_default=True, help="Largest weight file."),
    click.option("--seed", type=click.IntRange(min=0), help="Of random methods."),
    click.option(
        "--set",
        "settings",
        multiple=True,
        metavar="KEY=VALUE",
        help="Override a recipe value, such as parameters.t=0.3. Repeatable.",
    ),
    click.option(
        "--missing",
        type=click.Choice(["error", "base", "skip"]),
        help="What becomes of tensors that not every model has; goes before the recipe's.",
    ),
    click.option("--lenient", is_flag=True, help="Ignore unknown recipe keys, and list them."),
    pickle_option,
    download_option,
    click.option("--copy-code", is_flag=True, help="Copy the model's own *.py into the output."),
    click.option("--card/--no-card", default=True, help="Write a model card, README.md, or none."),
    click.option(
        "--license",
        "licence",
        metavar="ID",
        help="The result's licence, by its identifier on the Hub. [default: that of all inputs]",
    ),
)
"""What decides what a recipe's plan is."""


score_options = together(
    click.option(
        "--score",
        "command",
        required=True,
        metavar="COMMAND",
        help="Prints the score of the model in the folder {}; its last number counts.",
    ),
    click.option("--minimize", is_flag=True, help="Lower is better, as for a loss."),
    click.option(
        "--scratch",
        type=click.Path(path_type=Path, exists=True, file_okay=False),
        help="Where candidates are written and removed. [default: the temporary folder]",
    ),
)
"""How a candidate is scored."""

smoke_options = together(
    click.option(
        "--smoke",
        is_flag=True,
        help="Load the result in its library and run it once; needs hf-merge[transformers].",
    ),
    click.option(
        "--smoke-against",
        metavar="MODEL",
        type=click.Path(path_type=Path, exists=True, file_okay=False),
        help="Do the same with this folder, such as the base, and show both.",
    ),
)
"""Of the smoke check."""

rank_options = together(
    click.option(
        "--rank",
        type=click.IntRange(min=0),
        help="Compute this machine's share only, to be gathered by `merge finish`."
        " [default: of torchrun, MPI, srun, a job array or the like]",
    ),
    click.option(
        "--world",
        type=click.IntRange(min=1),
        help="How many machines share the work. [default: likewise; 1 means no sharing]",
    ),
)
"""Which machine of how many this is."""
