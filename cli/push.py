"""``merge push``: publish a finished folder; and the options of all commands that publish."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from merge import publishing
from merge.publishing import Published, Target
from merge.publishing_folder import push_folder

from .options import json_option, quiet_option, read_with_token, together
from .progress import progress_bar

if TYPE_CHECKING:
    from merge.write.admission import Admission

__all__ = ["open_repo", "print_published", "push_command", "push_options", "split_push", "tell"]

_KEYS = ("branch", "create_pr", "private", "commit_message", "token")
push_options = together(
    click.option("--branch", help="Branch to publish on; made if it is not there. [default: main]"),
    click.option("--create-pr", is_flag=True, help="Propose the model in a pull request."),
    click.option(
        "--private/--no-private",
        default=None,
        help="Whether a repo that is made is private. [default: if an input is gated or private]",
    ),
    click.option("--commit-message", metavar="TEXT", help="First line of the commit."),
    click.option(
        "--token",
        metavar="TOKEN",
        callback=read_with_token,
        help="A token that writes, and reads private models. [default: HF_TOKEN, or the login]",
    ),
)
"""How a model is published."""


def split_push(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A command's options without those that say how it publishes, and these."""
    other = {key: value for key, value in options.items() if key not in _KEYS}
    return other, {key: options[key] for key in _KEYS}


def open_repo(repo: str, how: Mapping[str, Any]) -> Admission:
    """The repo that the options name, after a look whether it may be written to."""
    branch, create_pr, private, message, token = (how[key] for key in _KEYS)
    target = Target(repo, branch or "main", create_pr, private, message, token)
    return publishing.open_target(target)


def tell(quiet: bool) -> Callable[[str], None]:
    """What is told on the way goes to stderr, above a progress bar where there is one."""
    if quiet:
        return lambda _: None
    if not sys.stderr.isatty():
        return lambda text: click.echo(text, err=True)

    def above(text: str) -> None:
        from tqdm import tqdm

        tqdm.write(text, file=sys.stderr)

    return above


@click.command("push", epilog="Example: merge push merged/ me/merged")
@click.argument("out", type=click.Path(path_type=Path))
@click.argument("repo")
@push_options
@click.option("--resume/--fresh", default=True, help="Send what is missing, or all anew.")
@json_option
@quiet_option
def push_command(
    out: Path, repo: str, resume: bool, as_json: bool, quiet: bool, **how: Any
) -> None:
    """Publish the finished folder OUT as REPO (owner/name) on the Hub.

    OUT is checked as by `merge verify`. The model appears in one commit, or, if it has more than 50
    weight files, is complete with the last. After an interruption the same command resumes.
    """
    target = open_repo(repo, how)
    total = sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
    with progress_bar(total, quiet=quiet) as advance:
        done = push_folder(out, target, fresh=not resume, progress=advance, notice=tell(quiet))
    print_published(done, as_json, quiet)


def print_published(
    done: Published, as_json: bool, quiet: bool, also: Mapping[str, object] | None = None
) -> None:
    """What was published: the address on stdout, or all of it as JSON with ``also`` in it."""
    outcome, say = done.outcome, tell(quiet)
    if not outcome.made:
        say("the model was there already, complete and checked")
    else:
        count = len(outcome.sent)
        files = "1 weight file" if count == 1 else f"{count} weight files"
        say(f"{files} sent, commit {outcome.commit[:12]} checked")
    for name in outcome.removed:
        say(f"removed the old {name}")
    if as_json:
        click.echo(json.dumps({**(also or {}), **_json(done)}, indent=2))
    else:
        click.echo(done.url)


def _json(done: Published) -> dict[str, object]:
    outcome = done.outcome
    return {
        "repo": done.target.repo,
        "branch": done.target.branch,
        "url": done.url,
        "commit": outcome.commit,
        "pull_request": outcome.pull,
        "private": done.private,
        "already_complete": not outcome.made,
        "sent": list(outcome.sent),
        "kept": list(outcome.kept),
        "removed": list(outcome.removed),
        "bytes_sent": outcome.bytes_sent,
    }
